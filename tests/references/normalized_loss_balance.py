"""w - rate (w - r / sum r) before each step, r the power of the loss over the first one."""


def weights(batches, *, num_tasks, rate=0.025, beta=1.0):
    w, first, out = [1 / num_tasks] * num_tasks, [row["loss"] for row in batches[0]], []
    for batch in batches:
        r = [(row["loss"] / start) ** beta for row, start in zip(batch, first, strict=True)]
        w = [old - rate * (old - value / sum(r)) for old, value in zip(w, r, strict=True)]
        out.append(w)
    return out
