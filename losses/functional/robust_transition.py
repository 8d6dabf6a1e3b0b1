"""Twins of the named objectives for labels that passed through a known noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..criteria.transition import Transition
from ..reductions import Reduction, ReductionName
from ..robust.transition import ForwardCorrectionLoss, TransitionReweightedLoss
from .device import beside


def forward_correction_loss(
    logits: Tensor,
    target: Tensor,
    transition: Transition,
    *,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Cross-entropy of the labels given; see :class:`~reweigh.losses.ForwardCorrectionLoss`.

    Example:
        >>> import torch
        >>> round(forward_correction_loss(torch.zeros(1, 2), torch.tensor([0]), [[0.8, 0.2], [0.0, 1.0]]).item(), 4)
        0.9163
    """
    loss = ForwardCorrectionLoss(transition, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def transition_reweighted_loss(
    logits: Tensor,
    target: Tensor,
    transition: Transition,
    *,
    ignore_index: int = -100,
    gather: bool = True,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Cross-entropy weighed by T; see :class:`~reweigh.losses.TransitionReweightedLoss`.

    Example:
        >>> import torch
        >>> round(transition_reweighted_loss(torch.zeros(1, 2), torch.tensor([0]), [[0.8, 0.2], [0.0, 1.0]]).item(), 4)
        0.6931
    """
    loss = TransitionReweightedLoss(transition, ignore_index=ignore_index, gather=gather, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)
