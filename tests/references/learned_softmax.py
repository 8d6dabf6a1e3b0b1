"""The prior as shares: softmax(log prior)."""


def weights(batches, *, num_tasks, prior=None, entropy=0.0):
    prior = [1.0] * num_tasks if prior is None else prior
    return [[p / sum(prior) for p in prior] for _ in batches]
