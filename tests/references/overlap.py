"""Set-level overlap, one element at a time, in plain Python: a reference that shares nothing with the library."""

import math

from references.focal import log_softmax


def flat(nested):
    return [number for item in nested for number in flat(item)] if isinstance(nested, list) else [nested]


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def elements(logits, target, activation="softmax"):
    """Per sample, a list of (probabilities, targets) over classes, one pair per element."""
    samples = []
    for rows, labels in zip(logits, target, strict=True):
        columns = [flat(row) for row in rows]
        many = len(flat(labels)) != len(columns[0])
        wanted = [flat(row) for row in labels] if many else flat(labels)
        pairs = []
        for i in range(len(columns[0])):
            x = [column[i] for column in columns]
            p = [math.exp(v) for v in log_softmax(x)] if activation == "softmax" else [sigmoid(v) for v in x]
            y = [row[i] for row in wanted] if many else [float(c == wanted[i]) for c in range(len(x))]
            pairs.append((p, y))
        samples.append(pairs)
    return samples


def sets(samples, over):
    return [[pair for pairs in samples for pair in pairs]] if over == "batch" else samples


def volumes(pairs, c, square=False):
    """Overlap, predicted and target volume of class c."""
    common = predicted = present = 0.0
    for p, y in pairs:
        common += p[c] * y[c]
        predicted += p[c] ** 2 if square else p[c]
        present += y[c] ** 2 if square else y[c]
    return common, predicted, present


def terms(samples, *, over, alpha, beta, square, above, below, include_background, empty):
    """Per set, the (class, loss) pairs that count; smoothing by Tversky's convention."""
    found = []
    for pairs in sets(samples, over):
        row = []
        for c in range(0 if include_background else 1, len(pairs[0][0])):
            common, predicted, present = volumes(pairs, c, square)
            if present == 0.0 and empty == "skip":
                continue
            size = common + alpha * (predicted - common) + beta * (present - common) + below
            loss = 1.0 - (common + above) / size if size > 0 else 0.0
            if present == 0.0 and empty in ("zero", "one"):
                loss = 0.0 if empty == "zero" else 1.0
            row.append((c, loss))
        found.append(row)
    return found


def mean(rows, change):
    """Mean over all terms of ``change(class, loss)``."""
    values = [change(c, loss) for row in rows for c, loss in row]
    return sum(values) / len(values)
