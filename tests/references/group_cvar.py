"""Fill the worst groups by running loss up to alpha of the data, one after the other; equal ones share."""

import math

from references.group_dro import means, spread


def weights(batches, *, num_groups, group_counts, alpha=0.2, smoothing=0.1, adjustment=0.0, minimum=0.0):
    total, out = sum(group_counts), []
    fraction = [n / total for n in group_counts]
    running = [None] * num_groups
    for rows in batches:
        height = [(value or 0.0) + adjustment / math.sqrt(n) for value, n in zip(running, group_counts, strict=True)]
        left, q = alpha, [0.0] * num_groups
        for level in sorted(set(height), reverse=True):
            tied = [g for g in range(num_groups) if height[g] == level]
            mass = sum(fraction[g] for g in tied)
            for g in tied:
                q[g] = fraction[g] / mass * min(left, mass) / alpha
            left -= min(left, mass)
        q = [minimum * f + (1 - minimum) * value for f, value in zip(fraction, q, strict=True)]
        out.append(spread(rows, q, num_groups, "group", "batch", group_counts))
        for g, mean in enumerate(means(rows, num_groups, "group")):
            if mean is not None:
                running[g] = mean if running[g] is None else (1 - smoothing) * running[g] + smoothing * mean
    return out
