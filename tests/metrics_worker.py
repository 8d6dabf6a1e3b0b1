"""The metrics over shards of one data set, as a script: ``python metrics_worker.py RANK WORLD INIT_FILE OUT``.

``run`` with one process is what the ranks are compared with.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from reweigh.lightning_callbacks import (
    DistinctN,
    EffectiveSampleSize,
    GroupAccuracy,
    RareTokenAccuracy,
    Repetition,
    SplitAccuracy,
    TokenFrequencyLoss,
    WeightEntropy,
    WorstClassRecall,
    WorstGroupAccuracy,
)

SIZE, CLASSES, GROUPS = 90, 5, 4
SHARDS = {"even": [45, 45], "uneven": [71, 19], "empty": [90, 0]}
COUNTS = [300, 100, 40, 20, 3]


def data():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(SIZE, CLASSES, generator=generator)
    target = torch.randint(CLASSES, (SIZE,), generator=generator)
    group = torch.randint(GROUPS - 1, (SIZE,), generator=generator) + 1  # nobody is in group 0
    weights = torch.rand(SIZE, generator=generator).double() ** 3
    return logits + 1.5 * torch.nn.functional.one_hot(target, CLASSES), target, group, weights


def made():
    return {
        "group": GroupAccuracy(GROUPS),
        "worst_group": WorstGroupAccuracy(GROUPS),
        "worst_class": WorstClassRecall(CLASSES),
        "split": SplitAccuracy(COUNTS),
        "size": EffectiveSampleSize(),
        "share": EffectiveSampleSize(share=True),
        "entropy": WeightEntropy(),
        "kl": WeightEntropy(kind="kl"),
        "frequency_loss": TokenFrequencyLoss(COUNTS, 2),
        "rare": RareTokenAccuracy(COUNTS, at_most=40, shift=False),
        "distinct": DistinctN(3),
        "repetition": Repetition(2),
    }


def arguments(name, rows):
    logits, target, group, weights = (value[rows] for value in data())
    if name in ("group", "worst_group"):
        return logits, target, group
    if name in ("worst_class", "split", "rare"):
        return logits, target
    if name == "frequency_loss":
        return weights, target
    if name in ("distinct", "repetition"):
        return (torch.randint(4, (SIZE, 7), generator=torch.Generator().manual_seed(5))[rows],)
    return weights, target != 1


def run(shards, rank=0, world=1, batch=16):
    """Everything after one epoch in batches, then after a second one that begins anew."""
    start = 0 if world == 1 else sum(shards[:rank])
    mine = torch.arange(start, start + (SIZE if world == 1 else shards[rank]))
    found = {}
    for epoch in range(2):
        for name, metric in made().items():
            for rows in mine.split(batch) if len(mine) else [mine]:
                metric.update(*arguments(name, rows))
            value = metric.compute()
            values = value if isinstance(value, dict) else {"value": value}
            found.update({f"{epoch}/{name}/{key}": entry for key, entry in values.items()})
            metric.reset()
    return found


def main(rank, world, init, out):
    rank, world = int(rank), int(world)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=40)
    )
    torch.set_num_threads(1)
    torch.save({kind: run(shards, rank, world) for kind, shards in SHARDS.items()}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
