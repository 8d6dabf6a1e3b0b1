"""Criteria for language models: one loss per token."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from reweigh.weighting.frequency import ClassTable, Values
from reweigh.weighting.schedules import Schedule
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms

from ..kernels.dense import lean
from ..kernels.rows import ROW_STATISTICS
from ..kernels.sharded import sharded
from ..logits import LogitTransform
from .base import _kind, expand_mask, floating, is_index
from .element import SoftmaxCriterion
from .rows import moved_up, packed


@final
class CausalLM(SoftmaxCriterion):
    r"""Next-token cross-entropy, one term per label, with the causal shift inside.

    .. math:: \ell_{bt} = -\log p(y_{bt} \mid \text{logits}_{b,t-1})

    Terms stand where their labels stand: ``(B, T)``, the first of each sequence masked under ``shift``. Masks, sample
    weights and statistics given at the call are therefore aligned with the labels. The other arguments are those of
    :class:`~reweigh.losses.CrossEntropy`.

    Provides ``loss``, ``log_pt``, ``target`` and ``category`` (the token); ``entropy`` and ``top_entropy`` where a
    weighting needs them.

    Packed rows:
        ``position_ids=`` at the call, ``(B, T)`` counting from 0 in each sequence, tells where sequences begin: no
        label is predicted across a border, sequence means and weights (:class:`~reweigh.losses.SequenceMean`,
        ``pooled()``, ``TLDR(level="sequence")``) take each sequence for itself, and ``batch_mean`` divides by their
        number.
        :func:`packed_position_ids` makes them from ``cu_seqlens``.

    Args:
        shift: Logits at t predict the label at t + 1 (labels as the tokenizer gives them). False where the labels are
            shifted already.
        weight: Per-token weights with torch's meaning and denominator.
        ignore_index: Labels with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        logits: A transform applied to the logits first.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``logits (B, T, V)``, ``labels (B, T)``; terms ``(B, T)``.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``labels`` not integer.
        ValueError: If shapes do not fit or a label is out of range.

    Example:
        >>> import torch
        >>> CausalLM().terms(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]])).loss
        tensor([[0.0000, 1.3863, 0.0000]])
    """

    provides = frozenset({"loss", "log_pt", "target", "category"})
    offers = frozenset(ROW_STATISTICS)
    accepts = frozenset({"offered", "position_ids"})
    target_name = "labels"

    def __init__(
        self,
        *,
        shift: bool = True,
        weight: Values | str | ClassTable | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        logits: LogitTransform | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, label_smoothing, logits, validate)
        self.shift = shift

    def lean(self, *inputs: Any) -> bool:
        logits = inputs[0]
        return self.logits is None and bool(logits.is_contiguous()) and lean(logits)

    def measure(
        self,
        *inputs: Any,
        mask: Tensor | None,
        position_ids: Tensor | None = None,
        offered: frozenset[str] = frozenset(),
    ) -> LossTerms:
        if len(inputs) != 2:
            raise TypeError(f"CausalLM: takes (logits, labels), got {len(inputs)} inputs")
        logits, labels = floating(self, "logits", inputs[0]), inputs[1]
        if not is_index(labels):
            raise TypeError(f"CausalLM: labels must be token indices, got {_kind(labels)}")
        if logits.ndim != 3 or logits.shape[-1] == 0 or labels.shape != logits.shape[:2]:
            raise ValueError(
                "CausalLM: logits must be (B, T, V) and labels (B, T), "
                f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        if mask is not None:
            mask = expand_mask(self, mask, labels.shape)
        places: dict[str, Tensor] = {}
        if position_ids is not None:
            kept, places = packed(self, position_ids, labels.shape, shift=self.shift)
            mask = kept if mask is None else mask & kept
        terms = self._measured(logits, labels, mask, offered)
        return terms._replace(extras={**places, **(terms.extras or {})}) if places else terms

    def _measured(self, logits: Tensor, labels: Tensor, mask: Tensor | None, offered: frozenset[str]) -> LossTerms:
        first = int(self.shift and labels.shape[1] > 0)
        if self.lean(logits) or (self.logits is None and sharded(logits)):
            return self._whole(logits, labels.long(), mask, first, offered)
        if first:
            logits, labels = logits[:, :-1], labels[:, 1:]
            mask = None if mask is None else mask[:, 1:]
        rows, length = labels.shape
        counted = None if mask is None else mask.reshape(-1)
        flat = self._indexed(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), counted, 1, offered)
        valid = torch.ones_like(labels, dtype=torch.bool) if flat.mask is None else flat.mask.reshape(rows, length)

        def place(value: Tensor | None, fill: float) -> Tensor | None:
            return None if value is None else pad(value.reshape(rows, length), (first, 0), value=fill)

        target = place(flat.target, 0)
        return LossTerms(
            loss=pad(flat.loss.reshape(rows, length), (first, 0)),
            mask=flat.mask if flat.mask is None and not first else pad(valid, (first, 0), value=False),
            log_pt=place(flat.log_pt, NEUTRAL_LOG_PT),
            log_qt=place(flat.log_qt, NEUTRAL_LOG_PT),
            target=target,
            category=target,
            num_classes=flat.num_classes,
            norm=place(flat.norm, 0.0),
            extras=None if flat.extras is None else {k: place(v, 0.0) for k, v in flat.extras.items()},  # type: ignore[misc]
        )

    def _whole(
        self, logits: Tensor, labels: Tensor, mask: Tensor | None, first: int, offered: frozenset[str]
    ) -> LossTerms:
        """Many classes: the shift moves labels, because moving logits would copy them."""
        shape, valid = labels.shape, self._valid(labels, mask)
        if valid is not None:
            labels = labels.masked_fill(~valid, 0)
        self._check_labels(labels, logits.shape[-1])
        counted = valid
        if first:
            labels, counted, valid = moved_up(labels, valid)
        flat = None if counted is None else counted.reshape(-1)
        return self._lean(logits.flatten(0, 1), labels.reshape(-1), flat, shape, valid, first, offered)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 3, 4, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(4, (batch, 3), generator=generator)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Any, ...]] = {}
        for rows, length in ((5, 4), (2, 9), (3, 1)):
            logits = (torch.randn(rows, length, 4, generator=generator, dtype=torch.float64) * 3).to(dtype)
            labels = torch.randint(4, (rows, length), generator=generator)
            ignored = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.4, self.ignore_index)
            found |= {
                f"({rows}, {length}), tokens": (logits, labels),
                f"({rows}, {length}), some ignored": (logits, ignored),
            }
        return found
