"""How large each task's gradient is at a shared tensor, over one process or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reweigh.weighting.config import owner_name
from reweigh.weighting.dynamics import Sync, over_ranks

Shared = Tensor | Sequence[Tensor]
"""Where gradients of tasks are compared: parameters of the last shared layer, or what comes out of it."""


class Slopes(NamedTuple):
    """What one process knows of its tasks' gradients, each times the task's ``scale``; a sample is a row."""

    scale: Tensor
    """``(K,)`` float64: powers of two, which keep a gradient that passes float16 layers in their range."""
    flat: Tensor | None
    """``(K, P)`` gradients at parameters, where ranks will be added; else they are in ``norm``."""
    norm: Tensor
    """``(K,)`` float64 norm of everything else."""
    rows: Tensor | None
    """``(K,)`` float64 sum of norms per sample, at activations."""
    samples: int
    """How many samples those are."""


def as_shared(owner: object, shared: Shared) -> list[Tensor]:
    """A checked list. A leaf is a parameter, equal on all ranks; anything else belongs to this rank's samples."""
    parts = [shared] if isinstance(shared, Tensor) else list(shared)
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"{owner_name(owner)}: shared must be a tensor or some of them, got {shared!r}")
    if any(not part.requires_grad and part.numel() for part in parts):
        raise ValueError(
            f"{owner_name(owner)}: shared must require gradient; no task has one at a frozen or detached tensor"
        )
    if len({_samples(part) for part in parts if not _is_parameter(part)}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts if not _is_parameter(part))
        raise ValueError(
            f"{owner_name(owner)}: shared activations must have one dimension 0, that of the samples, got {shapes}"
        )
    return parts


def refuse_static_graph(owner: object, losses: Sequence[Tensor | None]) -> None:
    """``RuntimeError`` where a DDP model would take the first partial backward for the whole, and ranks drift apart."""
    front = [loss.grad_fn for loss in losses if loss is not None and loss.grad_fn is not None]
    seen = set(front)
    while front:
        node = front.pop()
        model = getattr(node, "ddp_weakref", lambda: None)()
        if getattr(model, "static_graph", False):
            raise RuntimeError(
                f"{owner_name(owner)}: gradients of single tasks cannot be taken in the first step of a "
                "DistributedDataParallel(static_graph=True), which then leaves ranks unequal; build it without"
            )
        for found, _ in node.next_functions:
            if found is not None and found not in seen:
                seen.add(found)
                front.append(found)


def slopes(losses: Sequence[Tensor | None], shared: Sequence[Tensor], value: Tensor, *, join: bool) -> Slopes:
    """One partial backward per loss that is given; the graph is kept, and no ``grad`` is touched.

    Args:
        losses: Each task's own loss, ``None`` where it has none.
        shared: From :func:`as_shared`.
        value: ``(K,)`` detached losses.
        join: Keep gradients at parameters as they are, so that ranks can add them.
    """
    fixed = [place for place, part in enumerate(shared) if _is_parameter(part)]
    moving = [place for place in range(len(shared)) if place not in fixed]
    apart = fixed if join else []
    scale = _scales(value)
    zero = scale.new_zeros(())
    norm, rows = [zero] * len(losses), [zero] * len(losses)
    kept = [(part, part.grad) for part in shared if part.retains_grad]
    flat: Tensor | None = None
    samples = _samples(shared[moving[0]]) if moving else 0
    wanted = [part for part in shared if part.requires_grad]
    if apart:
        kinds = [shared[place].dtype for place in apart]
        kind = torch.float64 if torch.float64 in kinds else torch.float32
        flat = torch.zeros(len(losses), sum(shared[p].numel() for p in apart), dtype=kind, device=value.device)
    for place, loss in enumerate(losses):
        if loss is None or not loss.requires_grad or not wanted:
            continue
        most = 2.0**15 if loss.dtype == torch.float16 else torch.inf
        scale[place].clamp_(max=most)
        found = torch.autograd.grad(
            loss,
            wanted,
            scale[place].to(loss.dtype).reshape(loss.shape),
            retain_graph=True,
            allow_unused=True,
        )
        pool = iter(found)
        grads = [_wide(next(pool)) if part.requires_grad else None for part in shared]
        if flat is not None:
            at = 0
            for p in apart:
                size, grad = shared[p].numel(), grads[p]
                if grad is not None:
                    flat[place, at : at + size] = grad.reshape(-1)
                at += size
        rest = [found for p, found in enumerate(grads) if found is not None and p not in apart]
        if rest:
            norm[place] = _norm(rest).to(zero)
        if moving:
            rows[place] = _norm_per_sample([grads[p] for p in moving], samples, zero).to(zero)
    for part, grad in kept:  # torch writes there in a partial backward, too
        part.grad = grad
    return Slopes(scale, flat, torch.stack(norm), torch.stack(rows) if moving else None, samples)


def norms(found: Slopes, share: Tensor | None, sync: Sync) -> tuple[Tensor, Tensor | None]:
    """``(K,)`` norms of each task's gradient, and mean norms per sample where activations are shared.

    With a ``share`` (this rank's part of each task's samples) those of the joined batch: the same on all ranks.
    """
    scale = found.scale
    if share is None:
        return found.norm / scale, None if found.rows is None else found.rows / scale / max(found.samples, 1)
    part = share / scale
    square = torch.zeros_like(scale)
    if found.flat is not None:
        some = (share > 0).unsqueeze(1)
        own = torch.where(some, found.flat * part.unsqueeze(1).to(found.flat.dtype), 0.0)
        square = torch.linalg.vector_norm(over_ranks(own, sync), dim=1).double().square().to(scale)
    if found.rows is None:
        return square.sqrt(), None
    sums = torch.where(share > 0, torch.stack([found.norm, found.rows]) * part, 0.0)
    sums = torch.cat([sums[0].square(), sums[1], scale.new_full((1,), float(found.samples))])
    sums = over_ranks(sums, sync)
    size = len(scale)
    return (square + sums[:size]).sqrt(), sums[size:-1] / sums[-1].clamp_min(1.0)


def _is_parameter(part: Tensor) -> bool:
    return part.is_leaf and part.requires_grad and part.numel() > 0


def _samples(part: Tensor) -> int:
    return part.shape[0] if part.ndim else 1


def _scales(value: Tensor) -> Tensor:
    """Powers of two: near 1024 over each loss, or over its root below 1, where gradients may fall with the error."""
    exponent = torch.frexp(value.abs().double())[1].clamp(-200, 200)
    return torch.exp2(10.0 - torch.where(exponent > 0, exponent, exponent // 2).double())


def _wide(grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    grad = grad.detach()
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    return grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad


def _norm(grads: list[Tensor]) -> Tensor:
    found = [torch.linalg.vector_norm(grads[0])] if len(grads) == 1 else list(torch._foreach_norm(grads))
    whole: Tensor = torch.linalg.vector_norm(torch.stack([norm.double() for norm in found]))
    return whole


def _norm_per_sample(grads: list[Tensor | None], samples: int, zero: Tensor) -> Tensor:
    """The sum over samples of the norm of what belongs to each."""
    known = [grad.reshape(samples, -1) for grad in grads if grad is not None and samples]
    if not known:
        return zero
    each = torch.stack([torch.linalg.vector_norm(grad, dim=1).double() for grad in known])
    total: Tensor = torch.linalg.vector_norm(each, dim=0).sum()
    return total
