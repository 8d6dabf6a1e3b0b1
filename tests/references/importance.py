"""exp(a r), clipped at a number or at the batch's quantile, divided by its mean."""

import math


def weights(batches, *, flatten=1.0, clip=None, clip_quantile=None, self_normalize=True):
    found = []
    for batch in batches:
        raw = [math.exp(row["log_ratio"]) ** flatten for row in batch]
        if clip_quantile is not None:
            clip = sorted(raw)[math.ceil(clip_quantile * len(raw) - 1e-9) - 1]
        if clip is not None:
            raw = [min(value, clip) for value in raw]
        found.append([value * len(raw) / sum(raw) for value in raw] if self_normalize else raw)
        clip = None if clip_quantile is not None else clip
    return found
