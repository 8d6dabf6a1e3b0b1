"""w_c proportional to n_c ** -power; rescaled to a mean of 1 over the classes seen, or over the samples."""


def table(counts, raw, normalize):
    if normalize == "none":
        return raw
    if normalize == "samples":
        mean = sum(n * w for n, w in zip(counts, raw, strict=True)) / sum(counts)
    else:
        seen = [w for n, w in zip(counts, raw, strict=True) if n > 0]
        mean = sum(seen) / len(seen)
    return [w / mean for w in raw]


def filled(counts):
    rarest = min(n for n in counts if n > 0)
    return [n if n > 0 else rarest for n in counts]


def weights(batches, *, counts, power=1.0, normalize="classes"):
    of_class = table(counts, [n**-power for n in filled(counts)], normalize)
    return [[of_class[row["category"]] for row in batch] for batch in batches]
