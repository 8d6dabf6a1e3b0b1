"""One rank of a small data-parallel training, as a script: ``python distributed_worker.py RANK WORLD INIT_FILE OUT``.

The same functions with ``world=1`` are the single process that the ranks are compared with.
"""

import gc
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from reweigh.losses import CrossEntropy, Objective
from reweigh.weighting import Focal, InverseClassLoss, InverseFrequency, Linear

STEPS, BATCH = 5, 8
# scenario: how the 8 samples of a step fall on the ranks (sizes), micro-batches per rank, labels ignored on rank 1
SCENARIOS = {
    "even": ([4, 4], 1, False),
    "accumulated": ([4, 4], 2, False),
    "uneven": ([5, 3], 1, False),
    "empty_rank": ([8, 0], 1, False),
    "ignored_rank": ([4, 4], 2, True),
}


def objective(weighting):
    made = {
        "learned_classes": lambda: InverseClassLoss(3, smoothing=0.4) * Focal(1.0),
        "everything": lambda: (
            InverseClassLoss(3, smoothing=0.4)
            * Focal(Linear(0.0, 2.0, duration=4, by="step")).ema(0.7, 3)
            * InverseFrequency([9, 5, 1]).warmup(3)
        ),
        "groups": lambda: Focal(2.0).ema(0.5, 2, by="group"),
    }[weighting]()
    return Objective(CrossEntropy(weight=[1.0, 2.0, 0.5]), made)


def data(ignore):
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (BATCH,), generator=generator)
        y[1] = -100
        if ignore:
            y[4:] = -100
        yield (
            x,
            y,
            torch.rand(BATCH, generator=generator, dtype=torch.float64),
            torch.randint(2, (BATCH,), generator=generator),
        )


def train(scenario, weighting, rank=0, world=1, micro=None, wrap=False):
    """Train a linear model; everything that must agree afterwards."""
    sizes, pieces, ignore = SCENARIOS[scenario]
    pieces = pieces if micro is None else micro
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=torch.float64)
    loss = objective(weighting)
    net = nn.parallel.DistributedDataParallel(model) if wrap and world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    start = 0 if world == 1 else sum(sizes[:rank])
    mine = slice(start, start + (BATCH if world == 1 else sizes[rank]))
    values = []
    for step, whole in enumerate(data(ignore)):
        x, y, times, group = (part[mine] for part in whole)
        with torch.no_grad():
            _, items = loss.parts(net(x) if world == 1 else model(x), y, sample_weight=times, group=group)
        if world > 1:
            dist.all_reduce(items)
        optimizer.zero_grad()
        value = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(len(x)).chunk(pieces) if len(x) else [torch.arange(0)]:
            part = loss(net(x[rows]), y[rows], sample_weight=times[rows], group=group[rows], num_items=items)
            (part * (world if wrap else 1)).backward()  # DDP averages over the ranks
            value += part.detach()
        if world > 1:
            dist.all_reduce(value)
            if not wrap:
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
        values.append(value)
        grad = model.weight.grad.clone()
        optimizer.step()
        loss.update("step", index=step)
    return {"loss": torch.stack(values), "grad": grad, "weight": model.weight.detach(), **loss.state_dict()}


def forward_cadence(rank=0, world=1):
    """A weighting that commits inside forward: ranks agree on the joined batch before they weigh."""
    loss = Objective(CrossEntropy(), InverseClassLoss(3, smoothing=0.4, cadence="forward"), "sum")
    total = torch.zeros((), dtype=torch.float64)
    for x, y, _, _ in data(False):
        mine = slice(None) if world == 1 else slice(4 * rank, 4 * rank + 4)
        total += loss(x[mine, :3].requires_grad_(), y[mine]).detach()
        loss.update("step")
    if world > 1:
        dist.all_reduce(total)
    return {"loss": total, **loss.state_dict()}


def count_reductions():
    """How many collectives one update of several stateful parts takes."""
    loss, real, calls = objective("everything"), dist.all_reduce, []
    x, y, _, _ = next(data(False))
    loss(x[:, :3], y)
    dist.all_reduce = lambda *args, **kwargs: calls.append(args[0].numel()) or real(*args, **kwargs)
    try:
        loss.update("step")
    finally:
        dist.all_reduce = real
    return {"calls": torch.tensor(calls)}


RUNS = [
    (scenario, weighting, False) for scenario in SCENARIOS for weighting in ("learned_classes", "everything", "groups")
]
RUNS += [("even", "everything", True), ("uneven", "learned_classes", True)]


def main(rank, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=50)
    )
    results = {str(run): train(run[0], run[1], rank, world, wrap=run[2]) for run in RUNS}
    results["forward"] = forward_cadence(rank, world)
    results["calls"] = count_reductions()
    torch.save(results, out)
    dist.barrier()
    gc.collect()  # what DDP holds in cycles must not outlive its group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
