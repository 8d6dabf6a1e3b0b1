"""Losses over their own sum over classes, alone and with a passive partner."""

from __future__ import annotations

from typing import Literal, final

from reweigh.weighting.confidence import DFT, Confidence, GeneralizedCrossEntropy, SymmetricCrossEntropy
from reweigh.weighting.config import check_choice
from reweigh.weighting.expansion import FocalSlope
from reweigh.weighting.schedules import Schedule

from ..criteria.confidence import ActivePassive, NormalizedClosedForm
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method

Base = Literal["ce", "focal", "gce", "mae", "rce"]
"""What is normalised: cross-entropy, focal loss, generalized cross-entropy, mean absolute error, reverse CE."""
BASES: tuple[Base, ...] = ("ce", "focal", "gce", "mae", "rce")
Active = Literal["nce", "nfl", "ngce"]
"""Normalised cross-entropy, focal loss, generalized cross-entropy."""
ACTIVES: tuple[Active, ...] = ("nce", "nfl", "ngce")
Passive = Literal["rce", "mae"]
"""Reverse cross-entropy, mean absolute error."""
PASSIVES: tuple[Passive, ...] = ("rce", "mae")


def _base(name: str, gamma: float | Schedule, q: float | Schedule, floor: float = 1e-4) -> Confidence:
    made: dict[str, Confidence] = {
        "ce": GeneralizedCrossEntropy(0.0),
        "focal": FocalSlope(gamma),
        "gce": GeneralizedCrossEntropy(q),
        "mae": DFT(),
        "rce": SymmetricCrossEntropy(0.0, floor=floor),
    }
    return made[name]


