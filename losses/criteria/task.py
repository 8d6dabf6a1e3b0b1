"""One loss per task as one term per task: the criterion that multi-task weightings act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from reweigh.weighting.config import check_choice, readable, watched
from reweigh.weighting.dynamics import Sync, communicates, over_ranks
from reweigh.weighting.terms import LossTerms

from .base import Criterion, upcast
from .gradients import Shared, Slopes, as_shared, norms, refuse_static_graph, slopes

Losses = Mapping[str, Tensor] | Tensor
"""Scalar losses by task name, or a ``(K,)`` vector in the tasks' order."""
Mask = Mapping[str, "bool | Tensor"] | Tensor
"""Which tasks count, by name or as a ``(K,)`` bool vector; a task that is not named does."""
Counts = Mapping[str, "float | Tensor"] | Tensor
"""How many samples each loss is the mean of, by name or as a ``(K,)`` vector; 1 where nothing is said."""


@final
class TaskLosses(Criterion):
    r"""One term per task, from scalar losses that are computed already.

    Where several processes train (torch.distributed is initialised, training mode, gradient enabled), one all-reduce of
    ``3 K + 1`` numbers gives every rank each task's mean over all samples: the terms' *value* is that mean, their
    *gradient* this rank's part of it. Averaging gradients over ranks, as DDP does, then is training on the joined
    batch, whatever the weighting makes of the losses, with uneven batches (``counts=``) and ranks that lack a task.

    Args:
        tasks: Their names, in order; or how many, for the names ``"0"``, ``"1"``, ...
        init: ``"first"`` divides each task's loss by its first training loss, so that all start at 1. Default ``None``.
        nonfinite: What a loss that is not finite does in this batch. ``"keep"``: the total is not finite either, as in
            torch, but nothing is learned from it. ``"skip"``: its task is absent. ``"raise"``: ``FloatingPointError``.
            The last two read the losses back, one synchronisation per call on a device. Default ``"keep"``.
        sync: How losses are added over ranks: ``"auto"``, a function, or ``None`` for each rank on its own.

    State and cadence:
        ``first`` (0 until a task is seen) and ``nonfinite_count``, ``(K,)``, set in training forwards, the same on all
        ranks; ``task_names``, so that a checkpoint of other tasks is matched by name.

    Shapes:
        Input: a mapping of scalar tensors, or ``(K,)``. Terms ``(K,)`` with the task's number as ``category``, masked
        where a task is absent, and ``extras["count"]``.

    Raises:
        ValueError: If a name is unknown, or a loss is no scalar.

    Example:
        >>> import torch
        >>> TaskLosses(["seg", "depth"]).terms({"depth": torch.tensor(2.0)}).mask
        tensor([False,  True])
    """

    provides = frozenset({"loss", "category"})
    independent = False
    pools = True
    slots = True

    def __init__(
        self,
        tasks: Sequence[str] | int,
        *,
        init: Literal["first"] | None = None,
        nonfinite: Literal["keep", "skip", "raise"] = "keep",
        sync: Sync = "auto",
    ) -> None:
        super().__init__()
        names = tuple(map(str, range(tasks))) if isinstance(tasks, int) else tuple(tasks)
        if isinstance(tasks, str) or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"TaskLosses: tasks must be a sequence of names or a number, got {tasks!r}")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"TaskLosses: tasks must be one or more different names, got {list(names)!r}")
        if any("\n" in name for name in names):
            raise ValueError(f"TaskLosses: a task's name must be one line, got {list(names)!r}")
        if init is not None:
            check_choice(self, "init", init, ("first",))
        self.tasks = names
        self._places = {name: place for place, name in enumerate(names)}
        self.init = init
        self.nonfinite = check_choice(self, "nonfinite", nonfinite, ("keep", "skip", "raise"))
        self.sync = sync
        self._walked = False
        self.add_table("number", torch.arange(len(names)))
        self.add_state("task_names", encode(names))
        self.add_state("first", torch.zeros(len(names), dtype=torch.float64))
        self.add_state("nonfinite_count", torch.zeros(len(names), dtype=torch.int64))

    def terms(
        self,
        *inputs: Any,
        mask: Mask | None = None,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        **stats: Any,
    ) -> LossTerms:
        """Loss terms, one per task.

        Args:
            *inputs: The losses: a mapping by task name, in which absent tasks are missing, or a ``(K,)`` tensor.
            mask: Which tasks count, by name or as a ``(K,)`` bool tensor.
            sample_weight: Not taken; weigh samples in each task's own loss.
            group: Not taken.
            index: Not taken.
            **stats: ``counts=``, how many samples each loss is the mean of, by name or ``(K,)``; ``shared=``, a tensor
                or several, parameters or activations: in training ``extras["gradient_norm"]`` is how large each task's
                gradient is there (one partial backward per present task; ``"sample_gradient_norm"``, the mean over
                samples, as well where activations are given); further ``(K,)`` statistics.
        """
        for name, value in {"sample_weight": sample_weight, "group": group, "index": index}.items():
            if value is not None:
                raise ValueError(
                    f"TaskLosses: {name} has no place here, because terms are tasks; give it to each task's own loss"
                )
        if len(inputs) != 1:
            raise TypeError(f"TaskLosses: takes the losses and nothing else, got {len(inputs)} inputs")
        counts, shared = stats.pop("counts", None), stats.pop("shared", None)
        extras = {name: self._vector(name, value) for name, value in stats.items() if value is not None}
        loss, present, missed = self._losses(inputs[0], mask)
        own = self.get_buffer("first").device
        if loss.device != own:
            raise ValueError(
                f"TaskLosses: losses are on {loss.device}, the objective's state on {own}; "
                f"move the objective: .to({str(loss.device)!r})"
            )
        count = self._counts(counts, loss)
        learn = self.training and torch.is_grad_enabled()
        found, share = None, None
        if learn and shared is not None:
            here = present if count is None else count > 0 if present is None else present & (count > 0)
            found = self._slopes(inputs[0], mask, shared, loss, here)
        if learn and communicates(self.sync):
            loss, present, count, missed, share = self._joined(loss, present, count, missed)
        elif count is not None:
            present = count > 0 if present is None else present & (count > 0)
        if learn:
            self._note(loss, present, missed)
        if found is not None:
            extras.update(self._norms(found, share, present))
        if self.init == "first":
            loss = loss / self.divisor().to(loss.dtype)
        if present is not None:
            loss = torch.where(present, loss, 0.0)
        if count is not None:
            extras["count"] = count
        return LossTerms(
            loss, mask=present, category=self.get_buffer("number"), num_classes=len(self.tasks), extras=extras or None
        )

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        """The same as :meth:`terms` with nothing but a mask."""
        return self.terms(*inputs, mask=mask)

    # reading what was given

    def _losses(self, losses: Losses, mask: Mask | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(K,)`` losses, 0 where absent; which are present (``None``: all); which were left out as not finite."""
        given = self._mask(mask)
        if isinstance(losses, Tensor):
            if losses.shape != (len(self.tasks),):
                raise ValueError(
                    f"TaskLosses: losses must hold one number per task ({', '.join(self.tasks)}), "
                    f"got shape {tuple(losses.shape)}"
                )
            loss = _widened(self, "losses", losses)
            present = torch.tensor(given, device=loss.device) if isinstance(given, list) else given
        else:
            loss, present = self._stacked(losses, given)
        missed = self._not_finite(loss, present)
        if missed is not None:
            present = ~missed if present is None else present.to(missed.device) & ~missed
            if readable(missed, wait=True) and not isinstance(losses, Tensor) and bool(missed.any()):
                # out of the graph, too: zero times a gradient that is not finite is not zero
                left = {task: bool(here) for task, here in zip(self.tasks, present.tolist(), strict=True)}
                loss, present = self._stacked(losses, list(left.values()))
        if present is not None:
            present = present.to(loss.device)
            loss = torch.where(present, loss, 0.0)
        return loss, present, missed

    def _stacked(self, losses: Mapping[str, Tensor], given: list[bool] | Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(losses, Mapping):
            raise TypeError(f"TaskLosses: losses must be a mapping by task name, got {type(losses).__name__}")
        self._known("losses", losses)
        values: list[Tensor | None] = []
        for place, task in enumerate(self.tasks):
            value = losses.get(task)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"TaskLosses: the loss of {task!r} must be a tensor, got {type(value).__name__}")
            if value is not None and value.numel() != 1:
                raise ValueError(f"TaskLosses: the loss of {task!r} must be a scalar, got shape {tuple(value.shape)}")
            if value is None or (isinstance(given, list) and not given[place]):
                values.append(None)
            else:
                values.append(_widened(self, f"the loss of {task!r}", value.reshape(())))
        here = [value for value in values if value is not None]
        if not here:  # attached to a graph of its own, so that backward() has something to do
            nothing = self.get_buffer("first").mul(0.0).requires_grad_(torch.is_grad_enabled())
            return nothing, torch.zeros_like(nothing, dtype=torch.bool)
        dtype = torch.float64 if any(value.dtype == torch.float64 for value in here) else torch.float32
        zero = here[0].new_zeros((), dtype=dtype)
        loss = torch.stack([zero if value is None else value.to(dtype) for value in values])
        present = given if isinstance(given, Tensor) else None
        if len(here) < len(values):
            held = torch.tensor([value is not None for value in values], device=loss.device)
            present = held if present is None else held & present.to(loss.device)
        return loss, present

    def _not_finite(self, loss: Tensor, present: Tensor | None) -> Tensor | None:
        """Which present losses are to be left out; ``None`` where that is not asked for, or none is."""
        if self.nonfinite == "keep":
            return None
        bad = ~loss.detach().isfinite()
        if present is not None:
            bad = bad & present.to(bad.device)
        if readable(bad, wait=True):
            if not bool(bad.any()):
                return None
            if self.nonfinite == "raise":
                at = int(bad.nonzero()[0])
                raise FloatingPointError(
                    f"TaskLosses: the loss of {self.tasks[at]!r} is {float(loss.detach()[at]):g}; "
                    "give nonfinite='skip' to leave such a task out"
                )
        return bad

    def _mask(self, mask: Mask | None) -> list[bool] | Tensor | None:
        """A list where Python may know, else a tensor."""
        if mask is None:
            return None
        if isinstance(mask, Mapping):
            self._known("mask", mask)
            flags = [mask.get(task, True) for task in self.tasks]
            for task, flag in zip(self.tasks, flags, strict=True):
                if not isinstance(flag, bool) and not (isinstance(flag, Tensor) and flag.dtype == torch.bool):
                    raise TypeError(f"TaskLosses: the mask of {task!r} must be a bool, got {flag!r}")
            if all(isinstance(flag, bool) or readable(flag) for flag in flags):
                return [bool(flag) for flag in flags]
            device = next(flag.device for flag in flags if isinstance(flag, Tensor))
            return torch.stack([torch.as_tensor(flag, device=device).reshape(()) for flag in flags])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"TaskLosses: mask must be a mapping or a bool tensor (True = counts), got {found}")
        if mask.shape != (len(self.tasks),):
            raise ValueError(
                f"TaskLosses: mask must hold one bool per task, shape ({len(self.tasks)},), got {tuple(mask.shape)}"
            )
        return [bool(flag) for flag in mask.tolist()] if readable(mask) else mask

    def _counts(self, counts: Counts | None, loss: Tensor) -> Tensor | None:
        if counts is None:
            return None
        if isinstance(counts, Mapping):
            self._known("counts", counts)
            numbers = [counts.get(task, 1.0) for task in self.tasks]
            counts = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=loss.device) for n in numbers])
        value = self._vector("counts", counts).to(device=loss.device, dtype=torch.float64)
        if readable(value) and not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(f"TaskLosses: counts must be finite and >= 0, got {value.tolist()}")
        return value

    def _vector(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"TaskLosses: {name} must be a tensor or a mapping by task, got {type(value).__name__}")
        if value.shape != (len(self.tasks),):
            raise ValueError(
                f"TaskLosses: {name} must hold one number per task, shape ({len(self.tasks)},), "
                f"got {tuple(value.shape)}"
            )
        return value

    def _known(self, name: str, given: Mapping[str, Any]) -> None:
        unknown = [task for task in given if task not in self._places]
        if unknown:
            raise ValueError(
                f"TaskLosses: {name} names {', '.join(map(repr, unknown))}; the tasks are {', '.join(self.tasks)}"
            )

    # over ranks and time

    def _joined(
        self, loss: Tensor, present: Tensor | None, count: Tensor | None, missed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Each task over all ranks: the mean as value, this rank's part of its gradient; last, how large a part."""
        here = torch.ones_like(loss, dtype=torch.float64) if count is None else count
        if present is not None:
            here = torch.where(present, here, 0.0)
        gone = torch.zeros_like(here) if missed is None else missed.to(here)
        sums = torch.where(here > 0, loss.detach().double() * here, 0.0)
        size = len(self.tasks)
        flat = over_ranks(torch.cat([sums, here, gone, here.new_ones(1)]), self.sync)
        (total, number, gone), ranks = flat[:-1].view(3, size), flat[-1]
        safe = torch.where(number > 0, number, 1.0)
        part = torch.where(here > 0, loss * (here * ranks / safe).to(loss.dtype), 0.0)
        value = (total / safe).to(loss.dtype) + (part - part.detach())
        return value, number > 0, number / ranks, gone > 0, here / safe

    def _slopes(
        self, losses: Losses, mask: Mask | None, shared: Shared, loss: Tensor, present: Tensor | None
    ) -> Slopes:
        """Gradients of this rank's losses, of those that Python does not know to be absent."""
        flags = self._mask(mask) if present is None or not readable(present) else present.tolist()
        own = [losses[place] if isinstance(losses, Tensor) else losses.get(t) for place, t in enumerate(self.tasks)]
        if isinstance(flags, list):
            own = [value if here else None for value, here in zip(own, flags, strict=True)]
        join = communicates(self.sync)
        if join and not self._walked:
            refuse_static_graph(self, own)
            self._walked = True
        return slopes(own, as_shared(self, shared), loss.detach(), join=join)

    @torch.no_grad()
    def _norms(self, found: Slopes, share: Tensor | None, present: Tensor | None) -> dict[str, Tensor]:
        """Norms as statistics: of the losses as they are weighed, 0 where a task is absent."""
        norm, per_sample = norms(found, share, self.sync)
        extras = {"gradient_norm": norm}
        if per_sample is not None:
            extras["sample_gradient_norm"] = per_sample
        for name, value in extras.items():
            if self.init == "first":
                value = value / self.divisor()
            extras[name] = value if present is None else torch.where(present, value, 0.0)
        return extras

    @torch.no_grad()
    def _note(self, loss: Tensor, present: Tensor | None, missed: Tensor | None) -> None:
        """Remember first losses, and how often one was not finite."""
        value, first = loss.detach().double(), self.get_buffer("first")
        bad = ~value.isfinite()
        here = ~bad if present is None else ~bad & present
        first.copy_(torch.where((first == 0) & here, value.abs(), first))
        if present is not None:
            bad = bad & present
        self.get_buffer("nonfinite_count").add_(bad if missed is None else bad | missed)

    def reset(self) -> None:
        super().reset()
        self.get_buffer("first").zero_()
        self.get_buffer("nonfinite_count").zero_()

    def divisor(self) -> Tensor:
        """``(K,)`` what losses are divided by: their first values where ``init`` says so and they are known, else 1."""
        first = self.get_buffer("first")
        return torch.where(first > 0, first, 1.0) if self.init == "first" else torch.ones_like(first)

    def rename(self, state: dict[str, Any], prefix: str) -> list[str] | None:
        """Rewrite a checkpoint of other tasks for these; the old names, or ``None`` where they are the same."""
        saved = state.get(prefix + "task_names")
        if not isinstance(saved, Tensor):
            return None
        old = decode(saved)
        if tuple(old) == self.tasks:
            return None
        for name in ("first", "nonfinite_count"):
            fresh, was = self.get_buffer(name).clone(), state.get(prefix + name)
            for place, task in enumerate(self.tasks):
                if task in old and isinstance(was, Tensor) and was.shape == (len(old),):
                    fresh[place] = was[old.index(task)]
            state[prefix + name] = fresh
        state[prefix + "task_names"] = self.get_buffer("task_names")
        return old

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """A vector of losses between 0.1 and 3."""
        generator = torch.Generator().manual_seed(seed)
        return ((0.1 + 2.9 * torch.rand(len(self.tasks), generator=generator, dtype=torch.float64)).to(dtype),)


def _widened(owner: object, name: str, value: Tensor) -> Tensor:
    """At least float32; a gradient too large for float16 saturates on its way back, instead of becoming infinite."""
    wide = upcast(owner, name, value)
    if value.dtype == torch.float16 and wide.requires_grad and not watched():
        most = torch.finfo(torch.float16).max
        wide.register_hook(lambda slope: slope.clamp(-most, most))  # type: ignore[no-untyped-call]
    return wide


def encode(names: Sequence[str]) -> Tensor:
    """Names as bytes: a tensor, because some checkpoint formats hold nothing else."""
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)


def decode(saved: Tensor) -> list[str]:
    """The names that :func:`encode` was given."""
    return bytes(saved.tolist()).decode().split("\n")
