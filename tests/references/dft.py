"""The probability of the target, as a weight."""


def weights(batches):
    return [[row["p"] for row in batch] for batch in batches]
