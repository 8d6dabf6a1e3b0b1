"""Losses of logits whose classes are spread over ranks: ``python sharded_worker.py RANK WORLD INIT_FILE OUT``."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from reweigh.losses import CausalLM, CrossEntropy, Objective
from reweigh.weighting import KLDRO, TLDR, CVaR, Focal, PowerLawDecay

CLASSES = 11
CASES = {
    "plain": (CausalLM(), None),
    "decay x TLDR": (CausalLM(), PowerLawDecay([1000.0 / (v + 1) for v in range(CLASSES)], alpha=0.5) * TLDR()),
    "softmax": (CausalLM(), KLDRO(1.0)),
    "selection": (CausalLM(), CVaR(0.4)),
    "smooth": (CausalLM(label_smoothing=0.1, weight=torch.linspace(0.5, 2.0, CLASSES).tolist()), Focal(2.0)),
    "flat": (CrossEntropy(), Focal(1.0)),
}


def inputs(name):
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(3, 7, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (3, 7), generator=generator)
    labels[0, 2:4] = -100
    return (logits.flatten(0, 1), labels.flatten()) if name == "flat" else (logits, labels)


def run(spread=None):
    """Value and gradient of each case."""
    found = {}
    for name, (criterion, by) in CASES.items():
        logits, labels = inputs(name)
        at = (logits if spread is None else spread(logits)).requires_grad_()
        value = Objective(criterion, by)(at, labels)
        value.backward()
        found[name] = value.detach(), at.grad if spread is None else at.grad.full_tensor()
    return found


def refusals(mesh):
    """What is said of logits that are spread otherwise, and of a gradient that is to be differentiated."""
    from torch.distributed.tensor import Shard, distribute_tensor

    logits, labels = inputs("plain")
    said = []
    try:
        Objective(CausalLM())(distribute_tensor(logits, mesh, [Shard(1)]), labels)
    except ValueError as error:
        said.append(str(error))
    at = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    try:
        torch.autograd.grad(Objective(CausalLM())(at, labels), at, create_graph=True)
    except RuntimeError as error:
        said.append(str(error))
    return said


def main(rank, world, init, out):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    dist.init_process_group(
        "gloo",
        init_method=f"file://{init}",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=40),
    )
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (int(world),))
    cut = lambda logits: distribute_tensor(logits, mesh, [Shard(logits.ndim - 1)])  # noqa: E731
    found = {"sharded": run(cut), "copies": run(lambda logits: distribute_tensor(logits, mesh, [Replicate()]))}
    with loss_parallel():
        found["loss_parallel"] = run(cut)
    found["refusals"] = refusals(mesh)
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
