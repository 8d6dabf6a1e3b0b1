"""Named objectives for multi-label data, and the single-label relative of one of them."""

from __future__ import annotations

from typing import final

from reweigh.weighting.asymmetric import AsymmetricFocal
from reweigh.weighting.frequency import Values
from reweigh.weighting.schedules import Schedule

from .classification import PerClass
from .criteria.binary import BinaryCrossEntropy
from .criteria.classwise import ClasswiseCrossEntropy
from .objective import Objective
from .reductions import Reduction, ReductionName
from .registry import method


@method(
    "asymmetric",
    paper="Asymmetric Loss For Multi-Label Classification",
    venue="ICCV 2021",
    acts_on="binary",
    official="Alibaba-MIIL/ASL@8c9e0bd8 src/loss_functions/losses.py",
    defaults={
        "gamma_neg": ("4.0", "paper"),
        "gamma_pos": ("1.0", "authors' code; the paper recommends 0"),
        "clip": ("0.05", "paper"),
        "detach": ("True", "authors' AsymmetricLoss; their optimized class differentiates"),
        "ignore_index": ("-1", "ours: how data sets mark unknown labels; the authors' code counts them as anything"),
        "reduction": ("'mean'", "ours; the authors always sum over samples and labels"),
    },
    deviations=(
        "No eps clamp: a positive beyond logit -18.4 keeps its gradient, where the authors' has none.",
        "A soft label is the sum of the paper's two terms; the authors' code mixes probabilities and exponents (to get "
        "that: Objective(BinaryCrossEntropy(shift=0.05), AsymmetricFocal(4, 1))).",
        "Finite in every dtype and for exponents between 0 and 1; the grad mode is left alone; nothing is cached.",
    ),
    neutral={"gamma_neg": 0.0, "gamma_pos": 0.0},
    examples=(
        {},
        {"gamma_neg": 2.0, "gamma_pos": 0.5, "clip": 0.2, "detach": False},
        {"gamma_pos": 0.0, "clip": 0.0, "weight": [1.0, 2.0, 0.5, 3.0], "pos_weight": 2.0},
    ),
)
@final
class AsymmetricLoss(Objective):
    r"""Asymmetric loss for multi-label data: focus more on negatives than on positives, and drop the easiest negatives.

    .. math::
        \ell_i = -y_i (1-p_i)^{\gamma_+} \log p_i - (1-y_i)\, p_{m,i}^{\gamma_-} \log(1 - p_{m,i}), \qquad
        p_m = \max(p - m, 0)

    - :math:`p`: sigmoid of the logit; :math:`y`: target in [0, 1], soft ones included
    - :math:`\gamma_+`: ``gamma_pos``; :math:`\gamma_-`: ``gamma_neg``; :math:`m`: ``clip``

    Weights:
        In [0, 1]. Detached by default (the authors' main class). ``gamma_neg=0, gamma_pos=0`` is neutral; with
        ``clip=0`` as well the loss equals ``nn.BCEWithLogitsLoss``.

    State and cadence:
        None. The exponents may be schedules; for exponents that follow the data see
        :class:`~reweigh.weighting.AdaptiveAsymmetricFocal`.

    Use when:
        Multi-label data with few positives and very many negatives per sample, of which some are unlabelled positives
        that the clip should ignore.
    Avoid when:
        Probabilities have to be calibrated, or confident false positives matter. The multi-label suite shows no gain in
        average precision over binary cross-entropy; adjusting for priors gains there.

    Deviations:
        ``mean`` over valid terms instead of a sum; no eps clamp; two separate terms for a soft label.

    Args:
        gamma_neg: Exponent on negatives >= 0, or a schedule. Default 4.0 (paper).
        gamma_pos: Exponent on positives >= 0, or a schedule. Default 1.0 (authors' code; the paper recommends 0).
        clip: Probability shift m of the negatives, in [0, 1), or a schedule. Default 0.05 (paper).
        detach: Use the weights as constants. Default True (authors' main class).
        weight: Factor per label: a sequence or tensor, ``"balanced"``, ``"sqrt"``, ``"effective"``, or a class table.
        pos_weight: Weight of positives: a number, or one per label.
        ignore_index: Targets with this value are unknown and removed. Default -1 (ours).
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, L), targets (N, L))`` or any other equal shapes, labels along dimension 1; scalar unless
        ``"none"``. On a device integer or bool targets take half the memory of floating ones, which may be soft.

    Example:
        >>> import torch
        >>> loss = AsymmetricLoss(reduction="sum")
        >>> logits = torch.tensor([[2.0, -3.0, 1.0]])
        >>> round(loss(logits, torch.tensor([[1, 0, -1]])).item(), 4)  # -1: unknown
        0.0151

    References:
        T. Ridnik, E. Ben-Baruch, N. Zamir, A. Noy, I. Friedman, M. Protter, L. Zelnik-Manor, "Asymmetric Loss For
        Multi-Label Classification", ICCV 2021.
    """

    def __init__(
        self,
        gamma_neg: float | Schedule = 4.0,
        gamma_pos: float | Schedule = 1.0,
        *,
        clip: float | Schedule = 0.05,
        detach: bool = True,
        weight: PerClass | None = None,
        pos_weight: float | Values | None = None,
        ignore_index: int = -1,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(
            BinaryCrossEntropy(
                weight=weight, pos_weight=pos_weight, ignore_index=ignore_index, shift=clip, soft="sides"
            ),
            AsymmetricFocal(gamma_neg, gamma_pos, detach=detach),
            reduction,
        )


@method(
    "asymmetric_single_label",
    paper="Asymmetric Loss For Multi-Label Classification",
    venue="ICCV 2021",
    official="Alibaba-MIIL/ASL@8c9e0bd8 src/loss_functions/losses.py (ASLSingleLabel)",
    defaults={
        "gamma_neg": ("4.0", "authors' code"),
        "gamma_pos": ("0.0", "authors' code"),
        "label_smoothing": ("0.1", "authors' code, called eps there"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=("ignore_index and masks, which the authors' class lacks; finite for exponents between 0 and 1.",),
    neutral={"gamma_neg": 0.0, "gamma_pos": 0.0},
    examples=({}, {"gamma_neg": 2.0, "gamma_pos": 0.5, "label_smoothing": 0.3}, {"label_smoothing": 0.0}),
)
@final
class AsymmetricSingleLabelLoss(Objective):
    r"""Softmax cross-entropy with label smoothing that focuses on the target's class and on the others differently.

    .. math::
        \ell_i = -\sum_c y_{ic}\, w_{ic} \log p_{ic}, \qquad
        w_{ic} = (1-p_{ic})^{\gamma_+} \text{ for } c = y_i, \quad p_{ic}^{\gamma_-} \text{ else}

    - :math:`p`: softmax of the logits; :math:`y`: one-hot target smoothed to :math:`(1-s) y + s/C`
    - :math:`\gamma_+`: ``gamma_pos``; :math:`\gamma_-`: ``gamma_neg``; :math:`s`: ``label_smoothing``

    Weights:
        In [0, 1], differentiated (authors' code). ``gamma_neg=0, gamma_pos=0`` is neutral and equals
        ``nn.CrossEntropyLoss(label_smoothing=...)``.

    State and cadence:
        None. The exponents may be schedules.

    Use when:
        A single-label classifier is trained with label smoothing, and classes that are already ruled out should get
        less of it.
    Avoid when:
        Label smoothing is 0: the exponent on the other classes does nothing, and this is softmax focal loss, or
        cross-entropy where the exponent on the target is 0.

    Deviations:
        None in value; see the record for what is added.

    Args:
        gamma_neg: Exponent on the other classes >= 0, or a schedule. Default 4.0 (authors' code).
        gamma_pos: Exponent on the target's class >= 0, or a schedule. Default 0.0 (authors' code).
        label_smoothing: In [0, 1], or a schedule. Default 0.1 (authors' code).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))`` with integer targets; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = AsymmetricSingleLabelLoss()
        >>> round(loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.6607

    References:
        T. Ridnik, E. Ben-Baruch, N. Zamir, A. Noy, I. Friedman, M. Protter, L. Zelnik-Manor, "Asymmetric Loss For
        Multi-Label Classification", ICCV 2021.
    """

    def __init__(
        self,
        gamma_neg: float | Schedule = 4.0,
        gamma_pos: float | Schedule = 0.0,
        *,
        label_smoothing: float | Schedule = 0.1,
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(
            ClasswiseCrossEntropy(ignore_index=ignore_index, label_smoothing=label_smoothing),
            AsymmetricFocal(gamma_neg, gamma_pos, detach=False),
            reduction,
        )
