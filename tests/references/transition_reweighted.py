"""Cross-entropy weighed by f_y / (T^t f)_y, weights summing to 1."""

import math

from references.transition import softmax


def loss(logits, labels, *, transition):
    above = below = 0.0
    for row, label in zip(logits, labels, strict=True):
        f = softmax(row)
        weight = f[label] / sum(f[k] * transition[k][label] for k in range(len(f)))
        above += weight * -math.log(f[label])
        below += weight
    return above / below
