"""alpha * CE + beta * reverse CE, the latter summed over classes with log(floor) for the zeros of the label."""

import math

from references.focal import log_softmax


def weights(batches, *, alpha=0.1, beta=1.0, floor=1e-4):
    return [[alpha - beta * math.log(floor) * row["p"] for row in batch] for batch in batches]


def loss(logits, labels, *, alpha=0.1, beta=1.0, floor=1e-4, form="closed"):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = log_softmax(row)
        if form == "weighted":
            total -= (alpha - beta * math.log(floor) * math.exp(log_p[label])) * log_p[label]
            continue
        reverse = 0.0
        for c in range(len(row)):
            reverse -= math.exp(log_p[c]) * math.log(1.0 if c == label else floor)
        total += beta * reverse - alpha * log_p[label]
    return total / len(labels)
