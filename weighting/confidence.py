"""Losses that are a function of the target's probability alone, each as one weight on cross-entropy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from .base import Scope, Weighting, method
from .config import check_number
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


class Confidence(Weighting, ABC):
    r"""A loss :math:`\varphi(p)` of the target's probability alone, as one weight on cross-entropy.

    .. math:: \nabla \varphi(p_i) = w(p_i)\,\nabla(-\log p_i), \qquad w(p) = -p\,\varphi'(p)

    As a weighting it is :math:`w`, a constant to the gradient: ``Objective(CrossEntropy(), it)`` has the gradient of
    the loss and the value of weighted cross-entropy. ``Objective(ClosedForm(it))`` has both value and gradient of the
    loss (:class:`~reweigh.losses.ClosedForm`). Where the weight grows with p the loss trusts what the model believes
    and stands wrong labels; where it falls, the loss mines hard terms: :func:`confidence_curve` shows which.

    A subclass implements :meth:`slope` and :meth:`value`. Both must be finite from ``log_pt = 0`` to -1e4.
    """

    needs = frozenset({"log_pt"})
    detached = True
    scope: Scope = "local"
    positive: bool = True
    """Whether the loss is positive for p < 1, so that a sum over classes can normalise it."""

    @abstractmethod
    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        """The weight :math:`w(p)`, not to be differentiated.

        Args:
            log_pt: ``(*S)`` log-probability of the target.
            log_qt: ``(*S)`` exact ``log(1 - p)`` where known.
        """

    @abstractmethod
    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        r"""The loss :math:`\varphi(p)`, whose derivative by ``log_pt`` is minus :meth:`slope`; same arguments."""

    def weigh(self, terms: LossTerms) -> Tensor:
        log_qt = None if terms.log_qt is None else terms.log_qt.detach()
        return self.slope(terms.need("log_pt", self).detach(), log_qt)


@torch.no_grad()
def confidence_curve(weighting: Weighting, p: Any) -> Tensor:
    """The weights that a weighting gives at the target probabilities ``p``: rising curves trust, falling ones mine.

    Args:
        weighting: Any that reads nothing but ``log_pt`` (and ``log_qt``, ``loss``). One that compares terms takes the
            points as one batch of cross-entropies.
        p: Numbers in [0, 1]: a sequence, array or tensor; 0 is held at the smallest normal number.

    Returns:
        Weights of the shape of ``p``, float64, without gradient. Nothing is learned.

    Raises:
        TypeError: If ``weighting`` is none, or reads something else.
        ValueError: If a probability is outside [0, 1].

    Example:
        >>> from reweigh.weighting import Focal
        >>> confidence_curve(Focal(2.0), [0.0, 0.5, 1.0])
        tensor([1.0000, 0.2500, 0.0000], dtype=torch.float64)
        >>> confidence_curve(GeneralizedCrossEntropy(1.0), [0.25, 0.5, 1.0])
        tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    if not isinstance(weighting, Weighting):
        raise TypeError(f"confidence_curve: weighting must be a Weighting, got {type(weighting).__name__}")
    beyond = sorted(weighting.needs - {"log_pt", "log_qt", "loss"})
    if beyond:
        raise TypeError(
            f"confidence_curve: weighting must read log_pt only, got {type(weighting).__name__}, which needs "
            f"{', '.join(map(repr, beyond))}"
        )
    points = torch.as_tensor(p, dtype=torch.float64)
    outside = ~((points >= 0.0) & (points <= 1.0))
    if bool(outside.any()):
        raise ValueError(f"confidence_curve: p must be in [0, 1], got {float(points[outside][0]):g}")
    held = torch.finfo(points.dtype)
    log_pt, log_qt = points.clamp_min(held.tiny).log(), torch.log1p(-points).clamp_min(held.min)
    terms = LossTerms(loss=-log_pt, log_pt=log_pt, log_qt=log_qt)
    return weighting.weigh(terms).to(points.dtype).expand_as(points).clone()


# pieces that the presets share


