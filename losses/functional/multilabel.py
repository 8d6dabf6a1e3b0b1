"""Twins of the named objectives for multi-label data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reweigh.weighting.frequency import Values

from ..classification import PerClass
from ..multilabel import AsymmetricLoss, AsymmetricSingleLabelLoss
from ..reductions import Reduction, ReductionName
from .device import beside


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    *,
    clip: float = 0.05,
    detach: bool = True,
    weight: PerClass | None = None,
    pos_weight: float | Values | None = None,
    ignore_index: int = -1,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Asymmetric loss for multi-label data; see :class:`~reweigh.losses.AsymmetricLoss`.

    Example:
        >>> import torch
        >>> round(asymmetric_loss(torch.zeros(2), torch.tensor([0, 1]), clip=0.0).item(), 4)
        0.1949
    """
    loss = AsymmetricLoss(
        gamma_neg,
        gamma_pos,
        clip=clip,
        detach=detach,
        weight=weight,
        pos_weight=pos_weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, targets, **meta)


def asymmetric_single_label_loss(
    logits: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Asymmetric loss for single-label data; see :class:`~reweigh.losses.AsymmetricSingleLabelLoss`.

    Example:
        >>> import torch
        >>> round(asymmetric_single_label_loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.6607
    """
    loss = AsymmetricSingleLabelLoss(
        gamma_neg, gamma_pos, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction
    )
    return loss.forward(logits, target, **meta)
