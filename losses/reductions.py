r"""Reductions: how weighted terms become smaller. Each is defined by its denominator, in writing.

Notation: :math:`\ell_i` loss, :math:`w_i` weight, :math:`m_i` how many terms term i stands for (0 where masked,
``sample_weight`` where given, else 1), :math:`n_i` what it adds to a mean's denominator (1, or the class weight of a
criterion with torch's ``weight``). Where a label is several terms (:attr:`LossTerms.share`), m holds each one's share
as well, and ``none`` adds them up again.

================= ===================================================== ======================
name              value                                                 with ``num_items=k``
================= ===================================================== ======================
``mean``          sum(m w l) / sum(m n)                                 sum(m w l) / k
``weighted_mean`` sum(m w l) / sum(m w n)                               sum(m w l) / k
``sum``           sum(m w l)                                            not defined
``none``          m w l for each term, 0 where masked                   not defined
``batch_mean``    sum(m w l) / samples with a valid term, each m times  sum(m w l) / k
``sequence_mean`` mean over sequences of sum_t(m w l) / sum_t(m n)      sum over sequences / k
``group_mean``    mean over groups present of sum_g(m w l) / sum_g(m n) sum over groups / k
``LogMeanExp(t)`` t log(sum(m exp(w l / t)) / sum(m))                   not defined
================= ===================================================== ======================

A denominator of 0 (empty batch, everything masked) gives 0, attached to the graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from torch import Tensor

from reweigh.weighting.algebra import segment_sum
from reweigh.weighting.config import Configured, check_choice, check_number, readable
from reweigh.weighting.terms import LossTerms

Empty = Literal["zero", "nan"]


class Reduction(Configured, ABC):
    """Makes weighted terms smaller.

    Args:
        empty: What a denominator of 0 gives: ``"zero"`` (attached to the graph) or ``"nan"`` (torch's behaviour).
    """

    name: str

    def __init__(self, *, empty: Empty = "zero") -> None:
        self.empty = check_choice(self, "empty", empty, ("zero", "nan"))

    @abstractmethod
    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        """Numerator (0-d) and denominator. Add each over micro-batches and ranks, then divide, to get the exact mean.

        Args:
            weighted: ``(*S)`` weights times losses.
            weights: ``(*S)`` weights, ``None`` for ones.
            terms: The loss terms.
        """

    def __call__(
        self,
        weighted: Tensor,
        weights: Tensor | None,
        terms: LossTerms,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """The reduced loss; ``num_items`` replaces the denominator."""
        return self.finish(*self.parts(weighted, weights, terms), num_items)

    def summed(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        """What adds up over pieces of a batch: numerator and denominator (0 where there is none)."""
        return self.parts(weighted, weights, terms)

    def finish(self, numerator: Tensor, denominator: Tensor | float, num_items: float | Tensor | None = None) -> Tensor:
        """The value of sums over all pieces."""
        if num_items is not None:
            return numerator / _items(num_items, numerator)
        return self._divide(numerator, denominator)

    def lift(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> LossTerms:
        """Terms of the next level: what an outer objective weighs. By default one scalar term."""
        return LossTerms(self(weighted, weights, terms))

    def _divide(self, numerator: Tensor, denominator: Tensor | float) -> Tensor:
        if not isinstance(denominator, Tensor):
            return numerator / (denominator if denominator > 0 or self.empty == "nan" else 1.0)
        if self.empty == "nan":
            return numerator / denominator
        return numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator))


def _items(num_items: float | Tensor, like: Tensor) -> float | Tensor:
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
        if readable(num_items) and not 0.0 <= float(num_items) < math.inf:
            raise ValueError(f"num_items must be finite and >= 0, got {float(num_items):g}")
        items = num_items.to(device=like.device, dtype=like.dtype).reshape(())
        return torch.where(items > 0, items, torch.ones_like(items))  # nothing anywhere gives 0, not 0 / 0
    return check_number("num_items", "value", num_items, low=0.0, open_low=True)


def _mass(terms: LossTerms) -> Tensor:
    """``m * n`` of each term."""
    mass = terms.counts()
    return mass if terms.norm is None else mass * terms.norm.to(mass.dtype)


@final
class Mean(Reduction):
    """sum(m w l) / sum(m n): the plain mean over valid terms, or torch's class-weighted mean."""

    name = "mean"

    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        if terms.mask is None and terms.multiplicity is None and terms.norm is None and terms.share is None:
            return weighted.sum(), float(weighted.numel())
        return terms.times(weighted).sum(), _mass(terms).sum()


@final
class WeightedMean(Reduction):
    """sum(m w l) / sum(m w n): divided by the weights themselves, so only their ratios matter."""

    name = "weighted_mean"

    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        mass = _mass(terms)
        return terms.times(weighted).sum(), (mass if weights is None else mass * weights).sum()


class _Undivided(Reduction):
    """A reduction without a denominator."""

    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        raise ValueError(f"reduction {self.name!r} has no denominator to divide by; use 'mean'")

    def __call__(
        self,
        weighted: Tensor,
        weights: Tensor | None,
        terms: LossTerms,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        if num_items is not None:
            raise ValueError(f"num_items replaces a denominator, and reduction {self.name!r} has none; use 'mean'")
        return self._make_smaller(terms.fold(terms.times(weighted)))

    @abstractmethod
    def _make_smaller(self, value: Tensor) -> Tensor: ...


@final
class Total(_Undivided):
    """sum(m w l)."""

    name = "sum"

    def summed(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        return terms.times(weighted).sum(), 0.0

    def finish(self, numerator: Tensor, denominator: Tensor | float, num_items: float | Tensor | None = None) -> Tensor:
        return numerator

    def _make_smaller(self, value: Tensor) -> Tensor:
        return value.sum()


@final
class Unreduced(_Undivided):
    """m w l for each term, exactly 0 where masked."""

    name = "none"

    def _make_smaller(self, value: Tensor) -> Tensor:
        return value

    def lift(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> LossTerms:
        return terms._replace(loss=weighted)


@final
class BatchMean(Reduction):
    """sum(m w l) / the number of samples with at least one valid term, each counted as often as it stands for."""

    name = "batch_mean"

    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        counts = terms.fold(terms.counts())
        if (packed := _packed(terms)) is not None:
            return terms.times(weighted).sum(), _largest(counts.reshape(-1), packed).sum()
        return terms.times(weighted).sum(), _per_sample(counts).amax(-1).sum()


@final
class SequenceMean(Reduction):
    """Mean over sequences of each sequence's mean, so that long and short ones count the same.

    Where rows are packed of several sequences (``position_ids=`` of the language-model criteria), each of those counts
    the same. ``sample_weight`` of shape ``(S[0],)`` counts whole sequences, one of shape ``(*S)`` counts terms within
    them. As a criterion of an outer objective it hands on one term per sequence.

    Args:
        weighted: Divide each sequence by its weights: sum_t(m w l) / sum_t(m w n), so that only their ratios matter.
        empty: As in :class:`Reduction`.
    """

    name = "sequence_mean"

    def __init__(self, *, weighted: bool = False, empty: Empty = "zero") -> None:
        super().__init__(empty=empty)
        if not isinstance(weighted, bool):
            raise TypeError(f"SequenceMean: weighted must be True or False, got {weighted!r}")
        self.weighted = weighted

    def lift(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> LossTerms:
        if terms.loss.ndim == 0:
            raise ValueError("reduction 'sequence_mean' needs loss terms with at least one dimension, got a scalar")
        if _packed(terms) is not None:
            raise ValueError("reduction 'sequence_mean' hands on one term per row, and rows hold several sequences")
        whole = terms.multiplicity is not None and terms.multiplicity.ndim == 1
        inner = terms._replace(multiplicity=None) if whole else terms
        numerator = _per_sample(inner.times(weighted)).sum(-1)
        mass = _mass(inner)
        if self.weighted and weights is not None:
            mass = mass * weights
        denominator = _per_sample(mass).sum(-1)
        return LossTerms(
            loss=numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator)),
            mask=denominator > 0,
            group=terms.group,
            index=terms.index,
            multiplicity=terms.multiplicity if whole else None,
            extras=_of_samples(terms),
        )

    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        packed = _packed(terms)
        if packed is not None:
            return self._of_packed(weighted, weights, terms, packed)
        level = self.lift(weighted, weights, terms)
        return level.times(level.loss).sum(), level.counts().sum()

    def _of_packed(
        self, weighted: Tensor, weights: Tensor | None, terms: LossTerms, packed: Tensor
    ) -> tuple[Tensor, Tensor]:
        whole = terms.multiplicity is not None and terms.multiplicity.ndim == 1
        inner = terms._replace(multiplicity=None) if whole else terms
        times = terms.counts() if whole else (terms.counts() > 0).to(terms.loss.dtype)
        mass = _mass(inner)
        if self.weighted and weights is not None:
            mass = mass * weights
        size = segment_sum(mass.reshape(-1), packed)
        each = inner.times(weighted).reshape(-1) / torch.where(size > 0, size, torch.ones_like(size))
        counted = torch.where(size > 0, times.reshape(-1), 0.0)
        return (counted * each).sum(), _largest(counted, packed).sum()


@final
class GroupMean(Reduction):
    """Mean over the groups present of each group's mean, so that large and small groups count the same.

    Groups may have any integer names; ``group=`` is given at the call, one per sample.
    """

    name = "group_mean"

    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        counts, mass = terms.counts().reshape(-1), _mass(terms).reshape(-1)
        group = terms.spread(terms.need("group", "group_mean")).expand_as(terms.loss).reshape(-1)
        size, members = segment_sum(mass, group), segment_sum(counts, group)
        safe = torch.where(size > 0, size, torch.ones_like(size))
        present = counts / torch.where(members > 0, members, torch.ones_like(members))
        return (terms.times(weighted).reshape(-1) / safe).sum(), present.sum()


@final
class LogMeanExp(Reduction):
    r"""t log(sum(m exp(w l / t)) / sum(m)): between the mean (t to infinity) and the largest loss (t to 0).

    The value of KL-robust optimisation; its gradient in the losses are the weights of
    :class:`~reweigh.weighting.KLDRO`. It is no ratio of sums, so it takes no ``num_items``: micro-batches and ranks
    each have their own.

    Args:
        temperature: t > 0, in units of the loss.
        empty: As in :class:`Reduction`.
    """

    name = "log_mean_exp"

    def __init__(self, temperature: float = 1.0, *, empty: Empty = "zero") -> None:
        super().__init__(empty=empty)
        self.temperature = check_number(self, "temperature", temperature, low=0.0, open_low=True)

    def parts(self, weighted: Tensor, weights: Tensor | None, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        raise ValueError(f"reduction {self.name!r} is no ratio of sums over terms; use 'mean' with the weighting KLDRO")

    def __call__(
        self,
        weighted: Tensor,
        weights: Tensor | None,
        terms: LossTerms,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        if num_items is not None:
            raise ValueError(
                f"num_items replaces a denominator, and reduction {self.name!r} is no ratio of sums; use 'mean' "
                "with the weighting KLDRO"
            )
        counts = terms.counts()
        size = counts.sum()
        some = size > 0
        top = torch.where(counts > 0, weighted.detach(), -torch.inf).amax() if counts.numel() else size
        top = torch.where(some, top, torch.zeros_like(top))
        # from the largest down: a float32 sum at 1e4 / t would be too coarse for its own gradient
        score = (weighted - top) / self.temperature + torch.where(counts > 0, counts, 1.0).log()
        held = torch.where(counts > 0, score, -torch.inf).reshape(-1)
        # where nothing counts all is minus infinity, whose gradient is not a number
        total = torch.where(some, held, torch.zeros_like(held)).logsumexp(0) if held.numel() else size
        value = top + self.temperature * (total - torch.where(some, size, torch.ones_like(size)).log())
        nothing = weighted.sum() * (0.0 if self.empty == "zero" else torch.nan)
        return torch.where(some, value, nothing)


def _packed(terms: LossTerms) -> Tensor | None:
    """``(n,)`` numbers of the sequences that rows are packed of, ``None`` where each row is one."""
    found = terms.find("sequence")
    return None if found is None else terms.spread(found).expand_as(terms.loss).reshape(-1)


def _largest(value: Tensor, key: Tensor) -> Tensor:
    """``(n,)`` the largest value >= 0 of each key, one entry per key that occurs and 0 elsewhere."""
    first = torch.searchsorted(key.sort().values, key)
    return torch.zeros_like(value).scatter_reduce(0, first, value, "amax")


def _per_sample(value: Tensor) -> Tensor:
    return (
        value.reshape(1, 1)
        if value.ndim == 0
        else value.reshape(value.shape[0], -1)
        if value.numel()
        else (value.new_zeros(value.shape[0], 1) + value.sum())
    )


def _of_samples(terms: LossTerms) -> dict[str, Tensor] | None:
    kept = {name: value for name, value in (terms.extras or {}).items() if value.ndim == 1}
    return kept or None


REDUCTIONS: dict[str, type[Reduction]] = {
    cls.name: cls for cls in (Mean, WeightedMean, Total, Unreduced, BatchMean, SequenceMean, GroupMean)
}

ReductionName = Literal["mean", "weighted_mean", "sum", "none", "batch_mean", "sequence_mean", "group_mean"]


def as_reduction(owner: object, value: Reduction | str) -> Reduction:
    """The object that a ``reduction=`` argument means."""
    if isinstance(value, Reduction):
        return value
    return REDUCTIONS[check_choice(owner, "reduction", value, tuple(REDUCTIONS))]()
