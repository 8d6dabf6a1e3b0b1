"""Cross-entropy over paced similarities to class proxies, one number at a time."""

from references.circle import cosine, exponent
from references.focal import log_softmax


def loss(embeddings, labels, *, num_classes, embedding_dim, proxies, m=0.25, gamma=256.0, label_smoothing=0.0):
    total = 0.0
    for vector, label in zip(embeddings, labels, strict=True):
        row = []
        for c in range(num_classes):
            value = exponent(cosine(vector, proxies[c]), c == label, m, gamma)
            row.append(-value if c == label else value)
        log_p = log_softmax(row)
        total -= (1 - label_smoothing) * log_p[label] + label_smoothing * sum(log_p) / num_classes
    return total / len(labels)
