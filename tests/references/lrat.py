"""exp(-margin / temperature), divided by its mean over the members of the pair."""

import math


def weights(batches, *, temperature=1.0):
    found = []
    for batch in batches:
        raw = [math.exp(-row["margin"] / temperature) for row in batch]
        line = []
        for i, row in enumerate(batch):
            members = [raw[j] for j, other in enumerate(batch) if other["pair"] == row["pair"]]
            line.append(raw[i] * len(members) / sum(members))
        found.append(line)
    return found
