"""cos(pi p) + 1 per token, or of the mean p of a sequence; the loss divides by the number of tokens."""

import math

from references.focal import log_softmax


def weights(batches, *, level="token", detach=False):
    return [[math.cos(math.pi * row["p"]) + 1.0 for row in batch] for batch in batches]  # sequences of one token


def loss(logits, labels, *, level="token", shift=True):
    total = tokens = 0.0
    for rows, row_labels in zip(logits, labels, strict=True):
        pairs = list(zip(rows[:-1], row_labels[1:], strict=True) if shift else zip(rows, row_labels, strict=True))
        log_p = [log_softmax(row)[label] for row, label in pairs]
        mean = sum(math.exp(value) for value in log_p) / len(log_p)
        for value in log_p:
            p = mean if level == "sequence" else math.exp(value)
            total -= (math.cos(math.pi * p) + 1.0) * value
            tokens += 1
    return total / tokens
