"""-log p + bonus, the bonus log(1 - p) up to `end` and its tangent beyond; the weight with the same gradient."""

import math

from references.focal import log_softmax


def weights(batches, *, end=0.75):
    return [[1 / (1 - row["p"]) if row["p"] < end else 1 + row["p"] / (1 - end) for row in batch] for batch in batches]


def loss(logits, labels, *, end=0.75, form="closed"):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = log_softmax(row)[label]
        p = math.exp(log_p)
        if form == "weighted":
            total -= (1 / (1 - p) if p < end else 1 + p / (1 - end)) * log_p
        else:
            total += (math.log(1 - p) if p < end else math.log(1 - end) - (p - end) / (1 - end)) - log_p
    return total / len(labels)
