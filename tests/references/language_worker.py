"""One rank of token counting and of exact accumulation: ``python language_worker.py PART RANK WORLD INIT_FILE OUT``.

The same functions with ``world=1`` are the single process that the ranks are compared with.
"""

import gc
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from reweigh.losses import Accumulator, CausalLM, CrossEntropy, FocalLoss, Objective, PowerLawDecayLoss
from reweigh.weighting import Focal, InverseClassLoss, token_counts

VOCAB, STEPS, BATCH, LENGTH = 6, 3, 8, 5
COUNTS = [40, 20, 9, 3, 1, 0]
TEXT = [torch.arange(n) % VOCAB for n in range(1, 12)]
SIZES = {"even": [4, 4], "uneven": [6, 2], "ignored_rank": [4, 4], "nothing": [4, 4]}


OBJECTIVES = {
    "power law, weighted mean": lambda: PowerLawDecayLoss(COUNTS, alpha=0.5),
    "focal with class weights": lambda: FocalLoss(2.0, weight=[1.0, 2.0, 0.5, 3.0, 1.0, 4.0]),
    "sequence mean": lambda: Objective(CausalLM(), Focal(1.0), "sequence_mean"),
    "batch mean": lambda: Objective(CausalLM(), Focal(1.0), "batch_mean"),
    "sum": lambda: Objective(CausalLM(), Focal(1.0), "sum"),
    "learned": lambda: Objective(CrossEntropy(), InverseClassLoss(VOCAB, smoothing=0.4) * Focal(1.0), "mean"),
}


def batches(scenario):
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        labels[torch.rand(BATCH, LENGTH, generator=generator) < 0.3] = -100
        labels[1] = -100
        if scenario == "ignored_rank":
            labels[4:] = -100
        if scenario == "nothing":
            labels[:] = -100
        yield torch.randint(VOCAB, (BATCH, LENGTH), generator=generator), labels


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)).double()


def train(kind, scenario, rank=0, world=1, pieces=1, gradients="averaged", plain=False):
    """Losses, last gradient, parameters and state of a few steps; ``plain`` is the objective on whole batches."""
    net = model()
    objective = OBJECTIVES[kind]()
    loss = objective if plain else Accumulator(objective, gradients=gradients)
    flat = isinstance(objective.criterion, CrossEntropy)
    wrapped = nn.parallel.DistributedDataParallel(net) if world > 1 and gradients == "averaged" else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    start = sum(SIZES[scenario][:rank])
    mine = slice(None) if world == 1 else slice(start, start + SIZES[scenario][rank])
    values = []
    for step, (tokens, labels) in enumerate(batches(scenario)):
        optimizer.zero_grad()
        for x, y in zip(tokens[mine].chunk(pieces), labels[mine].chunk(pieces), strict=True):
            logits = wrapped(x)
            value = loss(logits.flatten(0, 1), y.flatten()) if flat else loss(logits, y)
            value.backward()
        if world > 1 and gradients == "summed":
            for parameter in net.parameters():
                dist.all_reduce(parameter.grad)
        values.append(value.detach() if plain else loss.finish(net))
        optimizer.step()
        objective.update("step", index=step)
    return {
        "loss": torch.stack(values),
        "grad": net[1].weight.grad.clone(),
        **{name: value.detach() for name, value in net.named_parameters()},
        **objective.state_dict(),
    }


RUNS = [(kind, "even", 2, "averaged") for kind in OBJECTIVES]
RUNS += [("power law, weighted mean", scenario, 1, "averaged") for scenario in ("uneven", "ignored_rank", "nothing")]
RUNS += [("power law, weighted mean", "uneven", 2, "summed"), ("sum", "uneven", 1, "summed")]


def evaluate(rank=0, world=1):
    """The exact loss of an evaluation; with two ranks the second has no data at all."""
    acc = Accumulator(OBJECTIVES["power law, weighted mean"]())
    net = model()
    with torch.no_grad():
        if rank == 0:
            for tokens, labels in batches("even"):
                acc(net(tokens), labels)
        return acc.finish()


def accumulation(rank, world):
    results = {str(run): train(run[0], run[1], rank, world, pieces=run[2], gradients=run[3]) for run in RUNS}
    results["evaluation"] = evaluate(rank, world)
    return results


def counting(rank, world):
    """What each way to count gives on this rank; the last entry is an error message."""
    share = TEXT[rank::world]
    results = {
        "added": token_counts(share, VOCAB, sharded=True),
        "compared": token_counts(iter(TEXT), VOCAB),
        "added, one rank empty": token_counts(TEXT if rank == 0 else [], VOCAB, sharded=True),
        "added, stopped early": token_counts(share, VOCAB, max_tokens=4, sharded=True),
    }
    if rank == 0:  # would wait for ever if it communicated
        results["own"] = token_counts(share, VOCAB, sharded=False)
    try:
        token_counts(share, VOCAB)
    except ValueError as error:
        results["differ"] = str(error)
    return results


def main(part, rank, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=50)
    )
    torch.save({"accumulation": accumulation, "counting": counting}[part](rank, world), out)
    dist.barrier()
    gc.collect()  # what DDP holds in cycles must not outlive its group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
