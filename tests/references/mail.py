"""sigmoid(-gamma (margin - beta)), divided by its mean over the batch."""

import math


def weights(batches, *, gamma=10.0, beta=-0.5):
    found = []
    for batch in batches:
        raw = [1 / (1 + math.exp(gamma * (row["margin"] - beta))) for row in batch]
        found.append([value * len(raw) / sum(raw) for value in raw])
    return found
