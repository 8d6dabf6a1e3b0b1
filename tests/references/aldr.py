"""LDR at temperatures of the samples' own, which start at the common one and have taken one fixed-point step."""

import math

from references.ldr import scored, term


def step(row, before, common, alpha):
    parts = [math.exp(value / before) for value in row]
    p = [part / sum(parts) + 1e-5 for part in parts]
    p = [value / sum(p) for value in p]
    divergence = sum(value * math.log(len(row) * value) for value in p)
    share = 1.0 - divergence / (alpha * math.log(len(row)))
    return common * max(share, 1e-4)


def loss(logits, target, *, num_samples, temperature=1.0, alpha=1.0, margin=0.0, scores="raw"):
    total = 0.0
    for row, label in zip(logits, target, strict=True):
        row = scored(row, scores)
        own = step(row, temperature, temperature, alpha)
        total += term(row, label, own, margin)
        total -= alpha * math.log(len(row)) / (2.0 * temperature) * (own - temperature) ** 2
    return total / len(target)
