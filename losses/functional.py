"""Functional twins of the named objectives: same names, same defaults, one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reweigh.weighting.base import Weighting
from reweigh.weighting.config import check_number
from reweigh.weighting.frequency import Normalization, Values
from reweigh.weighting.pair import CirclePacing
from reweigh.weighting.schedules import value_of

from .classification import FocalLoss, PerClass, SigmoidFocalLoss
from .criteria.base import upcast
from .criteria.element import CrossEntropy
from .criteria.pair import Pairs, contrast
from .criteria.proxy import cosines
from .criteria.tiles import Law, masked_logsumexp
from .language import PowerLawDecayLoss, TLDRLoss
from .logits import posthoc_logit_adjustment
from .margins import CircleLogits
from .metric import CircleLoss
from .multilabel import AsymmetricLoss, AsymmetricSingleLabelLoss
from .objective import Objective
from .reductions import Reduction, ReductionName
from .segmentation import (
    Absent,
    Activation,
    DiceLoss,
    GeneralizedDiceLoss,
    Over,
    SelfAdjustingDiceLoss,
    TverskyLoss,
    UnifiedFocalLoss,
)

__all__ = [
    "asymmetric_loss",
    "asymmetric_single_label_loss",
    "circle_classification_loss",
    "circle_loss",
    "circle_similarity_loss",
    "dice_loss",
    "focal_loss",
    "generalized_dice_loss",
    "posthoc_logit_adjustment",
    "power_law_decay_loss",
    "self_adjusting_dice_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "tldr_loss",
    "tversky_loss",
    "unified_focal_loss",
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


def circle_loss(
    embeddings: Tensor,
    labels: Tensor | None,
    m: float = 0.4,
    gamma: float = 80.0,
    *,
    pairs: Pairs | None = None,
    over: Literal["anchor", "batch"] = "anchor",
    pacing: Weighting | None = None,
    drop_satisfied: bool = False,
    normalize: bool = True,
    tile: int | None = None,
    gather: bool = False,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Circle loss on pairs; see :class:`~reweigh.losses.CircleLoss`.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> round(circle_loss(embeddings, torch.tensor([0, 0, 1, 1]), 0.25, 8.0).item(), 4)
        1.6027
    """
    loss = CircleLoss(
        m,
        gamma=gamma,
        over=over,
        pacing=pacing,
        drop_satisfied=drop_satisfied,
        normalize=normalize,
        tile=tile,
        gather=gather,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    inputs = (embeddings, labels) if pairs is None else (embeddings, labels, pairs)
    return loss.forward(*inputs, **meta)


def circle_classification_loss(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    m: float = 0.25,
    gamma: float = 256.0,
    *,
    weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Class-level circle loss against given ``proxies (C, D)``; see :class:`~reweigh.losses.CircleClassificationLoss`.

    Example:
        >>> import torch
        >>> proxies = torch.eye(2)
        >>> round(circle_classification_loss(torch.tensor([[0.6, 0.8]]), torch.tensor([0]), proxies).item(), 4)
        172.8
    """
    owner = "circle_classification_loss"
    embeddings, proxies = upcast(owner, "embeddings", embeddings), upcast(owner, "proxies", proxies)
    if embeddings.ndim != 2 or proxies.ndim != 2 or embeddings.shape[1] != proxies.shape[1]:
        raise ValueError(
            f"{owner}: embeddings must be (N, D) and proxies (C, D), got {tuple(embeddings.shape)} and "
            f"{tuple(proxies.shape)}"
        )
    counts = labels != ignore_index if isinstance(labels, Tensor) and labels.shape == embeddings.shape[:1] else None
    for given in (meta.get("mask"), meta.get("sample_weight")):
        if counts is not None and isinstance(given, Tensor) and given.shape == counts.shape:
            counts = counts & (given != 0)
    criterion = CrossEntropy(
        weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, logits=CircleLogits(m, gamma)
    )
    loss = Objective(criterion, None, reduction).to(embeddings.device)
    return loss.forward(cosines(embeddings, proxies, counts), labels, **meta)


def circle_similarity_loss(positive: Tensor, negative: Tensor, m: float = 0.25, gamma: float = 256.0) -> Tensor:
    """Circle loss of given similarities: all positive pairs against all negative ones.

    Args:
        positive: ``(K,)`` similarities of positive pairs, floating-point.
        negative: ``(L,)`` similarities of negative pairs.
        m: Relaxation in [0, 1].
        gamma: Scale >= 0.

    Returns:
        A scalar; 0 with a zero gradient where a side is empty.

    Example:
        >>> import torch
        >>> round(circle_similarity_loss(torch.tensor([0.75, 0.75]), torch.tensor([0.25])).item(), 4)
        1.0986
    """
    owner = "circle_similarity_loss"
    pacing = CirclePacing(m)
    gamma = check_number(owner, "gamma", gamma, low=0.0)
    sides = []
    for name, value in (("positive", positive), ("negative", negative)):
        score = upcast(owner, name, value)
        if score.ndim != 1:
            raise ValueError(f"{owner}: {name} must be a vector of similarities, got shape {tuple(score.shape)}")
        kind = torch.full_like(score, name == "positive", dtype=torch.bool)
        exponent, _ = Law(pacing, value_of(pacing.m), gamma).exponents(score, kind)
        sides.append(masked_logsumexp(exponent, torch.ones_like(kind), 0))
    return contrast(*sides).loss


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
    return _beside(logits, loss).forward(logits, target, **meta)


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
    return _beside(logits, loss).forward(logits, target, **meta)


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
    return _beside(logits, loss).forward(logits, target, **meta)


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
    return _beside(logits, loss).forward(logits, target, **meta)


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
    return _beside(logits, loss).forward(logits, target, **meta)
