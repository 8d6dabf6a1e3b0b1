"""TorchJD's scalarizers as task weightings: named, masked, saved, and driven by the same events as ours."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from reweigh.weighting.config import check_whole
from reweigh.weighting.dynamics import Event
from reweigh.weighting.tasks.base import TaskWeighting, mean_of
from reweigh.weighting.terms import LossTerms

from . import foreign

_OURS = {"DWA": "reweigh.DWA", "FAMO": "reweigh.FAMO", "UW": "reweigh.Uncertainty"}


def from_torchjd(scalarizer: nn.Module, *, seed: int = 0) -> Scalarized:
    """A scalarizer of ``torchjd.scalarization`` as a weighting for :class:`~reweigh.losses.MultiTaskLoss`.

    Total and effective weights are the scalarizer's, the latter by autograd. Added are names, absent tasks, saved
    state, several processes, and the calls it waits for (``step()`` at the epoch event, ``update(losses)`` at the step
    event, with losses given to ``observe_after``).

    - An absent task: the scalarizer is applied to the present ones. Everything in it that has one entry per task
      (weights, logits, log-variances) is cut to these.
    - What it remembers moves once per optimizer step, on the mean losses over micro-batches and ranks; a task without a
      loss in a step counts with its last one, and nothing is remembered before every task has been seen.
    - Learned parameters (UW, IMTLL) become this module's: give them to the optimizer (``parameter_groups()``).
    - Random numbers (Random) depend on ``seed`` and the step alone.

    It reads the mask and copies small tensors at every call; under ``torch.compile`` or on a busy device use the
    library's own methods where there is one.

    Args:
        scalarizer: A ``torchjd.scalarization.Scalarizer``, or any module that makes a ``(K,)`` tensor a scalar. A copy
            is taken.
        seed: For random ones.

    Raises:
        TypeError: If it is no module; at saving, if it remembers something that no checkpoint can hold.
        ValueError: When the objective is built, if it is made for another number of tasks.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, from_torchjd
        >>> class Largest(torch.nn.Module):  # as torchjd.scalarization.STCH for a small mu
        ...     def forward(self, values):
        ...         return values.max()
        >>> loss = MultiTaskLoss(["seg", "depth"], from_torchjd(Largest()))
        >>> loss({"seg": torch.tensor(2.0), "depth": torch.tensor(4.0)})
        tensor(4.)
        >>> {name: weight.item() for name, weight in loss.weights.items()}
        {'seg': 0.0, 'depth': 1.0}
    """
    if not isinstance(scalarizer, nn.Module):
        raise TypeError(f"from_torchjd: scalarizer must be a torch module, got {type(scalarizer).__name__}")
    return Scalarized(scalarizer, seed=seed)


@final
class Scalarized(TaskWeighting):
    """What :func:`from_torchjd` returns."""

    symmetric = False

    def __init__(self, scalarizer: nn.Module, *, seed: int = 0, num_tasks: int | None = None) -> None:
        super().__init__()
        inner = copy.deepcopy(scalarizer)
        self._inner = (inner,)  # in a tuple: not all of its parameters are to be learned
        self._fixed = foreign.fixtures(inner)
        self._learned: dict[str, str] = {}
        self.seed = check_whole(self, "seed", seed)
        self._steps_epochs, self._takes_after = hasattr(inner, "step"), hasattr(inner, "update")
        self.update_on = "epoch" if self._steps_epochs else "step"
        if self._takes_after:
            self.feeds = frozenset({"after"})
        self.start(num_tasks)

    @property
    def inner(self) -> Any:
        """The scalarizer."""
        return self._inner[0]

    def prepare(self, num_tasks: int) -> None:
        self.track_events()
        self.add_task_state("last", torch.full((num_tasks,), torch.nan, dtype=torch.float64))
        self.add_pending("seen", 2, num_tasks)
        if self._takes_after:
            self.add_pending("after", 2, num_tasks)
        foreign.convert(self.inner, lambda value: value.double() if value.is_floating_point() else value)
        named = dict(self.inner.named_parameters())
        values = torch.ones(num_tasks, dtype=torch.float64, requires_grad=True)
        try:
            with torch.enable_grad(), foreign.borrowed(self.inner), foreign.seeded(self.seed, values.device):
                total = self.inner(values)
            found = torch.autograd.grad(total, [values, *named.values()], allow_unused=True)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"from_torchjd: {type(self.inner).__name__} does not take {num_tasks} losses and give a scalar: {error}"
            ) from error
        for (path, parameter), slope in zip(named.items(), found[1:], strict=True):
            if slope is None:  # its own affair, such as FAMO's logits
                parameter.data = parameter.data.double()
                continue
            name = path.replace(".", "_")
            self.register_parameter(name, parameter)
            self._learned[name] = path
            if parameter.shape == (num_tasks,):
                self._by_task[name] = 0
        if self._learned:
            self.detached = False

    def _call(self, values: Tensor) -> Tensor:
        with foreign.seeded(self.seed + self.completed("step"), values.device):
            total: Tensor = self.inner(values)
        return total

    def _total(self, loss: Tensor, present: Tensor) -> Tensor:
        keep = None if bool(present.all()) else present
        with foreign.borrowed(self.inner, keep):
            return self._call(loss if keep is None else loss[keep])

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        if not bool(present.any()):
            return torch.zeros_like(loss)
        with torch.enable_grad():
            values = loss.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self._total(values, present), values)
        return slope.nan_to_num(0.0, 0.0, 0.0)

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        loss, present = self.read(terms)
        if not bool(present.any()):
            return None
        linear = (self.weigh(terms).to(terms.loss.dtype) * terms.loss.detach()).sum()
        total = self._total(loss, present)  # its gradient is that of what is learned
        return torch.where(total.isfinite(), total.to(terms.loss.dtype), linear) - linear

    # learning

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def observe_after(self, terms: LossTerms) -> None:
        if self._takes_after:
            self.accumulate("after", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        mean, known = mean_of(sums["seen"])
        last = self.get_buffer("last")
        last.copy_(torch.where(known, mean, last))
        if not bool(known.any()) or not bool(last.isfinite().all()):
            return
        self._call(last.clone())
        if self._takes_after:
            after, told = mean_of(sums["after"])
            if bool(told.any()):
                self.inner.update(torch.where(told, after, last))

    def refresh(self, event: Event, **signals: Any) -> None:
        if event == "epoch" and self._steps_epochs:
            self.inner.step()

    def reset(self) -> None:
        super().reset()
        self.get_buffer("last").fill_(torch.nan)
        if hasattr(self.inner, "reset"):
            self.inner.reset()

    # state

    def get_extra_state(self) -> Tensor:
        try:
            return foreign.pack(self.inner, self._fixed)
        except foreign.Unsaved as error:
            ours = _OURS.get(type(self.inner).__name__)
            hint = f"; use {ours}" if ours else "; keep numbers and tensors only, or write a reweigh weighting"
            raise TypeError(f"from_torchjd: {error}{hint}") from error

    def set_extra_state(self, state: Tensor) -> None:
        learned = {name: self.get_parameter(name).detach().clone() for name in self._learned}
        if not foreign.holds_data(state):
            warnings.warn(
                f"from_torchjd: the state of {type(self.inner).__name__} was never given memory, so it starts fresh; "
                "load it with load_state_dict from the file that has it",
                stacklevel=2,
            )
            return
        foreign.unpack(self.inner, state)
        device = self.get_buffer("last").device
        foreign.convert(self.inner, lambda value: value.to(device))
        with torch.no_grad():  # these were loaded, and matched by name, before
            for name, value in learned.items():
                self.get_parameter(name).copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "_extra_state"
        if key not in state_dict:
            state_dict[key] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def rename(self, state: dict[str, Any], prefix: str, old: Sequence[str]) -> None:
        super().rename(state, prefix, old)
        if state.pop(prefix + "_extra_state", None) is not None:
            warnings.warn(
                f"from_torchjd: what {type(self.inner).__name__} remembers of other tasks is dropped; it starts fresh",
                stacklevel=2,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scalarized:
        super()._apply(fn, recurse)
        device = fn(torch.zeros(0, device=self.get_buffer("last").device)).device if self.tasks else None
        if device is not None:
            foreign.convert(self.inner, lambda value: value.to(device))
            for name, parameter in self.inner.named_parameters():
                if name not in self._learned.values():
                    parameter.data = parameter.data.to(device)
        return self
