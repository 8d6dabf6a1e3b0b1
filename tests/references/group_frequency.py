"""n^-power of the group, with mean 1 over the training samples."""


def weights(batches, *, group_counts, power=1.0, by="group"):
    raw = [n**-power for n in group_counts]
    mean = sum(n * w for n, w in zip(group_counts, raw, strict=True)) / sum(group_counts)
    return [[raw[row[by]] / mean for row in rows] for rows in batches]
