"""Focal losses, one number at a time, in float64 and plain Python: a reference that shares nothing with the library."""

import math


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid_focal(x, y, gamma, alpha=None):
    """One term: BCE * (1 - p_t)**gamma * alpha_t, with p_t = y p + (1 - y)(1 - p)."""
    log_p, log_q = log_sigmoid(x), log_sigmoid(-x)
    bce = -(y * log_p + (1 - y) * log_q)
    not_pt = y * math.exp(log_q) + (1 - y) * math.exp(log_p)
    side = 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    return side * (not_pt**gamma if gamma else 1.0) * bce


def log_softmax(row):
    top = max(row)
    total = sum(math.exp(z - top) for z in row)
    return [z - top - math.log(total) for z in row]


def softmax_focal(row, label, gamma, alpha=None, weight=None, smoothing=0.0):
    """One term: alpha_y * (1 - p_y)**gamma * CE with torch's class weights and label smoothing."""
    log_p = log_softmax(row)
    v = [1.0] * len(row) if weight is None else weight
    hard = -v[label] * log_p[label]
    flat = -sum(v[c] * log_p[c] for c in range(len(row))) / len(row)
    others = sum(math.exp(log_p[c]) for c in range(len(row)) if c != label)  # 1 - p_y without cancellation
    side = 1.0 if alpha is None else alpha[label]
    return side * (others**gamma if gamma else 1.0) * ((1 - smoothing) * hard + smoothing * flat)


def focal_star(x, y, gamma):
    return -log_sigmoid(gamma * (2 * y - 1) * x) / gamma


def weights(batches, *, gamma=2.0, detach=False):
    """The weighting: (1 - p) ** gamma."""
    return [[(1.0 - row["p"]) ** gamma for row in batch] for batch in batches]


def loss(logits, labels, *, gamma=2.0, alpha=None, weight=None, label_smoothing=0.0, reduction="mean"):
    """The objective, reduced over the batch."""
    above = below = 0.0
    for row, label in zip(logits, labels, strict=True):
        factor = 1.0 if alpha is None else alpha[label]
        above += softmax_focal(row, label, gamma, alpha, weight, label_smoothing)
        share = factor * (1.0 - math.exp(log_softmax(row)[label])) ** gamma
        below += share if reduction == "weighted_mean" else (1.0 if weight is None else weight[label])
    return above / below
