"""Twins of the named objectives for segmentation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..classification import PerClass
from ..reductions import Reduction, ReductionName
from ..segmentation import (
    Absent,
    Activation,
    DiceLoss,
    GeneralizedDiceLoss,
    Over,
    SelfAdjustingDiceLoss,
    TverskyLoss,
    UnifiedFocalLoss,
)
from .device import beside


def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation = "softmax",
    over: Over = "sample",
    square: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    class_weight: PerClass | None = None,
    include_background: bool = True,
    empty: Absent = "skip",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Soft dice; see :class:`~reweigh.losses.DiceLoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(dice_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]])).item(), 4)
        0.5
    """
    loss = DiceLoss(
        activation=activation,
        over=over,
        square=square,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        class_weight=class_weight,
        include_background=include_background,
        empty=empty,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.3,
    beta: float = 0.7,
    *,
    gamma: float = 1.0,
    activation: Activation = "softmax",
    over: Over = "sample",
    square: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    class_weight: PerClass | None = None,
    include_background: bool = True,
    empty: Absent = "skip",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Tversky and focal Tversky; see :class:`~reweigh.losses.TverskyLoss`.

    Example:
        >>> import torch
        >>> round(tversky_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]]), 1.0, 1.0).item(), 4)
        0.6667
    """
    loss = TverskyLoss(
        alpha,
        beta,
        gamma=gamma,
        activation=activation,
        over=over,
        square=square,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        class_weight=class_weight,
        include_background=include_background,
        empty=empty,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)


def generalized_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    power: float = 2.0,
    activation: Activation = "softmax",
    over: Over = "sample",
    square: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    empty: Absent = "keep",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Generalised dice; see :class:`~reweigh.losses.GeneralizedDiceLoss`.

    Example:
        >>> import torch
        >>> round(generalized_dice_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 0, 1]])).item(), 4)
        0.625
    """
    loss = GeneralizedDiceLoss(
        power=power,
        activation=activation,
        over=over,
        square=square,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        include_background=include_background,
        empty=empty,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)


def self_adjusting_dice_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.01,
    *,
    smooth: float = 1.0,
    square: bool = True,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Dice of single examples; see :class:`~reweigh.losses.SelfAdjustingDiceLoss`.

    Example:
        >>> import torch
        >>> round(self_adjusting_dice_loss(torch.zeros(1, 2), torch.tensor([1]), 0.0).item(), 4)
        0.3111
    """
    loss = SelfAdjustingDiceLoss(alpha, smooth=smooth, square=square, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def unified_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lam: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    symmetric: bool = False,
    over: Over = "sample",
    smooth: float = 1e-6,
    empty: Absent = "keep",
    ignore_index: int = -100,
    **meta: Any,
) -> Tensor:
    """Focal cross-entropy plus focal Tversky; see :class:`~reweigh.losses.UnifiedFocalLoss`.

    Example:
        >>> import torch
        >>> round(unified_focal_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 0, 1]])).item(), 4)
        0.4317
    """
    loss = UnifiedFocalLoss(
        lam=lam,
        delta=delta,
        gamma=gamma,
        symmetric=symmetric,
        over=over,
        smooth=smooth,
        empty=empty,
        ignore_index=ignore_index,
    )
    return beside(logits, loss).forward(logits, target, **meta)
