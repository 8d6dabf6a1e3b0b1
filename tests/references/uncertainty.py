"""A likelihood's factor times exp(-s) (exp(-s / 2) for laplace), at the first s."""

from math import exp

FORMS = {"gaussian": (0.5, 1.0), "laplace": (1.0, 0.5), "categorical": (1.0, 1.0)}


def weights(batches, *, num_tasks, kind="gaussian", init=0.0):
    kinds = [kind] * num_tasks if isinstance(kind, str) else kind
    row = [FORMS[k][0] * exp(-FORMS[k][1] * init) for k in kinds]
    return [row for _ in batches]
