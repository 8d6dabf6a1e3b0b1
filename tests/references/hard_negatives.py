"""Positives, and as many of the hardest negatives as asked; losses that are equal at the edge share what is left."""

import math


def weights(batches, *, ratio=3.0, minimum=0, background=0):
    found = []
    for batch in batches:
        negatives = sorted((i for i, row in enumerate(batch) if row["target"] == background),
                           key=lambda i: -batch[i]["loss"])  # fmt: skip
        keep = max(minimum, math.floor(ratio * (len(batch) - len(negatives)) + 1e-12))
        chosen = set(negatives[:keep])
        found.append([1.0 if i in chosen or row["target"] != background else 0.0 for i, row in enumerate(batch)])
    return found