@method(
    "normalized",
    paper="Normalized Loss Functions for Deep Learning with Noisy Labels",
    venue="ICML 2020",
    official="HanxunH/Active-Passive-Losses@04bce534 loss.py",
    defaults={
        "base": ("'ce'", "paper's first example"),
        "gamma": ("0.5", "authors' code, normalised focal loss"),
        "q": ("0.7", "authors' code, normalised GCE; 0.1 for CIFAR-10 in NGCE+MAE"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=(
        "The gradient of 'focal' is the formula's; the authors' code holds the modulators (1 - p)^gamma constant.",
        "'mae' and 'rce' are (1 - p) / (C - 1), as the paper's definition gives; the authors' code has half of it for "
        "one and, by the precedence of 1 / 4 * (C - 1), a factor that grows with C for the other.",
        "No clamp of p at 1e-7.",
    ),
    examples=({}, {"base": "focal"}, {"base": "gce", "q": 0.3}, {"base": "mae"}, {"base": "rce"}),
)
@final
class NormalizedLoss(Objective):
    r"""A classification loss divided by its sum over all classes, which makes any of them robust to noisy labels.

    .. math:: \ell_i = \frac{\varphi(p_{iy_i})}{\sum_c \varphi(p_{ic})}

    ======= ============================= ==========
    base    :math:`\varphi(p)`            known as
    ======= ============================= ==========
    "ce"    :math:`-\log p`               NCE
    "focal" :math:`-(1-p)^\gamma \log p`  NFL
    "gce"   :math:`(1-p^q)/q`             NGCE
    "mae"   :math:`1-p`                   NMAE
    "rce"   :math:`A(1-p)`, A cancels     NRCE
    ======= ============================= ==========

    - :math:`p_{ic}`: softmax probability of class c

    Weights:
        None: one criterion, whose gradient is exact; it is no function of the target's probability alone, so no
        detached weight stands for it. No argument is neutral. In [0, 1], and 1 in the sum over all labels.

    State and cadence:
        None; ``gamma`` and ``q`` may be schedules.

    Use when:
        The active part of a sum for noisy labels, or a study of which losses become robust when divided by their sum
        over all classes.
    Avoid when:
        It stands alone: normalised losses are robust but learn too little, as their paper found. On clean labels plain
        cross-entropy fits better.

    Deviations:
        ``"focal"`` is differentiated throughout; ``"mae"`` and ``"rce"`` follow the definition.

    Args:
        base: ``"ce"``, ``"focal"``, ``"gce"``, ``"mae"`` or ``"rce"``; the last two are the same. Default "ce".
        gamma: Exponent of ``"focal"``, >= 0, or a schedule. Default 0.5 (authors' code).
        q: Power of ``"gce"``, in [0, 1], or a schedule. Default 0.7 (authors' code).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``, C at least 2, class indices; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> round(NormalizedLoss()(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0])).item(), 4)
        0.8281

    References:
        X. Ma, H. Huang, Y. Wang, S. Romano, S. Erfani, J. Bailey, "Normalized Loss Functions for Deep Learning with
        Noisy Labels", ICML 2020.
    """

    def __init__(
        self,
        base: Base = "ce",
        *,
        gamma: float | Schedule = 0.5,
        q: float | Schedule = 0.7,
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        confidence = _base(check_choice(self, "base", base, BASES), gamma, q)
        super().__init__(NormalizedClosedForm(confidence, ignore_index=ignore_index), None, reduction)


@method(
    "active_passive",
    paper="Normalized Loss Functions for Deep Learning with Noisy Labels",
    venue="ICML 2020",
    official="HanxunH/Active-Passive-Losses@04bce534 loss.py",
    defaults={
        "active": ("'nce'", "paper, NCE+RCE"),
        "passive": ("'rce'", "paper, NCE+RCE"),
        "alpha": ("1.0", "authors' config, CIFAR-10; 10.0 for CIFAR-100"),
        "beta": ("1.0", "authors' config, CIFAR-10; 0.1 for CIFAR-100"),
        "gamma": ("0.5", "authors' code, normalised focal loss"),
        "q": ("0.7", "authors' code; 0.1 for CIFAR-10 in NGCE+MAE"),
        "floor": ("1e-4", "authors' code: their clamp of a one-hot label"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=(
        "The gradient of 'nfl' is the formula's; the authors' code holds the modulators (1 - p)^gamma constant.",
        "No clamp of p at 1e-7.",
    ),
    examples=(
        {},
        {"active": "ngce", "passive": "mae", "alpha": 10.0, "beta": 0.1},
        {"active": "nfl", "gamma": 1.0, "floor": 0.01},
    ),
)
@final
class ActivePassiveLoss(Objective):
    r"""Active passive loss: a normalised loss that raises the target's probability, one that lowers the others'.

    .. math:: \ell_i = \alpha\,\frac{\varphi(p_{iy_i})}{\sum_c \varphi(p_{ic})} + \beta\,\psi(p_{iy_i})

    - :math:`p_{ic}`: softmax probability of class c; :math:`\alpha`: ``alpha``; :math:`\beta`: ``beta``
    - :math:`\varphi`: of ``active``, as in :class:`NormalizedLoss`
    - :math:`\psi`: of ``passive``, :math:`1 - p` ("mae") or :math:`-\log(f)\,(1 - p)` ("rce", f: ``floor``)

    Weights:
        None: one criterion, whose gradient is exact. No argument is neutral. The losses of a sample for all labels add
        up to a constant, so symmetric noise does not move the minimum.

    State and cadence:
        None; the factors, ``gamma`` and ``q`` may be schedules.

    Use when:
        Labels are noisy, classes few, and a robust loss should go on learning: a normalised part raises the target, a
        passive part lowers the others, and both factors can be tuned.
    Avoid when:
        Labels are clean, or there is no budget for factors and learning rate. The noisy-label suite shows no gain over
        cross-entropy for the two pairs that it tries.

    Deviations:
        ``"nfl"`` is differentiated throughout; p is not clamped.

    Args:
        active: ``"nce"``, ``"nfl"`` or ``"ngce"``. Default "nce" (paper).
        passive: ``"rce"`` or ``"mae"``. Default "rce" (paper).
        alpha: Factor of the active part, >= 0, or a schedule. Default 1.0 (authors' config, CIFAR-10).
        beta: Factor of the passive part, >= 0, or a schedule. Default 1.0 (authors' config, CIFAR-10).
        gamma: Exponent of ``"nfl"``, >= 0, or a schedule. Default 0.5 (authors' code).
        q: Power of ``"ngce"``, in [0, 1], or a schedule. Default 0.7 (authors' code).
        floor: What stands for the 0 of a label in ``"rce"``, in (0, 1]. Default 1e-4 (authors' code).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``, C at least 2, class indices; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = ActivePassiveLoss("nce", passive="mae")
        >>> round(loss(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0])).item(), 4)
        1.5781

    References:
        X. Ma, H. Huang, Y. Wang, S. Romano, S. Erfani, J. Bailey, "Normalized Loss Functions for Deep Learning with
        Noisy Labels", ICML 2020.
    """

    def __init__(
        self,
        active: Active = "nce",
        *,
        passive: Passive = "rce",
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 1.0,
        gamma: float | Schedule = 0.5,
        q: float | Schedule = 0.7,
        floor: float = 1e-4,
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        names = {"nce": "ce", "nfl": "focal", "ngce": "gce"}
        criterion = ActivePassive(
            _base(names[check_choice(self, "active", active, ACTIVES)], gamma, q),
            _base(check_choice(self, "passive", passive, PASSIVES), gamma, q, floor),
            alpha=alpha,
            beta=beta,
            ignore_index=ignore_index,
        )
        super().__init__(criterion, None, reduction)
