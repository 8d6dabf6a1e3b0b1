"""Schedules: any float hyper-parameter of a weighting or logit transform may be one.

A schedule is a function of how many optimizer steps (``by="step"``) or epochs (``by="epoch"``) are behind us. Its
position is state: it is saved, resumed, and moved by the same events as everything else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from .config import as_table, check_choice, check_number, check_whole
from .dynamics import Dynamic

By = Literal["step", "epoch"]


class Schedule(Dynamic, ABC):
    """A number that depends on training progress."""

    by: By

    def __init__(self, by: By) -> None:
        super().__init__()
        check_choice(self, "by", by, ("step", "epoch"))
        self.by = by
        self.update_on = by
        self.track_events()

    @abstractmethod
    def at(self, position: Tensor) -> Tensor:
        """The value after ``position`` steps or epochs, a 0-d float64 tensor. Pure."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value it can take, so that owners can check their rules at construction."""

    def forward(self) -> Tensor:
        """The value now."""
        return self.at(self.position(self.by).to(torch.float64))


class _Ramp(Schedule):
    """From ``start`` to ``end`` over ``duration``, after ``delay``; subclasses shape the way."""

    def __init__(self, start: float, end: float, *, duration: int, delay: int = 0, by: By = "epoch") -> None:
        super().__init__(by)
        self.start, self.end = check_number(self, "start", start), check_number(self, "end", end)
        self.duration = check_whole(self, "duration", duration, low=1)
        self.delay = check_whole(self, "delay", delay)

    @abstractmethod
    def shape(self, share: Tensor) -> Tensor:
        """How much of the way lies behind when ``share`` of the time does; from 0 to 1."""

    def at(self, position: Tensor) -> Tensor:
        share = ((position - self.delay) / self.duration).clamp(0.0, 1.0)
        return self.start + (self.end - self.start) * self.shape(share)

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


@final
class Linear(_Ramp):
    r"""From ``start`` to ``end`` in a straight line over ``duration``, after ``delay``.

    Example:
        >>> import torch
        >>> gamma = Linear(0.0, 2.0, duration=4, by="epoch")
        >>> gamma.update("epoch")
        >>> gamma().item()
        0.5
    """

    def shape(self, share: Tensor) -> Tensor:
        return share


@final
class Cosine(_Ramp):
    """From ``start`` to ``end`` along half a cosine wave over ``duration``, after ``delay``."""

    def shape(self, share: Tensor) -> Tensor:
        return 0.5 * (1.0 - torch.cos(math.pi * share))


@final
class Piecewise(Schedule):
    """Constant pieces: ``values[k]`` from ``milestones[k - 1]`` on, ``values[0]`` before the first milestone.

    ``Piecewise([0.0, 0.9999], [160])`` on the ``beta`` of ``EffectiveNumber`` is deferred re-weighting (DRW).

    Example:
        >>> beta = Piecewise([0.0, 0.9999], [1], by="epoch")
        >>> before = beta().item()
        >>> beta.update("epoch", index=0)
        >>> before, beta().item()
        (0.0, 0.9999)
    """

    def __init__(self, values: Sequence[float], milestones: Sequence[int], *, by: By = "epoch") -> None:
        super().__init__(by)
        table = as_table(self, "values", values, low=-math.inf)
        self.milestones = tuple(check_whole(self, "milestones", m) for m in milestones)
        if len(self.milestones) != table.numel() - 1 or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"{type(self).__name__}: milestones must be increasing and one fewer than values, "
                f"got {list(milestones)!r} for {table.numel()} values"
            )
        self.add_table("values", table)
        self.add_table("edges", torch.tensor(self.milestones, dtype=torch.float64))

    def at(self, position: Tensor) -> Tensor:
        passed = (position >= self.get_buffer("edges")).sum()
        return (
            self.get_buffer("values").gather(0, passed.reshape(1)).reshape(())
        )  # values[passed] would read the device

    def bounds(self) -> tuple[float, float]:
        values = self.get_buffer("values")
        return float(values.min()), float(values.max())


def check_hyper(owner: object, name: str, value: float | Schedule, **rules: Any) -> float | Schedule:
    """A hyper-parameter that may be a schedule: check the number, or both ends of the schedule's range."""
    if isinstance(value, Schedule):
        for bound in value.bounds():
            check_number(owner, name, bound, **rules)
        return value
    return check_number(owner, name, value, **rules)


def has_schedule(module: nn.Module) -> bool:
    """Whether one of a module's own hyper-parameters is a schedule."""
    return any(isinstance(child, Schedule) for child in module.children())


def value_of(hyper: float | Schedule) -> float | Tensor:
    """The number a hyper-parameter stands for now."""
    return hyper() if isinstance(hyper, Schedule) else hyper
