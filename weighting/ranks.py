"""Bringing rows of all ranks together: one small message about sizes, one with everything."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .config import owner_name


class Shard(NamedTuple):
    """How the joined rows lie on the ranks."""

    sizes: tuple[int, ...]
    rank: int

    @property
    def rows(self) -> tuple[int, int]:
        """First and one past the last of this rank's rows."""
        start = sum(self.sizes[: self.rank])
        return start, start + self.sizes[self.rank]


def shards(owner: object, sizes: Sequence[int], about: str, device: torch.device) -> list[Shard]:
    """How many rows every rank has of each of several things, in one message.

    Args:
        owner: Head of the error message.
        sizes: Number of this rank's rows of each thing.
        about: What the rows are; all ranks must say the same.
        device: Where the message travels.

    Raises:
        ValueError: On every rank, if ranks say different things.
    """
    header = torch.tensor([*sizes, zlib.crc32(about.encode())], device=device)
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size())]
    dist.all_gather(headers, header)
    found = torch.stack(headers).tolist()
    mine = found[dist.get_rank()][-1]
    others = [rank for rank, row in enumerate(found) if row[-1] != mine]
    if others:
        raise ValueError(
            f"{owner_name(owner)}: all ranks must give the same kinds of inputs; rank {dist.get_rank()} gives {about}, "
            f"other than rank {', '.join(map(str, others))}"
        )
    columns = list(zip(*found, strict=True))[:-1]
    return [Shard(tuple(column), dist.get_rank()) for column in columns]


def collect(value: Tensor, shard: Shard) -> Tensor:
    """``(n, ...)`` of every rank as ``(N, ...)`` in rank order, without gradient. Every rank must call it."""
    most = max(shard.sizes)
    if most == 0 or value.shape[1:].numel() == 0:
        return value.new_empty(sum(shard.sizes), *value.shape[1:])
    padded = value.new_zeros(most, *value.shape[1:])
    padded[: value.shape[0]] = value
    parts = [torch.empty_like(padded) for _ in shard.sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, shard.sizes, strict=True)])
