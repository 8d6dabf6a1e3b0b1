"""Bisection for the threshold above which weights grow linearly, until the distance is the radius."""

from references.focal import softmax_focal


def worst(losses, rho):
    n = len(losses)
    if rho == 0.0:
        return [1.0] * n

    def shape(edge):
        over = [max(value - edge, 0.0) for value in losses]
        return [n * value / sum(over) for value in over]

    def distance(edge):
        return sum((w - 1.0) ** 2 for w in shape(edge)) / (2 * n)

    high = max(losses) - 1e-13 * (max(losses) - min(losses))
    if distance(high) <= rho:
        ties = [value == max(losses) for value in losses]
        return [n / sum(ties) if tie else 0.0 for tie in ties]
    low = min(losses) - 1.0
    while distance(low) > rho:
        low -= 2.0 * (max(losses) - low)
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if distance(middle) <= rho else (low, middle)
    return shape(low)


def weights(batches, *, rho=1.0):
    return [worst([row["loss"] for row in rows], rho) for rows in batches]


def loss(logits, labels, *, rho=1.0):
    terms = [softmax_focal(row, label, 0.0) for row, label in zip(logits, labels, strict=True)]
    return sum(w * term for w, term in zip(worst(terms, rho), terms, strict=True)) / len(terms)
