"""Probability of the label as the clean one over that of the label given, divided by its mean over the batch."""

import math


def weights(batches, *, normalize=True):
    found = []
    for batch in batches:
        raw = [row["p"] / math.exp(row["log_noisy_pt"]) for row in batch]
        found.append([value * len(raw) / sum(raw) for value in raw] if normalize else raw)
    return found


def softmax(row):
    top = max(row)
    raised = [math.exp(z - top) for z in row]
    return [value / sum(raised) for value in raised]
