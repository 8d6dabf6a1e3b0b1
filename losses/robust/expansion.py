"""Cross-entropy as a series in 1 - p, as losses: cut off, bent, or turned around."""

from __future__ import annotations

from typing import final

from reweigh.weighting.expansion import Encouraging, Poly, Taylor
from reweigh.weighting.schedules import Schedule

from ..classification import PerClass
from ..criteria.confidence import ExactCrossEntropy
from ..criteria.element import CrossEntropy
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method
from .confidence import Form, formed


@method(
    "taylor",
    paper="Can Cross Entropy Loss Be Robust to Label Noise?",
    venue="IJCAI 2020",
    defaults={
        "order": ("2", "the shortest series that is neither end of the family; the paper tunes it, 2 to 6"),
        "form": ("'closed'", "paper's formula"),
        "reduction": ("'mean'", "ours: the mean over valid terms"),
    },
    deviations=("Summed by Horner's rule; no clamp of p.",),
    examples=({}, {"order": 6}, {"order": 3, "form": "weighted"}),
)
@final
class TaylorLoss(Objective):
    r"""Taylor cross-entropy: the first terms of its series, bounded, for noisy labels.

    .. math:: \ell_i = \sum_{k=1}^{t} \frac{(1-p_i)^k}{k}

    - :math:`p_i`: softmax probability of the target; :math:`t`: ``order``

    Weights:
        ``form="closed"``: none, the criterion is the loss. ``"weighted"``: detached :math:`1 - (1-p)^t` on
        cross-entropy, the same gradient. No argument is neutral: ``order`` to infinity is cross-entropy; ``order=1`` is
        the mean absolute error :math:`1 - p`.

    State and cadence:
        None.

    Use when:
        Labels are noisy and classes few, and a bounded loss in closed form with one whole number to tune is wanted.
    Avoid when:
        Classes are many, or order and learning rate cannot be tuned. It is worse than cross-entropy in the noisy-label
        suite; generalised cross-entropy can be set more finely.

    Deviations:
        p is not clamped.

    Args:
        order: Number of terms, >= 1; the closed form takes as many passes. Default 2 (the paper tunes it).
        form: ``"closed"`` or ``"weighted"``. Default "closed" (paper).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``. Targets are class indices; ``"weighted"``
        also takes probabilities, weighed by :math:`\sum_c y_c p_c`.

    Example:
        >>> import torch
        >>> round(TaylorLoss()(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])).item(), 4)
        0.625

    References:
        L. Feng, S. Shu, Z. Lin, F. Lv, L. Li, B. An, "Can Cross Entropy Loss Be Robust to Label Noise?", IJCAI 2020.
    """

    def __init__(
        self,
        order: int = 2,
        *,
        form: Form = "closed",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(*formed(self, form, Taylor(order), CrossEntropy(ignore_index=ignore_index)), reduction)


@method(
    "poly",
    paper="PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions",
    venue="ICLR 2022",
    official="the paper's listing (TensorFlow); none in PyTorch by the authors",
    defaults={
        "epsilon": ("1.0", "paper: 1 or 2 for ImageNet, -1 for detection; to be tuned per task"),
        "gamma": ("0.0", "paper: Poly-1 of cross-entropy; its detection experiments have focal's gamma"),
        "form": ("'closed'", "paper's formula"),
        "reduction": ("'mean'", "ours: the mean over valid terms"),
    },
    deviations=(
        "epsilon below -1 is refused: terms that are nearly right would be pushed back.",
        "Label smoothing, which the paper's listing has for ImageNet, is no function of p alone and not offered.",
    ),
    neutral={"epsilon": 0.0, "form": "weighted"},
    examples=(
        {},
        {"epsilon": -1.0, "form": "weighted"},
        {"epsilon": 2.0, "gamma": 2.0, "weight": [1.0, 2.0, 0.5, 3.0]},
        {"epsilon": -0.5, "gamma": 0.5, "weight": [1.0, 2.0, 0.5, 3.0], "form": "weighted"},
    ),
)
@final
class PolyLoss(Objective):
    r"""Poly-1: cross-entropy or focal loss with the first coefficient of its series changed.

    .. math:: \ell_i = v_{y_i} (1-p_i)^\gamma \big(-\log p_i + \epsilon\,(1 - p_i)\big), \qquad
              L = \frac{\sum_i m_i \ell_i}{\sum_i m_i v_{y_i}}

    - :math:`p_i`: softmax probability of the target; :math:`\epsilon`: ``epsilon``; :math:`\gamma`: ``gamma``
    - :math:`v`: ``weight``, 1 where there is none; :math:`m_i`: 1, 0 where ignored, ``sample_weight`` where given

    Weights:
        ``form="closed"``: none, the criterion is the loss. ``"weighted"``: a detached weight on cross-entropy
        (:class:`~reweigh.weighting.Poly`, :math:`1 + \epsilon p` at ``gamma=0``), the same gradient.
        ``epsilon=0, gamma=0`` is neutral.

    State and cadence:
        None, unless ``weight`` is a name such as ``"balanced"``: then the class counts, set by the ``fit`` event.
        ``epsilon`` and ``gamma`` may be schedules.

    Use when:
        A drop-in for cross-entropy or focal loss when everything else is settled and one coefficient can still be tuned
        on validation data.
    Avoid when:
        Nobody tunes it: an epsilon from another task may have the wrong sign. Rare classes are the aim: class weights
        and logit adjustment use their counts.

    Deviations:
        ``epsilon`` must be >= -1; no label smoothing.

    Args:
        epsilon: >= -1, or a schedule. Default 1.0 (paper, ImageNet).
        gamma: Focusing exponent >= 0, or a schedule. Default 0.0 (paper's Poly-1 cross-entropy).
        weight: Per-class weights with torch's meaning and torch's denominator: a sequence or tensor, ``"balanced"``,
            ``"sqrt"``, ``"effective"``, or a class table.
        form: ``"closed"`` or ``"weighted"``. Default "closed" (paper).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``. Targets are class indices; ``"weighted"``
        also takes probabilities, weighed by :math:`\sum_c y_c p_c`.

    Example:
        >>> import torch
        >>> round(PolyLoss(2.0)(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])).item(), 4)
        1.6931

    References:
        Z. Leng, M. Tan, C. Liu, E. D. Cubuk, X. Shi, S. Cheng, D. Anguelov, "PolyLoss: A Polynomial Expansion
        Perspective of Classification Loss Functions", ICLR 2022.
    """

    def __init__(
        self,
        epsilon: float | Schedule = 1.0,
        *,
        gamma: float | Schedule = 0.0,
        weight: PerClass | None = None,
        form: Form = "closed",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        criterion = CrossEntropy(weight=weight, ignore_index=ignore_index)
        super().__init__(*formed(self, form, Poly(epsilon, gamma=gamma), criterion), reduction)


@method(
    "encouraging",
    paper="Well-classified Examples are Underestimated in Classification with Deep Neural Networks",
    venue="AAAI 2022",
    official="lancopku/well-classified-examples-are-underestimated@9c1a756a EncouragingLoss.py",
    defaults={
        "end": ("0.75", "authors' code (log_end)"),
        "form": ("'closed'", "authors' code"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=(
        "1 - p is not clamped at 1e-5, where the authors' bonus and its gradient stop: it is added up from the other "
        "classes, and end=1 goes on to 3e-10 in float32, 1e-77 in float64, then along the tangent.",
    ),
    examples=({}, {"end": 0.0}, {"end": 1.0}, {"end": 0.5, "form": "weighted"}),
)
@final
class EncouragingLoss(Objective):
    r"""Encouraging loss: cross-entropy with a bonus for what is already right, the mirror image of focal loss.

    .. math:: \ell_i = -\log p_i + b(p_i), \qquad
              b(p) = \begin{cases} \log(1-p) & p < e \\ \log(1-e) - \frac{p-e}{1-e} & p \ge e \end{cases}

    - :math:`p_i`: softmax probability of the target; :math:`e`: ``end``

    Weights:
        ``form="closed"``: none, the criterion is the loss. ``"weighted"``: detached :math:`1/(1-p)` on cross-entropy,
        :math:`1 + p/(1-e)` from ``end`` on, the same gradient. No argument is neutral: ``end=0`` is Poly-1 with
        ``epsilon=1``, less 1.

    State and cadence:
        None; ``end`` may be a schedule.

    Use when:
        A drop-in for cross-entropy on clean, roughly balanced classes, when confident and right samples should go on
        shaping the representation.
    Avoid when:
        Values below 0 or overconfident probabilities are a problem, or easy samples dominate already. In the
        noisy-label suite frequent classes lose recall, with no certain gain in accuracy.

    Deviations:
        No clamp at 1 - p = 1e-5; the tangent goes on beyond 3e-10 (float32) or 1e-77 (float64).

    Args:
        end: In [0, 1], or a schedule. Default 0.75 (authors' code); 0.5 is safe everywhere, 1 the pure logarithm.
        form: ``"closed"`` or ``"weighted"``. Default "closed" (authors' code).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``, C at least 2, class indices; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = EncouragingLoss()
        >>> round(loss(torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log(), torch.tensor([0, 1])).item(), 4)
        -0.9405

    References:
        G. Zhao, W. Yang, X. Ren, L. Li, Y. Wu, X. Sun, "Well-classified Examples are Underestimated in Classification
        with Deep Neural Networks", AAAI 2022.
    """

    def __init__(
        self,
        end: float | Schedule = 0.75,
        *,
        form: Form = "closed",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(*formed(self, form, Encouraging(end), ExactCrossEntropy(ignore_index=ignore_index)), reduction)
