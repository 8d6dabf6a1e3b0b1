"""softmax(beta slope), the slope between the last two means, of epochs (two steps here) or of steps."""

from math import exp


def means(batches, num_tasks, every):
    found = []
    for start in range(0, len(batches) - every + 1, every):
        group = batches[start : start + every]
        totals = [sum(b[k]["count"] for b in group) for k in range(num_tasks)]
        found.append([sum(b[k]["loss"] * b[k]["count"] for b in group) / totals[k] for k in range(num_tasks)])
    return found


def weights(batches, *, num_tasks, beta=0.1, variant="plain", by="epoch"):
    every, out = (2 if by == "epoch" else 1), []
    for step in range(len(batches)):
        past = means(batches[:step], num_tasks, every)
        if len(past) < 2:
            out.append([1 / num_tasks] * num_tasks)
            continue
        slope = [new - old for new, old in zip(past[-1], past[-2], strict=True)]
        if variant == "normalized":
            slope = [s / sum(abs(other) for other in slope) for s in slope]
        powers = [exp(beta * s) for s in slope]
        if variant == "loss_weighted":
            powers = [p * (past[-1][k] + past[-2][k]) / 2 for k, p in enumerate(powers)]
        out.append([p / sum(powers) for p in powers])
    return out
