"""((1/p)**(1 - tau) - 1) / (1 - tau) per label, and its weight p**(tau - 1) on cross-entropy, held at a bound."""

import math

from references.focal import log_softmax


def weights(batches, *, tau=1.0, bound=32768.0):
    return [[min(row["p"] ** (tau - 1.0), bound) for row in batch] for batch in batches]


def phi(p, tau):
    return -math.log(p) if tau == 1.0 else ((1.0 / p) ** (1.0 - tau) - 1.0) / (1.0 - tau)


def loss(logits, labels, *, tau=1.0, bound=32768.0, form="closed"):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = log_softmax(row)[label]
        p = math.exp(log_p)
        if form == "weighted":
            total -= min(p ** (tau - 1.0), bound) * log_p
        elif p ** (tau - 1.0) > bound:
            edge = bound ** (-1.0 / (1.0 - tau))
            total += phi(edge, tau) + bound * math.log(edge / p)
        else:
            total += phi(p, tau)
    return total / len(labels)
