"""Lambert's W by bisection, and the running mean of the losses, which the first batch starts; before, ones."""

import math


def lambert(z):
    low, high = -1.0, max(2.0, math.log1p(abs(z)) + 1.0)
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if middle * math.exp(middle) < z else (low, middle)
    return low


def weights(batches, *, lam=1.0, tau="mean", smoothing=0.1):
    mean, out = None, []
    for rows in batches:
        own = sum(row["loss"] for row in rows) / len(rows)
        level = tau if tau != "mean" else mean
        if level is None:
            out.append([1.0] * len(rows))
            mean = own
            continue
        out.append([math.exp(-lambert(0.5 * max(-2 / math.e, (row["loss"] - level) / lam))) for row in rows])
        mean = own if mean is None else (1 - smoothing) * mean + smoothing * own
    return out
