"""(1 - p)**g - g p (1 - p)**(g - 1) log p: focal loss's gradient as a weight on cross-entropy."""

import math


def weights(batches, *, gamma=2.0):
    found = []
    for batch in batches:
        found.append([])
        for row in batch:
            p = row["p"]
            found[-1].append((1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * math.log(p))
    return found
