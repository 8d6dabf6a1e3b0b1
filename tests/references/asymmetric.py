"""The paper's two terms, each by itself, one number at a time."""

import math

from references.focal import log_sigmoid


def positive(x, gamma):
    return -(math.exp(log_sigmoid(-x)) ** gamma if gamma else 1.0) * log_sigmoid(x)


def negative(x, gamma, clip):
    if not clip:
        return -(math.exp(log_sigmoid(x)) ** gamma if gamma else 1.0) * log_sigmoid(-x)
    over = math.exp(log_sigmoid(x)) - clip
    return 0.0 if over <= 0 else -(over**gamma) * math.log1p(-over)


def loss(logits, targets, *, gamma_neg=4.0, gamma_pos=1.0, clip=0.05, detach=True, weight=None, pos_weight=1.0):
    total = count = 0
    for row, labels in zip(logits, targets, strict=True):
        for c, (x, y) in enumerate(zip(row, labels, strict=True)):
            term = y * pos_weight * positive(x, gamma_pos) + (1 - y) * negative(x, gamma_neg, clip)
            total += (1.0 if weight is None else weight[c]) * term
            count += 1
    return total / count
