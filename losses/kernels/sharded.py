"""Softmax cross-entropy of logits whose classes are spread over ranks (tensor parallelism), held as in one process.

Each rank has some columns of every row. Maxima, sums and the target's logit are added up over the ranks, numbers per
row and never logits; each rank then turns its own columns into their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import Rows, Spec, working_dtype


def sharded(logits: Tensor) -> bool:
    """Whether these are a DTensor. Its name tells, so that nothing is imported for other tensors."""
    return type(logits).__name__ == "DTensor"


def class_shard(logits: Tensor, dim: int) -> tuple[Tensor, int, dist.ProcessGroup | None] | None:
    """This rank's part of a DTensor, the number of its first class, and whom to ask; ``None`` for other tensors.

    Raises:
        ValueError: If it is sharded along another dimension than the classes'.
    """
    if not sharded(logits):
        return None
    try:
        from torch.distributed.tensor import DTensor, Replicate, Shard
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import DTensor, Replicate, Shard  # type: ignore[attr-defined]
    if not isinstance(logits, DTensor):
        return None
    split = [place for place, kind in enumerate(logits.placements) if not isinstance(kind, Replicate)]
    if not split:
        return logits.to_local(), 0, None
    kind = logits.placements[split[0]]
    if len(split) > 1 or not isinstance(kind, Shard) or kind.dim % logits.ndim != dim:
        raise ValueError(
            f"logits must be sharded along their classes (dimension {dim}) alone, got {logits.placements}; pass this "
            "rank's samples as logits.to_local() or redistribute them"
        )
    mesh, place = logits.device_mesh, split[0]
    size = -(-logits.shape[dim] // mesh.size(place))
    return logits.to_local(), size * mesh.get_local_rank(place), mesh.get_group(place)


def rows_of_shard(
    local: Tensor, target: Tensor, valid: Tensor | None, spec: Spec, first: int, group: dist.ProcessGroup | None
) -> Rows:
    """The numbers of rows, the same on all ranks, with gradient on ``local (N, C_local)``.

    ``spec.shares`` are those of the rank's own classes. Every rank of the group must call it.
    """
    number = local.new_tensor(0.0 if spec.shares is None else float(spec.shares.sum()), dtype=torch.float64)
    if group is not None and spec.shares is not None:
        dist.all_reduce(number, group=group)
    ce, lse, away, entropy = _ShardedRows.apply(local, target, valid, spec, first, group, number)  # type: ignore[no-untyped-call]
    return Rows(ce, lse, away, entropy)


class _ShardedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        target: Tensor,
        valid: Tensor | None,
        spec: Spec,
        first: int,
        group: dist.ProcessGroup | None,
        whole: Tensor,
    ) -> tuple[Tensor | None, ...]:
        soft = local.to(working_dtype(local.dtype), copy=True)
        if valid is not None:
            soft.masked_fill_(~valid.unsqueeze(1), 0.0)

        def over(value: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
            if group is not None:
                dist.all_reduce(value, op=how, group=group)
            return value

        classes = local.shape[1]
        high = soft.amax(1) if classes else soft.new_full((len(soft),), -torch.inf)
        high = over(high, dist.ReduceOp.MAX)
        high = torch.where(high.isfinite(), high, 0.0)
        soft.sub_(high.unsqueeze(1))
        mine = (target >= first) & (target < first + classes)
        column = torch.where(mine, target - first, 0)
        at = soft.gather(1, column.unsqueeze(1)).squeeze(1) if classes else torch.zeros_like(high)
        sums = [torch.where(mine, at, 0.0)]
        if spec.shares is not None:
            sums.append(soft @ spec.shares)
        if "entropy" in spec.offered:
            shifted = soft.clone()
            soft.exp_()
            sums.append(shifted.mul_(soft).nan_to_num_(nan=0.0).sum(1))
        else:
            soft.exp_()
        sums.append(soft.sum(1))
        found = list(over(torch.stack(sums)))
        total, at = found.pop(), found.pop(0)
        log_total = total.log()
        away = None if spec.shares is None else whole.to(total.dtype) * log_total - found.pop(0)
        entropy = log_total - found.pop(0) / total if "entropy" in spec.offered else None
        ce = log_total - at
        ctx.save_for_backward(soft, total, ce, mine, column, valid, whole)
        ctx.shares, ctx.dtype = spec.shares, local.dtype
        ctx.set_materialize_grads(False)
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return ce, high + log_total, away, entropy

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of a cross-entropy with sharded classes cannot be differentiated again")
        soft, total, ce, mine, column, valid, whole = ctx.saved_tensors
        by_ce, by_lse, by_away = (torch.zeros_like(total) if slope is None else slope for slope in slopes[:3])
        everywhere = by_ce + by_lse + (whole.to(total.dtype) * by_away if ctx.shares is not None else 0.0)
        slope = soft * (everywhere / total).unsqueeze(1)
        own = mine.nonzero().squeeze(1)
        at = (by_ce * torch.expm1(-ce) + (everywhere - by_ce) * torch.exp(-ce))[own]
        slope[own, column[own]] = at
        if ctx.shares is not None:
            slope.addr_(by_away, ctx.shares, alpha=-1.0)
        if valid is not None:
            slope.masked_fill_(~valid.unsqueeze(1), 0.0)
        return slope.to(ctx.dtype), None, None, None, None, None, None
