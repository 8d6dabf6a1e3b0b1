"""Joining the shards of all ranks into one batch, in rank order and with gradients."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from reweigh.weighting.config import owner_name
from reweigh.weighting.dynamics import communicates


class Shard(NamedTuple):
    """How the joined batch lies on the ranks."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def rows(self) -> tuple[int, int]:
        """First and one past the last of this rank's samples."""
        start = sum(self.sizes[: self.rank])
        return start, start + self.sizes[self.rank]


class _Join(torch.autograd.Function):
    """Every rank's rows in rank order. Backward adds what all ranks want and keeps this rank's rows."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: Shard) -> Tensor:
        ctx.rows = shard.rows
        return _collect(value, shard)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        slope = slope.contiguous().clone()
        if slope.numel():
            dist.all_reduce(slope)
        start, stop = ctx.rows
        return slope[start:stop], None


def _collect(value: Tensor, shard: Shard) -> Tensor:
    most = max(shard.sizes)
    if most == 0 or value.shape[1:].numel() == 0:
        return value.new_empty(sum(shard.sizes), *value.shape[1:])
    padded = value.new_zeros(most, *value.shape[1:])
    padded[: value.shape[0]] = value
    parts = [torch.empty_like(padded) for _ in shard.sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, shard.sizes, strict=True)])


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
    header = torch.tensor([size, zlib.crc32(mine.encode())], device=points.device)
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size())]
    dist.all_gather(headers, header)
    found = torch.stack(headers).tolist()
    others = [rank for rank, row in enumerate(found) if row[1] != int(header[1])]
    if others:
        raise ValueError(
            f"{owner_name(owner)}: all ranks must give the same kinds of inputs; rank {dist.get_rank()} gives {mine}, "
            f"other than rank {', '.join(map(str, others))}"
        )
    shard = Shard(tuple(row[0] for row in found), dist.get_rank())
    out: dict[str, Tensor | None] = dict.fromkeys(given)
    if columns:
        packed = _collect(torch.stack(columns, 1), shard)
        for name, column in zip(names, packed.unbind(1), strict=True):
            value = given[name]
            if value is not None:
                raw = column.contiguous()
                out[name] = (raw.view(torch.float64) if value.is_floating_point() else raw).to(value.dtype)
    return join(points, shard), out, shard


def _found(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
