"""Task weights in closed form of the batch's own losses, and random ones; nothing of the losses is remembered."""

from __future__ import annotations

import hashlib
from typing import Any, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_choice, check_number, check_whole
from ..dynamics import Event
from ..schedules import Schedule, check_hyper, value_of
from ..terms import LossTerms
from .base import SUMS, Sums, TaskWeighting, number_of, softmax_over, summing

_LARGEST = 1e300
"""Where exponents are held, so that no difference of two is infinite minus infinite."""


@method(
    "scale_invariant",
    paper="Improvable Gap Balancing for Multi-Task Learning (as a baseline)",
    venue="UAI 2023",
    acts_on="task",
    official="YanqiDai/IGB4MTL@a10deaa81928 methods/loss_weight_methods.py",
    defaults={"eps": ("1e-8", "DB-MTL; IGB4MTL has none, and divides by 0 where a loss is 0")},
    deviations=("A loss below eps is taken as eps, instead of adding eps to every loss.",),
    examples=({"num_tasks": 8},),
)
@final
class ScaleInvariant(TaskWeighting):
    r"""Sum the logarithms of the losses, so that units do not matter.

    .. math:: \text{total} = \sum_k \log L_k \qquad w_k = \frac{1}{\max(L_k, \epsilon)}

    - :math:`\epsilon`: ``eps``

    Weights:
        :math:`1/L_k`, detached; the gradient is that of the sum of logarithms. No argument is neutral.

    State and cadence:
        None; ``update_on = "never"``. Reads the batch: micro-batches have their own weights, ranks share theirs.

    Use when:
        Positive losses of different units that stay away from 0, where the same relative improvement is worth the same
        in each task.
    Avoid when:
        A loss comes near 0 or is negative. In the two-digit suite it is clearly worse than equal weights by mean
        relative change: the regression is given up for the classifications.

    Deviations:
        A loss below ``eps`` is taken as ``eps``.

    Args:
        eps: Least loss, > 0. Default 1e-8.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, ScaleInvariant
        >>> loss = MultiTaskLoss(["seg", "depth"], ScaleInvariant())
        >>> values = {"seg": torch.tensor(2.0, requires_grad=True), "depth": torch.tensor(8.0, requires_grad=True)}
        >>> loss(values).backward()
        >>> values["seg"].grad, values["depth"].grad
        (tensor(0.5000), tensor(0.1250))

    References:
        Y. Dai, N. Fei, Z. Lu, "Improvable Gap Balancing for Multi-Task Learning", UAI 2023.
    """

    def __init__(self, *, eps: float = 1e-8, num_tasks: int | None = None) -> None:
        super().__init__()
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.start(num_tasks)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        return torch.where(present, 1.0 / loss.clamp_min(self.eps), 0.0)

    def formula(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        return torch.where(present, loss.clamp_min(self.eps).log(), 0.0).sum()


@method(
    "geometric_mean",
    paper="MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning",
    venue="CVPR Workshops 2019",
    acts_on="task",
    defaults={"eps": ("1e-8", "ours: the paper has none, and a loss of 0 stops all tasks")},
    deviations=("A loss below eps is taken as eps.",),
    examples=({"num_tasks": 8},),
)
@final
class GeometricMean(TaskWeighting):
    r"""Take the geometric mean of the losses: the geometric loss strategy (GLS).

    .. math:: \text{total} = \Big(\prod_k \hat L_k\Big)^{1/K} = \exp \tfrac1K \sum_k \log \hat L_k \qquad
        w_k = \frac{\text{total}}{K \hat L_k} \qquad \hat L_k = \max(L_k, \epsilon)

    - :math:`\epsilon`: ``eps``
    - :math:`K`: number of tasks present

    Weights:
        As above, detached: those of :class:`ScaleInvariant` times :math:`\text{total} / K`, the same direction at
        another length. Every task adds the same to the total, :math:`w_k L_k = \text{total} / K`.
        No argument is neutral.

    State and cadence:
        None; ``update_on = "never"``. Reads the batch: micro-batches have their own weights, ranks share theirs.

    Use when:
        Positive losses of different units whose gradient should shrink as they fall; there is nothing to tune and
        nothing to remember.
    Avoid when:
        A loss comes near 0, which draws the whole total to 0, or is negative. It has the direction of the sum of
        logarithms, which is worse than equal weights in the two-digit suite.

    Deviations:
        A loss below ``eps`` is taken as ``eps``, and logarithms are averaged: the product itself underflows.

    Args:
        eps: Least loss, > 0. Default 1e-8.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import GeometricMean, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], GeometricMean())
        >>> values = {"seg": torch.tensor(2.0, requires_grad=True), "depth": torch.tensor(8.0, requires_grad=True)}
        >>> total = loss(values)
        >>> total.backward()
        >>> round(total.item(), 4), values["seg"].grad, values["depth"].grad
        (4.0, tensor(1.), tensor(0.2500))

    References:
        S. Chennupati, G. Sistu, S. Yogamani, S. A. Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and
        Geometric Loss Strategy for Multi-Task Learning", CVPR Workshops 2019.
    """

    def __init__(self, *, eps: float = 1e-8, num_tasks: int | None = None) -> None:
        super().__init__()
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.start(num_tasks)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        logs = loss.clamp_min(self.eps).log()
        return torch.where(present, (_mean(logs, present) - logs).exp() / number_of(present).clamp_min(1.0), 0.0)

    def formula(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        return torch.where(present.any(), _mean(loss.clamp_min(self.eps).log(), present).exp(), 0.0)


def _mean(values: Tensor, present: Tensor) -> Tensor:
    """Over those present; 0 where there is none."""
    return torch.where(present, values, 0.0).sum() / number_of(present).clamp_min(1.0)


@method(
    "uwo",
    paper="Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning (as UW-O)",
    venue="GCPR 2024",
    acts_on="task",
    defaults={"eps": ("1e-8", "a public LibMTL-style class")},
    deviations=("A negative loss is taken as 0.",),
    examples=({"num_tasks": 8},),
)
@final
class UWO(TaskWeighting):
    r"""Divide each loss by its own value: the optimum of uncertainty weighting, without its parameters (UW-O).

    .. math:: \text{total} = \sum_k w_k L_k \qquad w_k = \frac{1}{\max(L_k, 0) + \epsilon}

    - :math:`\epsilon`: ``eps``

    Weights:
        :math:`1/L_k`, detached. The total is the number of tasks, whatever the losses are (up to ``eps``): log the
        unweighted losses. The gradient is that of :class:`ScaleInvariant`, the sum of logarithms.
        No argument is neutral.

    State and cadence:
        None; ``update_on = "never"``. Reads the batch: micro-batches have their own weights, ranks share theirs.

    Use when:
        Uncertainty weighting would be right but its parameters lag behind the losses: each loss is divided by its own
        value, with nothing to learn.
    Avoid when:
        A loss reaches 0 or is negative, or batches are small, whose noise the weights follow. Its gradient is that of
        the sum of logarithms, worse than equal weights in the two-digit suite.

    Deviations:
        A negative loss is taken as 0.

    Args:
        eps: Added to every loss, > 0. Default 1e-8.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import UWO, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], UWO())
        >>> round(loss({"seg": torch.tensor(2.0), "depth": torch.tensor(8.0)}).item(), 6)
        2.0
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.5, 'depth': 0.125}

    References:
        L. Kirchdorfer, C. Elich, S. Kutsche, H. Stuckenschmidt, L. Schott, J. M. Köhler, "Analytical Uncertainty-Based
        Loss Weighting in Multi-Task Learning", GCPR 2024.
    """

    def __init__(self, *, eps: float = 1e-8, num_tasks: int | None = None) -> None:
        super().__init__()
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.start(num_tasks)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        return torch.where(present, 1.0 / (loss.clamp_min(0.0) + self.eps), 0.0)


@method(
    "uwso",
    paper="Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning",
    venue="GCPR 2024",
    acts_on="task",
    defaults={
        "temperature": ("1.0", "a public LibMTL-style class; the paper tunes it"),
        "eps": ("1e-8", "the same class"),
        "normalize": ("'sum_to_1'", "paper"),
    },
    deviations=("A negative loss is taken as 0.", "Weights are computed in float64 with the largest taken off."),
    examples=({"num_tasks": 8}, {"num_tasks": 8, "temperature": 5.0, "normalize": "sum_to_k"}),
)
@final
class UWSO(TaskWeighting):
    r"""Share a weight of 1 by a softmax of the inverse losses: soft optimal uncertainty weighting.

    .. math:: \text{total} = \sum_k w_k L_k \qquad
        w_k = \mathrm{softmax}_k\!\left(\frac{1}{T\,(\max(L_k, 0) + \epsilon)}\right)

    - :math:`T`: ``temperature``
    - :math:`\epsilon`: ``eps``

    Weights:
        Positive, summing to 1 (with ``normalize="sum_to_k"`` to the number of tasks present), largest for the smallest
        loss; detached. :math:`T \to \infty` gives equal weights, :math:`T \to 0` all weight to the smallest loss.
        No argument is neutral.

    State and cadence:
        None; ``update_on = "never"``, but where ``temperature`` is a schedule. Reads the batch: micro-batches have
        their own weights, ranks share theirs.

    Use when:
        Losses are in comparable units, and a temperature can be tuned that says how far weight goes to tasks with small
        losses.
    Avoid when:
        Losses differ in scale or nobody tunes the temperature: the default gives nearly everything to the smallest
        loss. Divide by first losses, or stay with equal weights.

    Deviations:
        A negative loss is taken as 0.

    Args:
        temperature: :math:`T` > 0, or a schedule. Default 1.0.
        eps: Added to every loss, > 0. Default 1e-8.
        normalize: What the weights sum to: ``"sum_to_1"`` (paper) or ``"sum_to_k"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import UWSO, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], UWSO(temperature=0.5))
        >>> value = loss({"seg": torch.tensor(1.0), "depth": torch.tensor(2.0)})
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.7311, 'depth': 0.2689}

    References:
        L. Kirchdorfer, C. Elich, S. Kutsche, H. Stuckenschmidt, L. Schott, J. M. Köhler, "Analytical Uncertainty-Based
        Loss Weighting in Multi-Task Learning", GCPR 2024.
    """

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        eps: float = 1e-8,
        normalize: Sums = "sum_to_1",
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.total = check_choice(self, "normalize", normalize, SUMS)
        self.start(num_tasks)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        logits = 1.0 / (loss.clamp_min(0.0) + self.eps) / value_of(self.temperature)
        weights = softmax_over(logits.clamp_max(_LARGEST), present)
        return summing(weights, present, self.total)


@method(
    "rlw",
    paper="Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning",
    venue="TMLR 2022",
    acts_on="task",
    official="median-research-group/LibMTL@43368048 LibMTL/weighting/RLW.py",
    defaults={"seed": ("0", "ours"), "normalize": ("'sum_to_1'", "paper")},
    deviations=("Draws come from a generator of their own, keyed by seed and step.",),
    examples=({"num_tasks": 8}, {"seed": 3, "num_tasks": 8, "normalize": "sum_to_k"}),
)
@final
class RLW(TaskWeighting):
    r"""Draw the weights at random, anew at every step: a baseline that a good method should beat.

    .. math:: w_k = \mathrm{softmax}_k(z_k) \qquad z_k \sim \mathcal N(0, 1)

    Weights:
        Positive, summing to 1 (with ``normalize="sum_to_k"`` to the number of tasks present); equal in expectation.
        Detached. No argument is neutral.

    State and cadence:
        The number of steps behind us; ``update_on = "step"``. The draws are a function of seed and step, from a
        generator of its own: the same in all micro-batches of a step, on all ranks and after a resume. Torch's random
        numbers are neither read nor moved.

    Use when:
        A comparison of task weightings needs a control, which tells whether a method does more than weights drawn at
        random.
    Avoid when:
        A gain is expected: on average these are equal weights, with noise in the gradient. Short training does not even
        the draws out.

    Deviations:
        The draws are keyed by seed and step, instead of taken from the global generator, which differs between ranks.

    Args:
        seed: Whole number >= 0 that picks the sequence of draws. Default 0.
        normalize: What the weights sum to: ``"sum_to_1"`` (paper) or ``"sum_to_k"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import RLW, MultiTaskLoss
        >>> loss, same = (MultiTaskLoss(["seg", "depth"], RLW(seed=7)) for _ in range(2))
        >>> first = loss.weights
        >>> loss.update("step")
        >>> first["seg"] == same.weights["seg"], first["seg"] == loss.weights["seg"]
        (tensor(True), tensor(False))

    References:
        B. Lin, F. Ye, Y. Zhang, I. W. Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for
        Multi-Task Learning", TMLR 2022.
    """

    update_on = "step"
    symmetric = False

    def __init__(self, seed: int = 0, *, normalize: Sums = "sum_to_1", num_tasks: int | None = None) -> None:
        super().__init__()
        self.seed = check_whole(self, "seed", seed)
        self.total = check_choice(self, "normalize", normalize, SUMS)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.add_table("draw", self._draw(0))

    def _draw(self, step: int) -> Tensor:
        """``(K,)`` normal draws of a step; hashed, because neighbouring seeds are neighbours in other sequences."""
        key = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        return torch.randn(self.num_tasks, generator=generator, dtype=torch.float64, device="cpu")

    def _redraw(self) -> None:
        if self.tasks and not self.get_buffer("clock").is_meta:
            self.get_buffer("draw").copy_(self._draw(self.completed("step")))

    def weigh(self, terms: LossTerms) -> Tensor:
        _, present = self.read(terms)
        weights = softmax_over(self.get_buffer("draw"), present)
        return summing(weights, present, self.total)

    def _tick(self, event: Event, index: int | None) -> None:
        super()._tick(event, index)
        if event == "step":
            self._redraw()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._redraw()

    def reset(self) -> None:
        super().reset()
        self._redraw()
