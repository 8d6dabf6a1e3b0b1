"""log((1 + N) / (1 + d)) + 1, with mean 1 over tokens seen unless told otherwise."""

import math


def weights(batches, *, document_counts, documents, normalize="classes"):
    table = [math.log((1 + documents) / (1 + d)) + 1 for d in document_counts]
    seen = [w for w, d in zip(table, document_counts, strict=True) if d]
    mean = sum(seen) / len(seen) if normalize == "classes" else 1.0
    return [[table[row["category"]] / mean for row in batch] for batch in batches]
