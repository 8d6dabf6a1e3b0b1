"""(1 - TI) ** gamma per class and set, averaged."""

from references import overlap


def loss(
    logits, target, *, alpha=0.3, beta=0.7, gamma=1.0, activation="softmax", over="sample", square=False,
    smooth_nr=1e-5, smooth_dr=1e-5, class_weight=None, include_background=True, empty="skip",
):  # fmt: skip
    rows = overlap.terms(
        overlap.elements(logits, target, activation), over=over, alpha=alpha, beta=beta, square=square,
        above=smooth_nr, below=smooth_dr, include_background=include_background, empty=empty,
    )  # fmt: skip
    return overlap.mean(rows, lambda c, value: value**gamma * (1.0 if class_weight is None else class_weight[c]))
