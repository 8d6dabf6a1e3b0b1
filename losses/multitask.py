"""Several tasks' losses as one: named, some of them absent, balanced by any weighting over tasks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reweigh.weighting.algebra import Frozen, is_node
from reweigh.weighting.base import Weighting, learned_parameters
from reweigh.weighting.dynamics import Dynamic, Event, Sync, dynamics
from reweigh.weighting.tasks.base import TaskWeighting
from reweigh.weighting.tasks.fixed import Fixed
from reweigh.weighting.terms import LossTerms

from .criteria.gradients import Shared
from .criteria.task import Counts, Losses, Mask, TaskLosses
from .objective import Objective


class TaskWeights(dict[str, Tensor]):
    """Weights by task name. Called with losses, it says what they would be for those: ``loss.weights(losses)``."""

    def __init__(self, values: Mapping[str, Tensor], ask: Any) -> None:
        super().__init__(values)
        self._ask = ask

    def __call__(self, *inputs: Any, **meta: Any) -> Tensor:
        """``(K,)`` weights for given losses, 0 for absent tasks. Changes no state."""
        found: Tensor = self._ask(*inputs, **meta)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class MultiTaskLoss(Objective):
    r"""The losses of several tasks, each times its weight, as one scalar.

    .. math:: \text{total} = \sum_{k\ \text{present}} w_k L_k \;(+\ \text{what the method's own total adds})

    - :math:`L_k`: loss of task :math:`k`; with ``init="first"`` divided by its first training loss
    - :math:`w_k`: what the weighting says: :math:`\partial\,\text{total} / \partial L_k`

    Weights and statistics:
        Adaptive weights are constants in the backward pass, learned ones (:class:`~reweigh.weighting.Uncertainty`)
        parameters of this module. In training mode, with gradient enabled, each call is observed; ``update("step")``
        after the optimizer's step, ``update("epoch")`` and ``update("validation")``, or the Lightning callback, let the
        weights move.

    Several processes:
        A training call adds the losses over ranks (one all-reduce of ``3 K + 1`` numbers), so that all ranks have the
        same weights and total, and gradients averaged as DDP does are those of the joined batch. Every rank must call
        as often as the others, with ``{}`` where it has no task. Where ranks hold unequal numbers of samples, give
        ``counts=``.

    Args:
        tasks: Their names, in order.
        weighting: A weighting over tasks, or composed of them; or constants, by name or in order. Default: all 1.
        init: ``"first"`` divides every loss by its first training loss, so that units do not matter: a strong baseline
            by itself, and a start for every method. Default ``None``.
        nonfinite: What a loss that is not finite does: ``"keep"`` (the total is not finite either; nothing is learned
            from it), ``"skip"`` (its task is absent in this batch) or ``"raise"``. The last two read the losses back, a
            synchronisation on a device. Default ``"keep"``.
        sync: How ranks are added: ``"auto"`` (torch.distributed where initialised), a function, or ``None``.

    Shapes:
        Scalars by task name, or a ``(K,)`` tensor; returns a scalar.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a task is unknown or a loss is no scalar.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], {"seg": 1.0, "depth": 0.5})
        >>> loss({"seg": torch.tensor(2.0), "depth": torch.tensor(4.0)})
        tensor(4.)
        >>> loss({"depth": torch.tensor(4.0)})
        tensor(2.)
    """

    criterion: TaskLosses

    def __init__(
        self,
        tasks: Sequence[str],
        weighting: Weighting | Mapping[str, float] | Sequence[float] | None = None,
        *,
        init: Literal["first"] | None = None,
        nonfinite: Literal["keep", "skip", "raise"] = "keep",
        sync: Sync = "auto",
    ) -> None:
        criterion = TaskLosses(tasks, init=init, nonfinite=nonfinite, sync=sync)
        if not isinstance(weighting, Weighting):
            weighting = Fixed(1.0 if weighting is None else weighting)
        for part in weighting.modules():
            if isinstance(part, TaskWeighting):
                part.bind(criterion.tasks)
            if isinstance(part, Dynamic):
                part.sync = sync
        for part in weighting.modules():
            if isinstance(part, Frozen):
                part.requires_grad_(False)  # its parameters came with the names
        super().__init__(criterion, weighting, "sum")
        self.sync = sync
        self._last: tuple[Tensor, Tensor] | None = None
        self._total: Tensor | None = None
        self._held: list[nn.Parameter] = []
        self._by_gradient = [
            type(part).__name__
            for part in dynamics(weighting)
            if isinstance(part, Weighting) and not is_node(part) and "gradient_norm" in part.needs
        ]
        self.add_state("frozen", torch.zeros((), dtype=torch.int64))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return self.criterion.tasks

    def forward(  # type: ignore[override]
        self,
        losses: Losses,
        *,
        mask: Mask | None = None,
        counts: Counts | None = None,
        shared: Shared | None = None,
        **stats: Any,
    ) -> Tensor:
        """The total.

        Args:
            losses: Scalar losses by task name; tasks that are missing are absent. Or a ``(K,)`` tensor.
            mask: Which tasks count, by name or as a ``(K,)`` bool tensor. Masked means removed.
            counts: How many samples each loss is the mean of, by name or ``(K,)``: makes means over micro-batches,
                epochs and ranks exact. 0 is absent, but the loss stays in the graph: what is NaN in it has a NaN
                gradient. Leave such a task out, or mask it.
            shared: For weightings that look at gradients (:class:`~reweigh.weighting.GradNorm`): parameters of the
                last shared layer, or the activations that it gives (dimension 0 counts samples); a tensor or several.
                In training each present task takes one partial backward pass down to it. Otherwise ignored.
            **stats: Further ``(K,)`` statistics that a weighting reads.

        Returns:
            A scalar. 0 with a zero gradient where no task is present.
        """
        given: dict[str, Any] = {"mask": mask, "counts": counts, **stats}
        if shared is not None and self._by_gradient and not self.asleep:
            given["shared"] = shared
        value = super().forward(losses, **given)
        if not torch.compiler.is_compiling():
            self._total = value.detach()
        return value

    def _weigh(self, terms: LossTerms, *, learn: bool) -> tuple[Tensor, Tensor | None]:
        learn = learn and not self.asleep
        if learn and self._by_gradient and terms.find("gradient_norm") is None:
            raise ValueError(
                f"MultiTaskLoss: {self._by_gradient[0]} looks at gradients; give shared= in training: parameters of "
                "the last shared layer, or what comes out of it"
            )
        weighted, weights = super()._weigh(terms, learn=learn)
        if weights is not None and not torch.compiler.is_compiling():
            self._last = (terms.loss.detach(), weights.detach())
        return weighted, weights

    # looking

    @property
    def weights(self) -> TaskWeights:
        """Each task's weight now, 0-d tensors by name.

        For methods that read the batch: at the losses of the last call (before any, at losses of 1). With
        ``init="first"`` they refer to the divided losses; :meth:`effective_weights` to the losses themselves.
        """
        number = self.criterion.get_buffer("number")
        ones = torch.ones(len(self.tasks), device=number.device)
        last = ones if self._last is None else self._last[0].to(number.device)
        with torch.no_grad():
            now = self._weights(LossTerms(last, category=number, num_classes=len(self.tasks)))
        return TaskWeights(dict(zip(self.tasks, now.unbind(), strict=True)), super().weights)

    def effective_weights(self, losses: Losses, **meta: Any) -> dict[str, Tensor]:
        """``d total / d loss`` of each task for given losses, 0 for absent ones. Changes no state."""
        weights = super().weights(losses, **meta)
        weights = weights / self.criterion.divisor().to(weights.dtype)
        return dict(zip(self.tasks, weights.unbind(), strict=True))

    def summary(self) -> dict[str, Tensor]:
        """Weights, unweighted losses (as given) and total of the last call, for loggers."""
        if self._last is None:
            return {}
        loss, weights = self._last
        values = {} if self._total is None else {"total": self._total}
        loss = loss * self.criterion.divisor().to(loss.dtype)
        for name, value in {"loss": loss, "weight": weights}.items():
            values.update({f"{name}/{task}": part for task, part in zip(self.tasks, value.unbind(), strict=True)})
        return values

    # learning

    def observe_after(self, losses: Losses, *, mask: Mask | None = None, counts: Counts | None = None) -> None:
        """Losses of the step's own data after the optimizer has stepped, for methods that compare (FAMO).

        Once per micro-batch, before ``update("step")``.
        """
        if not self.asleep and self.weighting is not None:
            self.weighting.observe_after(self._seen(losses, mask, counts))

    def observe_validation(self, losses: Losses, *, mask: Mask | None = None, counts: Counts | None = None) -> None:
        """Losses of one validation batch, for methods that live on them (CoBa), before ``update("validation")``."""
        self._hear_validation(self._seen(losses, mask, counts))

    @torch.no_grad()
    def _seen(self, losses: Losses, mask: Mask | None, counts: Counts | None) -> LossTerms:
        return self.criterion.terms(losses, mask=mask, counts=counts).detach()

    def _hear_validation(self, terms: LossTerms) -> None:
        """In the losses' own units: a validation may come before the first training losses that ``init`` divides by."""
        if not self.asleep:
            super()._hear_validation(terms._replace(loss=terms.loss * self.criterion.divisor().to(terms.loss.dtype)))

    def update(self, event: Event, *, index: int | None = None, **signals: Any) -> None:
        """Tell every stateful part that a step, an epoch or a validation has ended.

        Args:
            event: ``"step"``, ``"epoch"`` or ``"validation"``.
            index: Number of what has ended, from 0; one that was seen before changes nothing.
            **signals: ``losses=``: with ``"step"`` the losses after the step, with ``"validation"`` those of the
                validation, as for :meth:`observe_after` and :meth:`observe_validation`.
        """
        losses = signals.pop("losses", None)
        if losses is not None:
            if event not in ("step", "validation"):
                raise ValueError(f"MultiTaskLoss: losses= comes with 'step' or 'validation', got {event!r}")
            if index is None or any(part.awaits(event, index) for part in dynamics(self)):
                (self.observe_after if event == "step" else self.observe_validation)(losses)
        super().update(event, index=index, **signals)

    def freeze(self) -> None:
        """Hold the weights as they are: no observation, no event, no gradient into learned ones. Saved."""
        self._set_frozen(True)

    def unfreeze(self) -> None:
        """Let the weights move again."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        if frozen == self.asleep:
            return
        self.get_buffer("frozen").fill_(int(frozen))
        for part in dynamics(self):
            part.asleep = frozen
        if frozen:
            self._held = learned_parameters(self)
        for parameter in self._held:
            parameter.requires_grad_(not frozen)

    # state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        old = self.criterion.rename(state_dict, prefix + "criterion.")
        if old is not None:
            for path, part in self.named_modules(prefix=prefix.removesuffix(".")):
                if isinstance(part, TaskWeighting):
                    part.rename(state_dict, f"{path}.", old)
            new, gone = [t for t in self.tasks if t not in old], [t for t in old if t not in self.tasks]
            if new or gone:
                warnings.warn(
                    f"MultiTaskLoss: the checkpoint is of other tasks; {', '.join(new) or 'none'} start fresh, "
                    f"{', '.join(gone) or 'none'} are dropped, the others are matched by name",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._last = self._total = None
        self._set_frozen(bool(self.get_buffer("frozen")))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None, "_total": None}


def strip(module: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A model's state without that of its objectives and weightings: a clean checkpoint for inference.

    Args:
        module: The model, with its objectives.
        state: A state of it, such as ``checkpoint["state_dict"]``; default ``module.state_dict()``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, strip
        >>> model = torch.nn.ModuleDict({"net": torch.nn.Linear(1, 1), "loss": MultiTaskLoss(["seg", "depth"])})
        >>> sorted(strip(model))
        ['net.bias', 'net.weight']
    """
    heads = [f"{path}." if path else "" for path, part in module.named_modules() if isinstance(part, Dynamic)]
    found = module.state_dict() if state is None else state
    return {name: value for name, value in found.items() if not any(name.startswith(head) for head in heads)}
