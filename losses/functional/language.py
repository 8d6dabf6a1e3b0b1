"""Twins of the named objectives for language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from reweigh.weighting.frequency import Normalization, Values

from ..language import PowerLawDecayLoss, TLDRLoss
from ..reductions import Reduction, ReductionName
from .device import beside


def power_law_decay_loss(
    logits: Tensor,
    labels: Tensor,
    counts: Values,
    *,
    alpha: float = 1.0,
    eps: float = 1.0,
    normalize: Normalization = "none",
    num_classes: int | None = None,
    neutral: Sequence[int] | Tensor = (),
    shift: bool = True,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "weighted_mean",
    **meta: Any,
) -> Tensor:
    """Power-law decay loss; see :class:`~reweigh.losses.PowerLawDecayLoss`.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[0, 1]])
        >>> round(power_law_decay_loss(logits, labels, [9, 5, 3, 1]).item(), 4)
        1.3863
    """
    loss = PowerLawDecayLoss(
        counts,
        alpha=alpha,
        eps=eps,
        normalize=normalize,
        num_classes=num_classes,
        neutral=neutral,
        shift=shift,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, labels, **meta)


def tldr_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    shift: bool = True,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """TLDR loss; see :class:`~reweigh.losses.TLDRLoss`.

    Example:
        >>> import torch
        >>> round(tldr_loss(torch.zeros(1, 2, 2), torch.tensor([[0, 1]])).item(), 4)
        0.6931
    """
    loss = TLDRLoss(level=level, shift=shift, ignore_index=ignore_index, reduction=reduction)
    return loss.forward(logits, labels, **meta)
