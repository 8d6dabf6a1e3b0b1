"""Half of exp(-s), one half over sigma squared, at the first s."""

from math import exp


def weights(batches, *, num_tasks, init=0.0, raw=False):
    sigma = exp(init / 2)
    return [[0.5 / sigma**2] * num_tasks for _ in batches]
