"""Task weights from the batch's losses relative to earlier ones."""

from __future__ import annotations

import random
from typing import Any, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_choice, check_number, check_whole
from ..dynamics import Event
from ..schedules import Schedule, check_hyper, value_of
from ..terms import LossTerms
from .base import SUMS, Sums, mean_of, number_of, safe_ratio, softmax_over, summing
from .history import Remembering, relative

LEAST = 1e-100
"""Ratio of losses below which it is taken as this, so that its logarithm is finite."""


@method(
    "normalized_loss_balance",
    paper="Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher Adversarial Distillation",
    venue="arXiv 2306.16170, 2023 (MTARD)",
    acts_on="task",
    official="zhaoshiji123/MTARD@a46fbc24925b mtard/mtard_resnet18_cifar10.py",
    defaults={
        "rate": ("0.025", "authors' code; times 0.1 where the learning rate drops"),
        "beta": ("1.0", "authors' code"),
    },
    deviations=(
        "Any number of tasks; the authors have two.",
        "First losses are means of a task's first step, not of its first micro-batch.",
    ),
    examples=({"num_tasks": 8}, {"num_tasks": 8, "rate": 0.5, "beta": 2.0}),
)
@final
class NormalizedLossBalance(Remembering):
    r"""Move weights towards relative losses, a little at every step: the normalized loss balance of MTARD.

    .. math::
        w_k \leftarrow w_k - \eta \left( w_k - \frac{r_k}{\sum_j r_j} \right) \qquad
        r_k = \left( \frac{L_k}{L_k(0)} \right)^{\beta}

    - :math:`L_k(0)`: loss of the task's first step
    - :math:`\eta`: ``rate``; the weights move **before** they meet the losses of the batch

    Weights:
        Positive, summing to 1 over the tasks present; :math:`1/K` at first. An exponential mean of relative losses.
        Detached. No argument is neutral (``rate=0`` gives :math:`1/K`).

    State and cadence:
        Weights and first losses; ``update_on = "step"``. Reads the batch; what is kept is the move by the step's mean.
        An absent task keeps its weight, and the others share what is theirs.

    Use when:
        Tasks should fall at one pace in relation to their first losses, as the teachers of a multi-teacher distillation
        should.
    Avoid when:
        A first loss is close to 0, negative or not typical, since all later ratios rest on it: warm up first. Dividing
        by first losses once needs no step size.

    Deviations:
        Any number of tasks; first losses are means of a step. Ratios below 1e-100 count as that.

    Args:
        rate: :math:`\eta` in [0, 1], or a schedule. Default 0.025 (authors' code).
        beta: :math:`\beta` >= 0. Default 1.0 (authors' code).
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, NormalizedLossBalance
        >>> loss = MultiTaskLoss(["natural", "adversarial"], NormalizedLossBalance(0.5))
        >>> value = loss({"natural": torch.tensor(2.0), "adversarial": torch.tensor(4.0)})
        >>> loss.update("step")
        >>> loss.weights({"natural": torch.tensor(1.0), "adversarial": torch.tensor(6.0)})
        tensor([0.3750, 0.6250])

    References:
        S. Zhao, X. Wang, X. Wei, "Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher Adversarial
        Distillation", arXiv 2306.16170, 2023.
    """

    update_on = "step"

    def __init__(self, rate: float | Schedule = 0.025, *, beta: float = 1.0, num_tasks: int | None = None) -> None:
        super().__init__()
        self.rate = check_hyper(self, "rate", rate, low=0.0, high=1.0)
        self.beta = check_number(self, "beta", beta, low=0.0)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.remember("share", num_tasks, fill=1.0 / num_tasks)
        self.remember("first", num_tasks)  # 0: unknown
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def _moved(self, loss: Tensor, present: Tensor) -> Tensor:
        ratio = relative(loss, self.get_buffer("first"), floor=LEAST)
        goal = softmax_over(self.beta * ratio.log(), present)
        held = torch.where(present, self.get_buffer("share"), 0.0)
        own = torch.where(held.sum() > 0, safe_ratio(held, held.sum()), softmax_over(torch.zeros_like(held), present))
        return own - value_of(self.rate) * (own - goal)

    def commit(self, sums: dict[str, Tensor]) -> None:
        loss, known = mean_of(sums["seen"])
        share, first = self.get_buffer("share"), self.get_buffer("first")
        theirs = torch.where(known, share, 0.0).sum()
        share.copy_(torch.where(known, theirs * self._moved(loss, known), share))
        first.copy_(torch.where(known & (first == 0), loss, first))

    def weigh(self, terms: LossTerms) -> Tensor:
        return self._moved(*self.read(terms))

    def summary(self) -> dict[str, Tensor]:
        return {"share": self.get_buffer("share").clone()}


