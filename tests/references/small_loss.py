"""Take the smallest losses, one after the other, until the share is full."""


def weights(batches, *, keep=0.7):
    out = []
    for rows in batches:
        left, found = keep * len(rows), [0.0] * len(rows)
        for i in sorted(range(len(rows)), key=lambda i, rows=rows: rows[i]["loss"]):
            found[i] = min(1.0, left) / keep
            left -= min(1.0, left)
        out.append(found)
    return out
