"""Softmax of normal draws from a generator seeded with a hash of seed and step."""

from hashlib import blake2b
from math import exp

import torch


def weights(batches, *, num_tasks, seed=0, normalize="sum_to_1"):
    out = []
    for step in range(len(batches)):
        key = int.from_bytes(blake2b(f"{seed} {step}".encode(), digest_size=8).digest(), "little")
        draws = torch.randn(num_tasks, generator=torch.Generator().manual_seed(key), dtype=torch.float64).tolist()
        total = {"sum_to_1": 1.0, "sum_to_k": float(num_tasks)}[normalize]
        out.append([total * exp(z) / sum(exp(z) for z in draws) for z in draws])
    return out