@method(
    "lbtw",
    paper="Loss-Balanced Task Weighting to Reduce Negative Transfer in Multi-Task Learning",
    venue="AAAI 2019 (student abstract)",
    acts_on="task",
    official="chao1224/Loss-Balanced-Task-Weighting@63ee7d8974e7 src/pcba_run.py",
    defaults={
        "alpha": ("0.5", "a public implementation; the authors' code reads it from a file"),
        "normalize": ("'sum_to_k'", "authors' code"),
    },
    deviations=(
        "First losses are means of a task's first step of the epoch, not of the first micro-batch.",
        "A task that is absent from that step takes its first loss where it first appears in the epoch.",
    ),
    neutral={"alpha": 0.0, "num_tasks": 8},
    examples=({"num_tasks": 8}, {"num_tasks": 8, "alpha": 1.5, "normalize": None}),
)
@final
class LossBalancedTaskWeighting(Remembering):
    r"""Weigh tasks by how little their loss has fallen since the epoch began.

    .. math:: w_k = K \frac{\rho_k}{\sum_j \rho_j} \qquad \rho_k = \left( \frac{L_k}{L_k(0)} \right)^{\alpha}

    - :math:`L_k(0)`: loss of the first step of the epoch that runs
    - with ``normalize=None``: :math:`w_k = \rho_k`

    Weights:
        Positive, summing to the number of tasks present; 1 in the first step of each epoch. Detached. ``alpha=0`` is
        neutral: all 1.

    State and cadence:
        The epoch's first losses, forgotten at its end; ``update_on = "step"``. Reads the batch: micro-batches have
        their own weights, ranks share theirs.

    Use when:
        Many related tasks of one kind, of which some are learned much sooner than others, and epochs of many steps.
    Avoid when:
        Single batches are noisy: two of them are compared, and the first decides a whole epoch. Ratios of epoch means,
        as in dynamic weight averaging, are steadier.

    Deviations:
        First losses are means of a step, and a late task takes its own. Ratios below 1e-100 count as that.

    Args:
        alpha: :math:`\alpha` in [0, 3]; 0 gives equal weights. Default 0.5.
        normalize: What the weights sum to: ``"sum_to_1"``, ``"sum_to_k"`` (authors' code), or ``None`` for the powers
            as they are. Default ``"sum_to_k"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import LossBalancedTaskWeighting, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], LossBalancedTaskWeighting())
        >>> value = loss({"seg": torch.tensor(4.0), "depth": torch.tensor(9.0)})
        >>> loss.update("step")
        >>> loss.weights({"seg": torch.tensor(1.0), "depth": torch.tensor(9.0)})
        tensor([0.6667, 1.3333])

    References:
        S. Liu, Y. Liang, A. Gitter, "Loss-Balanced Task Weighting to Reduce Negative Transfer in Multi-Task Learning",
        AAAI 2019.
    """

    update_on = "step"

    def __init__(
        self, alpha: float = 0.5, *, normalize: Sums | None = "sum_to_k", num_tasks: int | None = None
    ) -> None:
        super().__init__()
        self.alpha = check_number(self, "alpha", alpha, low=0.0, high=3.0)
        self.total = None if normalize is None else check_choice(self, "normalize", normalize, SUMS)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.remember("first", num_tasks)  # 0: unknown
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        loss, known = mean_of(sums["seen"])
        first = self.get_buffer("first")
        first.copy_(torch.where(known & (first == 0), loss, first))

    def refresh(self, event: Event, **signals: Any) -> None:
        if event == "epoch":
            self.get_buffer("first").zero_()

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        power = self.alpha * relative(loss, self.get_buffer("first"), floor=LEAST).log()
        if self.total is None:
            return torch.where(present, power.exp(), 0.0)
        return summing(softmax_over(power, present), present, self.total)


def look_back(seed: int, step: int, rho: float) -> float:
    """1.0 with probability ``rho``: whether the step goes on from the last weights, whatever else draws numbers."""
    return float(random.Random(f"relobralo {seed} {step}").random() < rho)


