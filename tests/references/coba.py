"""CoBa as the paper states it, from the list of validation losses, all of it anew for every record."""

from math import exp


def slope(points):
    """Least squares through (x, y); None for fewer than two points."""
    if len(points) < 2:
        return None
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    above = sum((x - x_mean) * (y - y_mean) for x, y in points)
    below = sum((x - x_mean) ** 2 for x, _ in points)
    return above / below if abs(above / below) > 1e-15 else 0.0


def softmax(values):
    powers = [exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def ratio(above, below):
    return above / below if below else 0.0


def shares(losses, *, warmup=100, history=200, tau=5.0):
    """Losses per record and task, None where absent; K omega after each record, 1 before the warm-up is over."""
    num_tasks = len(losses[0])
    ratios, base, slopes, steepest, out = [], [None] * num_tasks, [], [], []
    for t, row in enumerate(losses):
        known = [None if loss is None or not base[k] else loss / base[k] for k, loss in enumerate(row)]
        ratios.append(known)
        base = [base[k] or (abs(loss) if loss is not None else None) for k, loss in enumerate(row)]
        if t + 1 < max(warmup, 3):
            out.append([1.0] * num_tasks)
            continue
        window = range(max(0, t - history + 1), t + 1)
        now = [slope([(s, ratios[s][k]) for s in window if ratios[s][k] is not None]) for k in range(num_tasks)]
        tops = [
            (s, max(r for r in ratios[s] if r is not None)) for s in window if any(r is not None for r in ratios[s])
        ]
        steepest.append(slope(tops) or 0.0)
        slopes.append(now)
        tasks = [k for k in range(num_tasks) if now[k] is not None]
        if not tasks:
            out.append([1.0] * num_tasks)
            continue
        total = sum(abs(now[k]) for k in tasks)
        relative = softmax([ratio(len(tasks) * now[k], total) for k in tasks])
        absolute = []
        for k in tasks:
            past = [a[k] for a in slopes[-history:] if a[k] is not None]
            absolute.append(ratio(-len(past) * now[k], sum(abs(a) for a in past)))
        absolute = softmax(absolute)
        number, size = len(steepest), sum(abs(a) for a in steepest)
        factor = min(number * softmax([ratio(-tau * number * a, size) for a in steepest])[-1], 1.0)
        mixed = [factor * r + (1 - factor) * a for r, a in zip(relative, absolute, strict=True)]
        found = [1.0] * num_tasks
        for k, omega in zip(tasks, mixed, strict=True):
            found[k] = omega * len(tasks)
        out.append(found)
    return out


def weights(batches, *, num_tasks, renormalize=True, fidelity="paper", **options):
    """Steps of one validation batch each, a validation event after every second (two records, which move nothing)."""
    seen, records, out = [], [], []
    for step, batch in enumerate(batches):
        now = shares(records, **options)[-1] if records else [1.0] * num_tasks
        out.append([share / (sum(now) if renormalize else num_tasks) for share in now])
        seen.append([(row["loss"], row["count"]) for row in batch])
        if step % 2:
            sums = [
                [sum(row[k][0] * row[k][1] for row in seen), sum(row[k][1] for row in seen)] for k in range(num_tasks)
            ]
            records.append([above / below for above, below in sums])
            seen = []
    return out
