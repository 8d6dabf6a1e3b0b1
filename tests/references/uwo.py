"""One over the loss plus eps."""


def weights(batches, *, num_tasks, eps=1e-8):
    return [[1.0 / (row["loss"] + eps) for row in batch] for batch in batches]
