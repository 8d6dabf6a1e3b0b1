"""The value every part of the library speaks: a batch of losses and what is known about each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import log1mexp

NEUTRAL_LOG_PT = -math.log(2.0)
"""What ``log_pt`` and ``log_qt`` read at masked places, so that no later node meets an edge case there."""

GIVEN_AT_CALL = frozenset({"group", "index"})
"""Statistics that arrive with the call, not from the criterion."""


class LossTerms(NamedTuple):
    """A batch of unreduced losses, with the statistics that weightings look at.

    ``S`` is the shape of the losses; ``S[0]`` counts the samples. Everything is a tensor (or ``None``), so the value is
    a pytree and passes through ``torch.compile``.
    """

    loss: Tensor
    """``(*S)``, at least float32; exactly 0 where masked."""
    mask: Tensor | None = None
    """``(*S)`` bool, True = counts. ``None`` means that every term counts."""
    log_pt: Tensor | None = None
    """``(*S)`` log-probability that the model gives to the target."""
    log_qt: Tensor | None = None
    """``(*S)`` ``log(1 - p_t)`` where the criterion has it exactly; otherwise see :meth:`log_complement`."""
    target: Tensor | None = None
    """``(*S)`` class index (0 where masked), or the {0, 1} / soft target of an elementwise criterion."""
    score: Tensor | None = None
    """``(*S)`` similarity or margin, for pair criteria."""
    group: Tensor | None = None
    """``(S[0],)`` group number of each sample, given at the call."""
    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is given up for the field's own meaning
    """``(S[0],)`` position of each sample in the data set, given at the call."""
    category: Tensor | None = None
    """``(*S)`` class that a term belongs to: the target's for softmax criteria, the column for sigmoid criteria."""
    num_classes: int | None = None
    """How many categories there are."""
    multiplicity: Tensor | None = None
    """``(S[0],)`` or ``(*S)``: how many equal terms this one stands for (``sample_weight``). ``None`` means one."""
    norm: Tensor | None = None
    """``(*S)`` what a term adds to the denominator of a mean instead of 1 (torch's class-weight mean)."""
    share: Tensor | None = None
    """``(*S)`` where the last dimension lists the alternatives of one label (the two sides of a soft binary label, the
    classes of a smoothed one): the share of each, summing to 1. ``None``: every term is a label of its own."""
    extras: Mapping[str, Tensor] | None = None
    """Further statistics by name, from a third-party criterion or given at the call."""

    def find(self, name: str) -> Tensor | None:
        """The statistic ``name``, or ``None`` where it is absent."""
        if name in STATISTICS:
            value = getattr(self, name)
            return value if isinstance(value, Tensor) else None
        return None if self.extras is None else self.extras.get(name)

    def need(self, name: str, owner: object = "weighting") -> Tensor:
        """The statistic ``name``; raises ``ValueError`` saying where it has to come from."""
        value = self.find(name)
        if value is None:
            label = owner if isinstance(owner, str) else type(owner).__name__
            if name in STATISTICS and name not in GIVEN_AT_CALL:
                raise ValueError(f"{label}: the loss terms carry no {name!r}; the criterion does not provide it")
            raise ValueError(f"{label}: {name!r} is missing; pass {name}= when calling the objective")
        return value

    def log_complement(self) -> Tensor:
        """``log(1 - p_t)``: exact where the criterion has it, else derived from ``log_pt`` with a finite gradient."""
        return self.log_qt if self.log_qt is not None else log1mexp(self.need("log_pt"))

    def spread(self, per_sample: Tensor) -> Tensor:
        """View a ``(S[0],)`` tensor so that it broadcasts against ``(*S)``; a ``(*S)`` tensor is returned as it is."""
        if per_sample.ndim < self.loss.ndim:
            return per_sample.reshape(per_sample.shape + (1,) * (self.loss.ndim - per_sample.ndim))
        return per_sample

    def counts(self) -> Tensor:
        """``(*S)`` in the loss's dtype: how many terms each one stands for, 0 where masked."""
        ones = torch.ones_like(self.loss) if self.mask is None else self.mask.to(self.loss.dtype)
        return self.times(ones)

    def times(self, value: Tensor) -> Tensor:
        """``value`` (``*S``) times what each term stands for: its ``multiplicity`` and its ``share`` of a label."""
        if self.multiplicity is not None:
            value = value * self.spread(self.multiplicity).to(value.dtype)
        return value if self.share is None else value * self.share.to(value.dtype)

    def fold(self, value: Tensor) -> Tensor:
        """Sum over the alternatives of each label, where terms have any: from ``(*S)`` to one value per label."""
        return value if self.share is None else value.sum(-1)

    def detach(self) -> LossTerms:
        """The same terms, cut from the graph."""
        fields: dict[str, Any] = {
            name: value.detach() for name in self._fields if isinstance(value := getattr(self, name), Tensor)
        }
        extras = None if self.extras is None else {key: value.detach() for key, value in self.extras.items()}
        return self._replace(**fields, extras=extras)


STATISTICS = frozenset(LossTerms._fields) - {"extras", "num_classes"}
"""Names of the statistics that a :class:`LossTerms` has fields for."""


def mask_out(value: Tensor, mask: Tensor | None, fill: float) -> Tensor:
    """``value`` where ``mask`` is True and ``fill`` elsewhere; no gradient passes at masked places."""
    return value if mask is None else value.masked_fill(~mask, fill)
