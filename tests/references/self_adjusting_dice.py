"""Sum over classes of 1 - (2 q y + s) / (q**2 + y**2 + s) per example, with q = (1 - p)**alpha p; averaged."""

from references import overlap


def loss(logits, target, *, alpha=0.01, smooth=1.0, square=True):
    total = count = 0.0
    for pairs in overlap.elements(logits, target):
        for p, y in pairs:
            for c in range(len(p)):
                others = sum(p[k] for k in range(len(p)) if k != c)
                q = p[c] * (others**alpha if alpha else 1.0)
                size = (q * q + y[c] * y[c] if square else q + y[c]) + smooth
                total += 1 - (2 * q * y[c] + smooth) / size
            count += 1
    return total / count
