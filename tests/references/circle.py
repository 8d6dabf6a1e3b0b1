"""Circle loss and its weights of pairs, one pair at a time, in float64 and plain Python."""

import math


def weights(batches, *, m=0.25, detach=True):
    """The weighting: how far a similarity is from 1 + m (positive pairs) or -m (negative ones)."""
    return [
        [max(0.0, 1 + m - row["score"] if row["target"] else row["score"] + m) for row in batch] for batch in batches
    ]


def cosine(x, y):
    length = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / length if length else 0.0


def exponent(score, positive, m, gamma):
    if positive:
        return -gamma * max(0.0, 1 + m - score) * (score - 1 + m)
    return gamma * max(0.0, score + m) * (score - m)


def contrast(positive, negative, m, gamma, drop=False):
    """``log(1 + sum of negatives * sum of positives)`` of two lists of similarities; ``None`` where one is empty."""
    if drop:
        negative = [score for score in negative if score > -m]
    if not positive or not negative:
        return None
    near = sum(math.exp(exponent(score, True, m, gamma)) for score in positive)
    far = sum(math.exp(exponent(score, False, m, gamma)) for score in negative)
    return math.log1p(near * far)


def anchors(embeddings, labels, m, gamma, drop=False):
    """The loss of each anchor, ``None`` where it has none."""
    size, out = len(labels), []
    for i in range(size):
        near = [cosine(embeddings[i], embeddings[j]) for j in range(size) if j != i and labels[j] == labels[i]]
        far = [cosine(embeddings[i], embeddings[j]) for j in range(size) if labels[j] != labels[i]]
        out.append(contrast(near, far, m, gamma, drop))
    return out


def loss(embeddings, labels, *, m=0.4, gamma=80.0, over="anchor", drop_satisfied=False, tile=None):
    if over == "batch":
        size = len(labels)
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
        near = [cosine(embeddings[i], embeddings[j]) for i, j in pairs if labels[i] == labels[j]]
        far = [cosine(embeddings[i], embeddings[j]) for i, j in pairs if labels[i] != labels[j]]
        return contrast(near, far, m, gamma, drop_satisfied) or 0.0
    found = [value for value in anchors(embeddings, labels, m, gamma, drop_satisfied) if value]
    return sum(found) / len(found) if found else 0.0
