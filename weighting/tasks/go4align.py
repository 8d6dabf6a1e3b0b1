"""Task weights by groups of tasks that are alike."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from ..base import method
from ..config import check_choice, check_number, check_whole
from ..terms import LossTerms
from .base import SUMS, Sums, mean_of, softmax_over, summing
from .history import Remembering

_ROUNDING = 1e-12
"""Share of a run's squares that differences of running sums leave where there is nothing."""


def grouped(scores: Tensor, present: Tensor, groups: int) -> Tensor:
    """Each present score replaced by the mean of its group, 0 elsewhere: k-means of numbers, exactly.

    The groups of an optimum are runs of the sorted numbers; all runs are costed by differences of running sums, the
    best cut is found by dynamic programming. Work grows with the square of the number of tasks.
    """
    size = scores.numel()
    order = torch.where(present, scores, torch.inf).argsort()
    mass = present.double()[order]
    value = torch.where(present, scores, 0.0)[order]
    middle = (mass * value).sum() / mass.sum().clamp_min(1.0)
    spread = mass * (value - middle)
    spread = spread / spread.abs().amax().clamp_min(1e-100)  # so that squares stay finite
    place = torch.arange(size, device=scores.device)
    sums = torch.stack([mass, spread, spread.square()]).cumsum(1)
    before = torch.nn.functional.pad(sums, (1, -1))
    number, total, square = sums.unsqueeze(1) - before.unsqueeze(2)  # of the run (first, last)
    cost = (square - total.square() / number.clamp_min(1.0)).clamp_min(0.0)
    cost = torch.where(cost > _ROUNDING * square, cost, 0.0)  # equal numbers cost nothing
    cost = torch.where(place.unsqueeze(1) <= place, cost, torch.inf)
    best, cuts = cost[0], []  # cost of the numbers up to each place, in as many groups as yet
    for _ in range(min(groups, size) - 1):
        before = torch.cat([torch.zeros_like(best[:1]), best[:-1]])  # of what comes before a run that starts here
        best, cut = (before.unsqueeze(-1) + cost).min(0)
        cuts.append(cut)
    end = torch.full_like(order[:1], size - 1)
    means = torch.zeros_like(value)
    for cut in [*reversed(cuts), torch.zeros_like(order)]:
        start = cut.gather(0, end.clamp_min(0))
        run = (place >= start) & (place <= end)
        mean = (run * mass * value).sum() / (run * mass).sum().clamp_min(1.0)
        means = torch.where(run, mean, means)
        end = start - 1
    return torch.where(present, torch.zeros_like(means).scatter(0, order, means), 0.0)


@method(
    "go4align",
    paper="GO4Align: Group Optimization for Multi-Task Alignment",
    venue="NeurIPS 2024",
    acts_on="task",
    official="autumn9999/GO4Align@b718bea79f32 methods/cluster_methods.py",
    defaults={
        "groups": ("2", "ours: the smallest number that groups; the authors' code has no default"),
        "step_size": ("0.0001", "authors' code"),
        "normalize": ("None", "authors' code"),
        "eps": ("1e-8", "ours; the authors divide by 0 where a loss is 0"),
    },
    deviations=(
        "Groups are the exact optimum of k-means on a line; the authors call one that their file does not import.",
        "The shares are kept as logarithms; a loss below eps is taken as eps in the score.",
    ),
    neutral={"groups": 1, "normalize": "sum_to_k", "num_tasks": 8},
    examples=(
        {"num_tasks": 8, "normalize": "sum_to_k"},
        {"num_tasks": 8, "groups": 3, "step_size": 0.2, "normalize": "sum_to_k"},
    ),
)
@final
class GO4Align(Remembering):
    r"""Give each task the weight of its group, groups being tasks with like scores: small losses score high.

    .. math::
        w_k = \operatorname{mean}_{j \in \text{group of } k} z_j \qquad z_k = p_k \frac{\sum_j L_j}{L_k} \qquad
        p_k \leftarrow \frac{p_k e^{-\eta L_k}}{\sum_j p_j e^{-\eta L_j}}

    - groups: k-means of the :math:`z_k` into ``groups``
    - :math:`\eta`: ``step_size``; the shares :math:`p_k` move **before** they meet the losses of the batch

    Weights:
        Positive, detached, equal within a group. Their sum is that of the scores, which moves with the ratios of the
        losses; with ``normalize="sum_to_k"`` it is the number of tasks present. ``groups=1`` with it is
        neutral: all 1.

    State and cadence:
        Logarithms of the shares; ``update_on = "step"``. Reads the batch; what is kept is the move by the step's mean.
        An absent task keeps its share, and the others divide what is theirs.

    Use when:
        Many tasks of different units, some of them alike: tasks with like scores form a group and share one weight.
    Avoid when:
        Tasks are two or three, for which groups mean little, or a loss reaches 0 or is negative. Losses orders of
        magnitude apart give large weights: normalise them, or tune the learning rate anew.

    Deviations:
        Exact groups instead of those of an iteration; ``eps``. Equal scores are always in one group.

    Args:
        groups: Largest number of groups, >= 1; with as many as tasks, each has its own score. Default 2.
        step_size: :math:`\eta` >= 0. Default 0.0001 (authors' code).
        normalize: What the weights sum to: ``"sum_to_1"``, ``"sum_to_k"``, or ``None``. Default ``None`` (as in the
            authors' code).
        eps: Least loss in the score, > 0. Default 1e-8.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import GO4Align, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth", "normal"], GO4Align(2, step_size=0.0))
        >>> loss.weights(torch.tensor([1.0, 2.0, 6.0]))
        tensor([3., 1., 1.])

    References:
        J. Shen, Q. Wang, Z. Xiao, N. van Noord, M. Worring, "GO4Align: Group Optimization for Multi-Task Alignment",
        NeurIPS 2024.
    """

    update_on = "step"

    def __init__(
        self,
        groups: int = 2,
        *,
        step_size: float = 1e-4,
        normalize: Sums | None = None,
        eps: float = 1e-8,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.groups = check_whole(self, "groups", groups, low=1)
        self.step_size = check_number(self, "step_size", step_size, low=0.0)
        self.total = None if normalize is None else check_choice(self, "normalize", normalize, SUMS)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.remember("log_share", num_tasks, fill=-math.log(num_tasks))
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        loss, known = mean_of(sums["seen"])
        share = self.get_buffer("log_share")
        moved = torch.where(known, share - self.step_size * loss, -torch.inf).log_softmax(0)
        theirs = torch.where(known, share, -torch.inf).logsumexp(0)
        share.copy_(torch.where(known, moved + theirs, share))

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        share = softmax_over(self.get_buffer("log_share") - self.step_size * loss, present)
        held = loss.clamp_min(self.eps)
        scores = share * torch.where(present, held, 0.0).sum() / held
        return summing(grouped(scores, present, self.groups), present, self.total)

    def summary(self) -> dict[str, Tensor]:
        return {"share": self.get_buffer("log_share").exp()}
