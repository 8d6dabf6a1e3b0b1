"""Softmax of one over the loss and the temperature."""

from math import exp


def weights(batches, *, num_tasks, temperature=1.0, eps=1e-8, normalize="sum_to_1"):
    out = []
    for batch in batches:
        logits = [1.0 / ((row["loss"] + eps) * temperature) for row in batch]
        powers = [exp(logit - max(logits)) for logit in logits]
        total = {"sum_to_1": 1.0, "sum_to_k": float(num_tasks)}[normalize]
        out.append([total * power / sum(powers) for power in powers])
    return out
