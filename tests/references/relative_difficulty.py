"""Running losses under both networks over the largest of the class; the table in single precision, two-step epochs."""

from references.adawac import single


def weights(batches, *, num_samples, num_classes, smoothing=0.3):
    table, most, out = {}, [[0.0, 0.0] for _ in range(num_classes)], []
    for step, rows in enumerate(batches):
        found, new = [], {}
        for row in rows:
            mixed = [row["biased_loss"], row["loss"]]
            if row["index"] in table:
                old, _ = table[row["index"]]
                mixed = [(1 - smoothing) * a + smoothing * b for a, b in zip(old, mixed, strict=True)]
            b, d = (value / max(value, top) for value, top in zip(mixed, most[row["category"]], strict=True))
            found.append(b / (b + d))
            new[row["index"]] = mixed, row["category"]
        for index, (mixed, c) in new.items():
            most[c] = [max(a, b) for a, b in zip(most[c], mixed, strict=True)]
            table[index] = [single(value) for value in mixed], c
        if step % 2:
            for c in range(num_classes):
                mine = [mixed for mixed, label in table.values() if label == c]
                most[c] = [max((mixed[k] for mixed in mine), default=0.0) for k in range(2)]
        out.append(found)
    return out
