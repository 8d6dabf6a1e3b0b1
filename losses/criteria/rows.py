"""Loss terms from numbers of softmax rows: what criteria on logits and on hidden states have in common."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from reweigh.weighting.config import owner_name
from reweigh.weighting.schedules import value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..kernels.rows import Rows
from .base import _kind, is_index
from .labels import _Element


class RowTerms(_Element):
    """Criteria whose terms are softmax rows with an index target each.

    Rows stand in the order of the terms, or (``first`` = 1, the causal shift) the row at t is the term at t + 1.
    """

    z_loss: float = 0.0

    def _shares(self, classes: int, like: Tensor) -> Tensor | None:
        """What each class has of the uniform part of a smoothed target, class weights included."""
        smoothing = value_of(self.label_smoothing)
        if not isinstance(smoothing, Tensor) and smoothing == 0.0:
            return None
        table = self._class_weight(classes, like)
        return (like.new_ones(classes) if table is None else table) / classes

    def _laid_out(
        self, target: Tensor, classes: int, like: Tensor, shape: torch.Size, valid: Tensor | None, first: int
    ) -> LossTerms:
        """Terms ``(*S)`` without losses: what is known from targets ``(N,)`` of rows and the terms' mask."""
        loss = like.new_zeros(shape)
        table = self._class_weight(classes, loss)
        target = target.reshape(shape)
        norm = None if table is None else table[target]
        if first:
            target = pad(target[:, :-1], (1, 0))
            norm = None if norm is None else pad(norm[:, :-1], (1, 0))
        return LossTerms(loss=loss, mask=valid, num_classes=classes, target=target, category=target, norm=norm)

    def _assembled(self, found: Rows, target: Tensor, classes: int) -> LossTerms:
        """Terms of rows that all count."""
        table = self._class_weight(classes, found.ce)
        norm = None if table is None else table[target]
        loss = found.ce if norm is None else norm * found.ce
        if found.away is not None:
            smoothing = value_of(self.label_smoothing)
            loss = (1.0 - smoothing) * loss + smoothing * found.away
        if self.z_loss:
            loss = loss + self.z_loss * found.lse.square()
        extras = {name: v for name in ("entropy", "top_entropy") if (v := getattr(found, name)) is not None}
        return LossTerms(
            loss=loss,
            log_pt=-found.ce,
            target=target,
            category=target,
            num_classes=classes,
            norm=norm,
            extras=extras or None,
        )

    def _placed(self, terms: LossTerms, flat: LossTerms, first: int) -> LossTerms:
        """Statistics of rows, in the places of their terms; 0 or neutral where masked."""

        def place(value: Tensor, fill: float) -> Tensor:
            if first:
                rows, length = terms.loss.shape
                value = pad(value.reshape(rows, length)[:, :-1], (1, 0), value=fill)
            else:
                value = value.reshape(terms.loss.shape)
            return mask_out(value, terms.mask, fill)

        extras = {**(terms.extras or {})}
        for name, value in (flat.extras or {}).items():
            extras.setdefault(name, place(value, 0.0))
        log_pt = place(flat.need("log_pt", self), NEUTRAL_LOG_PT)
        return terms._replace(loss=place(flat.loss, 0.0), log_pt=log_pt, extras=extras or None)


def moved_up(labels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The causal shift of ``labels (B, T)``: labels by row, which rows count, and which terms do.

    The row at t has the label at t + 1; the last one has none, and the first term has no row.
    """
    some = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    terms = pad(some[:, 1:], (1, 0), value=False)
    return pad(labels[:, 1:], (0, 1)), pad(some[:, 1:], (0, 1), value=False), terms


def packed(owner: object, position_ids: Tensor, shape: torch.Size, *, shift: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows that hold several sequences: which labels may be predicted, and ``sequence`` and ``position`` of each.

    A sequence begins where its position is 0 and where a row begins. No label is predicted from another sequence:
    under ``shift`` that removes each first one; otherwise the label at t belongs to the position at t + 1.
    """
    if not is_index(position_ids):
        raise TypeError(f"{owner_name(owner)}: position_ids must hold integers, got {_kind(position_ids)}")
    if position_ids.shape != shape:
        raise ValueError(
            f"{owner_name(owner)}: position_ids must have the labels' shape {tuple(shape)}, "
            f"got {tuple(position_ids.shape)}"
        )
    begins = position_ids == 0
    edge = torch.zeros_like(begins[:, :1])
    kept = ~begins if shift else ~torch.cat([begins[:, 1:], edge], 1)
    begins = torch.cat([~edge, begins[:, 1:]], 1) if shape[1] else begins
    sequence = begins.reshape(-1).cumsum(0).reshape(shape)
    return kept, {"sequence": sequence, "position": position_ids.long()}


def packed_position_ids(cu_seqlens: Tensor) -> Tensor:
    """``position_ids (1, n)`` of sequences that lie behind each other in one row.

    Args:
        cu_seqlens: Where each begins, and the end: ascending integers from 0, ``(sequences + 1,)``.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they do not ascend from 0.

    Example:
        >>> import torch
        >>> packed_position_ids(torch.tensor([0, 3, 5]))
        tensor([[0, 1, 2, 0, 1]])
    """
    if not is_index(cu_seqlens):
        raise TypeError(f"packed_position_ids: cu_seqlens must hold integers, got {_kind(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or int(cu_seqlens[0]) or bool((cu_seqlens.diff() <= 0).any()):
        raise ValueError(f"packed_position_ids: cu_seqlens must ascend from 0, got {cu_seqlens.tolist()}")
    lengths = cu_seqlens.diff().long()
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    return (torch.arange(len(starts), device=starts.device) - starts).unsqueeze(0)
