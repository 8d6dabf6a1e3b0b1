"""(1 - p**q) / q per label, and its weight p**q on cross-entropy."""

import math

from references.focal import log_softmax


def weights(batches, *, q=0.7):
    return [[row["p"] ** q for row in batch] for batch in batches]


def loss(logits, labels, *, q=0.7, form="closed", reduction="mean"):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = log_softmax(row)[label]
        if form == "weighted" or q == 0:
            total -= math.exp(log_p) ** q * log_p
        else:
            total += (1.0 - math.exp(log_p) ** q) / q
    return total if reduction == "sum" else total / len(labels)
