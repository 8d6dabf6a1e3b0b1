"""A softmax of tilt times loss, times the number of terms."""

import math

from references.focal import softmax_focal


def weights(batches, *, tilt=1.0):
    out = []
    for rows in batches:
        raised = [math.exp(row["loss"] * tilt) for row in rows]
        out.append([len(rows) * value / sum(raised) for value in raised])
    return out


def loss(logits, labels, *, tilt=1.0):
    terms = [softmax_focal(row, label, 0.0) for row, label in zip(logits, labels, strict=True)]
    (found,) = weights([[{"loss": term} for term in terms]], tilt=tilt)
    return sum(w * term for w, term in zip(found, terms, strict=True)) / len(terms)
