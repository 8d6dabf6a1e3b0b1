"""A share of the total norm, over a running mean of the gradient's norm that has this batch in it."""


def weights(batches, *, num_tasks, shares=1.0, total_norm=1.0, decay=0.999, eps=1e-12):
    shares = shares if isinstance(shares, list) else [shares] * num_tasks
    total, weight, out = [0.0] * num_tasks, 0.0, []
    for batch in batches:
        weight = decay * weight + 1.0
        total = [decay * a + row["gradient_norm"] for a, row in zip(total, batch, strict=True)]
        out.append([total_norm * c / sum(shares) / (eps + a / weight) for c, a in zip(shares, total, strict=True)])
    return out
