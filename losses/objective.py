"""The law in one class: criterion x weighting -> reduction. An objective is itself a criterion, so levels nest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reweigh.weighting.algebra import is_node
from reweigh.weighting.base import Weighting, learned_parameters
from reweigh.weighting.config import check_number, readable
from reweigh.weighting.dynamics import Dynamic, Event, drive, dynamics
from reweigh.weighting.frequency import ClassCounts, ClassTable
from reweigh.weighting.functional import effective_sample_size
from reweigh.weighting.terms import GIVEN_AT_CALL, STATISTICS, LossTerms, mask_out

from .blocks import in_blocks
from .chunks import in_chunks
from .criteria.base import Criterion
from .logits import LogitTransform
from .reductions import Reduction, ReductionName, as_reduction

_TOLD: tuple[Event, ...] = ("step", "epoch", "validation")
"""Events that a training loop has to send."""
_PATIENCE = 500
"""Training calls without any event after which a warning says so."""


class Components(NamedTuple):
    """What a logger wants to know of one batch; 0-d tensors without gradient."""

    raw: Tensor
    """Mean unweighted loss over valid terms."""
    weighted: Tensor
    """The objective's value."""
    mean_weight: Tensor
    """Mean weight over valid terms."""
    effective_sample_size: Tensor
    """Kish's effective number of terms, between 1 and ``num_terms``."""
    num_terms: Tensor
    """Number of valid terms."""


