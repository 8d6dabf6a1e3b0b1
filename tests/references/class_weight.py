"""Each term gets the number written down for its class."""


def weights(batches, *, weight):
    return [[weight[row["category"]] for row in batch] for batch in batches]
