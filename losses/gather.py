"""Joining the shards of all ranks into one batch, in rank order and with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reweigh.weighting.config import owner_name
from reweigh.weighting.dynamics import communicates
from reweigh.weighting.ranks import Shard, collect, shards


class _Join(torch.autograd.Function):
    """Every rank's rows in rank order. Backward adds what all ranks want and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: Shard) -> Tensor:
        ctx.rows = shard.rows
        return collect(value, shard)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        slope = slope.contiguous().clone()
        if slope.numel():
            dist.all_reduce(slope)
        start, stop = ctx.rows
        return slope[start:stop], None


def join(value: Tensor, shard: Shard) -> Tensor:
    """``(n, ...)`` of every rank as ``(N, ...)`` in rank order, with gradients. Every rank must call it."""
    joined: Tensor = _Join.apply(value, shard)  # type: ignore[no-untyped-call]
    return joined


def join_samples(
    owner: object, points: Tensor, given: dict[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor | None], Shard] | None:
    """The joined batch: ``points`` with gradients, and what was given per sample; ``None`` where there is one process.

    Two small messages go before: shapes (uneven and empty shards are allowed), then all that was given, in one.

    Raises:
        ValueError: If something is not ``(n,)``, or ranks differ in the width or dtype of ``points``, in whether these
            have gradient, or in what else they give.
        TypeError: If something given is not a real tensor.
    """
    if not communicates("auto"):
        return None
    size, names = points.shape[0], [name for name, value in given.items() if value is not None]
    columns: list[Tensor] = []
    for name in names:
        value = given[name]
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{owner_name(owner)}: {name} must be a real tensor, got {_found(value)}")
        if value.shape != (size,):
            raise ValueError(
                f"{owner_name(owner)}: {name} must have shape {(size,)} to be gathered, got {tuple(value.shape)}"
            )
        value = value.to(points.device)
        columns.append(value.double().view(torch.int64) if value.is_floating_point() else value.long())
    about = [f"embeddings {points.dtype}{' with gradient' if points.requires_grad and torch.is_grad_enabled() else ''}"]
    about += [f"{name} {value.dtype}" for name, value in given.items() if value is not None]
    mine = ", ".join([f"width {points.shape[1]}", *about]).replace("torch.", "")
    (shard,) = shards(owner, [size], mine, points.device)
    out: dict[str, Tensor | None] = dict.fromkeys(given)
    if columns:
        packed = collect(torch.stack(columns, 1), shard)
        for name, column in zip(names, packed.unbind(1), strict=True):
            value = given[name]
            if value is not None:
                raw = column.contiguous()
                out[name] = (raw.view(torch.float64) if value.is_floating_point() else raw).to(value.dtype)
    return join(points, shard), out, shard


def _found(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
