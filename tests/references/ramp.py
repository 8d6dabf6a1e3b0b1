"""1 for all but one task, whose weight goes from start to end."""

from math import cos, pi


def weights(batches, *, task, duration, num_tasks, start=0.0, end=1.0, delay=0, shape="linear"):
    out = []
    for step in range(len(batches)):
        share = min(max((step - delay) / duration, 0.0), 1.0)
        if shape == "cosine":
            share = (1 - cos(pi * share)) / 2
        row = [1.0] * num_tasks
        row[int(task)] = start + (end - start) * share
        out.append(row)
    return out
