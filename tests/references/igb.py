"""K softmax(L / base) / L, with base the mean of an epoch (two steps here) and 1 in place of the ratio before."""

from math import exp


def weights(batches, *, num_tasks, base_epoch=1):
    epochs = [batches[start : start + 2] for start in range(0, len(batches), 2)]
    out = []
    for step, batch in enumerate(batches):
        ratio = [1.0] * num_tasks
        if step // 2 > base_epoch:
            for k in range(num_tasks):
                rows = [b[k] for b in epochs[base_epoch]]
                base = sum(row["loss"] * row["count"] for row in rows) / sum(row["count"] for row in rows)
                ratio[k] = batch[k]["loss"] / base
        powers = [exp(r) for r in ratio]
        out.append([num_tasks * p / sum(powers) / row["loss"] for p, row in zip(powers, batch, strict=True)])
    return out
