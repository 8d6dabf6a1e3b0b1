"""exp(s), at the first s."""

from math import exp


def weights(batches, *, num_tasks, init=0.0):
    return [[exp(init)] * num_tasks for _ in batches]
