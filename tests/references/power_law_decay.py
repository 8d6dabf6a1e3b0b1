"""(count + eps) ** -alpha per token; the loss divides by the sum of the weights."""

from references.focal import log_softmax


def weights(batches, *, counts, alpha=1.0, eps=1.0, normalize="none"):
    of_token = [(n + eps) ** -alpha for n in counts]
    mean = 1.0
    if normalize == "samples":
        mean = sum(n * w for n, w in zip(counts, of_token, strict=True)) / sum(counts)
    return [[of_token[row["category"]] / mean for row in batch] for batch in batches]


def loss(logits, labels, *, counts, alpha=1.0, eps=1.0, shift=True):
    above = below = 0.0
    for rows, tokens in zip(logits, labels, strict=True):
        pairs = zip(rows[:-1], tokens[1:], strict=True) if shift else zip(rows, tokens, strict=True)
        for row, token in pairs:
            weight = (counts[token] + eps) ** -alpha
            above -= weight * log_softmax(row)[token]
            below += weight
    return above / below
