"""Functional twins of the named objectives: same names, same defaults, one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from reweigh.weighting.config import check_number
from reweigh.weighting.frequency import Normalization, Values

from .classification import FocalLoss, PerClass, SigmoidFocalLoss
from .criteria.base import upcast
from .language import PowerLawDecayLoss, TLDRLoss
from .logits import posthoc_logit_adjustment
from .multilabel import AsymmetricLoss, AsymmetricSingleLabelLoss
from .objective import Objective
from .reductions import Reduction, ReductionName

__all__ = [
    "asymmetric_loss",
    "asymmetric_single_label_loss",
    "focal_loss",
    "posthoc_logit_adjustment",
    "power_law_decay_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "tldr_loss",
]


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
    return _beside(logits, loss).forward(logits, target, **meta)


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
    return _beside(logits, loss).forward(logits, target, **meta)


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


def _beside(logits: Tensor, loss: Objective) -> Objective:
    """The loss on the logits' device; what is not a tensor is left for the loss itself to refuse."""
    return loss.to(logits.device) if isinstance(logits, Tensor) else loss


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
    return _beside(logits, loss).forward(logits, labels, **meta)


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
    return _beside(logits, loss).forward(logits, targets, **meta)


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
