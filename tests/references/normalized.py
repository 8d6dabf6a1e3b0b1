"""phi(p_y) over the sum of phi(p_c) for all classes."""

import math

from references.focal import log_softmax

PHI = {
    "ce": lambda log_p, gamma, q: -log_p,
    "focal": lambda log_p, gamma, q: -((1.0 - math.exp(log_p)) ** gamma) * log_p,
    "gce": lambda log_p, gamma, q: (1.0 - math.exp(log_p) ** q) / q,
    "mae": lambda log_p, gamma, q: 1.0 - math.exp(log_p),
    "rce": lambda log_p, gamma, q: -math.log(1e-4) * (1.0 - math.exp(log_p)),
}


def term(row, label, base, gamma, q):
    each = [PHI[base](log_p, gamma, q) for log_p in log_softmax(row)]
    return each[label] / sum(each)


def loss(logits, labels, *, base="ce", gamma=0.5, q=0.7):
    return sum(term(row, label, base, gamma, q) for row, label in zip(logits, labels, strict=True)) / len(labels)