def rest(log_pt: Tensor, log_qt: Tensor | None) -> Tensor:
    """``1 - p``, exact to the last digit of what is known."""
    return -torch.expm1(log_pt) if log_qt is None else log_qt.exp()


def log_rest(log_pt: Tensor, log_qt: Tensor | None) -> Tensor:
    """``log(1 - p)`` from the side on which it does not cancel; minus infinity at p = 1. Not to be differentiated."""
    if log_qt is not None:
        return log_qt
    return torch.where(log_pt < -0.7, torch.log1p(-log_pt.exp()), (-torch.expm1(log_pt)).log())


def power_loss(log_pt: Tensor, k: float | Tensor) -> Tensor:
    """``(1 - p**k) / k``, and ``-log p`` where k is 0: without cancellation for any k."""
    least = 1e-5 * torch.finfo(log_pt.dtype).eps  # below, both are the same number down to p = exp(-1e4)
    if not isinstance(k, Tensor):
        return -log_pt if abs(k) < least else -torch.expm1(k * log_pt) / k
    k = k.to(log_pt.dtype)
    some = k.abs() >= least
    safe = torch.where(some, k, torch.ones_like(k))
    return torch.where(some, -torch.expm1(safe * log_pt) / safe, -log_pt)


@method(
    "generalized_cross_entropy",
    paper="Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    venue="NeurIPS 2018",
    official="none by the authors; HanxunH/Active-Passive-Losses@04bce534 loss.py (GeneralizedCrossEntropy)",
    defaults={"q": ("0.7", "paper")},
    deviations=(
        "No clamp of p: codes that hold it at 1e-7 give the worst terms no gradient, and lose digits at small q.",
        "The paper's truncation (pruning terms with p below k) is not part of it.",
    ),
    neutral={"q": 0.0},
    examples=({}, {"q": 0.1}, {"q": 1.0}),
)
@final
class GeneralizedCrossEntropy(Confidence):
    r"""Trust what the model believes, by a power of p: between cross-entropy and mean absolute error (GCE).

    .. math:: w_i = p_i^q, \qquad \varphi(p) = \frac{1 - p^q}{q}

    - :math:`p_i`: probability the model gives to the target; :math:`q`: ``q``

    Weights:
        In [0, 1], rising in p. Detached. ``q=0`` is neutral (cross-entropy); ``q=1`` has the gradient of the mean
        absolute error :math:`1 - p`.

    State and cadence:
        None; ``update_on = "never"``. ``q`` may be a schedule, through 0 as well.

    Use when:
        An unknown share of labels is wrong and cross-entropy learns them by heart; as a weight, the power of p combines
        with class or sample weights.
    Avoid when:
        Classes are many, or a weak group counts: in the shortcut suite a large q loses the worst group almost wholly.
        The noisy-label suite shows no certain gain over cross-entropy.

    Deviations:
        p is not clamped; no truncation.

    Args:
        q: In [0, 1], or a schedule. Default 0.7 (paper).

    Shapes:
        Reads ``log_pt`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), GeneralizedCrossEntropy(0.5))
        >>> objective.weights(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1]))
        tensor([0.5000])

    References:
        Z. Zhang, M. R. Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        NeurIPS 2018.
    """

    def __init__(self, q: float | Schedule = 0.7) -> None:
        super().__init__()
        self.q = check_hyper(self, "q", q, low=0.0, high=1.0)

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return torch.exp(value_of(self.q) * log_pt)

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return power_loss(log_pt, value_of(self.q))


