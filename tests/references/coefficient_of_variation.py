"""Standard deviation over mean of each loss's ratios to its earlier mean, as shares; two passes, no running update."""

from math import sqrt


def weights(batches, *, num_tasks, eps=1e-8):
    losses, out = [[row["loss"] for row in batch] for batch in batches], []
    for step in range(len(batches)):
        if step < 2:
            out.append([1 / num_tasks] * num_tasks)
            continue
        spread = []
        for k in range(num_tasks):
            past = [row[k] for row in losses[:step]]
            ratios = [1.0] + [past[t] / (sum(past[:t]) / t) for t in range(1, step)]
            mean = sum(ratios) / step
            variance = sum((ratio - mean) ** 2 for ratio in ratios) / step
            spread.append(sqrt(variance + eps) / mean)
        out.append([s / sum(spread) for s in spread])
    return out
