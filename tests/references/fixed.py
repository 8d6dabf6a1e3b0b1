"""The numbers that were named."""


def weights(batches, *, weights, num_tasks):
    return [[float(w) for w in weights] for _ in batches]
