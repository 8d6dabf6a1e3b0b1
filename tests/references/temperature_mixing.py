"""n^(1/T) as shares, over how often tasks arrive."""


def weights(batches, *, counts, num_tasks, temperature=5.0, drawn="by_size"):
    powers = [n ** (1.0 / temperature) for n in counts]
    arriving = [n / sum(counts) if drawn == "by_size" else 1.0 / num_tasks for n in counts]
    return [[p / sum(powers) / a for p, a in zip(powers, arriving, strict=True)] for _ in batches]
