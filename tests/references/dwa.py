"""K softmax(r / T), with r the ratio of the last two epoch means (an epoch is two steps here), or of windows."""

from math import exp


def weights(batches, *, num_tasks, temperature=2.0, window=None):
    means, epoch, steps, out = [], [], [], []
    for step, batch in enumerate(batches):
        ratio = [1.0] * num_tasks
        if window is None and len(means) >= 2:
            ratio = [a / b for a, b in zip(means[-1], means[-2], strict=True)]
        if window is not None and len(steps) >= 2 * window:
            new, old = steps[-window:], steps[-2 * window : -window]
            ratio = [sum(r[k] for r in new) / sum(r[k] for r in old) for k in range(num_tasks)]
        powers = [exp(r / temperature) for r in ratio]
        out.append([num_tasks * p / sum(powers) for p in powers])
        epoch.append([(row["loss"], row["count"]) for row in batch])
        steps.append([row["loss"] for row in batch])
        if step % 2:
            means.append(
                [
                    sum(row[k][0] * row[k][1] for row in epoch) / sum(row[k][1] for row in epoch)
                    for k in range(num_tasks)
                ]
            )
            epoch = []
    return out
