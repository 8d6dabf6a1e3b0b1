"""Named objectives for hard instances."""

from __future__ import annotations

from typing import final

from reweigh.weighting.base import Weighting
from reweigh.weighting.instance import KLDRO, ChiSquareDRO, Tilted
from reweigh.weighting.schedules import Schedule
from reweigh.weighting.selection import CVaR

from ..classification import PerClass
from ..criteria.element import CrossEntropy
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method


class _Instances(Objective):
    """Cross-entropy under weights that compare the instances of a batch."""

    def __init__(
        self,
        weighting: Weighting,
        gather: bool,
        weight: PerClass | None,
        ignore_index: int,
        label_smoothing: float | Schedule,
        reduction: Reduction | ReductionName,
    ) -> None:
        if not isinstance(gather, bool):
            raise TypeError(f"{type(self).__name__}: gather must be True or False, got {gather!r}")
        super().__init__(
            CrossEntropy(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing),
            weighting.gathered() if gather else weighting,
            reduction,
        )


@method(
    "kl_dro",
    paper="Doubly Robust Instance-Reweighted Adversarial Training",
    venue="ICLR 2024",
    defaults={"temperature": ("1.0", "ours: the paper tunes it"), "gather": ("True", "ours: the joined batch's loss")},
    deviations=("See the weighting KLDRO.",),
    examples=({}, {"temperature": 0.5, "weight": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.1}),
)
@final
class KLDROLoss(_Instances):
    r"""Cross-entropy under the worst distribution over the batch within reach of a KL penalty.

    .. math:: L = \sum_i p_i\,\mathrm{CE}_i, \qquad p = \mathrm{softmax}(\mathrm{CE} / r)

    - :math:`r`: ``temperature``

    Weights:
        p times the number of terms, averaging 1, detached: the exact gradient of
        :math:`r \log \frac1N \sum_i e^{\mathrm{CE}_i/r}`, which ``Objective(CrossEntropy(), None, LogMeanExp(r))`` has
        as its value (with ``weight``, the mean divides by the class weights). No argument is neutral.

    State and cadence:
        None. ``temperature`` may be a schedule.

    Use when:
        Adversarial training or other clean data judged by the hardest instances: a soft maximum over the batch, with a
        temperature between mean and maximum.
    Avoid when:
        Labels are noisy, or the temperature is low and one term owns the batch. For a weak group it shows no gain over
        plain training in the shortcut suite.

    Deviations:
        See :class:`~reweigh.weighting.KLDRO`.

    Args:
        temperature: :math:`r` > 0, in units of the loss, or a schedule. Default 1.
        gather: Compare with the terms of all ranks (:class:`~reweigh.weighting.Gathered`). Default True.
        weight: Per-class weights with torch's meaning and denominator.
        ignore_index: Targets with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))`` or probabilities; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> round(KLDROLoss()(logits, torch.tensor([0, 1])).item(), 4)
        0.4881

    References:
        D. Sow, S. Lin, Z. Wang, Y. Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024.
    """

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        gather: bool = True,
        weight: PerClass | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(KLDRO(temperature), gather, weight, ignore_index, label_smoothing, reduction)