@method(
    "dft",
    paper="On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
    venue="arXiv 2508.05629, 2025",
    official="yongliang-wu/DFT verl/verl/trainer/fsdp_dft_trainer.py",
    defaults={},
    examples=({},),
)
@final
class DFT(Confidence):
    r"""Weigh each term by its own probability (dynamic fine-tuning): the gradient of the mean absolute error.

    .. math:: w_i = p_i, \qquad \varphi(p) = 1 - p

    - :math:`p_i`: probability the model gives to the target

    Weights:
        In [0, 1], rising in p. Detached. No argument is neutral. The same weights as
        ``GeneralizedCrossEntropy(1.0)``.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        A pre-trained language model is fine-tuned on answers of which some tokens are alien to it, and it should not
        forget for their sake.
    Avoid when:
        Training starts from nothing, or answers hold new knowledge: p is small where there is most to learn. Its
        gradient is that of mean absolute error, which the noisy-label suite shows far behind cross-entropy.

    Deviations:
        None: a detached p on each token's cross-entropy.

    Args:
        None.

    Shapes:
        Reads ``log_pt`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CausalLM, Objective
        >>> objective = Objective(CausalLM(), DFT())
        >>> objective.weights(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]))
        tensor([[0.0000, 0.2500, 0.2500]])

    References:
        Y. Wu, Y. Zhou, Z. Ziheng, Y. Peng, X. Ye, X. Hu, W. Zhu, L. Qi, M.-H. Yang, X. Yang, "On the Generalization of
        SFT: A Reinforcement Learning Perspective with Reward Rectification", arXiv 2508.05629, 2025.
    """

    def __init__(self) -> None:
        super().__init__()

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return log_pt.exp()

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return rest(log_pt, log_qt)


@method(
    "comp_sum",
    paper="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    venue="ICML 2023",
    defaults={
        "tau": ("1.0", "cross-entropy, the middle of the paper's family"),
        "bound": ("32768.0", "ours: gradients of half-precision logits stay finite"),
    },
    deviations=(
        "tau < 1 has no largest weight: it is held at bound, and the loss goes on along its tangent (in log p) from "
        "there, so that closed form and weight stay one loss.",
    ),
    neutral={"tau": 1.0},
    examples=({"tau": 0.5}, {"tau": 0.0, "bound": 1e4}, {"tau": 1.7}),
)
@final
class CompSum(Confidence):
    r"""The comp-sum family: from sums of exponentials through cross-entropy to mean absolute error.

    .. math:: w_i = p_i^{\tau - 1}, \qquad \varphi(p) = \frac{1}{1-\tau}\Big(\frac{1}{p^{1-\tau}} - 1\Big)

    - :math:`p_i`: probability the model gives to the target; :math:`\tau`: ``tau``

    ``tau=0`` is the sum-exponential loss, ``tau=1`` cross-entropy, ``tau`` = 1 + q generalized cross-entropy,
    ``tau=2`` the mean absolute error :math:`1 - p`.

    Weights:
        For ``tau`` above 1 in [0, 1], rising in p. Below 1 at least 1, falling in p, and **without bound** in the
        paper: 1/p at ``tau=0``; they are held at ``bound``. Detached. ``tau=1`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``tau`` may be a schedule, through 1 as well.

    Use when:
        One exponent on a weight should lead from hard mining (below 1) through cross-entropy (1) to mean absolute error
        (2), in a product with other weightings.
    Avoid when:
        The exponent is below 1 and any label may be wrong: that term then owns the batch. Near 2 with many classes,
        terms with a small probability are hardly learned.

    Deviations:
        Weights of ``tau < 1`` are held at ``bound``; the loss is linear in log p beyond.

    Args:
        tau: In [0, 2], or a schedule. Default 1.0 (cross-entropy).
        bound: Largest weight, in [1, 1e30]. Default 32768 (ours): reached at p = 3e-5 for ``tau=0``, at 1e-9 for 0.5.

    Shapes:
        Reads ``log_pt`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), CompSum(0.5))
        >>> objective.weights(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([1]))
        tensor([2.])

    References:
        A. Mao, M. Mohri, Y. Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023.
    """

    def __init__(self, tau: float | Schedule = 1.0, *, bound: float = 32768.0) -> None:
        super().__init__()
        self.tau = check_hyper(self, "tau", tau, low=0.0, high=2.0)
        self.bound = check_number(self, "bound", bound, low=1.0, high=1e30)

    def _parts(self) -> tuple[float | Tensor, float | Tensor]:
        """The power of p, and the logarithm of the least p at which the weight is not held."""
        k, bound = value_of(self.tau) - 1.0, math.log(self.bound)
        if not isinstance(k, Tensor):
            return k, bound / k if k < 0.0 else -math.inf
        falls = k < 0.0
        return k, torch.where(falls, bound / torch.where(falls, k, -1.0), -torch.inf)

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        k, edge = self._parts()
        return torch.where(log_pt < edge, self.bound, torch.exp(k * log_pt))

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        k, edge = self._parts()
        if not isinstance(k, Tensor) and k >= 0.0:
            return power_loss(log_pt, k)
        below = log_pt < edge
        inner = power_loss(torch.where(below, edge, log_pt), k)
        return inner + self.bound * torch.where(below, edge - log_pt, 0.0)


