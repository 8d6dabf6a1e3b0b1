"""One rank of data-parallel metric learning, as a script: ``python metric_worker.py RANK WORLD INIT_FILE OUT``.

The same functions with ``world=1`` are the single process on the joined batch that the ranks are compared with.
"""

import gc
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from reweigh.losses import CircleLoss, Objective, PairLogSumExp
from reweigh.weighting import CirclePacing, Focal, Weighting

STEPS, BATCH = 4, 10
SHARDS = {"even": [5, 5], "uneven": [7, 3], "empty": [0, 10], "last_empty": [10, 0]}


class Learned(Weighting):
    """A pacing with a parameter of its own."""

    needs = frozenset({"score", "target"})
    detached = False
    scope = "local"

    def __init__(self):
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def weigh(self, terms):
        return (self.steepness * (1 - 2 * terms.target) * terms.score).exp()


LOSSES = {
    "circle": lambda: CircleLoss(0.25, gamma=8.0, gather=True),
    "tiled": lambda: CircleLoss(0.25, gamma=8.0, gather=True, tile=2, drop_satisfied=True),
    "batch": lambda: CircleLoss(0.25, gamma=8.0, gather=True, over="batch"),
    "learned": lambda: Objective(PairLogSumExp(Learned(), gamma=4.0, gather=True), Focal(1.0), "mean"),
    "groups": lambda: Objective(PairLogSumExp(CirclePacing(0.1), gamma=4.0, gather=True), None, "group_mean"),
}
PLAIN = ("batch",)  # pooled terms take nothing per sample but a weight and a mask


def data():
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (BATCH,), generator=generator)
        y[1] = -100
        weight = torch.randint(4, (BATCH,), generator=generator).to(torch.float32) / 2
        mask = torch.rand(BATCH, generator=generator) < 0.9
        yield x, y, weight, mask, torch.randint(3, (BATCH,), generator=generator)


def train(shards, name, rank=0, world=1):
    """A few steps of a linear model under DistributedDataParallel; everything that must agree afterwards."""
    sizes = SHARDS[shards]
    torch.manual_seed(0)
    model, loss = nn.Linear(5, 4, dtype=torch.float64), LOSSES[name]()
    learned = list(loss.parameters())
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD([*model.parameters(), *learned], lr=0.05)
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank]) if world > 1 else slice(None)
    values, grads = [], []
    for batch in data():
        x, y, weight, mask, group = (part[mine] for part in batch)
        optimizer.zero_grad()
        meta = {} if name in PLAIN else {"group": group}
        value = loss(net(x), y, sample_weight=weight, mask=mask, **meta)
        value.backward()
        if world > 1:
            for parameter in learned:  # what DistributedDataParallel does for the model's own
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        values.append(value.detach())
        grads.append(model.weight.grad.clone())
        optimizer.step()
    out = {"loss": torch.stack(values), "grad": torch.stack(grads), "weight": model.weight.detach()}
    out.update({f"learned{i}": parameter.detach() for i, parameter in enumerate(learned)})
    return out


def refusals(rank, world):
    """Messages that every rank gets where the ranks do not fit together or pairs are given."""
    loss, x = CircleLoss(gather=True), torch.randn(3, 4)
    labels = torch.arange(3)

    def message(*inputs, **meta):
        try:
            loss(*inputs, **meta)
        except (TypeError, ValueError) as error:
            return str(error)
        return "none"

    return [
        message(x, labels, (torch.tensor([0]),) * 3),
        message(x if rank else x[:, :2], labels),
        message(x, labels, **({"mask": labels > 0} if rank else {})),
        message(x, labels, sample_weight=torch.ones(3, 3)),
        message(x, labels, sample_weight="all"),
    ]


def main(rank, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=50)
    )
    results = {f"{shards} {name}": train(shards, name, rank, world) for shards in SHARDS for name in LOSSES}
    results["refusals"] = refusals(rank, world)
    torch.save(results, out)
    dist.barrier()
    gc.collect()  # what DDP holds in cycles must not outlive its group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
