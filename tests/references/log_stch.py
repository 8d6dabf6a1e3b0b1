"""1 / L until the nadir's epoch is over (an epoch is two steps here), then K / L softmax(log(L / nadir) / mu)."""


def weights(batches, *, num_tasks, mu=1.0, nadir_epoch=4):
    nadir, epoch, out = None, [], []
    for step, batch in enumerate(batches):
        losses = [row["loss"] for row in batch]
        if nadir is None:
            out.append([1.0 / loss for loss in losses])
        else:
            powers = [(loss / low) ** (1.0 / mu) for loss, low in zip(losses, nadir, strict=True)]
            out.append([num_tasks * p / sum(powers) / loss for p, loss in zip(powers, losses, strict=True)])
        epoch.append(batch)
        if step % 2:
            if step // 2 == nadir_epoch:
                nadir = [
                    sum(row[k]["loss"] * row[k]["count"] for row in epoch) / sum(row[k]["count"] for row in epoch)
                    for k in range(num_tasks)
                ]
            epoch = []
    return out
