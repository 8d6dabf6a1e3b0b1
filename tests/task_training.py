"""A small multi-task training that any task weighting can drive: whole, interrupted, or spread over ranks.

As a script it is one rank: ``python task_training.py RANK WORLD INIT_FILE OUT``.
"""

import copy
import gc
import io
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from reweigh import weighting
from reweigh.losses import MultiTaskLoss
from reweigh.weighting.conformance import TASKS

STEPS, EPOCH, BATCH = 20, 5, 12
NAMES = [f"task{k}" for k in range(TASKS)]
SCALES = torch.logspace(-1, 1, TASKS, dtype=torch.float64)
# how the samples of a step fall on the ranks
SHARES = {
    1: {"even": [12], "rough": [12]},
    2: {"even": [6, 6], "rough": [8, 4]},
    4: {"even": [3, 3, 3, 3], "rough": [5, 4, 2, 1]},
}


def methods():
    """Name and constructor arguments of every registered task weighting."""
    found = []
    for name in weighting.available():
        record = weighting.registry.record(name)
        if record.acts_on == "task":
            found += [(name, place) for place in range(len(record.examples))]
    return found


def build(name, example):
    made = weighting.create(name, **weighting.registry.record(name).examples[example])
    loss = MultiTaskLoss(NAMES, made)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, TASKS, dtype=torch.float64))
    return model, loss.double()


def batch(step, scenario, salt=0):
    """Inputs, targets, and which samples have which task."""
    generator = torch.Generator().manual_seed(1000 * salt + step)
    size = 8 if scenario == "rough" and step % EPOCH == EPOCH - 1 else BATCH  # an epoch's last batch is smaller
    x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCH, TASKS, generator=generator, dtype=torch.float64)
    has = torch.ones(BATCH, TASKS, dtype=torch.bool)
    has[size:] = False
    if scenario == "rough":
        has[8:, 2] = False  # the last ranks never see this one
        if step % 3 == 1:
            has[:, 5] = False  # nobody sees this one now
        if step % 4 == 2:
            has[:8, 0] = False
    return x, y, has


def task_losses(model, x, y, has):
    """Losses by name of the tasks that these samples have, and how many samples each is the mean of."""
    errors = (model(x) - y).square() * SCALES
    counts = {name: int(has[:, k].sum()) for k, name in enumerate(NAMES)}
    losses = {name: errors[has[:, k], k].mean() for k, name in enumerate(NAMES) if counts[name]}
    return losses, counts


def extra(model, loss, x):
    """What a gradient-based method wants to see beside the losses."""
    return {"shared": model[2].weight} if "gradient_norm" in loss.weighting.needs else {}


def train(
    name, example, *, scenario="even", rank=0, world=1, micro=1, wrap=False, start=None, snapshots=None, steps=STEPS
):
    """Weights before each step and what must agree at the end. ``start`` is a snapshot to go on from."""
    model, loss = build(name, example)
    parameters = [*model.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    first, epoch_due = 0, False
    if start is not None:
        state = torch.load(io.BytesIO(start), weights_only=True)
        model.load_state_dict(state["model"])
        loss.load_state_dict(state["loss"])
        optimizer.load_state_dict(state["optimizer"])
        first, epoch_due = state["step"], state["epoch_due"]

    def save(step, due):
        if snapshots is not None:
            file = io.BytesIO()
            parts = {"model": model, "loss": loss, "optimizer": optimizer}
            torch.save({k: v.state_dict() for k, v in parts.items()} | {"step": step, "epoch_due": due}, file)
            snapshots.append(file.getvalue())

    def validate(step):
        share = share_of(scenario, rank, world)
        losses, counts = task_losses(model, *(part[share] for part in batch(step, scenario, salt=1)))
        loss.observe_validation({name: value.detach() for name, value in losses.items()}, counts=counts)
        loss.update("validation", index=step // 2)

    net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if wrap and world > 1 else model
    if epoch_due:
        loss.update("epoch", index=(first - 1) // EPOCH)
    weights, totals = [], []
    for step in range(first, steps):
        if step % 2 == 0:
            validate(step)
        optimizer.zero_grad()
        share = share_of(scenario, rank, world)
        whole = [part[share] for part in batch(step, scenario)]
        pieces = [[part[rows] for part in whole] for rows in torch.arange(len(whole[0])).chunk(micro)]
        total = torch.zeros((), dtype=torch.float64)
        for piece in pieces:
            losses, counts = task_losses(net, *piece)
            value = loss(losses, counts=counts, **extra(model, loss, piece[0])) / len(pieces)
            if wrap and not losses:
                value = value + 0.0 * net(piece[0]).sum()  # DDP waits for a backward pass through the network
            value.backward()
            total += value.detach()
        if world > 1:
            average([*loss.parameters()] if wrap else parameters, world)
        weights.append(torch.stack([*loss.effective_weights(losses, counts=counts).values()]))
        totals.append(total)
        optimizer.step()
        if "after" in loss.weighting.feeds:
            for piece in pieces:
                losses, counts = task_losses(model, *piece)
                loss.observe_after({k: v.detach() for k, v in losses.items()}, counts=counts)
        loss.update("step", index=step)
        save(step + 1, step % EPOCH == EPOCH - 1)
        if step % EPOCH == EPOCH - 1:
            loss.update("epoch", index=step // EPOCH)
            save(step + 1, False)
    return {
        "weights": torch.stack(weights) if weights else torch.zeros(0, TASKS),
        "totals": torch.stack(totals) if totals else torch.zeros(0),
        **{f"model.{key}": value for key, value in copy.deepcopy(model.state_dict()).items()},
        **{f"loss.{key}": value for key, value in copy.deepcopy(loss.state_dict()).items()},
    }


def average(parameters, world):
    """What DDP does to gradients."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([torch.zeros(1, dtype=torch.float64), *(grad.double().reshape(-1) for grad in grads)])
    dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat[1:].split([p.numel() for p in parameters]), strict=True):
        parameter.grad = (grad / world).reshape(parameter.shape).to(parameter.dtype)


def share_of(scenario, rank, world):
    sizes = SHARES[world][scenario]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def main(runs, rank, world, init, out):
    """What the ranks do: gradients averaged by hand ("even", "rough"), or the rough scenario under DDP ("ddp")."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=50)
    )
    results = {}
    for name, example in methods():
        for run in runs:
            scenario = "rough" if run == "ddp" else run
            results[name, example, run] = train(
                name, example, scenario=scenario, rank=rank, world=world, wrap=run == "ddp", steps=11
            )
    torch.save({str(key): value for key, value in results.items()}, out)
    dist.barrier()
    gc.collect()  # what DDP holds in cycles must not outlive its group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
