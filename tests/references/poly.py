"""Poly-1: focal loss + epsilon * (1 - p)**(gamma + 1), and the weight on cross-entropy with its gradient."""

import math

from references.focal import log_softmax


def weight(p, epsilon, gamma):
    focal = (1 - p) ** gamma - (gamma * p * (1 - p) ** (gamma - 1) * math.log(p) if gamma else 0.0)
    return focal + epsilon * (gamma + 1) * p * (1 - p) ** gamma


def weights(batches, *, epsilon=1.0, gamma=0.0):
    return [[weight(row["p"], epsilon, gamma) for row in batch] for batch in batches]


def loss(logits, labels, *, epsilon=1.0, gamma=0.0, weight=None, form="closed"):
    above = below = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = log_softmax(row)[label]
        p = math.exp(log_p)
        v = 1.0 if weight is None else weight[label]
        if form == "weighted":
            above -= v * slope(p, epsilon, gamma) * log_p
        else:
            above += v * (-((1 - p) ** gamma) * log_p + epsilon * (1 - p) ** (gamma + 1))
        below += v
    return above / below


slope = weight