class Objective(Criterion):
    r"""A loss: what a criterion measures, times what a weighting says, made smaller by a reduction.

    .. math:: L = \mathrm{reduce}_i\big(w_i\,\ell_i\big) + \text{penalty}

    Args:
        criterion: Makes the loss terms. An objective will do: the outer one weighs what the inner one's reduction
            leaves over.
        weighting: Gives one weight per term; ``None`` for 1.
        reduction: A :class:`~reweigh.losses.reductions.Reduction`, or the name of one: ``"mean"``,
            ``"weighted_mean"``, ``"sum"``, ``"none"``, ``"batch_mean"``, ``"sequence_mean"``, ``"group_mean"``.

    Weights and statistics:
        The same formula in training and evaluation mode. In training mode, with gradient enabled, stateful weightings
        observe each forward; :meth:`update` commits what they saw.

    Raises:
        TypeError: If an argument is of the wrong kind, or the weighting needs a statistic that the criterion does not
            provide.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> from reweigh.weighting import Focal, InverseFrequency
        >>> objective = Objective(CrossEntropy(), InverseFrequency([90, 10]) * Focal(1.0))
        >>> round(objective(torch.zeros(2, 2), torch.tensor([0, 1])).item(), 4)
        0.3466
    """

    def __init__(
        self,
        criterion: Criterion,
        weighting: Weighting | None = None,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(criterion, Criterion):
            raise TypeError(
                f"{type(self).__name__}: criterion must be a Criterion, got {type(criterion).__name__}"
                f"{_instead_of(criterion)}"
            )
        if weighting is not None and not isinstance(weighting, Weighting):
            where = "; it changes logits: CrossEntropy(logits=...)" if isinstance(weighting, LogitTransform) else ""
            raise TypeError(
                f"{type(self).__name__}: weighting must be a Weighting or None, got {type(weighting).__name__}{where}"
            )
        self.criterion = criterion
        self.weighting = weighting
        self.reduction = as_reduction(self, reduction)
        keeps = self.reduction.name == "none"
        self.provides = criterion.provides if keeps else frozenset({"loss"})
        self.offers = criterion.offers if keeps else frozenset()
        self._offered = frozenset() if weighting is None else weighting.needs & criterion.offers
        self.independent = criterion.independent
        self.exact_gradient = criterion.exact_gradient and (weighting is None or weighting.exact_gradient)
        for name in sorted(frozenset() if weighting is None else weighting.needs):
            if name in STATISTICS and name not in GIVEN_AT_CALL and name not in criterion.provides:
                raise TypeError(
                    f"{_needy(weighting, name)} needs {name!r}, which {type(criterion).__name__} does not provide "
                    f"(it provides {', '.join(map(repr, sorted(criterion.provides)))})"
                )
        inside = [] if weighting is None else list(dynamics(weighting))
        self._learns = any(_observes(module) for module in inside)
        self._per_forward = [module for module in inside if module.update_on == "forward"]
        self._by_class = bool(inside) and all(isinstance(m, ClassTable | ClassCounts) for m in inside)
        self._warned = False
        self._unheard = 0
        self._moves = any(module.update_on in _TOLD for module in dynamics(self))
        self._watchers: list[Any] = []
        self._validating = False

    # the law

    def forward(
        self,
        *inputs: Any,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        num_items: float | Tensor | None = None,
        **stats: Any,
    ) -> Tensor:
        """The loss.

        Args:
            *inputs: What the criterion takes, usually ``(logits, target)``.
            sample_weight: Numbers >= 0, ``(S[0],)`` or the terms' shape: 0 removes a term, 2 counts it twice.
            mask: Bool, True = counts; the terms' shape, or ``(S[0],)`` for whole samples. Masked means removed.
            group: ``(S[0],)`` integers, for weightings and reductions over groups.
            index: ``(S[0],)`` integers, positions in the data set, for per-sample state.
            num_items: Replaces the denominator: sum over micro-batches and ranks of ``loss(..., num_items=n)`` with n
                counted over all of them is the full batch's loss exactly.
            **stats: Further statistics by name, for weightings that need them.

        Returns:
            A scalar, or the terms' shape for ``reduction="none"``. 0 with a zero gradient where nothing counts.
        """
        if self._moves and self.training and not torch.compiler.is_compiling():
            self._listen()
        meta = {"mask": mask, "sample_weight": sample_weight, "group": group, "index": index, **stats}
        value = in_blocks(self, inputs, meta, num_items)
        value = in_chunks(self, inputs, meta, num_items) if value is None else value
        return self._plainly(inputs, meta, num_items) if value is None else value

    def _listen(self) -> None:
        """Say once that nobody tells weights that move of steps and epochs."""
        self._unheard += 1
        if self._unheard < _PATIENCE:
            return
        self._moves = False
        moving = [
            module
            for module in dynamics(self)
            if module.update_on in _TOLD and not module.asleep and next(module.parameters(recurse=False), None) is None
        ]  # what an optimizer moves needs no event
        if moving and not any(module.completed(event) for module in dynamics(self) for event in _TOLD):
            names = ", ".join(dict.fromkeys(type(module).__name__ for module in moving))
            warnings.warn(
                f"{type(self).__name__}: {names} would move in training, but no event has come in {_PATIENCE} training "
                "calls, so all weights are still the first ones; call update('step') after each optimizer step and "
                "update('epoch') after each epoch, or attach WeightingCallback to the Trainer",
                stacklevel=5,
            )

    def _plainly(self, inputs: tuple[Any, ...], meta: dict[str, Any], num_items: float | Tensor | None) -> Tensor:
        return self._reduced(self._measured(inputs, meta), num_items)

    def _reduced(self, terms: LossTerms, num_items: float | Tensor | None) -> Tensor:
        weighted, weights = self._weigh(terms, learn=self.training and torch.is_grad_enabled())
        if num_items is None:
            self._warn_where_weights_cancel(self._more_classes((0, 0, 0), terms))
        weighted, penalty = self._penalized(terms, weighted, weights)
        loss = self.reduction(weighted, weights, terms, num_items)
        if penalty is None:
            return loss
        if loss.ndim:
            raise ValueError(f"{type(self).__name__}: a weighting with a penalty needs a scalar reduction, not 'none'")
        return loss + penalty

    def _measured(self, inputs: tuple[Any, ...], meta: dict[str, Any]) -> LossTerms:
        """The criterion's terms, with the rows that the weighting reads and the offers that it needs."""
        offered = self._offered - meta.keys()
        if offered:
            meta = {**meta, "offered": offered | meta.get("offered", frozenset())}
        rows = {} if self.weighting is None else {name: meta[name] for name in self.weighting.rows & meta.keys()}
        if not rows:
            return self.criterion.terms(*inputs, **meta)
        rest = {name: value for name, value in meta.items() if name not in rows}
        return self.criterion.attach_rows(self.criterion.terms(*inputs, **rest), rows)

    def _penalized(self, terms: LossTerms, weighted: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weighted losses with a penalty that has one number per term added, and one that is a single number."""
        penalty = None if weights is None or self.weighting is None else self.weighting.penalty(terms, weights)
        if penalty is None or penalty.ndim == 0:
            return weighted, penalty
        return weighted + mask_out(penalty.to(weighted.dtype).expand_as(weighted), terms.mask, 0.0), None

    def terms(
        self,
        *inputs: Any,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        **stats: Any,
    ) -> LossTerms:
        """Terms of the next level: what an outer objective weighs and reduces."""
        meta = {"mask": mask, "sample_weight": sample_weight, "group": group, "index": index, **stats}
        terms = self._measured(inputs, meta)
        weighted, weights = self._weigh(terms, learn=self.training and torch.is_grad_enabled())
        weighted, _ = self._penalized(terms, weighted, weights)
        return self.reduction.lift(weighted, weights, terms)

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        """The same as :meth:`terms` with nothing but a mask."""
        return self.terms(*inputs, mask=mask)

    def _more_classes(self, seen: tuple[int, int, int], terms: LossTerms) -> tuple[int, int, int]:
        """Number of terms, least and largest class so far, where it matters that they are not all the same."""
        cancels = terms.norm is not None or (self.reduction.name == "weighted_mean" and self._by_class)
        category = terms.category
        if not cancels or self._warned or not self.training or category is None or terms.num_classes == 1:
            return seen
        if not readable(category):
            return seen
        valid = category if terms.mask is None else category[terms.mask]
        if not valid.numel():
            return seen
        low, high = (int(edge) for edge in valid.aminmax())
        number, least, most = seen
        return number + valid.numel(), min(low, least) if number else low, max(high, most) if number else high

    def _warn_where_weights_cancel(self, seen: tuple[int, int, int]) -> None:
        """Say once that a batch of one class, divided by its weights, is the unweighted loss."""
        number, least, most = seen
        if number > 1 and least == most:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: all targets of a batch have the same class, so its weight cancels in "
                f"reduction {self.reduction.name!r}; pass num_items= (the class weights summed over all "
                "micro-batches) to keep it",
                stacklevel=5,
            )

    def _weigh(self, terms: LossTerms, *, learn: bool) -> tuple[Tensor, Tensor | None]:
        if self.weighting is None:
            weights = None
        else:
            if learn and self._learns:
                with torch.no_grad():
                    self.weighting.observe(terms.detach())
                if self._per_forward:
                    drive(self._per_forward, "forward")
            elif self._validating and not learn:
                with torch.no_grad():
                    self._hear_validation(terms.detach())
            weights = self._weights(terms)
        if learn and self._watchers and not torch.compiler.is_compiling():
            for watcher in self._watchers:
                watcher(self, terms.detach(), None if weights is None else weights.detach())
        return terms.loss if weights is None else terms.loss * weights, weights

    def _hear_validation(self, terms: LossTerms) -> None:
        if self.weighting is not None:
            self.weighting.observe_validation(terms)

    def _weights(self, terms: LossTerms) -> Tensor:
        if self.weighting is None:
            return mask_out(torch.ones_like(terms.loss), terms.mask, 0.0)
        weights = self.weighting.weigh(terms)
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"{type(self.weighting).__name__}: weigh must return a tensor, got {type(weights).__name__}"
            )
        if weights.dtype != terms.loss.dtype:
            weights = weights.to(terms.loss.dtype)
        if weights.shape == terms.loss.shape:
            return mask_out(weights, terms.mask, 0.0)
        try:
            weights = weights.expand(terms.loss.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{type(self.weighting).__name__}: weights must broadcast to the terms' shape "
                f"{tuple(terms.loss.shape)}, got {tuple(weights.shape)}"
            ) from error
        return mask_out(weights, terms.mask, 0.0)

    # looking

    @torch.no_grad()
    def weights(self, *inputs: Any, **meta: Any) -> Tensor:
        """The weight each label would get, 0 where masked: the shape of ``reduction="none"``. Changes no state.

        Same arguments as the call. A label of several terms (a soft target of two sides) gets their mean by share.
        """
        meta.pop("num_items", None)
        terms = self._look(*inputs, **meta)
        weights = self._weights(terms)
        return weights if terms.share is None else terms.fold(weights * terms.share)

    @torch.no_grad()
    def components(self, *inputs: Any, **meta: Any) -> Components:
        """Raw and weighted loss, mean weight and effective sample size of a batch. Changes no state."""
        num_items = meta.pop("num_items", None)
        terms = self._look(*inputs, **meta)
        weights = self._weights(terms)
        counts = terms.counts()
        size = counts.sum()
        safe = torch.where(size > 0, size, torch.ones_like(size))
        weighted, penalty = self._penalized(terms, terms.loss * weights, weights)
        value = self.reduction(weighted, weights, terms, num_items)
        return Components(
            raw=(counts * terms.loss).sum() / safe,
            weighted=value.sum() if penalty is None else value.sum() + penalty,
            mean_weight=(counts * weights).sum() / safe,
            effective_sample_size=effective_sample_size(weights, counts),
            num_terms=size,
        )

    def parts(self, *inputs: Any, **meta: Any) -> tuple[Tensor, Tensor]:
        """Numerator (with gradient) and denominator of the reduction, for exact accumulation by hand.

        Add denominators over micro-batches and ranks, then divide. State is observed as in the call itself.
        """
        terms = self._measured(inputs, meta)
        weighted, weights = self._weigh(terms, learn=self.training and torch.is_grad_enabled())
        weighted, _ = self._penalized(terms, weighted, weights)
        numerator, denominator = self.reduction.parts(weighted, weights, terms)
        return numerator, torch.as_tensor(denominator, dtype=numerator.dtype, device=numerator.device).detach()

    def _look(self, *inputs: Any, **meta: Any) -> LossTerms:
        """The criterion's terms without letting an inner objective learn from them."""
        was = [(module, module.training) for module in self.criterion.modules() if isinstance(module, Objective)]
        for module, _ in was:
            module.training = False
        try:
            return self._measured(inputs, meta)
        finally:
            for module, training in was:
                module.training = training

    def watch(self, watcher: Any) -> Any:
        """Call ``watcher(objective, terms, weights)`` at every training forward; returns a function that stops it."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher) if watcher in self._watchers else None

    # learning

    @contextmanager
    def validation(self, *, index: int | None = None) -> Iterator[None]:
        """Validation inside, for weightings that live on it: ``with objective.validation(): ...``.

        Calls in evaluation mode, or without gradient, are observed as validation losses; leaving the block sends the
        ``validation`` event, but not where an exception does.
        """
        with self.observing_validation():
            yield
        self.update("validation", index=index)

    @contextmanager
    def observing_validation(self) -> Iterator[None]:
        """The same without the event, for drivers that send it themselves."""
        before, self._validating = self._validating, True
        try:
            yield
        finally:
            self._validating = before

    def update(self, event: Event, *, index: int | None = None, **signals: Any) -> None:
        """Tell every stateful part that a step, an epoch or a validation has ended, or (``"fit"``) what the data are.

        The one entry point that a bare loop, the Lightning callback and other drivers share. Pending sums of all parts
        are added over the ranks in one all-reduce.

        Args:
            event: ``"fit"``, ``"step"``, ``"epoch"`` or ``"validation"``.
            index: Number of what has ended, from 0; one that was seen before changes nothing.
            **signals: What the event brings; ``"fit"`` takes ``class_counts``.
        """
        drive(dynamics(self), event, index=index, **signals)

    def reweighted(self, by: Weighting) -> Objective:
        """The same objective with another factor on its weights; parts are shared, not copied."""
        return Objective(self.criterion, by if self.weighting is None else self.weighting * by, self.reduction)

    # objectives add up

    def __add__(self, other: Objective) -> Objective:
        """``a + b``: one objective whose terms are the two (:class:`~reweigh.losses.Joint`), summed."""
        from .criteria.joint import combine

        return combine((1.0, self), (1.0, other)) if isinstance(other, Objective) else NotImplemented

    def __radd__(self, other: int) -> Objective:
        """``sum`` of objectives starts with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: float) -> Objective:
        """``2.0 * a``: the objective times a number."""
        from .criteria.joint import combine

        known = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        return combine((check_number("Objective", "factor", factor, low=0.0), self)) if known else NotImplemented

    __rmul__ = __mul__

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups of the learned weights, without weight decay; empty where nothing is learned."""
        parameters: list[nn.Parameter] = learned_parameters(self)
        if not parameters:
            return []
        group: dict[str, Any] = {"params": parameters, "weight_decay": 0.0}
        return [group if lr is None else {**group, "lr": lr}]

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """Those of the criterion."""
        return self.criterion.example_inputs(batch, seed=seed, dtype=dtype)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        """Those of the criterion."""
        return self.criterion.example_variants(seed=seed, dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watchers": [], "_validating": False}


def _instead_of(criterion: object) -> str:
    """What to write in place of something that is no criterion."""
    if isinstance(criterion, Weighting):
        return "; the weighting is the second argument"
    if isinstance(criterion, nn.CrossEntropyLoss):
        return "; use CrossEntropy(), which takes its weight, ignore_index and label_smoothing"
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return "; use BinaryCrossEntropy(), which takes its weight and pos_weight"
    return "; wrap a loss function in FromLoss" if callable(criterion) else ""


def _observes(module: Dynamic) -> bool:
    """Whether a weighting takes anything from what it sees; the nodes of the algebra only pass it on."""
    if not isinstance(module, Weighting):
        return False
    own = type(module).observe is not Weighting.observe and not is_node(module)
    return own or bool(module._pending or module._rows) or module.update_on == "forward"


def _needy(weighting: Weighting | None, name: str) -> str:
    """The innermost weighting that needs a statistic, for the error message."""
    for module in [] if weighting is None else reversed(list(weighting.modules())):
        if isinstance(module, Weighting) and name in module.needs:
            return type(module).__name__
    return type(weighting).__name__
