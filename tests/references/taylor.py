"""The first terms of -log p as a series in 1 - p, and the weight 1 - (1 - p)**t on cross-entropy."""

import math

from references.focal import log_softmax


def weights(batches, *, order=2):
    return [[1.0 - (1.0 - row["p"]) ** order for row in batch] for batch in batches]


def loss(logits, labels, *, order=2, form="closed"):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = log_softmax(row)[label]
        q = 1.0 - math.exp(log_p)
        if form == "weighted":
            total -= (1.0 - q**order) * log_p
        else:
            total += sum(q**k / k for k in range(1, order + 1))
    return total / len(labels)
