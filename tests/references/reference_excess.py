"""The share of largest excesses over the reference, ties by parts; or a softmax of the excess with mean 1."""

import math


def weights(batches, *, keep=0.6, temperature=None):
    return [
        batch_weights([row["loss"] - row["reference_loss"] for row in batch], keep, temperature) for batch in batches
    ]


def batch_weights(excess, keep, temperature):
    if temperature is not None:
        raised = [math.exp(e / temperature) for e in excess]
        return [len(excess) * r / sum(raised) for r in raised]
    found = []
    for mine in excess:
        above = sum(e > mine for e in excess)
        left = keep * len(excess) - above  # what is left for this value and its equals
        found.append(min(1.0, max(0.0, left / sum(e == mine for e in excess))))
    return found