@method(
    "relobralo",
    paper="Multi-Objective Loss Balancing for Physics-Informed Deep Learning",
    venue="arXiv 2110.09813, 2021",
    acts_on="task",
    official="rbischof/relative_balancing@b3c76d2bed7c src/update_rules.py, src/train.py",
    defaults={
        "alpha": ("0.999", "authors' code"),
        "rho": ("0.99", "PhysicsNeMo Sym; the authors' code has 1, which never looks back"),
        "tau": ("1.0", "authors' code"),
        "seed": ("0", "ours"),
    },
    deviations=(
        "No warm-up rule: the authors' code takes alpha = 0 in the second step, and its losses as the first ones.",
        "Draws are keyed by (seed, step), not taken from a global generator.",
    ),
    neutral={"alpha": 1.0, "rho": 1.0, "num_tasks": 8},
    examples=({"num_tasks": 8}, {"num_tasks": 8, "alpha": 0.6, "rho": 0.5, "tau": 0.3, "seed": 7}),
)
@final
class ReLoBRaLo(Remembering):
    r"""Balance the pace of the losses, now and then against the very first: relative loss balancing, random lookback.

    .. math::
        w_k(t) = \alpha \left( \rho_t\, w_k(t-1) + (1 - \rho_t)\, \hat w_k(t, 0) \right) + (1 - \alpha)\,
        \hat w_k(t, t-1) \qquad
        \hat w_k(t, s) = K\,\mathrm{softmax}_k\!\left( \frac{L_k(t)}{\tau L_k(s)} \right)

    - :math:`\rho_t \in \{0, 1\}`: drawn for each step, 1 with probability ``rho``

    Weights:
        Positive, summing to the number of tasks (where all are present); 1 in the first step. Detached. ``alpha=1``
        with ``rho=1`` is neutral: all 1.

    State and cadence:
        First losses, last losses, last weights, and the draw; ``update_on = "step"``. Reads the batch; what is kept
        comes from the step's mean. The draw is the same on all ranks and after a resume.

    Use when:
        Terms of a physics-informed loss, of different units, whose paces differ by orders of magnitude, with large or
        full batches.
    Avoid when:
        Batches are small: a ratio of two batch losses is noisy. Where only units differ, dividing by first losses is
        enough.

    Deviations:
        No warm-up rule for the second step; draws have their own key. A task that is seen for the first time, or whose
        earlier loss is not positive, has ratio 1; one that is absent keeps its state.

    Args:
        alpha: :math:`\alpha` in [0, 1], the share of the past. Default 0.999 (authors' code).
        rho: Probability of going on from the last weights, in [0, 1]; otherwise the past is the first step. Default
            0.99.
        tau: :math:`\tau` > 0; large values flatten. Default 1.0 (authors' code).
        seed: Whole number >= 0 that the draws are keyed by. Default 0.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, ReLoBRaLo
        >>> loss = MultiTaskLoss(["pde", "boundary"], ReLoBRaLo(alpha=0.0))
        >>> value = loss({"pde": torch.tensor(4.0), "boundary": torch.tensor(0.1)})
        >>> loss.update("step")
        >>> loss.weights({"pde": torch.tensor(2.0), "boundary": torch.tensor(0.1)})
        tensor([0.7551, 1.2449])

    References:
        R. Bischof, M. A. Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning", arXiv
        2110.09813, 2021.
    """

    update_on = "step"

    def __init__(
        self,
        alpha: float = 0.999,
        *,
        rho: float = 0.99,
        tau: float = 1.0,
        seed: int = 0,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_number(self, "alpha", alpha, low=0.0, high=1.0)
        self.rho = check_number(self, "rho", rho, low=0.0, high=1.0)
        self.tau = check_number(self, "tau", tau, low=0.0, open_low=True)
        self.seed = check_whole(self, "seed", seed)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.remember("first", num_tasks)  # 0: unknown
        self.remember("last", num_tasks)  # 0: unknown
        self.remember("balance", num_tasks, fill=1.0)
        self.add_state("onward", torch.tensor(look_back(self.seed, 0, self.rho), dtype=torch.float64))
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def _against(self, loss: Tensor, before: Tensor, present: Tensor) -> Tensor:
        return number_of(present) * softmax_over((relative(loss, before) / self.tau).clamp_max(1e200), present)

    def _balanced(self, loss: Tensor, present: Tensor) -> Tensor:
        first, last, balance = (self.get_buffer(name) for name in ("first", "last", "balance"))
        onward = self.get_buffer("onward")
        past = onward * balance + (1.0 - onward) * self._against(loss, first, present)
        now = self._against(loss, last, present)
        return torch.where(present, self.alpha * past + (1.0 - self.alpha) * now, 0.0)

    def commit(self, sums: dict[str, Tensor]) -> None:
        loss, known = mean_of(sums["seen"])
        first, last, balance = (self.get_buffer(name) for name in ("first", "last", "balance"))
        balance.copy_(torch.where(known, self._balanced(loss, known), balance))
        first.copy_(torch.where(known & (first == 0), loss, first))
        last.copy_(torch.where(known, loss, last))
        drawn, onward = look_back(self.seed, self.completed("step") + 1, self.rho), self.get_buffer("onward")
        onward.copy_(torch.where(known.any(), drawn, onward))

    def weigh(self, terms: LossTerms) -> Tensor:
        return self._balanced(*self.read(terms))

    def reset(self) -> None:
        super().reset()
        if self.tasks:
            self.get_buffer("onward").fill_(look_back(self.seed, 0, self.rho))
