"""Losses of the target's probability alone, for noisy labels: each in closed form or as a weight on cross-entropy."""

from __future__ import annotations

from typing import Literal, final

from reweigh.weighting.base import Weighting
from reweigh.weighting.confidence import DFT, CompSum, Confidence, GeneralizedCrossEntropy, SymmetricCrossEntropy
from reweigh.weighting.config import check_choice
from reweigh.weighting.schedules import Schedule

from ..criteria.base import Criterion
from ..criteria.confidence import ClosedForm
from ..criteria.element import CrossEntropy
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method

Form = Literal["closed", "weighted"]
"""``"closed"``: the loss itself. ``"weighted"``: cross-entropy times the detached weight that has its gradient."""

FORMS: tuple[Form, ...] = ("closed", "weighted")


def formed(
    owner: object, form: Form, confidence: Confidence, criterion: Criterion
) -> tuple[Criterion, Weighting | None]:
    """Criterion and weighting of a loss of p alone, in the form asked for."""
    if check_choice(owner, "form", form, FORMS) == "closed":
        return ClosedForm(confidence, criterion), None
    return criterion, confidence


@method(
    "generalized_cross_entropy",
    paper="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    venue="NeurIPS 2018",
    official="none by the authors; HanxunH/Active-Passive-Losses@04bce534 loss.py (GeneralizedCrossEntropy)",
    defaults={
        "q": ("0.7", "paper"),
        "form": ("'closed'", "paper's formula"),
        "reduction": ("'mean'", "ours: the mean over valid terms"),
    },
    deviations=(
        "Computed as -expm1(q log p) / q without a clamp of p: exact for every q down to 0.",
        "The paper's truncation (pruning terms with p below k) is not part of it.",
    ),
    neutral={"q": 0.0, "form": "weighted"},
    examples=({}, {"form": "weighted"}, {"q": 0.1, "reduction": "sum"}),
)
@final
class GCELoss(Objective):
    r"""Generalized cross-entropy: between cross-entropy and mean absolute error, for noisy labels.

    .. math:: \ell_i = \frac{1 - p_i^q}{q}

    - :math:`p_i`: softmax probability of the target; :math:`q`: ``q``

    Weights:
        ``form="closed"``: none, the criterion is the loss. ``"weighted"``: detached :math:`p^q` on cross-entropy, the
        same gradient. ``q=0`` is neutral (cross-entropy), ``q=1`` the mean absolute error :math:`1 - p`.

    State and cadence:
        None; ``q`` may be a schedule, through 0 as well.

    Use when:
        A drop-in for cross-entropy under label noise of unknown amount, on few and balanced classes, with exponent and
        learning rate tuned together.
    Avoid when:
        A weak group or a rare class counts: both look like wrong labels. A large exponent loses the worst group in the
        shortcut suite; no certain gain over cross-entropy under noise either.

    Deviations:
        p is not clamped; no truncation.

    Args:
        q: In [0, 1], or a schedule. Default 0.7 (paper).
        form: ``"closed"`` or ``"weighted"``. Default "closed" (paper).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``. Targets are class indices; ``"weighted"``
        also takes probabilities, weighed by :math:`\sum_c y_c p_c`.

    Example:
        >>> import torch
        >>> loss = GCELoss(q=0.5)
        >>> round(loss(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1])).item(), 4)
        1.0

    References:
        Z. Zhang, M. R. Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        NeurIPS 2018.
    """

    def __init__(
        self,
        q: float | Schedule = 0.7,
        *,
        form: Form = "closed",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        confidence = GeneralizedCrossEntropy(q)
        super().__init__(*formed(self, form, confidence, CrossEntropy(ignore_index=ignore_index)), reduction)


@method(
    "mae",
    paper="Robust Loss Functions under Label Noise for Deep Neural Networks",
    venue="AAAI 2017",
    official="none by the authors; HanxunH/Active-Passive-Losses@04bce534 loss.py (MeanAbsoluteError)",
    defaults={"form": ("'closed'", "paper's formula"), "reduction": ("'mean'", "ours: the mean over valid terms")},
    deviations=("1 - p, half of the paper's sum of |p_c - y_c| over classes, as the public codes have it.",),
    examples=({}, {"form": "weighted"}),
)
@final
class MAELoss(Objective):
    r"""Mean absolute error between softmax probabilities and the one-hot label: the most noise-robust loss of p.

    .. math:: \ell_i = 1 - p_i = \tfrac12 \sum_c |p_{ic} - y_{ic}|

    - :math:`p_i`: softmax probability of the target

    Weights:
        ``form="closed"``: none, the criterion is the loss. ``"weighted"``: detached :math:`p` on cross-entropy (dynamic
        fine-tuning, :class:`~reweigh.weighting.DFT`), the same gradient. No argument is neutral. The losses of a sample
        for all C labels add up to C - 1, whatever the model says: symmetric noise does not move the minimum.

    State and cadence:
        None.

    Use when:
        Very many labels may be wrong, classes are two or a few, and there is time and learning rate enough for small
        gradients.
    Avoid when:
        Classes are more than a few: terms with a small p hardly move. The noisy-label suite shows it far behind
        cross-entropy, with rare classes hardly learned.

    Deviations:
        Half of the sum over classes.

    Args:
        form: ``"closed"`` or ``"weighted"``. Default "closed" (paper).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``. Targets are class indices; ``"weighted"``
        also takes probabilities, weighed by :math:`\sum_c y_c p_c`.

    Example:
        >>> import torch
        >>> round(MAELoss()(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1])).item(), 4)
        0.75

    References:
        A. Ghosh, H. Kumar, P. S. Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017.
    """

    def __init__(
        self,
        *,
        form: Form = "closed",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(*formed(self, form, DFT(), CrossEntropy(ignore_index=ignore_index)), reduction)


@method(
    "symmetric_cross_entropy",
    paper="Symmetric Cross Entropy for Robust Learning with Noisy Labels",
    venue="ICCV 2019",
    official="HanxunH/Active-Passive-Losses@04bce534 loss.py (SCELoss)",
    defaults={
        "alpha": ("0.1", "paper, CIFAR-10; 6.0 for CIFAR-100"),
        "beta": ("1.0", "paper, CIFAR-10; 0.1 for CIFAR-100"),
        "floor": ("1e-4", "the code's clamp of a one-hot label; any A = -log(floor) can be had"),
        "form": ("'closed'", "paper's formula"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=("No clamp of p at 1e-7, with which the code's sum over classes is a little above 1 - p.",),
    neutral={"alpha": 1.0, "beta": 0.0, "form": "weighted"},
    examples=({}, {"alpha": 6.0, "beta": 0.1, "form": "weighted"}),
)
@final
class SCELoss(Objective):
    r"""Symmetric cross-entropy: cross-entropy plus reverse cross-entropy, for noisy labels.

    .. math:: \ell_i = -\alpha \log p_i - \beta \sum_c p_{ic} \log \max(y_{ic}, f)
              = -\alpha \log p_i + \beta A (1 - p_i), \qquad A = -\log f

    - :math:`p_i`: softmax probability of the target; :math:`y`: its one-hot label
    - :math:`\alpha`: ``alpha``; :math:`\beta`: ``beta``; :math:`f`: ``floor``

    Weights:
        ``form="closed"``: none, the criterion is the loss. ``"weighted"``: detached :math:`\alpha + \beta A p` on
        cross-entropy, the same gradient. ``alpha=1, beta=0`` is neutral.

    State and cadence:
        None; ``alpha`` and ``beta`` may be schedules.

    Use when:
        A drop-in for cross-entropy under label noise that goes on learning hard samples; both factors and the learning
        rate can be tuned.
    Avoid when:
        The schedule of cross-entropy has to be kept: default gradients are several times larger. In the noisy-label
        suite the gain is not certain, and more wrong labels are learned.

    Deviations:
        p is not clamped.

    Args:
        alpha: Share of cross-entropy, >= 0, or a schedule. Default 0.1 (paper, CIFAR-10).
        beta: Share of reverse cross-entropy, >= 0, or a schedule. Default 1.0 (paper, CIFAR-10).
        floor: In (0, 1]. Default 1e-4 (the code's clamp).
        form: ``"closed"`` or ``"weighted"``. Default "closed" (paper).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``. Targets are class indices; ``"weighted"``
        also takes probabilities, weighed by :math:`\sum_c y_c p_c`.

    Example:
        >>> import torch
        >>> round(SCELoss()(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])).item(), 4)
        4.6745

    References:
        Y. Wang, X. Ma, Z. Chen, Y. Luo, J. Yi, J. Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy
        Labels", ICCV 2019.
    """

    def __init__(
        self,
        alpha: float | Schedule = 0.1,
        *,
        beta: float | Schedule = 1.0,
        floor: float = 1e-4,
        form: Form = "closed",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        confidence = SymmetricCrossEntropy(alpha, beta=beta, floor=floor)
        super().__init__(*formed(self, form, confidence, CrossEntropy(ignore_index=ignore_index)), reduction)


@method(
    "comp_sum",
    paper="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    venue="ICML 2023",
    defaults={
        "tau": ("1.0", "cross-entropy, the middle of the paper's family"),
        "bound": ("32768.0", "ours: gradients of half-precision logits stay finite"),
        "form": ("'closed'", "paper's formula"),
        "reduction": ("'mean'", "ours: the mean over valid terms"),
    },
    deviations=(
        "tau < 1 has no largest slope: it is held at bound, and the loss is linear in log p from there.",
        "The paper's smooth adversarial variant is not part of it.",
    ),
    neutral={"tau": 1.0, "form": "weighted"},
    examples=({"tau": 0.5}, {"tau": 0.0, "form": "weighted", "bound": 1e4}, {"tau": 1.7}),
)
@final
class CompSumLoss(Objective):
    r"""The comp-sum family: sum-exponential, cross-entropy, generalized cross-entropy, mean absolute error.

    .. math:: \ell_i = \frac{1}{1-\tau}\Big(\frac{1}{p_i^{1-\tau}} - 1\Big), \qquad -\log p_i \text{ for } \tau = 1

    - :math:`p_i`: softmax probability of the target; :math:`\tau`: ``tau``

    ``tau=0`` is the sum-exponential loss :math:`1/p - 1`, ``tau=1`` cross-entropy, ``tau`` = 1 + q generalized
    cross-entropy, ``tau=2`` the mean absolute error :math:`1 - p`.

    Weights:
        ``form="closed"``: none, the criterion is the loss. ``"weighted"``: detached :math:`p^{\tau-1}` on
        cross-entropy, the same gradient. ``tau=1`` is neutral. Below 1 the slope has no bound in the paper; here it is
        held at ``bound``.

    State and cadence:
        None; ``tau`` may be a schedule, through 1 as well.

    Use when:
        The closed forms of sum-exponential, cross-entropy, generalised cross-entropy and mean absolute error are to be
        compared on one data set by one exponent.
    Avoid when:
        The exponent is below 1 and the data may hold a wrong label, which then owns the batch. At 1 this is plain
        cross-entropy.

    Deviations:
        Slopes of ``tau < 1`` are held at ``bound``; the loss is linear in log p beyond.

    Args:
        tau: In [0, 2], or a schedule. Default 1.0 (cross-entropy).
        bound: Largest slope, in [1, 1e30]. Default 32768 (ours): reached at p = 3e-5 for ``tau=0``, at 1e-9 for 0.5.
        form: ``"closed"`` or ``"weighted"``. Default "closed" (paper).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``. Targets are class indices; ``"weighted"``
        also takes probabilities, weighed by :math:`\sum_c y_c p_c`.

    Example:
        >>> import torch
        >>> round(CompSumLoss(tau=0.0)(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1])).item(), 4)
        3.0

    References:
        A. Mao, M. Mohri, Y. Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023.
    """

    def __init__(
        self,
        tau: float | Schedule = 1.0,
        *,
        bound: float = 32768.0,
        form: Form = "closed",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        confidence = CompSum(tau, bound=bound)
        super().__init__(*formed(self, form, confidence, CrossEntropy(ignore_index=ignore_index)), reduction)
