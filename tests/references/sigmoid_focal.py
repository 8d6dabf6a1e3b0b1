"""Mean over all logits of BCE * (1 - p_t) ** gamma * alpha_t."""

import math


def loss(logits, targets, *, gamma=2.0, alpha=0.25):
    terms = []
    for row, labels in zip(logits, targets, strict=True):
        for x, y in zip(row, labels, strict=True):
            p = 1.0 / (1.0 + math.exp(-x))
            p_t = p if y == 1 else 1.0 - p
            side = 1.0 if alpha is None else (alpha if y == 1 else 1.0 - alpha)
            terms.append(-side * (1.0 - p_t) ** gamma * math.log(p_t))
    return sum(terms) / len(terms)
