"""Every registered method on the shards of a batch, as a script: ``python joined_batch.py RANK WORLD INIT_FILE OUT``.

``run`` with one process is what the ranks are compared with. Tasks have their own runs (task_training.py).
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from reweigh import losses, weighting
from reweigh.losses import Objective
from reweigh.losses.conformance import CRITERION_FOR, example_meta, ready
from reweigh.weighting import dynamics

STEPS, BATCH = 5, 8
SHARDS = {"even": [4, 4], "uneven": [5, 3], "empty": [8, 0]}
INDEX = torch.tensor([0, 1, 2, 3, 1, 5, 0, 7])  # samples 0 and 1 come twice, on different ranks


def innermost(objective):
    while isinstance(objective, Objective):
        objective = objective.criterion
    return objective


def built(registry, name, number):
    """The objective of one example; weightings that compare terms weigh the joined batch."""
    example = registry.record(name).examples[number]
    if registry is losses.registry:
        return ready(losses.create(name, **example))
    made = weighting.create(name, **example)
    compares = made.scope != "local" and made.detached
    return ready(Objective(CRITERION_FOR[registry.record(name).acts_on](), made.gathered() if compares else made))


def splits(objective):
    """Whether samples can lie on different ranks with one process's numbers as a result."""
    criterion = innermost(objective)
    if not criterion.independent or criterion.slots or criterion.pools or isinstance(objective.criterion, Objective):
        return False
    factor = objective.weighting
    if objective.reduction.name not in ("mean", "weighted_mean", "batch_mean"):
        return False
    if factor is None or factor.scope == "local":
        return objective.reduction.name != "weighted_mean" or factor is None or factor.detached
    return isinstance(factor, weighting.Gathered) and objective.reduction.name != "weighted_mean"


CASES = [
    (registry.kind, name, number)
    for registry in (weighting.registry, losses.registry)
    for name in registry.available()
    for number in range(len(registry.record(name).examples))
]
CASES = [case for case in CASES if splits(built((weighting if case[0] == "weighting" else losses).registry, *case[1:]))]


def stateful(case):
    """Whether a method of this case learns anything at all."""
    objective = made(case)
    return any(part._pending or part._rows for part in dynamics(objective))


def made(case):
    return built((weighting if case[0] == "weighting" else losses).registry, *case[1:])


def run(case, shards, micro, rank=0, world=1):
    """Losses and gradients of five steps, and all state afterwards."""
    objective = made(case).train()
    start = 0 if world == 1 else sum(shards[:rank])
    mine = torch.arange(start, start + (BATCH if world == 1 else shards[rank]))
    values, slopes = [], []
    for step in range(STEPS):
        inputs = objective.example_inputs(BATCH, seed=step)
        meta = {**example_meta(objective, BATCH), "index": INDEX}
        with torch.no_grad():
            _, items = objective.parts(*inputs, **meta)  # of the joined batch
        total = torch.zeros((), dtype=torch.float64)
        for rows in mine.chunk(micro) if len(mine) else [mine]:
            first = inputs[0][rows].requires_grad_()
            rest = [value[rows] for value in inputs[1:]]
            part = objective(first, *rest, **{key: value[rows] for key, value in meta.items()}, num_items=items)
            slope = torch.autograd.grad(part, first)[0]
            slopes.append(slope.flatten(1) if slope.ndim > 1 else slope.unsqueeze(1))
            total += part.detach()
        if world > 1:
            dist.all_reduce(total)
        values.append(total)
        objective.update("step", index=step)
        if step % 2:
            objective.update("epoch", index=step // 2)
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    return {"loss": torch.stack(values), "slope": torch.cat(slopes), **state}


def refusal(rank):
    """What each rank hears when one of them gives sample weights and the other does not."""
    loss = Objective(CRITERION_FOR["binary"](), weighting.HardNegatives().gathered())
    more = {"sample_weight": torch.ones(4)} if rank else {}
    try:
        loss(torch.zeros(4, requires_grad=True), torch.tensor([0.0, 1.0, 0.0, 0.0]), **more)
    except ValueError as error:
        return str(error)
    return "nothing"


def alone_in_evaluation(rank):
    """One rank weighs by itself where nothing is trained: no message is sent, so nobody has to answer."""
    loss = Objective(CRITERION_FOR["binary"](), weighting.HardNegatives(1.0).gathered())
    scores, target = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    if rank:
        return torch.zeros(4)
    found = loss.weights(scores, target)
    loss.eval()(scores.requires_grad_(), target)
    return found


def main(rank, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=100)
    )
    found = {"refusal": refusal(rank), "alone": alone_in_evaluation(rank)}
    for case in CASES:
        for name, shards in SHARDS.items():
            found[f"{case} {name}"] = run(case, shards, 1, rank, world)
        found[f"{case} micro"] = run(case, SHARDS["even"], 2, rank, world)
    torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
