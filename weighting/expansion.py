r"""Cross-entropy as a series in 1 - p, :math:`-\log p = \sum_k (1-p)^k / k`, cut off, bent, or turned around."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from .base import method
from .confidence import Confidence, log_rest, rest
from .config import check_whole
from .functional import focal_weight
from .schedules import Schedule, check_hyper, value_of


def _log_per_rest(log_pt: Tensor) -> Tensor:
    """``-log p / (1 - p)``, 1 at p = 1; at least 1. Not to be differentiated."""
    below = log_pt < 0.0
    held = torch.where(below, log_pt, -1.0)
    return torch.where(below, held / torch.expm1(held), 1.0).clamp_min(1.0)


@method(
    "taylor",
    paper="Can Cross Entropy Loss Be Robust to Label Noise?",
    venue="IJCAI 2020",
    defaults={"order": ("2", "the shortest series that is neither end of the family; the paper tunes it, 2 to 6")},
    deviations=("The series is summed by Horner's rule and the weight in closed form; no clamp of p.",),
    examples=({}, {"order": 1}, {"order": 6}),
)
@final
class Taylor(Confidence):
    r"""Cut the series of cross-entropy off, so that no term's loss is without bound (Taylor cross-entropy).

    .. math:: w_i = 1 - (1 - p_i)^t, \qquad \varphi(p) = \sum_{k=1}^{t} \frac{(1-p)^k}{k}

    - :math:`p_i`: probability the model gives to the target; :math:`t`: ``order``

    Weights:
        In [0, 1], rising in p. Detached. No argument is neutral: ``order`` to infinity is cross-entropy; ``order=1``
        has the loss and gradient of the mean absolute error :math:`1 - p`.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        Labels are noisy, classes few, and a weight with one whole number between mean absolute error and cross-entropy
        is all you want to tune.
    Avoid when:
        Classes are many: at a small p the weight is only the order times p, and learning stalls. The noisy-label suite
        shows it worse than cross-entropy.

    Deviations:
        p is not clamped.

    Args:
        order: Number of terms, >= 1; the loss takes as many passes, the weight one. Default 2 (the paper tunes it).

    Shapes:
        Reads ``log_pt`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), Taylor(2))
        >>> objective.weights(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1]))
        tensor([0.7500])

    References:
        L. Feng, S. Shu, Z. Lin, F. Lv, L. Li, B. An, "Can Cross Entropy Loss Be Robust to Label Noise?", IJCAI 2020.
    """

    def __init__(self, order: int = 2) -> None:
        super().__init__()
        self.order = check_whole(self, "order", order, low=1)

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return -torch.expm1(self.order * log_rest(log_pt, log_qt))

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        q = rest(log_pt, log_qt)
        total = q / self.order
        for k in range(self.order - 1, 0, -1):
            total = q * (1.0 / k + total)
        return total


@method(
    "poly",
    paper="PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions",
    venue="ICLR 2022",
    official="the paper's listing (TensorFlow); none in PyTorch by the authors",
    defaults={
        "epsilon": ("1.0", "paper: 1 or 2 for ImageNet, -1 for detection; to be tuned per task"),
        "gamma": ("0.0", "paper: Poly-1 of cross-entropy; its detection experiments have focal's gamma"),
    },
    deviations=("epsilon below -1 is refused: terms that are nearly right would be pushed back.",),
    neutral={"epsilon": 0.0},
    examples=({}, {"epsilon": -1.0}, {"epsilon": 2.0, "gamma": 2.0}, {"epsilon": -1.0, "gamma": 0.5}),
)
@final
class Poly(Confidence):
    r"""Change the first coefficient of the series, of cross-entropy or of focal loss (Poly-1).

    .. math:: \varphi(p) = (1-p)^\gamma \big(-\log p + \epsilon\,(1 - p)\big)

    .. math:: w_i = (1-p_i)^\gamma \Big( 1 + \gamma\, p_i \frac{-\log p_i}{1 - p_i} + \epsilon (\gamma + 1)\, p_i \Big)

    - :math:`p_i`: probability the model gives to the target; :math:`\epsilon`: ``epsilon``; :math:`\gamma`: ``gamma``

    With ``gamma=0`` the weight is :math:`1 + \epsilon p`.

    Weights:
        At ``gamma=0`` between 1 and :math:`1 + \epsilon`, rising in p for positive ``epsilon``. Detached: the weights
        have the loss's exact gradient. ``epsilon=0, gamma=0`` is neutral; ``epsilon=-1`` is :math:`1 - p`, detached
        focal with exponent 1.

    State and cadence:
        None; ``update_on = "never"``. ``epsilon`` and ``gamma`` may be schedules.

    Use when:
        Cross-entropy or focal loss works and one number can be tuned on top of it: positive against under-confidence,
        negative against over-confidence.
    Avoid when:
        There is no budget to tune: the right sign depends on the task, and 0 is plain cross-entropy. It knows no class
        counts, so it is no remedy for rare classes.

    Deviations:
        ``epsilon`` must be >= -1.

    Args:
        epsilon: >= -1, or a schedule. Default 1.0 (paper, ImageNet).
        gamma: Focusing exponent >= 0, or a schedule. Default 0.0 (paper's Poly-1 cross-entropy).

    Shapes:
        Reads ``log_pt`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), Poly(2.0))
        >>> objective.weights(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1]))
        tensor([1.5000])

    References:
        Z. Leng, M. Tan, C. Liu, E. D. Cubuk, X. Shi, S. Cheng, D. Anguelov, "PolyLoss: A Polynomial Expansion
        Perspective of Classification Loss Functions", ICLR 2022.
    """

    def __init__(self, epsilon: float | Schedule = 1.0, *, gamma: float | Schedule = 0.0) -> None:
        super().__init__()
        self.epsilon = check_hyper(self, "epsilon", epsilon, low=-1.0)
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        epsilon, gamma = value_of(self.epsilon), value_of(self.gamma)
        # 1 taken apart into 1 - p and p leaves no summand negative
        hard = gamma * (_log_per_rest(log_pt) - 1.0) + (1.0 + epsilon) * (1.0 + gamma)
        return focal_weight(log_pt, gamma, log_qt) * (rest(log_pt, log_qt) + log_pt.exp() * hard)

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        inner = value_of(self.epsilon) * rest(log_pt, log_qt) - log_pt
        return focal_weight(log_pt, value_of(self.gamma), log_qt) * inner


@method(
    "focal_slope",
    paper="Focal Loss for Dense Object Detection",
    venue="ICCV 2017",
    official="none: the derivative of the paper's formula",
    defaults={"gamma": ("2.0", "paper")},
    neutral={"gamma": 0.0},
    examples=({}, {"gamma": 0.5}, {"gamma": 1.0}),
)
@final
class FocalSlope(Confidence):
    r"""Focal loss as a constant weight: the one whose weighted cross-entropy has focal loss's exact gradient.

    .. math:: w_i = (1-p_i)^\gamma - \gamma\, p_i\, (1-p_i)^{\gamma-1} \log p_i, \qquad
              \varphi(p) = -(1-p)^\gamma \log p

    - :math:`p_i`: probability the model gives to the target; :math:`\gamma`: ``gamma``

    This is not :math:`(1-p)^\gamma`. Focal loss differentiates its modulator too: as p rises the modulator falls, and
    that is the second summand. ``Focal(gamma, detach=True)`` leaves it out and is another objective: at ``gamma=1`` it
    is Poly-1 with ``epsilon=-1``.

    Weights:
        Zero at p = 1, 1 at p = 0, and above 1 between for small p: for ``gamma=2`` the largest is 1.22, at p = 0.10.
        Detached. ``gamma=0`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``gamma`` may be a schedule.

    Use when:
        The exact gradient of focal loss is wanted from a weight that is a constant and can be normalised, clipped or
        kept as a running mean.
    Avoid when:
        Nothing is done to the weight: focal loss itself is simpler, and reports its own value. Labels are noisy, as
        with every weight that grows with the loss.

    Deviations:
        None in the gradient; the value is that of weighted cross-entropy (``ClosedForm(FocalSlope())`` has focal's).

    Args:
        gamma: Finite and >= 0, or a schedule. Default 2.0 (paper).

    Shapes:
        Reads ``log_pt`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), FocalSlope(2.0))
        >>> objective.weights(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1]))
        tensor([0.5966])

    References:
        T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017.
    """

    def __init__(self, gamma: float | Schedule = 2.0) -> None:
        super().__init__()
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        gamma = value_of(self.gamma)
        return focal_weight(log_pt, gamma, log_qt) * (1.0 + gamma * log_pt.exp() * _log_per_rest(log_pt))

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return -focal_weight(log_pt, value_of(self.gamma), log_qt) * log_pt


@method(
    "encouraging",
    paper="Well-classified Examples are Underestimated in Classification with Deep Neural Networks",
    venue="AAAI 2022",
    official="lancopku/well-classified-examples-are-underestimated@9c1a756a EncouragingLoss.py",
    defaults={"end": ("0.75", "authors' code (log_end)")},
    deviations=(
        "1 - p is not clamped at 1e-5, where the authors' bonus and its gradient stop: end=1 goes on to the dtype's "
        "eps (to 3e-10 in float32, 1e-77 in float64 where the criterion has log(1 - p) exactly), then along the "
        "tangent that the authors use for end < 1.",
    ),
    examples=({}, {"end": 0.0}, {"end": 0.5}, {"end": 1.0}),
)
@final
class Encouraging(Confidence):
    r"""Reward what is already right: the mirror image of focal loss (encouraging loss).

    .. math:: w_i = \begin{cases} 1/(1-p_i) & p_i < e \\ 1 + p_i/(1-e) & p_i \ge e \end{cases} \qquad
              \varphi(p) = -\log p + b(p), \quad
              b(p) = \begin{cases} \log(1-p) & p < e \\ \log(1-e) - \frac{p-e}{1-e} & p \ge e \end{cases}

    - :math:`p_i`: probability the model gives to the target; :math:`e`: ``end``, where the logarithm of the bonus
      :math:`b` gives way to its tangent

    Up to ``end`` the weight is that of a detached focal loss with exponent -1.

    Weights:
        Between 1 and :math:`1 + 1/(1-e)`, rising in p. Detached. No argument is neutral: ``end=0`` is
        :math:`1 + p`, Poly-1 with ``epsilon=1`` (whose loss is larger by 1). With ``end=1`` weights have no bound as p
        goes to 1, but the gradient on the logits stays below 1, since cross-entropy's own is :math:`1 - p`.

    State and cadence:
        None; ``update_on = "never"``. ``end`` may be a schedule.

    Use when:
        Labels are clean and the representation matters: terms that are already right should go on teaching, so that
        margins grow.
    Avoid when:
        A loss that stays positive or calibrated probabilities are needed, or easy terms already drown the rest. The
        noisy-label suite shows no certain gain over cross-entropy.

    Deviations:
        No clamp at 1 - p = 1e-5; beyond what the dtype knows of 1 - p the tangent goes on. Under ``end=1`` take a
        criterion with exact :math:`\log(1-p)` (:class:`~reweigh.losses.ExactCrossEntropy`).

    Args:
        end: In [0, 1], or a schedule. Default 0.75 (authors' code); 0.5 is safe everywhere, 1 the pure logarithm.

    Shapes:
        Reads ``log_pt`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), Encouraging())
        >>> objective.weights(torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log(), torch.tensor([0, 1]))
        tensor([2.0000, 4.6000])

    References:
        G. Zhao, W. Yang, X. Ren, L. Li, Y. Wu, X. Sun, "Well-classified Examples are Underestimated in Classification
        with Deep Neural Networks", AAAI 2022.
    """

    positive = False

    def __init__(self, end: float | Schedule = 0.75) -> None:
        super().__init__()
        self.end = check_hyper(self, "end", end, low=0.0, high=1.0)

    def _edge(self, log_pt: Tensor, log_qt: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
        """1 - p where the tangent begins, no smaller than can be told from 0, and its logarithm."""
        kind = torch.finfo(log_pt.dtype)
        least = kind.eps if log_qt is None else kind.tiny**0.25  # squares and sums of weights stay finite
        edge = 1.0 - value_of(self.end)
        if isinstance(edge, Tensor):
            edge = edge.clamp_min(least)
            return edge, edge.log()
        edge = max(edge, least)
        return edge, math.log(edge)

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        q, (edge, _) = rest(log_pt, log_qt), self._edge(log_pt, log_qt)
        inside = q > edge
        return torch.where(inside, 1.0 / torch.where(inside, q, 1.0), 1.0 + log_pt.exp() / edge)

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        q, (edge, log_edge) = rest(log_pt, log_qt), self._edge(log_pt, log_qt)
        inside = q > edge
        log_q = torch.where(inside, q, 1.0).log() if log_qt is None else log_qt
        return torch.where(inside, log_q, log_edge + q / edge - 1.0) - log_pt
