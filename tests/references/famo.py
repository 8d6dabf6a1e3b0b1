"""Softmax logits moved by Adam along what each step did to the logarithms of the losses."""

from math import exp, log, sqrt


def weights(batches, *, num_tasks, lr=0.025, weight_decay=1e-3, min_losses=0.0, eps=1e-8, next_batch=False):
    least = min_losses if isinstance(min_losses, list) else [min_losses] * num_tasks
    logits, first, second, previous, out = [0.0] * num_tasks, [0.0] * num_tasks, [0.0] * num_tasks, None, []
    moves = 0
    for batch in batches:
        gap = [max(row["loss"] - b, 0.0) + eps for row, b in zip(batch, least, strict=True)]
        total = sum(exp(x) for x in logits)
        z = [exp(x) / total for x in logits]
        c = 1 / sum(a / d for a, d in zip(z, gap, strict=True))
        out.append([c * a / d for a, d in zip(z, gap, strict=True)])
        after = [max(0.9 * row["loss"] - b, 0.0) + eps for row, b in zip(batch, least, strict=True)]
        old, new = (previous, gap) if next_batch else (gap, after)
        previous = gap
        if old is None:
            continue
        moves += 1
        fell = [log(a) - log(b) for a, b in zip(old, new, strict=True)]
        mean = sum(a * b for a, b in zip(z, fell, strict=True))
        for k in range(num_tasks):
            slope = z[k] * (fell[k] - mean) + weight_decay * logits[k]
            first[k] = 0.9 * first[k] + 0.1 * slope
            second[k] = 0.999 * second[k] + 0.001 * slope**2
            logits[k] -= lr * (first[k] / (1 - 0.9**moves)) / (sqrt(second[k] / (1 - 0.999**moves)) + 1e-8)
    return out