@method(
    "symmetric_cross_entropy",
    paper="Symmetric Cross Entropy for Robust Learning with Noisy Labels",
    venue="ICCV 2019",
    official="HanxunH/Active-Passive-Losses@04bce534 loss.py (SCELoss)",
    defaults={
        "alpha": ("0.1", "paper, CIFAR-10; 6.0 for CIFAR-100"),
        "beta": ("1.0", "paper, CIFAR-10; 0.1 for CIFAR-100"),
        "floor": ("1e-4", "the code's clamp of a one-hot label; any A = -log(floor) can be had"),
    },
    deviations=("No clamp of p at 1e-7, with which the code's sum over classes is a little above 1 - p.",),
    neutral={"alpha": 1.0, "beta": 0.0},
    examples=({}, {"alpha": 6.0, "beta": 0.1}, {"floor": 0.0183}),
)
@final
class SymmetricCrossEntropy(Confidence):
    r"""Cross-entropy plus reverse cross-entropy (SCE), the latter a multiple of the mean absolute error.

    .. math:: w_i = \alpha + \beta A p_i, \qquad \varphi(p) = -\alpha \log p + \beta A (1 - p), \qquad A = -\log f

    - :math:`p_i`: probability the model gives to the target; :math:`\alpha`: ``alpha``; :math:`\beta`: ``beta``
    - :math:`f`: ``floor``, what stands for the 0 of a one-hot label inside the logarithm

    Weights:
        Between :math:`\alpha` and :math:`\alpha + \beta A`, rising in p. Detached. ``alpha=1, beta=0`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``alpha`` and ``beta`` may be schedules.

    Use when:
        Labels are noisy, some pull on hard terms has to stay, and the sum of a constant and a multiple of p is wanted
        as a weight among others.
    Avoid when:
        The learning rate is tuned for cross-entropy and may not be changed: default weights are far above 1. The
        noisy-label suite shows no certain gain over cross-entropy.

    Deviations:
        p is not clamped.

    Args:
        alpha: Share of cross-entropy, >= 0, or a schedule. Default 0.1 (paper, CIFAR-10).
        beta: Share of reverse cross-entropy, >= 0, or a schedule. Default 1.0 (paper, CIFAR-10).
        floor: In (0, 1]. Default 1e-4 (the code's clamp).

    Shapes:
        Reads ``log_pt`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), SymmetricCrossEntropy())
        >>> objective.weights(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1]))
        tensor([4.7052])

    References:
        Y. Wang, X. Ma, Z. Chen, Y. Luo, J. Yi, J. Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy
        Labels", ICCV 2019.
    """

    def __init__(self, alpha: float | Schedule = 0.1, *, beta: float | Schedule = 1.0, floor: float = 1e-4) -> None:
        super().__init__()
        self.alpha = check_hyper(self, "alpha", alpha, low=0.0)
        self.beta = check_hyper(self, "beta", beta, low=0.0)
        self.floor = check_number(self, "floor", floor, low=0.0, high=1.0, open_low=True)

    def _reverse(self) -> float | Tensor:
        """Factor of p in the weight."""
        return -math.log(self.floor) * value_of(self.beta)

    def slope(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return value_of(self.alpha) + self._reverse() * log_pt.exp()

    def value(self, log_pt: Tensor, log_qt: Tensor | None = None) -> Tensor:
        return -value_of(self.alpha) * log_pt + self._reverse() * rest(log_pt, log_qt)
