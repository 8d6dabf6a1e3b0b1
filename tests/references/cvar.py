"""Take the largest losses, one after the other, until the share is full; then the mean over what was taken."""

from references.focal import softmax_focal


def weights(batches, *, alpha=0.2):
    out = []
    for rows in batches:
        left, found = alpha * len(rows), [0.0] * len(rows)
        for i in sorted(range(len(rows)), key=lambda i, rows=rows: -rows[i]["loss"]):
            found[i] = min(1.0, left) / alpha
            left -= min(1.0, left)
        out.append(found)
    return out


def loss(logits, labels, *, alpha=0.2):
    terms = [softmax_focal(row, label, 0.0) for row, label in zip(logits, labels, strict=True)]
    (found,) = weights([[{"loss": term} for term in terms]], alpha=alpha)
    return sum(w * term for w, term in zip(found, terms, strict=True)) / len(terms)
