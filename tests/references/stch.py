"""c softmax(c (L - z) / mu)."""

from math import exp


def weights(batches, *, num_tasks, mu=1.0, preferences=None, reference=0.0):
    c = [1.0 / num_tasks] * num_tasks if preferences is None else preferences
    out = []
    for batch in batches:
        powers = [exp(c[k] * (row["loss"] - reference) / mu) for k, row in enumerate(batch)]
        out.append([c[k] * power / sum(powers) for k, power in enumerate(powers)])
    return out
