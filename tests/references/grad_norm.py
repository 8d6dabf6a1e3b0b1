"""Descent on the distance of weighted gradient norms from their target (an epoch is two steps here)."""

from math import exp, sqrt


def weights(batches, *, num_tasks, alpha=1.5, lr=0.025, form="paper", optimizer="sgd"):
    tasks = range(num_tasks)
    w, s, first, epoch, out = [1.0] * num_tasks, [1.0] * num_tasks, None, [], []
    moment, square, moves = [0.0] * num_tasks, [0.0] * num_tasks, 0
    for step, batch in enumerate(batches):
        out.append(list(w))
        loss, norm = [row["loss"] for row in batch], [row["gradient_norm"] for row in batch]
        if form == "paper" and first is None:
            first = loss
        if first is not None:
            ratio = [a / b for a, b in zip(loss, first, strict=True)]
            pace = [(r / (sum(ratio) / num_tasks)) ** alpha for r in ratio]
            size = [a * b for a, b in zip(w, norm, strict=True)]
            slope = [0.0] * num_tasks
            for k in tasks:
                target = sum(size) / num_tasks * pace[k]
                slope[k] = norm[k] if size[k] > target else -norm[k]
            if form == "softmax":  # through w = K softmax(s)
                slope = [sum(slope[j] * w[j] * ((j == k) - w[k] / num_tasks) for j in tasks) for k in tasks]
            moves += 1
            for k in tasks:
                move = slope[k]
                if optimizer == "adam":
                    moment[k] = 0.9 * moment[k] + 0.1 * slope[k]
                    square[k] = 0.999 * square[k] + 0.001 * slope[k] ** 2
                    move = moment[k] / (1 - 0.9**moves) / (sqrt(square[k] / (1 - 0.999**moves)) + 1e-8)
                w[k], s[k] = max(w[k] - lr * move, 1e-6), s[k] - lr * move
            raw = [exp(x) for x in s] if form == "softmax" else w
            w = [num_tasks * x / sum(raw) for x in raw]
        epoch.append([(row["loss"], row["count"]) for row in batch])
        if step % 2:
            if form == "softmax" and first is None:
                first = [
                    sum(rows[k][0] * rows[k][1] for rows in epoch) / sum(rows[k][1] for rows in epoch) for k in tasks
                ]
            epoch = []
    return out
