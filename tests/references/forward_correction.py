"""-log of (T^t f)_y: what the noise makes of the probabilities of the clean classes."""

import math

from references.transition import softmax


def loss(logits, labels, *, transition, reduction="mean"):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        f = softmax(row)
        total -= math.log(sum(f[k] * transition[k][label] for k in range(len(f))))
    return total if reduction == "sum" else total / len(labels)
