"""Twins of the named objectives of metric learning."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from reweigh.weighting.base import Weighting
from reweigh.weighting.config import check_number
from reweigh.weighting.pair import CirclePacing
from reweigh.weighting.schedules import value_of

from ..classification import PerClass
from ..criteria.base import upcast
from ..criteria.element import CrossEntropy
from ..criteria.pair import Pairs, contrast
from ..criteria.proxy import cosines
from ..criteria.tiles import Law, masked_logsumexp
from ..margins import CircleLogits
from ..metric import CircleLoss
from ..objective import Objective
from ..reductions import Reduction, ReductionName


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
