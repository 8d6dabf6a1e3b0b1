"""A softmax over the batch of signed influence over temperature, times the number of samples."""

import math


def weights(batches, *, temperature=1.0, sign=1.0):
    found = []
    for batch in batches:
        raw = [math.exp(sign * row["influence"] / temperature) for row in batch]
        found.append([value * len(raw) / sum(raw) for value in raw])
    return found
