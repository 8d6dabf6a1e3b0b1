"""(entropy of the likeliest entries / scale) ** alpha."""


def weights(batches, *, alpha=1.0, scale=3.0):
    return [[(row["top_entropy"] / scale) ** alpha for row in batch] for batch in batches]
