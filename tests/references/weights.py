"""Weightings as loops over plain numbers, in float64. Shares nothing with the library."""


def inverse_class_loss(batches, num_classes, smoothing, eps, to="sum", cadence="step"):
    """Weights that each batch of ``[(category, loss), ...]`` meets, one table per batch, with the state after each."""
    running = [1.0 / num_classes] * num_classes
    met, states = [], []

    def table():
        inverse = [1.0 / (eps + value) for value in running]
        scale = num_classes if to == "mean" else 1.0
        return [scale * value / sum(inverse) for value in inverse]

    def learn(batch):
        for c in range(num_classes):
            seen = [loss for category, loss in batch if category == c]
            if seen:
                running[c] = (1 - smoothing) * running[c] + smoothing * sum(seen) / len(seen)

    for batch in batches:
        if cadence == "forward":
            learn(batch)
        met.append(table())
        if cadence == "step":
            learn(batch)
        states.append(list(running))
    return met, states


def ema(batches, slots, beta):
    """Running means of ``[(slot, weight), ...]`` batches: tables before each batch."""
    mean, seen, met = [1.0] * slots, [False] * slots, []
    for batch in batches:
        met.append(list(mean))
        for k in range(slots):
            mine = [weight for slot, weight in batch if slot == k]
            if mine:
                new = sum(mine) / len(mine)
                mean[k] = beta * mean[k] + (1 - beta) * new if seen[k] else new
                seen[k] = True
    return met, mean


def normalize(weight, times, key, to):
    """``weight[i]`` rescaled within each value of ``key[i]``."""
    out = []
    for i, value in enumerate(weight):
        mine = [j for j in range(len(weight)) if key[j] == key[i]]
        if to == "sum":
            total = sum(times[j] * weight[j] for j in mine)
        elif to == "mean":
            count = sum(times[j] for j in mine)
            total = sum(times[j] * weight[j] for j in mine) / count if count else 0.0
        else:
            total = max((weight[j] for j in mine if times[j] > 0), default=0.0)
        out.append(value / total if total > 0 else value)
    return out


def pooled(weight, times, key):
    """Each weight replaced by the mean over its ``key``."""
    out = []
    for i in range(len(weight)):
        mine = [j for j in range(len(weight)) if key[j] == key[i]]
        count = sum(times[j] for j in mine)
        out.append(sum(times[j] * weight[j] for j in mine) / count if count else 0.0)
    return out


def effective_number(counts, beta):
    """Class-balanced weights, summing to the number of classes."""
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(raw) * value / sum(raw) for value in raw]


def inverse_frequency(counts, power):
    """Inverse frequency to a power, averaging 1 over classes."""
    raw = [n**-power for n in counts]
    return [len(raw) * value / sum(raw) for value in raw]
