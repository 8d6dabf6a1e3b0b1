"""Twins of the named objectives that are functions of the target's probability."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..classification import PerClass
from ..reductions import Reduction, ReductionName
from ..robust.confidence import CompSumLoss, Form, GCELoss, MAELoss, SCELoss
from ..robust.expansion import EncouragingLoss, PolyLoss, TaylorLoss
from ..robust.normalized import Active, ActivePassiveLoss, Base, NormalizedLoss, Passive
from .device import beside


def gce_loss(
    logits: Tensor,
    target: Tensor,
    q: float = 0.7,
    *,
    form: Form = "closed",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Generalized cross-entropy; see :class:`~reweigh.losses.GCELoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(gce_loss(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1]), 0.5).item(), 4)
        1.0
    """
    loss = GCELoss(q, form=form, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def mae_loss(
    logits: Tensor,
    target: Tensor,
    *,
    form: Form = "closed",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Mean absolute error of softmax probabilities; see :class:`~reweigh.losses.MAELoss`.

    Example:
        >>> import torch
        >>> round(mae_loss(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1])).item(), 4)
        0.75
    """
    loss = MAELoss(form=form, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def sce_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float = 0.1,
    *,
    beta: float = 1.0,
    floor: float = 1e-4,
    form: Form = "closed",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Symmetric cross-entropy; see :class:`~reweigh.losses.SCELoss`.

    Example:
        >>> import torch
        >>> round(sce_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])).item(), 4)
        4.6745
    """
    loss = SCELoss(alpha, beta=beta, floor=floor, form=form, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def comp_sum_loss(
    logits: Tensor,
    target: Tensor,
    tau: float = 1.0,
    *,
    bound: float = 32768.0,
    form: Form = "closed",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Comp-sum loss; see :class:`~reweigh.losses.CompSumLoss`.

    Example:
        >>> import torch
        >>> round(comp_sum_loss(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1]), 0.0).item(), 4)
        3.0
    """
    loss = CompSumLoss(tau, bound=bound, form=form, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def taylor_loss(
    logits: Tensor,
    target: Tensor,
    order: int = 2,
    *,
    form: Form = "closed",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Taylor cross-entropy; see :class:`~reweigh.losses.TaylorLoss`.

    Example:
        >>> import torch
        >>> round(taylor_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])).item(), 4)
        0.625
    """
    loss = TaylorLoss(order, form=form, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def poly_loss(
    logits: Tensor,
    target: Tensor,
    epsilon: float = 1.0,
    *,
    gamma: float = 0.0,
    weight: PerClass | None = None,
    form: Form = "closed",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Poly-1 loss; see :class:`~reweigh.losses.PolyLoss`.

    Example:
        >>> import torch
        >>> round(poly_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1]), 2.0).item(), 4)
        1.6931
    """
    loss = PolyLoss(epsilon, gamma=gamma, weight=weight, form=form, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def encouraging_loss(
    logits: Tensor,
    target: Tensor,
    end: float = 0.75,
    *,
    form: Form = "closed",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Encouraging loss; see :class:`~reweigh.losses.EncouragingLoss`.

    Example:
        >>> import torch
        >>> round(encouraging_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])).item(), 4)
        0.0
    """
    loss = EncouragingLoss(end, form=form, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def normalized_loss(
    logits: Tensor,
    target: Tensor,
    base: Base = "ce",
    *,
    gamma: float = 0.5,
    q: float = 0.7,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """A loss over its sum over all classes; see :class:`~reweigh.losses.NormalizedLoss`.

    Example:
        >>> import torch
        >>> round(normalized_loss(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0])).item(), 4)
        0.8281
    """
    loss = NormalizedLoss(base, gamma=gamma, q=q, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def active_passive_loss(
    logits: Tensor,
    target: Tensor,
    active: Active = "nce",
    *,
    passive: Passive = "rce",
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.5,
    q: float = 0.7,
    floor: float = 1e-4,
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Active passive loss; see :class:`~reweigh.losses.ActivePassiveLoss`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.25, 0.75]]).log()
        >>> round(active_passive_loss(logits, torch.tensor([0]), passive="mae").item(), 4)
        1.5781
    """
    loss = ActivePassiveLoss(
        active,
        passive=passive,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        q=q,
        floor=floor,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, **meta)
