"""lam * mean over classes of (1 - TI)**e + (1 - lam) * mean over elements of d (1 - p)**f CE."""

import math

from references import overlap


def loss(logits, target, *, lam=0.5, delta=0.6, gamma=0.5, symmetric=False, over="sample", smooth=1e-6, empty="keep"):
    samples = overlap.elements(logits, target)
    rows = overlap.terms(
        samples, over=over, alpha=1 - delta, beta=delta, square=False, above=smooth, below=smooth,
        include_background=True, empty=empty,
    )  # fmt: skip
    tversky = overlap.mean(rows, lambda c, value: value ** (1 - gamma) if c or symmetric else value)
    focal = count = 0.0
    for p, y in (pair for pairs in samples for pair in pairs):
        label = y.index(1.0)
        focused = (1 - p[label]) ** gamma if symmetric or label == 0 else 1.0
        focal -= (delta if label else 1 - delta) * focused * math.log(p[label])
        count += 1
    return lam * tversky + (1 - lam) * focal / count
