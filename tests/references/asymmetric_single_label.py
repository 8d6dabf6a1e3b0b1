"""Smoothed cross-entropy whose classes are weighed one by one."""

import math

from references.focal import log_softmax


def loss(logits, target, *, gamma_neg=4.0, gamma_pos=0.0, label_smoothing=0.1):
    total = 0.0
    for row, label in zip(logits, target, strict=True):
        log_p = log_softmax(row)
        for c, value in enumerate(log_p):
            others = sum(math.exp(log_p[k]) for k in range(len(row)) if k != c)
            factor = others**gamma_pos if c == label else math.exp(value) ** gamma_neg
            share = label_smoothing / len(row) + (1 - label_smoothing if c == label else 0.0)
            total -= share * factor * value
    return total / len(logits)
