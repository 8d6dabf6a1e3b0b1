"""Task weights of the smooth maximum: small steps for all tasks, large ones for the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_number, check_whole
from ..dynamics import Event
from ..schedules import Schedule, check_hyper, value_of
from ..terms import LossTerms
from .base import TaskWeighting, mean_of, number_of


def smooth_max(values: Tensor, mu: float | Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """``mu logsumexp(values / mu)`` over the present tasks (0 where there is none) and its slopes, a softmax."""
    held = torch.where(present, values, -torch.inf)
    top = held.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    powers = torch.where(present, ((held - top) / mu).exp(), 0.0)
    total = powers.sum(-1, keepdim=True)
    safe = torch.where(total > 0, total, 1.0)
    return (top + mu * safe.log()).squeeze(-1), powers / safe


@method(
    "stch",
    paper="Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    venue="ICML 2024",
    acts_on="task",
    official="Xi-L/STCH; SimplexLab/TorchJD 0.18.0 torchjd/scalarization/_stch.py",
    defaults={
        "mu": ("1.0", "authors' multi-task code; the paper has 0.01 to 1"),
        "preferences": ("None", "TorchJD: 1/K each"),
        "reference": ("0.0", "TorchJD"),
    },
    examples=(
        {"num_tasks": 8},
        {"mu": 0.5, "num_tasks": 8, "preferences": [0.1, 0.2, 0.0, 0.3, 1.0, 0.5, 0.2, 0.1], "reference": 0.05},
    ),
)
@final
class STCH(TaskWeighting):
    r"""Minimise a smooth maximum of the losses: smooth Tchebycheff scalarisation.

    .. math:: \text{total} = \mu \log \sum_k e^{y_k / \mu} \qquad y_k = c_k (L_k - z_k) \qquad
        w_k = c_k\,\mathrm{softmax}_k(y_k / \mu)

    - :math:`\mu`: ``mu``
    - :math:`c_k`: ``preferences``, by default 1 over the number of tasks present
    - :math:`z_k`: ``reference``, the ideal losses

    Weights:
        As above, detached. :math:`\mu \to 0` leaves the worst task only; :math:`\mu \to \infty` gives weights
        :math:`c_k / K`. No argument is neutral.

    State and cadence:
        None; ``update_on = "never"``, but where ``mu`` is a schedule. Reads the batch: micro-batches have their own
        weights, ranks share theirs.

    Use when:
        The worst task matters most, or given preferences name a trade-off that no weighted sum reaches, because the
        front is not convex.
    Avoid when:
        Losses have different units: the largest takes all; divide by first losses, or take the logarithmic form. A task
        that cannot be learned holds the others back.

    Deviations:
        None.

    Args:
        mu: Smoothness > 0, or a schedule. Default 1.0.
        preferences: :math:`c_k \ge 0`, one for all, one per task in order, or by name. Default 1 over the number of
            tasks present.
        reference: :math:`z_k`, one for all, one per task in order, or by name. Default 0.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import STCH, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], STCH(mu=0.5))
        >>> value = loss({"seg": torch.tensor(1.0), "depth": torch.tensor(2.0)})
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.1345, 'depth': 0.3655}

    References:
        X. Lin, X. Zhang, Z. Yang, F. Liu, Z. Wang, Q. Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective
        Optimization", ICML 2024.
    """

    def __init__(
        self,
        mu: float | Schedule = 1.0,
        *,
        preferences: float | Sequence[float] | Mapping[str, float] | None = None,
        reference: float | Sequence[float] | Mapping[str, float] = 0.0,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.mu = check_hyper(self, "mu", mu, low=0.0, open_low=True)
        self._preferences, self._reference = preferences, reference
        self.symmetric = isinstance(preferences, (int, float, type(None))) and isinstance(reference, (int, float))
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        if self._preferences is not None:
            self.add_table("preferences", self.per_task("preferences", self._preferences, low=0.0))
        self.add_table("reference", self.per_task("reference", self._reference))

    def _parts(self, terms: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
        """Value, its slopes in y, and the preferences."""
        loss, present = self.read(terms)
        if self._preferences is None:
            preference = 1.0 / number_of(present).clamp_min(1.0)
        else:
            preference = self.get_buffer("preferences")
        scaled = preference * (loss - self.get_buffer("reference"))
        return *smooth_max(scaled, value_of(self.mu), present), preference

    def weigh(self, terms: LossTerms) -> Tensor:
        _, slopes, preference = self._parts(terms)
        return preference * slopes

    def formula(self, terms: LossTerms) -> Tensor:
        return self._parts(terms)[0]


@method(
    "log_stch",
    paper="Smooth Tchebycheff Scalarization for Multi-Objective Optimization (its multi-task form)",
    venue="ICML 2024",
    acts_on="task",
    official="Xi-L/STCH STCH_MTL; median-research-group/LibMTL@43368048 LibMTL/weighting/STCH.py",
    defaults={
        "mu": ("1.0", "authors' multi-task code"),
        "nadir_epoch": ("4", "authors' multi-task code"),
        "eps": ("1e-8", "ours; theirs adds 1e-20"),
    },
    deviations=(
        "The value keeps the maximum, which the authors' code takes off without adding it back; gradients are equal.",
        "The nadir counts every sample once (with counts=), not every batch.",
        "A loss below eps is taken as eps.",
    ),
    examples=({"num_tasks": 8}, {"mu": 0.5, "nadir_epoch": 0, "num_tasks": 8}),
)
@final
class LogSTCH(TaskWeighting):
    r"""Minimise a smooth maximum of how far each loss is above its early mean, in logarithms.

    .. math:: \text{total} = K \mu \log \sum_k \Big(\frac{\hat L_k}{n_k}\Big)^{1/\mu} \qquad
        w_k = \frac{K}{\hat L_k}\,\mathrm{softmax}_k\!\left(\frac1\mu \log \frac{\hat L_k}{n_k}\right) \qquad
        \hat L_k = \max(L_k, \epsilon)

    - :math:`n_k`: the nadir, mean training loss of epoch ``nadir_epoch``
    - :math:`\mu`: ``mu``
    - :math:`\epsilon`: ``eps``

    Up to the end of epoch ``nadir_epoch`` (counted from 0), and for a task that was not seen in it, the total is
    :math:`\sum_k \log \hat L_k` as in :class:`ScaleInvariant`.

    Weights:
        As above, detached; unit-free, :math:`\sum_k w_k L_k = K`. For :math:`\mu = 1`,
        :math:`w_k = K / (n_k \sum_j L_j / n_j)`. No argument is neutral.

    State and cadence:
        ``nadir`` (0 until known) and the sums of the epoch that makes it; ``update_on = "epoch"``. Sums are added over
        ranks at every step. A task first seen later gets its nadir from the first epoch that it is in. Otherwise reads
        the batch: micro-batches have their own weights, ranks share theirs.

    Use when:
        Losses have different units, the task that has improved least should lead, and training has epochs, the early
        ones of which serve as reference.
    Avoid when:
        Training has no epochs or their events are not sent: weights stay those of the sum of logarithms. A loss reaches
        0 or is negative.

    Deviations:
        The value keeps the maximum; the nadir counts samples; a loss below ``eps`` is taken as ``eps``.

    Args:
        mu: Smoothness > 0, or a schedule. Default 1.0.
        nadir_epoch: Number of the epoch, from 0, whose mean losses are the nadir. Default 4.
        eps: Least loss, > 0. Default 1e-8.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import LogSTCH, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], LogSTCH(nadir_epoch=0))
        >>> value = loss({"seg": torch.tensor(4.0), "depth": torch.tensor(10.0)})
        >>> loss.update("step")
        >>> loss.update("epoch")
        >>> value = loss({"seg": torch.tensor(1.0), "depth": torch.tensor(7.5)})
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.5, 'depth': 0.2}

    References:
        X. Lin, X. Zhang, Z. Yang, F. Liu, Z. Wang, Q. Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective
        Optimization", ICML 2024.
    """

    update_on = "epoch"

    def __init__(
        self, mu: float | Schedule = 1.0, *, nadir_epoch: int = 4, eps: float = 1e-8, num_tasks: int | None = None
    ) -> None:
        super().__init__()
        self.mu = check_hyper(self, "mu", mu, low=0.0, open_low=True)
        self.nadir_epoch = check_whole(self, "nadir_epoch", nadir_epoch)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.add_task_state("nadir", torch.zeros(num_tasks, dtype=torch.float64))
        self.add_task_state("running", torch.zeros(2, num_tasks, dtype=torch.float64), dim=1)
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        if self.completed("epoch") >= self.nadir_epoch:
            self.get_buffer("running").add_(torch.where(self.get_buffer("nadir") == 0, sums["seen"], 0.0))

    def refresh(self, event: Event, **signals: Any) -> None:
        if event != "epoch" or not self.tasks or self.completed("epoch") < self.nadir_epoch:
            return
        nadir, (mean, known) = self.get_buffer("nadir"), mean_of(self.get_buffer("running"))
        nadir.copy_(torch.where((nadir == 0) & known, mean.clamp_min(self.eps), nadir))
        self.get_buffer("running").zero_()

    def _parts(self, terms: LossTerms) -> tuple[Tensor, Tensor]:
        """The total, and each task's share of its slope in the logarithm of the loss."""
        loss, present = self.read(terms)
        nadir, held = self.get_buffer("nadir"), loss.clamp_min(self.eps)
        ready = present & (nadir > 0)
        early = present & (nadir == 0)
        excess = held.log() - torch.where(nadir > 0, nadir, 1.0).log()
        value, slopes = smooth_max(excess, value_of(self.mu), ready)
        number = number_of(ready)
        total = number * value + torch.where(early, held.log(), 0.0).sum()
        return total, (number * slopes + early) / held

    def weigh(self, terms: LossTerms) -> Tensor:
        return self._parts(terms)[1]

    def formula(self, terms: LossTerms) -> Tensor:
        return self._parts(terms)[0]

    def reset(self) -> None:
        super().reset()
        for name in self._by_task:
            self.get_buffer(name).zero_()
