"""Twins of the named objectives for noisy and partial labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reweigh.weighting.config import check_choice, check_number

from ..criteria.base import upcast
from ..criteria.label_dro import SCORES, Scores, label_concentration, label_scores
from ..criteria.partial_labels import PSEUDO, Pseudo, moved_belief
from ..reductions import Reduction, ReductionName
from ..robust.label import ALDRLoss, LDRLoss
from ..robust.partial import ALIMLoss
from .device import beside


def ldr_loss(
    logits: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    *,
    margin: float = 0.0,
    scores: Scores = "raw",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """LDR-KL; see :class:`~reweigh.losses.LDRLoss`. ``meta`` takes ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> round(ldr_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), margin=1.0).item(), 4)
        -0.3799
    """
    loss = LDRLoss(temperature, margin=margin, scores=scores, ignore_index=ignore_index, reduction=reduction)
    return beside(logits, loss).forward(logits, target, **meta)


def aldr_loss(
    logits: Tensor,
    target: Tensor,
    temperatures: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    margin: float = 0.0,
    scores: Scores = "raw",
    ignore_index: int = -100,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """ALDR-KL with the samples' ``temperatures (N,)`` before this visit; see :class:`~reweigh.losses.ALDRLoss`.

    The caller keeps the temperatures: :func:`adaptive_temperatures` has those after the visit.

    Example:
        >>> import torch
        >>> logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> round(aldr_loss(logits, target, torch.ones(1), margin=1.0).item(), 4)
        -0.3692
    """
    loss = ALDRLoss(
        1,
        temperature=temperature,
        alpha=alpha,
        margin=margin,
        scores=scores,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return beside(logits, loss).forward(logits, target, temperatures=temperatures, **meta)


def adaptive_temperatures(
    logits: Tensor, temperatures: Tensor, *, temperature: float = 1.0, alpha: float = 1.0, scores: Scores = "raw"
) -> Tensor:
    """ALDR-KL's temperatures of samples after a visit, from those before it.

    Args:
        logits: ``(N, C)``, C at least 2.
        temperatures: ``(N,)`` numbers > 0.
        temperature: The common one, > 0, that they start at.
        alpha: How hard they are to move, > 0.
        scores: As in :class:`~reweigh.losses.LabelDRO`.

    Returns:
        ``(N,)`` without gradient.

    Raises:
        TypeError: If ``logits`` or ``temperatures`` are not floating-point.
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> adaptive_temperatures(torch.tensor([[2.0, 0.0]]), torch.ones(1))
        tensor([0.5271])
    """
    owner = "adaptive_temperatures"
    logits, temperatures = upcast(owner, "logits", logits), upcast(owner, "temperatures", temperatures)
    if logits.ndim != 2 or logits.shape[1] < 2 or temperatures.shape != logits.shape[:1]:
        raise ValueError(
            f"{owner}: logits must be (N, C) with at least two classes and temperatures (N,), "
            f"got {tuple(logits.shape)} and {tuple(temperatures.shape)}"
        )
    temperature = check_number(owner, "temperature", temperature, low=0.0, open_low=True)
    alpha = check_number(owner, "alpha", alpha, low=0.0, open_low=True)
    check_choice(owner, "scores", scores, SCORES)
    with torch.no_grad():
        fall = label_concentration(label_scores(logits, scores, 1), temperatures, alpha)
        return temperature * (1.0 - fall)


def alim_loss(
    logits: Tensor,
    candidates: Tensor,
    beliefs: Tensor,
    *,
    mixing: float = 0.0,
    pseudo: Pseudo = "onehot",
    ema: float = 0.95,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """ALIM with the samples' ``beliefs (N, C)`` before this visit; see :class:`~reweigh.losses.ALIMLoss`.

    The caller keeps the beliefs: :func:`partial_label_beliefs` has those after the visit. Rows of zeros are new.

    Example:
        >>> import torch
        >>> logits, candidates = torch.tensor([[2.0, 0.0, 3.0]]), torch.tensor([[1, 1, 0]])
        >>> round(alim_loss(logits, candidates, torch.zeros(1, 3), ema=0.5).item(), 4)
        1.849
    """
    classes = beliefs.shape[-1] if isinstance(beliefs, Tensor) and beliefs.ndim else 2
    loss = ALIMLoss(1, max(classes, 2), mixing=mixing, pseudo=pseudo, ema=ema, reduction=reduction)
    return beside(logits, loss).forward(logits, candidates, beliefs=beliefs, **meta)


def partial_label_beliefs(
    logits: Tensor,
    candidates: Tensor,
    beliefs: Tensor,
    *,
    mixing: float = 0.0,
    pseudo: Pseudo = "onehot",
    ema: float = 0.95,
) -> Tensor:
    """ALIM's beliefs of samples after a visit, from those before it.

    Args:
        logits: ``(N, C)`` of the classifier, or of prototypes.
        candidates: ``(N, C)`` bool or 0/1, at least one per row.
        beliefs: ``(N, C)``; rows of zeros are new, and start uniform over the candidates.
        mixing: In [0, 1]: 0 trusts the candidates, 1 the logits.
        pseudo: ``"onehot"`` or ``"scale"``.
        ema: Share of the old belief, in [0, 1].

    Returns:
        ``(N, C)`` without gradient.

    Raises:
        TypeError: If ``logits`` or ``beliefs`` are not floating-point.
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> logits, candidates = torch.tensor([[2.0, 0.0, 3.0]]), torch.tensor([[1, 1, 0]])
        >>> partial_label_beliefs(logits, candidates, torch.zeros(1, 3), ema=0.5)
        tensor([[0.7500, 0.2500, 0.0000]])
    """
    owner = "partial_label_beliefs"
    logits, beliefs = upcast(owner, "logits", logits), upcast(owner, "beliefs", beliefs)
    if not isinstance(candidates, Tensor) or candidates.is_complex():
        raise TypeError(f"{owner}: candidates must be a real tensor, got {type(candidates).__name__}")
    if logits.ndim != 2 or candidates.shape != logits.shape or beliefs.shape != logits.shape:
        raise ValueError(
            f"{owner}: logits, candidates and beliefs must be (N, C), got {tuple(logits.shape)}, "
            f"{tuple(candidates.shape)} and {tuple(beliefs.shape)}"
        )
    mixing = check_number(owner, "mixing", mixing, low=0.0, high=1.0)
    ema = check_number(owner, "ema", ema, low=0.0, high=1.0)
    check_choice(owner, "pseudo", pseudo, PSEUDO)
    with torch.no_grad():
        return moved_belief(beliefs, logits.log_softmax(1), candidates != 0, mixing, pseudo, ema)
