"""1 - sum_c f_c (2 I_c + s) / sum_c f_c (P_c + T_c + s') per set, with f_c = T_c ** -power; averaged over sets."""

from references import overlap


def loss(
    logits, target, *, power=2.0, activation="softmax", over="sample", square=False, smooth_nr=1e-5, smooth_dr=1e-5,
    include_background=True, empty="keep",
):  # fmt: skip
    total = count = 0.0
    for pairs in overlap.sets(overlap.elements(logits, target, activation), over):
        classes = range(0 if include_background else 1, len(pairs[0][0]))
        parts = [overlap.volumes(pairs, c, square) for c in classes]
        largest = max((t**-power for _, _, t in parts if t > 0), default=1.0)
        above = below = 0.0
        for common, predicted, present in parts:
            if present == 0.0 and empty == "skip":
                continue
            factor = present**-power if present > 0 else largest
            above += factor * (2 * common + smooth_nr)
            below += factor * (predicted + present + smooth_dr)
        total, count = total + 1 - above / below, count + 1
    return total / count
