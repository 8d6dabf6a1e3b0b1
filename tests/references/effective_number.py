"""w_c proportional to (1 - beta) / (1 - beta ** n_c), by the sum 1 + beta + ... + beta ** (n_c - 1)."""


def weights(batches, *, counts, beta=0.9999):
    effective = [sum(beta**k for k in range(n)) for n in counts]
    raw = [1.0 / e for e in effective]
    of_class = [w * len(raw) / sum(raw) for w in raw]
    return [[of_class[row["category"]] for row in batch] for batch in batches]
