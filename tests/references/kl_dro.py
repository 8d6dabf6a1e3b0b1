"""A softmax over the losses of the batch, times their number."""

import math


def weights(batches, *, temperature=1.0):
    out = []
    for rows in batches:
        raised = [math.exp(row["loss"] / temperature) for row in rows]
        out.append([len(rows) * value / sum(raised) for value in raised])
    return out


def loss(logits, labels, *, temperature=1.0, weight=None, label_smoothing=0.0):
    from references.focal import softmax_focal

    terms = [
        softmax_focal(row, label, 0.0, weight=weight, smoothing=label_smoothing)
        for row, label in zip(logits, labels, strict=True)
    ]
    (found,) = weights([[{"loss": term} for term in terms]], temperature=temperature)
    below = len(terms) if weight is None else sum(weight[label] for label in labels)
    return sum(w * term for w, term in zip(found, terms, strict=True)) / below
