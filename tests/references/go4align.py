"""p exp(-step_size L), normalised; scores p sum(L) / L; every partition of the tasks tried for the best grouping."""

from math import exp


def partitions(items, groups):
    if not items:
        yield []
        return
    for rest in partitions(items[1:], groups):
        for place in range(len(rest)):
            yield [*rest[:place], [items[0], *rest[place]], *rest[place + 1 :]]
        if len(rest) < groups:
            yield [[items[0]], *rest]


def grouped(scores, groups):
    def cost(partition):
        total = 0.0
        for group in partition:
            mean = sum(scores[k] for k in group) / len(group)
            total += sum((scores[k] - mean) ** 2 for k in group)
        return total

    best = min(partitions(list(range(len(scores))), groups), key=cost)
    return [
        next(sum(scores[j] for j in group) / len(group) for group in best if k in group) for k in range(len(scores))
    ]


def weights(batches, *, num_tasks, groups=2, step_size=1e-4, normalize=None):
    p, out = [1 / num_tasks] * num_tasks, []
    for batch in batches:
        loss = [row["loss"] for row in batch]
        p = [share * exp(-step_size * value) for share, value in zip(p, loss, strict=True)]
        p = [share / sum(p) for share in p]
        w = grouped([share * sum(loss) / value for share, value in zip(p, loss, strict=True)], groups)
        out.append([num_tasks * value / sum(w) for value in w] if normalize else w)
    return out
