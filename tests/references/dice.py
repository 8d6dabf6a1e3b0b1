"""1 - (2 I + s) / (P + T + s') per class and set, averaged."""

from references import overlap


def loss(
    logits, target, *, activation="softmax", over="sample", square=False, smooth_nr=1e-5, smooth_dr=1e-5,
    class_weight=None, include_background=True, empty="skip",
):  # fmt: skip
    rows = overlap.terms(
        overlap.elements(logits, target, activation), over=over, alpha=0.5, beta=0.5, square=square,
        above=smooth_nr / 2, below=smooth_dr / 2, include_background=include_background, empty=empty,
    )  # fmt: skip
    return overlap.mean(rows, lambda c, value: value * (1.0 if class_weight is None else class_weight[c]))
