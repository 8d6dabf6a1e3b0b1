"""The second of the four nouns: something that looks at loss terms and gives each a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .dynamics import Dynamic
from .registry import Registry
from .terms import LossTerms

if TYPE_CHECKING:
    from . import algebra
    from .schedules import By, Schedule

Feed = Literal["validation", "after"]
"""What a weighting lives on beside training forwards: losses on validation data, losses after the optimizer step."""

Scope = Literal["local", "scaled", "global"]
"""What a weight depends on: its own term, constants and stored state (``local``); that times one detached number of
the batch (``scaled``); other terms of the batch in any other way (``global``, always a correct answer)."""

SCOPES: tuple[Scope, ...] = ("local", "scaled", "global")


class Weighting(Dynamic, ABC):
    r"""Gives one non-negative weight per loss term.

    Look and learn are split: :meth:`weigh` is pure, :meth:`observe` adds up what this rank sees, and events
    (:meth:`update`) commit it. A subclass declares what it reads and how, and overrides :meth:`weigh`; one with state
    overrides ``observe``, ``commit`` and ``refresh`` as well.

    Weightings compose: ``a * b``, ``2 * a``, ``a + b``, ``a ** p``, ``a.clip(max=5)``, ``a.normalize()``,
    ``a.detach()`` and the other methods below build the nodes of :mod:`reweigh.weighting.algebra`.
    """

    needs: frozenset[str] = frozenset()
    """Statistics read from the terms. Checked against what the criterion provides when an objective is built."""
    rows: frozenset[str] = frozenset()
    """Those of them that a call brings as a row of numbers per sample, ``(S[0], K)``."""
    detached: bool = True
    """Whether the weights carry no gradient (to the terms or to learned parameters)."""
    exact_gradient: bool = True
    """False where part of the formula is held constant while gradient flows through the rest."""
    scope: Scope = "global"
    """See :data:`Scope`; a weighting that does not say is taken as global."""
    feeds: frozenset[Feed] = frozenset()
    """See :data:`Feed`; drivers bring what is named here."""

    @abstractmethod
    def weigh(self, terms: LossTerms) -> Tensor:
        """Weights that broadcast to ``terms.loss``. Pure: no state changes, no random numbers."""

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        """What is added to the loss, or ``None``.

        One number (the regulariser of learned weights) is added to the reduced loss; numbers per term, ``(*S)``, are
        added to the weighted losses and reduced with them.
        """
        return None

    def observe(self, terms: LossTerms) -> None:
        """Add what is seen to pending sums. Called once per training forward, on detached terms, without gradient."""

    def observe_validation(self, terms: LossTerms) -> None:
        """The same for terms of validation data, which arrive between ``validation`` events."""

    def observe_after(self, terms: LossTerms) -> None:
        """The same for terms of the step's own data after the optimizer has stepped, before the ``step`` event."""

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Random values, ``(batch,)``, of what the call has to bring beside group and index, for the suite."""
        return {}

    def summary(self) -> dict[str, Tensor]:
        """Numbers a logger may plot, by name: 0-d or 1-d tensors."""
        return {}

    def forward(self, terms: LossTerms) -> Tensor:
        """The same as :meth:`weigh`."""
        return self.weigh(terms)

    # the algebra; each is sugar for a named node

    def __mul__(self, other: Weighting | float) -> algebra.Product:
        from .algebra import Product

        return Product(self, other)

    def __rmul__(self, other: float) -> algebra.Product:
        from .algebra import Product

        return Product(other, self)

    def __add__(self, other: Weighting | float) -> algebra.Sum:
        from .algebra import Sum

        return Sum(self, other)

    def __radd__(self, other: float) -> algebra.Sum:
        from .algebra import Sum

        return Sum(other, self)

    def __pow__(self, exponent: float | Schedule) -> algebra.Power:
        from .algebra import Power

        return Power(self, exponent)

    def clip(self, min: float | None = None, max: float | None = None) -> algebra.Clip:
        """Hold the weights in ``[min, max]``."""
        from .algebra import Clip

        return Clip(self, min=min, max=max)

    def normalize(
        self,
        over: Literal["batch", "sample", "class", "group"] = "batch",
        to: Literal["mean", "sum", "max"] = "mean",
        detach: bool = True,
    ) -> algebra.Normalize:
        """Rescale so that the weights' mean, sum or maximum is 1."""
        from .algebra import Normalize

        return Normalize(self, over=over, to=to, detach=detach)

    def detach(self) -> algebra.Detach:
        """Use the weights as constants: no gradient flows through them."""
        from .algebra import Detach

        return Detach(self)

    def where(self, condition: Weighting, otherwise: Weighting | float = 1.0) -> algebra.Where:
        """Keep these weights where ``condition`` is positive, take ``otherwise`` elsewhere."""
        from .algebra import Where

        return Where(self, condition, otherwise=otherwise)

    def warmup(self, duration: int, *, delay: int = 0, by: By = "step") -> algebra.Warmup:
        """Fade in from weight 1, in a straight line."""
        from .algebra import Warmup

        return Warmup(self, duration, delay=delay, by=by)

    def pooled(self, over: Literal["sequence", "batch", "class", "group"] = "sequence") -> algebra.Pooled:
        """Give all terms of a sequence (batch, class, group) their mean weight."""
        from .algebra import Pooled

        return Pooled(self, over=over)

    def ema(
        self, beta: float | Schedule, num_slots: int, by: Literal["category", "group", "position"] = "category"
    ) -> algebra.EMA:
        """Replace the weights by their running mean per class, group or position."""
        from .algebra import EMA

        return EMA(self, beta, num_slots=num_slots, by=by)

    def gathered(self) -> algebra.Gathered:
        """Weigh the joined batch of all ranks, in training."""
        from .algebra import Gathered

        return Gathered(self)

    def frozen(self) -> algebra.Frozen:
        """Stop learning: same weights, no more events, no gradient into learned parameters."""
        from .algebra import Frozen

        return Frozen(self)


