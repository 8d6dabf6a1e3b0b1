"""Named objectives for classification. Each is nothing but a composition of public parts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import final

from torch import Tensor

from reweigh.weighting.algebra import Constant
from reweigh.weighting.base import Weighting
from reweigh.weighting.config import check_number
from reweigh.weighting.difficulty import Focal
from reweigh.weighting.frequency import ClassTable, PositiveBalance, class_table
from reweigh.weighting.schedules import Schedule

from .criteria.binary import BinaryCrossEntropy
from .criteria.element import CrossEntropy
from .objective import Objective
from .reductions import Reduction, ReductionName
from .registry import method

PerClass = Sequence[float] | Tensor | str | ClassTable


@method(
    "focal",
    paper="Focal Loss for Dense Object Detection",
    venue="ICCV 2017",
    official="no softmax form by the authors; facebookresearch/Detectron has the sigmoid form",
    defaults={"gamma": ("2.0", "paper"), "reduction": ("'mean'", "ours: the mean over valid terms")},
    deviations=(
        "The authors define the sigmoid form (SigmoidFocalLoss); this is the softmax form in common use, kept under "
        "its own name.",
        "weight keeps torch's meaning and denominator, so gamma=0 equals nn.CrossEntropyLoss; alpha only multiplies.",
    ),
    neutral={"gamma": 0.0},
    examples=(
        {},
        {"gamma": 0.5},
        {"gamma": 1.0, "weight": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.1},
        {"alpha": [0.25, 0.5, 1.0, 2.0], "reduction": "weighted_mean"},
    ),
)
@final
class FocalLoss(Objective):
    r"""Softmax focal loss, a drop-in for ``nn.CrossEntropyLoss`` that turns down what is already right.

    .. math:: \ell_i = \alpha_{y_i}\,(1-p_i)^\gamma\,\mathrm{CE}_i, \qquad
              L = \frac{\sum_i m_i \ell_i}{\sum_i m_i v_{y_i}}

    - :math:`p_i`: softmax probability of the target
    - :math:`\mathrm{CE}_i`: cross-entropy with torch's ``weight`` :math:`v` and label smoothing
    - :math:`m_i`: 1, 0 where ignored, ``sample_weight`` where given

    Weights:
        :math:`\alpha (1-p)^\gamma`, differentiated (paper). ``gamma=0, alpha=None`` is neutral and equals
        ``nn.CrossEntropyLoss(weight, label_smoothing=...)``.

    State and cadence:
        None, unless ``alpha`` or ``weight`` is a name such as ``"balanced"``: then the class counts, set by the
        ``fit`` event. ``gamma`` may be a schedule.

    Use when:
        A drop-in for softmax cross-entropy where easy terms drown the rest, or where probabilities trained on clean
        labels are over-confident.
    Avoid when:
        Rare classes, rare words, few positive tokens or weak groups are the aim: no suite shows a certain gain there.
        Class weights, logit adjustment or group weights are made for them.

    Deviations:
        ``mean`` divides by the number of valid terms (by the sum of ``weight`` where given), not by the number of
        foreground anchors; use ``num_items`` for that.

    Args:
        gamma: Focusing exponent >= 0, or a schedule. Default 2.0 (paper).
        alpha: Factor per class: a sequence or tensor, ``"balanced"``, ``"sqrt"``, ``"effective"``, or a class table.
            A single number only rescales the loss, and says so.
        weight: Per-class weights with torch's meaning and torch's denominator; same kinds of value.
        ignore_index: Targets with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))`` or probabilities ``(N, C, ...)``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = FocalLoss(gamma=2.0)
        >>> logits = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
        >>> round(loss(logits, torch.tensor([0, 1])).item(), 4)
        0.0872

    References:
        T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017.
    """

    def __init__(
        self,
        gamma: float | Schedule = 2.0,
        *,
        alpha: float | PerClass | None = None,
        weight: PerClass | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        weighting: Weighting = Focal(gamma)
        if isinstance(alpha, (int, float)) or (isinstance(alpha, Tensor) and alpha.ndim == 0):
            factor = check_number(self, "alpha", alpha, low=0.0)
            warnings.warn(
                f"FocalLoss: a single alpha={factor:g} only rescales the softmax loss; give one per class, or use "
                "SigmoidFocalLoss, whose alpha balances positives against negatives",
                stacklevel=2,
            )
            weighting = Constant(factor) * weighting
        elif alpha is not None:
            weighting = class_table(self, "alpha", alpha) * weighting
        super().__init__(
            CrossEntropy(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing),
            weighting,
            reduction,
        )


@method(
    "sigmoid_focal",
    paper="Focal Loss for Dense Object Detection",
    venue="ICCV 2017",
    acts_on="binary",
    official="pytorch/vision@148ddaaa torchvision/ops/focal_loss.py; facebookresearch/fvcore@3378afe0",
    defaults={
        "gamma": ("2.0", "paper"),
        "alpha": ("0.25", "paper, RetinaNet"),
        "reduction": ("'mean'", "ours; torchvision and fvcore default to 'none', RetinaNet sums over anchors"),
    },
    deviations=(
        "alpha=None switches alpha off (the reference codes use -1 and raise on None).",
        "Log-space powers: finite gradients for 0 < gamma < 1, where torchvision returns NaN.",
    ),
    neutral={"gamma": 0.0, "alpha": None},
    examples=({}, {"gamma": 0.5, "alpha": None}),
)
@final
class SigmoidFocalLoss(Objective):
    r"""Sigmoid focal loss of dense detection, one term per logit.

    .. math:: \ell_i = \alpha_i\,(1-p_{t,i})^\gamma\,\mathrm{BCE}_i, \qquad
              p_t = y p + (1-y)(1-p), \quad \alpha_i = \alpha y + (1-\alpha)(1-y)

    - :math:`p`: sigmoid of the logit; :math:`y`: target in [0, 1]
    - :math:`\alpha`: ``alpha``; :math:`\gamma`: ``gamma``

    Weights:
        In [0, 1], differentiated (paper). ``gamma=0, alpha=None`` is neutral and equals ``nn.BCEWithLogitsLoss``.

    State and cadence:
        None; ``gamma`` may be a schedule.

    Use when:
        Dense detection, or one-versus-rest with thousands of labels: very many easy negatives per positive, with a sum
        divided by the number of foreground anchors.
    Avoid when:
        Positives are rare but easy negatives few: alpha 0.25 turns positives down. The multi-label suite shows no
        certain gain over binary cross-entropy.

    Deviations:
        ``mean`` is over all valid terms; pass ``num_items`` = number of foreground anchors for RetinaNet's.

    Args:
        gamma: Focusing exponent >= 0, or a schedule. Default 2.0 (paper).
        alpha: Weight of positives in [0, 1]; ``None`` for off. Default 0.25 (paper).
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits, targets)`` of the same shape, soft targets allowed; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = SigmoidFocalLoss()
        >>> round(loss(torch.zeros(2), torch.tensor([0.0, 1.0])).item(), 4)
        0.0866

    References:
        T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017.
    """

    def __init__(
        self,
        gamma: float | Schedule = 2.0,
        *,
        alpha: float | None = 0.25,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        focal = Focal(gamma)
        super().__init__(BinaryCrossEntropy(), focal if alpha is None else PositiveBalance(alpha) * focal, reduction)
