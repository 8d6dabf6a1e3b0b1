"""Class weights by exchange between pairs of classes; an epoch is two batches, as the suite drives it."""


def exchanged(similarity, strength):
    classes = sorted(similarity)
    raw = dict.fromkeys(classes, 1.0)
    for weak in classes:
        for strong in classes:
            if similarity[weak][weak] < similarity[strong][strong]:
                moved = strength * similarity[weak][strong] * similarity[strong][strong]
                raw[weak] += moved
                raw[strong] -= moved
    return raw


def weights(batches, *, num_classes, strength=1.0, warmup=70, recompute=False):
    table, fitted, epoch, found, rows = [1.0] * num_classes, False, 0, [], []
    for step, batch in enumerate(batches):
        found.append([table[row["category"]] for row in batch])
        rows += batch
        if step % 2 == 0:
            continue
        epoch += 1
        if warmup is not None and epoch >= warmup and (recompute or not fitted):
            similarity = {}
            for c in range(num_classes):
                own = [row["probabilities"] for row in rows if row["category"] == c]
                if own:
                    similarity[c] = [sum(p[j] for p in own) / len(own) for j in range(num_classes)]
            raw = exchanged(similarity, strength)
            held = [max(raw.get(c, 1.0), 0.0) for c in range(num_classes)]
            table, fitted = [value * num_classes / sum(held) for value in held], True
        rows = []
    return found
