"""The paper's recursion, with draws of a generator seeded by (seed, step)."""

from math import exp
from random import Random


def balanced(batch, before, tau):
    powers = [exp(row["loss"] / (tau * old["loss"])) for row, old in zip(batch, before, strict=True)]
    return [len(batch) * p / sum(powers) for p in powers]


def weights(batches, *, num_tasks, alpha=0.999, rho=0.99, tau=1.0, seed=0):
    w, out = [1.0] * num_tasks, []
    for step, batch in enumerate(batches):
        onward = Random(f"relobralo {seed} {step}").random() < rho
        if step > 0:
            past = w if onward else balanced(batch, batches[0], tau)
            now = balanced(batch, batches[step - 1], tau)
            w = [alpha * p + (1 - alpha) * n for p, n in zip(past, now, strict=True)]
        out.append(w)
    return out