registry: Registry[Weighting] = Registry("weighting", "reweigh.weightings", Weighting)
method = registry.method
available = registry.available
create = registry.create


def widest(scopes: Sequence[Scope]) -> Scope:
    """The largest of several scopes, ``local`` for none."""
    return SCOPES[max((SCOPES.index(scope) for scope in scopes), default=0)]


def learned_parameters(root: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of all weightings in a module tree."""
    found: dict[int, nn.Parameter] = {}
    for module in root.modules():
        if isinstance(module, Weighting):
            found.update((id(p), p) for p in module.parameters() if p.requires_grad)
    return list(found.values())


def lookup(owner: object, table: Tensor, terms: LossTerms, statistic: str = "category") -> Tensor:
    """``table[statistic]`` per term, in the loss's dtype.

    Raises:
        ValueError: If the table has another length than there are classes, or an entry is out of range.
    """
    at = _slots(owner, table.numel(), terms, statistic)
    try:
        found = nn.functional.embedding(at, table.unsqueeze(-1)).squeeze(-1)
    except IndexError as error:
        raise _out_of_range(owner, table.numel(), at, statistic) from error
    return terms.spread(found.to(terms.loss.dtype))


def tally(owner: object, value: Tensor, terms: LossTerms, size: int, statistic: str = "category") -> Tensor:
    """``(size,)`` float64 sums of ``value`` (``*S``) per slot of a statistic; raises as :func:`lookup` does."""
    at = terms.spread(_slots(owner, size, terms, statistic)).expand_as(value)
    zeros = torch.zeros(size, dtype=torch.float64, device=value.device)
    try:
        return zeros.index_add(0, at.reshape(-1), value.double().reshape(-1))
    except IndexError as error:
        raise _out_of_range(owner, size, at, statistic) from error


def _slots(owner: object, size: int, terms: LossTerms, statistic: str) -> Tensor:
    if statistic == "category" and terms.num_classes is not None and size != terms.num_classes:
        raise ValueError(
            f"{type(owner).__name__}: has {size} class weights, but the criterion has {terms.num_classes} classes"
        )
    at = terms.need(statistic, owner)
    if at.is_floating_point() or at.is_complex() or at.dtype == torch.bool:
        raise TypeError(f"{type(owner).__name__}: {statistic!r} must hold integers, got {at.dtype}")
    return at


def _out_of_range(owner: object, size: int, at: Tensor, statistic: str) -> ValueError:
    return ValueError(
        f"{type(owner).__name__}: {statistic!r} must be in [0, {size}), got {int(at.min())}..{int(at.max())}"
    )
