"""A power of the score, on the share of the batch that is kept (all scores are different here), divided by its mean."""

import math


def weights(batches, *, power=1.0, keep=None, largest=True):
    found = []
    for batch in batches:
        raw = [row["difficulty"] ** power for row in batch]
        if keep is not None:
            order = sorted(range(len(batch)), key=lambda i: batch[i]["difficulty"], reverse=largest)
            room = keep * len(batch)
            for place, i in enumerate(order):
                raw[i] *= min(1.0, max(0.0, room - place))
        found.append([value * len(raw) / math.fsum(raw) for value in raw])
    return found
