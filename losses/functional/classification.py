"""Twins of the named objectives for classification."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from reweigh.weighting.config import check_number

from ..classification import FocalLoss, PerClass, SigmoidFocalLoss
from ..criteria.base import upcast
from ..reductions import Reduction, ReductionName
from .device import beside


def focal_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    *,
    alpha: float | PerClass | None = None,
    weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Softmax focal loss; see :class:`~reweigh.losses.FocalLoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(focal_loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.1733
    """
    loss = FocalLoss(
        gamma,
        alpha=alpha,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    *,
    alpha: float | None = 0.25,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Sigmoid focal loss; see :class:`~reweigh.losses.SigmoidFocalLoss`.

    Example:
        >>> import torch
        >>> round(sigmoid_focal_loss(torch.zeros(1), torch.ones(1)).item(), 4)
        0.0433
    """
    loss = SigmoidFocalLoss(gamma, alpha=alpha, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def sigmoid_focal_loss_star(logits: Tensor, target: Tensor, gamma: float = 1.0) -> Tensor:
    r"""FL* of the focal-loss paper's appendix, unreduced: :math:`-\log\sigma(\gamma(2y-1)x)/\gamma`.

    Args:
        logits: Any shape, floating-point.
        target: Same shape, in [0, 1].
        gamma: Steepness > 0; 1 is binary cross-entropy for hard targets. Default 1 (fvcore).

    Example:
        >>> import torch
        >>> round(sigmoid_focal_loss_star(torch.zeros(1), torch.ones(1)).item(), 4)
        0.6931
    """
    gamma = check_number("sigmoid_focal_loss_star", "gamma", gamma, low=0.0, open_low=True)
    logits = upcast("sigmoid_focal_loss_star", "logits", logits)
    if not isinstance(target, Tensor) or target.is_complex():
        raise TypeError(f"sigmoid_focal_loss_star: target must be a real tensor, got {type(target).__name__}")
    if target.shape != logits.shape:
        raise ValueError(
            f"sigmoid_focal_loss_star: target must have the logits' shape {tuple(logits.shape)}, "
            f"got {tuple(target.shape)}"
        )
    return -logsigmoid(gamma * (2.0 * target.to(logits.dtype) - 1.0) * logits) / gamma
