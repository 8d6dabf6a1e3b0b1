"""Twins of the named objectives for hard instances."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..classification import PerClass
from ..reductions import Reduction, ReductionName
from ..robust.instance import ChiSquareDROLoss, CVaRLoss, KLDROLoss, TiltedLoss
from .device import beside


def kl_dro_loss(
    logits: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    *,
    gather: bool = True,
    weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """See :class:`~reweigh.losses.KLDROLoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(kl_dro_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])).item(), 4)
        0.4881
    """
    loss = KLDROLoss(
        temperature,
        gather=gather,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)


def cvar_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.2,
    *,
    gather: bool = True,
    weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """See :class:`~reweigh.losses.CVaRLoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(cvar_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])).item(), 4)
        0.6931
    """
    loss = CVaRLoss(
        alpha,
        gather=gather,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)


def chi_square_dro_loss(
    logits: Tensor,
    target: Tensor,
    rho: float = 1.0,
    *,
    gather: bool = True,
    weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """See :class:`~reweigh.losses.ChiSquareDROLoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(chi_square_dro_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])).item(), 4)
        0.6931
    """
    loss = ChiSquareDROLoss(
        rho,
        gather=gather,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)


def tilted_loss(
    logits: Tensor,
    target: Tensor,
    tilt: float = 1.0,
    *,
    gather: bool = True,
    weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """See :class:`~reweigh.losses.TiltedLoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(tilted_loss(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])).item(), 4)
        0.4881
    """
    loss = TiltedLoss(
        tilt,
        gather=gather,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)
