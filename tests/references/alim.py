"""Cross-entropy against beliefs that start uniform over the candidates and have moved towards one pseudo-target."""

import math

from references.focal import log_softmax


def softmax(row):
    return [math.exp(value) for value in log_softmax(row)]


def pseudo_target(q, candidates, mixing, kind):
    odds = [value * (1.0 if inside else mixing) for value, inside in zip(q, candidates, strict=True)]
    if kind == "scale":
        return [value / sum(odds) for value in odds]
    best = odds.index(max(odds))
    return [1.0 if c == best else 0.0 for c in range(len(odds))]


def moved(before, logits, candidates, mixing, kind, ema):
    target = pseudo_target(softmax(logits), candidates, mixing, kind)
    return [ema * old + (1.0 - ema) * new for old, new in zip(before, target, strict=True)]


def ratio(logits, candidates):
    q = softmax(logits)
    inside = [value for value, member in zip(q, candidates, strict=True) if member]
    outside = [value for value, member in zip(q, candidates, strict=True) if not member]
    return min(1.0, max(inside) / max(outside)) if outside else 1.0


def term(belief, logits):
    return -sum(weight * value for weight, value in zip(belief, log_softmax(logits), strict=True))


def loss(
    logits, candidates, *, num_samples, num_classes, mixing=0.0, pseudo="onehot", ema=0.95, noise_rate=None, start=0
):
    total = 0.0
    for row, members in zip(logits, candidates, strict=True):
        uniform = [member / sum(members) for member in members]
        total += term(moved(uniform, row, members, mixing, pseudo, ema), row)
    return total / len(logits)