@method(
    "cvar",
    paper="Training Region-based Object Detectors with Online Hard Example Mining",
    venue="CVPR 2016; CVaR: Rockafellar and Uryasev, Journal of Risk 2000",
    defaults={"alpha": ("0.2", "ours: tuned"), "gather": ("True", "ours: the joined batch's loss")},
    deviations=("See the weighting CVaR.",),
    neutral={"alpha": 1.0},
    examples=({}, {"alpha": 0.5}),
)
@final
class CVaRLoss(_Instances):
    r"""Mean cross-entropy of the worst share of the batch: CVaR, top-k loss, online hard example mining.

    .. math:: L = \frac{1}{\alpha N} \sum_{i \in \text{worst } \alpha N} \mathrm{CE}_i

    - :math:`\alpha`: ``alpha``; :math:`N`: number of terms

    Weights:
        :class:`~reweigh.weighting.CVaR`'s, detached. ``alpha=1`` is neutral.

    State and cadence:
        None. ``alpha`` may be a schedule.

    Use when:
        A drop-in for cross-entropy over pixels or anchors, most of them solved: mean of the worst share, also called
        top-k loss or online hard example mining.
    Avoid when:
        Labels are noisy, or a known group is weak: plain training has the better worst group in the shortcut suite.
        Small batches leave a few terms to learn from.

    Deviations:
        See :class:`~reweigh.weighting.CVaR`.

    Args:
        alpha: Share in (0, 1], or a schedule. Default 0.2.
        gather: Compare with the terms of all ranks (:class:`~reweigh.weighting.Gathered`). Default True.
        weight: Per-class weights with torch's meaning and denominator.
        ignore_index: Targets with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))`` or probabilities; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> round(CVaRLoss()(logits, torch.tensor([0, 1])).item(), 4)
        0.6931

    References:
        R. T. Rockafellar, S. Uryasev, "Optimization of Conditional Value-at-Risk", Journal of Risk 2000.
        A. Shrivastava, A. Gupta, R. Girshick, "Training Region-based Object Detectors with Online Hard Example
        Mining", CVPR 2016.
    """

    def __init__(
        self,
        alpha: float | Schedule = 0.2,
        *,
        gather: bool = True,
        weight: PerClass | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(CVaR(alpha), gather, weight, ignore_index, label_smoothing, reduction)


@method(
    "chi_square_dro",
    paper="Variance-based Regularization with Convex Objectives",
    venue="NeurIPS 2017, JMLR 2019",
    defaults={"rho": ("1.0", "ours: the radius is tuned"), "gather": ("True", "ours: the joined batch's loss")},
    deviations=("See the weighting ChiSquareDRO.",),
    neutral={"rho": 0.0},
    examples=({}, {"rho": 0.1}),
)
@final
class ChiSquareDROLoss(_Instances):
    r"""Cross-entropy under the worst distribution in a chi-square ball around the batch.

    .. math::
        L = \max_{w \ge 0,\; \bar w = 1} \frac1N \sum_i w_i\,\mathrm{CE}_i \quad \text{with} \quad
        \frac{1}{2N} \sum_i (w_i - 1)^2 \le \rho

    - :math:`\rho`: ``rho``; :math:`N`: number of terms

    Weights:
        :class:`~reweigh.weighting.ChiSquareDRO`'s, detached. ``rho=0`` is neutral.

    State and cadence:
        None. ``rho`` may be a schedule.

    Use when:
        A drop-in for cross-entropy on clean labels that weighs the harder samples of a batch up within a bounded
        radius, and batches are large.
    Avoid when:
        Labels are noisy, or batches so small that their variance is noise. Rare classes or known groups are the aim:
        weights by counts reach them directly.

    Deviations:
        See :class:`~reweigh.weighting.ChiSquareDRO`.

    Args:
        rho: Radius >= 0, or a schedule. Default 1.
        gather: Compare with the terms of all ranks (:class:`~reweigh.weighting.Gathered`). Default True.
        weight: Per-class weights with torch's meaning and denominator.
        ignore_index: Targets with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))`` or probabilities; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> round(ChiSquareDROLoss()(logits, torch.tensor([0, 1])).item(), 4)
        0.6931

    References:
        J. Duchi, H. Namkoong, "Variance-based Regularization with Convex Objectives", JMLR 2019.
    """

    def __init__(
        self,
        rho: float | Schedule = 1.0,
        *,
        gather: bool = True,
        weight: PerClass | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(ChiSquareDRO(rho), gather, weight, ignore_index, label_smoothing, reduction)


@method(
    "tilted",
    paper="Tilted Empirical Risk Minimization",
    venue="ICLR 2021",
    defaults={"tilt": ("1.0", "ours: the paper tunes it"), "gather": ("True", "ours: the joined batch's loss")},
    deviations=("See the weighting Tilted.",),
    neutral={"tilt": 0.0},
    examples=({}, {"tilt": -1.0}),
)
@final
class TiltedLoss(_Instances):
    r"""Cross-entropy tilted towards hard instances, or away from outliers (TERM).

    .. math:: L = \sum_i p_i\,\mathrm{CE}_i, \qquad p = \mathrm{softmax}(t\,\mathrm{CE})

    - :math:`t`: ``tilt``: above 0 towards large losses, below 0 away from them

    Weights:
        :class:`~reweigh.weighting.Tilted`'s, detached: the exact gradient of
        :math:`\frac1t \log \frac1N \sum_i e^{t\,\mathrm{CE}_i}`.
        ``tilt=0`` is neutral.

    State and cadence:
        None. ``tilt`` may be a schedule.

    Use when:
        A drop-in for cross-entropy on data with outliers (negative tilt) or with a mean that hides hard instances
        (positive tilt), and batches large enough for a soft extremum.
    Avoid when:
        A negative tilt is on from the first step: warm it up from 0. A positive one meets wrong labels. With tilt 0 it
        is plain cross-entropy.

    Deviations:
        See :class:`~reweigh.weighting.Tilted`.

    Args:
        tilt: :math:`t`, of any sign, or a schedule. Default 1.
        gather: Compare with the terms of all ranks (:class:`~reweigh.weighting.Gathered`). Default True.
        weight: Per-class weights with torch's meaning and denominator.
        ignore_index: Targets with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))`` or probabilities; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> round(TiltedLoss()(logits, torch.tensor([0, 1])).item(), 4)
        0.4881

    References:
        T. Li, A. Beirami, M. Sanjabi, V. Smith, "Tilted Empirical Risk Minimization", ICLR 2021.
    """

    def __init__(
        self,
        tilt: float | Schedule = 1.0,
        *,
        gather: bool = True,
        weight: PerClass | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(Tilted(tilt), gather, weight, ignore_index, label_smoothing, reduction)
