"""lambda times the logarithm of the mean over labels of exp((f_k - f_y + margin) / lambda), one number at a time."""

import math


def scored(row, scores):
    if scores == "softplus":
        row = [math.log1p(math.exp(value)) for value in row]
    if scores == "raw":
        return row
    mean = sum(abs(value) for value in row) / len(row)
    return [value / mean for value in row]


def term(row, label, temperature, margin):
    ahead = [value - row[label] + (margin if k != label else 0.0) for k, value in enumerate(row)]
    most = max(ahead)
    total = sum(math.exp((value - most) / temperature) for value in ahead)
    return most + temperature * math.log(total / len(row))


def loss(logits, target, *, temperature=1.0, margin=0.0, scores="raw"):
    terms = [term(scored(row, scores), label, temperature, margin) for row, label in zip(logits, target, strict=True)]
    return sum(terms) / len(terms)
