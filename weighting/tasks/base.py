"""What weightings over the task axis share: one term per task, in an order fixed when the objective is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..base import Scope, Weighting
from ..config import check_number, check_whole
from ..terms import LossTerms

PerTask = float | Sequence[float] | Mapping[str, float] | Tensor
"""One number for all tasks, one per task in their order, or one per task by name."""


class TaskWeighting(Weighting):
    r"""One weight per task. Terms are ``(K,)``: one loss per task.

    The weight is always the **effective weight**, :math:`\partial\,\text{total} / \partial L_k`. A method whose total
    is not :math:`\sum_k w_k L_k` says its value in :meth:`formula`; the difference is added as a constant, so value and
    gradient are both the formula's, on every rank.

    Which tasks there are is known from :meth:`bind`, which :class:`~reweigh.losses.MultiTaskLoss` calls; state is
    declared there (:meth:`prepare`). Every constructor takes ``num_tasks`` as well, for use without it, and ends with
    ``self.start(num_tasks)``.

    An absent task (masked, missing, not finite) gets weight 0 in this batch and leaves what is known of it alone.
    """

    detached = True
    scope: Scope = "global"
    symmetric: bool = True
    """Whether tasks are treated alike, so that permuting them permutes the weights; instances may set their own."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = ()
        self._by_task: dict[str, int] = {}

    # which tasks

    def start(self, num_tasks: int | None) -> None:
        """Bind at construction where the number of tasks is given."""
        if num_tasks is not None:
            self.bind(tuple(map(str, range(check_whole(self, "num_tasks", num_tasks, low=1)))))

    def bind(self, tasks: Sequence[str]) -> None:
        """Learn the tasks' names and declare state. Again with as many names: they are renamed."""
        bound = bool(self.tasks)
        if bound and len(tasks) != len(self.tasks):
            raise ValueError(
                f"{type(self).__name__}: it is bound to {len(self.tasks)} tasks ({', '.join(self.tasks)}), "
                f"got {len(tasks)}; use one weighting per objective"
            )
        self.tasks = tuple(tasks)
        if not bound:
            self.prepare(len(tasks))

    def prepare(self, num_tasks: int) -> None:
        """Declare state, pending sums and parameters for so many tasks."""

    @property
    def num_tasks(self) -> int:
        """How many tasks there are; ``ValueError`` where that is not known yet."""
        if not self.tasks:
            raise ValueError(
                f"{type(self).__name__}: the number of tasks is not known; use a MultiTaskLoss, or give num_tasks="
            )
        return len(self.tasks)

    # declaration

    def add_task_state(self, name: str, value: Tensor, *, dim: int = 0) -> None:
        """Declare state with one entry per task along ``dim``, so that loading matches it by task name."""
        self.add_state(name, value)
        self._by_task[name] = dim

    def add_task_parameter(self, name: str, value: Tensor) -> None:
        """Declare a learned number per task, of the default dtype or float32, matched by task name on loading."""
        kind = torch.get_default_dtype()
        kind = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
        self.register_parameter(name, torch.nn.Parameter(value.to(kind)))
        self._by_task[name] = 0

    def per_task(self, name: str, value: PerTask, **rules: Any) -> Tensor:
        """``(K,)`` float64 from one number, a sequence in the tasks' order, or a mapping that names every task."""
        numbers = [check_number(self, name, number, **rules) for number in self.each_task(name, value)]
        return torch.tensor(numbers, dtype=torch.float64)

    def each_task(self, name: str, value: Any) -> list[Any]:
        """One entry per task, in order, from a single one, a sequence, or a mapping that names every task."""
        if isinstance(value, Mapping):
            if set(value) != set(self.tasks):
                raise ValueError(
                    f"{type(self).__name__}: {name} must name every task ({', '.join(self.tasks)}), "
                    f"got {', '.join(map(str, value)) or 'nothing'}"
                )
            return [value[task] for task in self.tasks]
        if isinstance(value, Tensor):
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [value] * self.num_tasks
        if len(value) != self.num_tasks:
            raise ValueError(
                f"{type(self).__name__}: {name} must have one entry per task ({', '.join(self.tasks)}), "
                f"got {len(value)}"
            )
        return list(value)

    # looking and learning

    def read(self, terms: LossTerms) -> tuple[Tensor, Tensor]:
        """``(K,)`` detached float64 losses, and which of them are present and finite; the others are 0."""
        loss = terms.loss.detach().double()
        if loss.shape != (self.num_tasks,):
            raise ValueError(
                f"{type(self).__name__}: terms must be one loss per task ({', '.join(self.tasks)}), "
                f"got shape {tuple(loss.shape)}"
            )
        present = loss.isfinite() if terms.mask is None else loss.isfinite() & terms.mask
        return torch.where(present, loss, 0.0), present

    def tallies(self, terms: LossTerms) -> Tensor:
        """``(2, K)``: what to add to a pending sum of losses and of how many samples (or batches) they stand for."""
        loss, present = self.read(terms)
        count = terms.find("count")
        number = present.double() if count is None else torch.where(present, count.double(), 0.0)
        return torch.stack([loss * number, number])

    def formula(self, terms: LossTerms) -> Tensor | None:
        """The method's own total, without gradient, where it is not the weighted sum."""
        return None

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        with torch.no_grad():
            value = self.formula(terms)
            if value is None:
                return None
            own = torch.where(self.read(terms)[1], self.weigh(terms), 0.0).to(terms.loss.dtype)
            return value.to(terms.loss.dtype) - (own * terms.loss.detach()).sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskWeighting:
        before = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():  # a learned weight in bfloat16 would not move
            moved = self.get_parameter(name)
            if moved.dtype in (torch.float16, torch.bfloat16) and not moved.is_meta:
                moved.data = old.to(moved.device)
        return self

    # loading

    def rename(self, state: dict[str, Any], prefix: str, old: Sequence[str]) -> None:
        """Rewrite saved entries of the tasks ``old`` for those of today: matched by name, new ones start fresh."""
        for name, dim in self._by_task.items():
            saved = state.get(prefix + name)
            if not isinstance(saved, Tensor) or saved.ndim <= dim or saved.shape[dim] != len(old):
                continue
            fresh = (self.get_parameter(name) if name in self._parameters else self.get_buffer(name)).detach().clone()
            for place, task in enumerate(self.tasks):
                if task in old:
                    fresh.select(dim, place).copy_(saved.select(dim, old.index(task)))
            state[prefix + name] = fresh

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        missing = [name for name in self._parameters if prefix + name not in state_dict]
        for name in missing:
            state_dict[prefix + name] = self.get_parameter(name).detach()
        if missing:
            warnings.warn(
                f"{type(self).__name__}: the checkpoint has no {', '.join(prefix + n for n in missing)}; "
                "starting fresh",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def safe_ratio(above: Tensor, below: Tensor, otherwise: float = 0.0) -> Tensor:
    """``above / below``, and ``otherwise`` where ``below`` is 0."""
    known = below != 0
    return torch.where(known, above / torch.where(known, below, torch.ones_like(below)), otherwise)


def mean_of(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Means from committed :meth:`TaskWeighting.tallies`, and which tasks have any."""
    return safe_ratio(sums[0], sums[1]), sums[1] > 0


def softmax_over(logits: Tensor, present: Tensor) -> Tensor:
    """Softmax over the present tasks, 0 for the others; all 0 where there is none."""
    held = torch.where(present, logits, -torch.inf)
    top = held.amax(-1, keepdim=True)
    weights = torch.where(present, (held - torch.where(top.isfinite(), top, 0.0)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


Sums = Literal["sum_to_1", "sum_to_k"]
"""What weights are rescaled to: 1, or the number of tasks present."""
SUMS: tuple[Sums, ...] = get_args(Sums)


def summing(weights: Tensor, present: Tensor, to: str | None) -> Tensor:
    """Weights of the present tasks with another sum; ``None`` leaves them."""
    if to is None:
        return weights
    held = torch.where(present, weights, 0.0)
    unit = safe_ratio(held, held.sum())
    return unit * number_of(present) if to == "sum_to_k" else unit


def number_of(present: Tensor) -> Tensor:
    """How many tasks are present, as float64."""
    return present.sum(-1).double()
