"""alpha * normalised loss + beta * (mean absolute error or reverse cross-entropy summed over classes)."""

import math

from references.focal import log_softmax
from references.normalized import term


def loss(
    logits, labels, *, active="nce", passive="rce", alpha=1.0, beta=1.0, gamma=0.5, q=0.7, floor=1e-4
):  # fmt: skip
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        p = [math.exp(value) for value in log_softmax(row)]
        if passive == "mae":
            second = 1.0 - p[label]
        else:
            second = -sum(p[c] * math.log(1.0 if c == label else floor) for c in range(len(row)))
        base = {"nce": "ce", "nfl": "focal", "ngce": "gce"}[active]
        total += alpha * term(row, label, base, gamma, q) + beta * second
    return total / len(labels)
