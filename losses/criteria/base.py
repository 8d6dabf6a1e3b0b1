"""The first of the four nouns: what turns inputs into loss terms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from reweigh.weighting.config import owner_name, readable
from reweigh.weighting.dynamics import Dynamic
from reweigh.weighting.terms import LossTerms, mask_out


class Criterion(Dynamic, ABC):
    """Makes unreduced :class:`~reweigh.weighting.LossTerms` from inputs.

    A subclass names what it provides and implements :meth:`measure`; the mask, sample weights, groups and indices of
    the call are checked and attached here.
    """

    provides: frozenset[str] = frozenset({"loss"})
    """Statistics that its terms always carry."""
    independent: bool = True
    """Whether the terms of a sample depend on that sample alone, so that micro-batches can add up to the batch."""
    rowwise: bool = False
    """Whether all inputs may be cut along dimension 0: rows that are measured apart are the same terms."""
    elementwise: bool = False
    """Whether every entry of the first input is a term, so that weighing costs as much as measuring."""
    pools: bool = False
    """Whether terms stand for the batch as a whole: then nothing given per sample but its weight has a place."""
    slots: bool = False
    """Whether terms are so many slots in a fixed order (tasks), each of which may be empty: then no input has rows."""
    counts_inside: bool = False
    """Whether :meth:`measure` takes ``sample_weight`` itself and sets the terms' ``multiplicity``."""
    exact_gradient: bool = True
    """False where part of the formula is held constant while gradient flows through the rest."""
    accepts: frozenset[str] = frozenset()
    """Names of further inputs of :meth:`measure` that may be given by keyword, ``"index"`` of the call among them."""
    offers: frozenset[str] = frozenset()
    """Further statistics that are computed only for a weighting that needs them: :meth:`measure` gets their names as
    ``offered=`` and puts them into the terms' ``extras``."""
    whole: frozenset[int] = frozenset()
    """Positions of inputs that are not one entry per sample (a vocabulary matrix)."""
    rounds: bool = False
    """Whether it multiplies in its inputs' own dtype: then half-precision inputs give losses of that accuracy."""
    defers: bool = False
    """Whether an objective may ask for terms that are laid out only (see :mod:`reweigh.losses.chunks`)."""

    @abstractmethod
    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        """Loss terms of the inputs, 0 and neutral where ``mask`` is False or the target is ignored.

        Gets ``sample_weight=`` (checked, or ``None``) as well under ``counts_inside``, and what ``accepts`` names.
        """

    def lean(self, *inputs: Any) -> bool:
        """Whether it holds no more than a gradient of the first input takes anyway, whatever weighs its terms."""
        return False

    def observe(self, terms: LossTerms) -> None:
        """Add what is seen to pending sums and rows; called per training forward, with detached terms, no gradient."""

    @abstractmethod
    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """Random inputs for the conformance suite (four classes where there are classes); the first takes gradient."""

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        """Inputs of every kind that is accepted, by name: other shapes, soft and ignored targets."""
        return {"usual": self.example_inputs(seed=seed, dtype=dtype)}

    def terms(
        self,
        *inputs: Any,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        **stats: Any,
    ) -> LossTerms:
        """Unreduced loss terms.

        Args:
            *inputs: What the criterion compares, usually ``(logits, target)``.
            mask: Bool, True = counts; the terms' shape, or ``(S[0],)`` for whole samples. Masked means removed.
            sample_weight: Numbers >= 0, ``(S[0],)`` or the terms' shape: how many equal terms each stands for.
            group: ``(S[0],)`` integers.
            index: ``(S[0],)`` integers, positions in the data set.
            **stats: Further statistics that a weighting reads by name, ``(S[0],)`` or the terms' shape.

        Raises:
            TypeError: If a tensor has the wrong dtype.
            ValueError: If a shape or value does not fit.
        """
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{type(self).__name__}: mask must be a bool tensor (True = counts), got {found}")
        counted = self._counted(mask, sample_weight)
        given = {name: stats.pop(name) for name in self.accepts & stats.keys()}
        if "index" in self.accepts:
            given["index"] = index
        if self.counts_inside:
            given["sample_weight"] = None if sample_weight is None else self._checked(sample_weight, mask)
            sample_weight = None
        try:
            terms = self.measure(*inputs, mask=counted, **given)
        except ValueError as error:
            if mask is None and counted is not None:  # what does not fit is the sample_weight
                raise ValueError(str(error).replace("mask must", "sample_weight must")) from error
            raise
        terms = self._attach(terms, sample_weight, group, index, stats)
        if self.training and torch.is_grad_enabled() and type(self).observe is not Criterion.observe:
            with torch.no_grad():
                self.observe(terms.detach())
        return terms

    def forward(self, *inputs: Any, **meta: Any) -> Any:
        """The same as :meth:`terms`."""
        return self.terms(*inputs, **meta)

    def _counted(self, mask: Tensor | None, sample_weight: Tensor | None) -> Tensor | None:
        """The mask, without samples of weight 0: they count for nothing, so nothing they hold may spread."""
        if not isinstance(sample_weight, Tensor) or sample_weight.is_complex():
            return mask  # its own check comes with the terms' shape
        some = sample_weight != 0
        if readable(some) and bool(some.all()):
            return mask
        if some.ndim > 1 and some.shape[1:].numel() == 1:
            some = some.reshape(-1)
        if mask is None:
            return some
        few, many = sorted((mask, some), key=lambda part: part.ndim)
        if few.shape != many.shape[: few.ndim]:
            return mask
        return few.reshape(few.shape + (1,) * (many.ndim - few.ndim)) & many

    def _attach(
        self,
        terms: LossTerms,
        sample_weight: Tensor | None,
        group: Tensor | None,
        index: Tensor | None,
        stats: dict[str, Any],
    ) -> LossTerms:
        for name, value in {"group": group, "index": index, **stats}.items():
            if self.pools and value is not None:
                raise ValueError(
                    f"{type(self).__name__}: {name} has no place here, because its terms stand for the whole batch"
                )
        if sample_weight is not None:
            terms = terms._replace(multiplicity=self._sample_weight(sample_weight, terms))
        if group is not None:
            terms = terms._replace(group=_only_counted(self._per_sample("group", group, terms.loss.shape[:1]), terms))
        if index is not None:
            terms = terms._replace(index=self._per_sample("index", index, terms.loss.shape[:1]))
        if stats:
            extras = dict(terms.extras or {})
            for name, value in stats.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{type(self).__name__}: {name} must be a tensor, got {type(value).__name__}")
                self._check_shape(name, value, terms)
                extras[name] = _only_counted(value, terms)
            terms = terms._replace(extras=extras)
        return terms

    def attach_rows(self, terms: LossTerms, rows: Mapping[str, Tensor]) -> LossTerms:
        """The terms with what a weighting reads as a row of numbers per sample, ``(S[0], K)``; 0 where masked."""
        extras = dict(terms.extras or {})
        for name, value in rows.items():
            size = terms.loss.shape[:1]
            if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[:1] != size:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a tensor of {tuple(size)} rows, one per sample, got {found}"
                )
            if terms.mask is not None and terms.mask.numel():
                value = value.masked_fill(~terms.mask.reshape(len(value), -1).any(1, keepdim=True), 0.0)
            extras[name] = value
        return terms._replace(extras=extras)

    def _check_shape(self, name: str, value: Tensor, terms: LossTerms) -> None:
        shape = tuple(terms.loss.shape if terms.share is None else terms.loss.shape[:-1])
        if tuple(value.shape) not in (shape, shape[:1]):
            raise ValueError(
                f"{type(self).__name__}: {name} must have the terms' shape {shape} or {shape[:1]}, "
                f"got {tuple(value.shape)}"
            )

    def _sample_weight(self, value: Tensor, terms: LossTerms) -> Tensor:
        value = self._real(value)
        self._check_shape("sample_weight", value, terms)
        return self._in_range(_only_counted(value.to(terms.loss.dtype), terms))

    def _checked(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """A sample weight whose shape :meth:`measure` has to check."""
        value = self._real(value)
        covered = mask_out(value, mask, 0.0) if mask is not None and mask.shape == value.shape else value
        return self._in_range(covered)

    def _real(self, value: Tensor) -> Tensor:
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{type(self).__name__}: sample_weight must be a real tensor, got {_kind(value)}")
        if value.ndim > 1 and value.shape[1:].numel() == 1:
            value = value.reshape(-1)  # (B, 1) is one weight per sample, whatever the terms' shape
        return value if value.is_floating_point() else value.double()

    def _in_range(self, value: Tensor) -> Tensor:
        if readable(value) and value.numel():
            low, high = (float(edge) for edge in value.detach().aminmax())
            if not (low >= 0.0 and high < math.inf):
                raise ValueError(
                    f"{type(self).__name__}: sample_weight must be finite and >= 0, got {high if low >= 0.0 else low:g}"
                )
        return value

    def _per_sample(self, name: str, value: Tensor, shape: torch.Size) -> Tensor:
        if not is_index(value):
            raise TypeError(f"{type(self).__name__}: {name} must be an integer tensor, got {_kind(value)}")
        if value.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: {name} must hold one integer per sample, shape {tuple(shape)}, "
                f"got {tuple(value.shape)}"
            )
        return value.long()


def _only_counted(value: Tensor, terms: LossTerms) -> Tensor:
    """What came with the call, 0 where its terms are masked (for one value per sample: where all of them are)."""
    if terms.mask is None or value.ndim == terms.mask.ndim:
        return mask_out(value, terms.mask, 0.0)
    return mask_out(value, terms.mask.flatten(value.ndim).any(-1), 0.0)


def is_index(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of integers."""
    return isinstance(value, Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def floating(owner: object, name: str, value: object) -> Tensor:
    """A value that must be a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{owner_name(owner)}: {name} must be a floating-point tensor, got {_kind(value)}")
    return value


def upcast(owner: object, name: str, value: Any) -> Tensor:
    """A floating tensor in at least float32."""
    found = floating(owner, name, value)
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def expand_mask(owner: object, mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of the terms' shape from one that has it, or covers its first dimensions."""
    if mask.shape == shape[: mask.ndim] and mask.ndim <= len(shape):
        return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)).expand(shape)
    raise ValueError(
        f"{type(owner).__name__}: mask must have the terms' shape {tuple(shape)} or its first dimensions, "
        f"got {tuple(mask.shape)}"
    )
