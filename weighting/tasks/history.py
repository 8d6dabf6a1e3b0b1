"""Task weights from how losses went so far."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_choice, check_number, check_whole
from ..dynamics import Event
from ..terms import LossTerms
from .base import TaskWeighting, mean_of, number_of, safe_ratio, softmax_over


@method(
    "dwa",
    paper="End-to-End Multi-Task Learning with Attention",
    venue="CVPR 2019",
    acts_on="task",
    official="lorenmt/mtan im2im_pred/utils.py; with a window: YanqiDai/IGB4MTL@a10deaa81928",
    defaults={"temperature": ("2.0", "paper"), "window": ("None", "paper: epochs")},
    deviations=(
        "Epoch means count every sample once (with counts=), not every batch.",
        "A task whose earlier mean is 0 keeps ratio 1.",
        "With a window: weights move once 2 n steps are known, by the steps before this one. The public code starts at "
        "step n + 2, when its older window still holds ones (whatever the unit), and counts the step at hand.",
    ),
    examples=({"num_tasks": 8}, {"num_tasks": 8, "temperature": 0.5, "window": 2}),
)
@final
class DWA(TaskWeighting):
    r"""Weigh tasks by how slowly their loss falls: dynamic weight averaging.

    .. math:: w_k = K\,\mathrm{softmax}_k\!\left(\frac{r_k}{T}\right) \qquad r_k = \frac{\bar L_k(e-1)}{\bar L_k(e-2)}

    - :math:`\bar L_k(e)`: mean training loss of epoch :math:`e` (with ``window=n``: of n steps, the last and the ones
      before)
    - :math:`T`: ``temperature``

    Weights:
        Positive, summing to the number of tasks; 1 until two epochs (two windows) have passed. Detached.
        No argument is neutral.

    State and cadence:
        Sums of the epoch that runs, means of the last two; ``update_on = "epoch"``, with a window ``"step"``. Sums are
        added over ranks at every step. A task unseen for a whole epoch keeps its means.

    Use when:
        Tasks with losses of one unit learn at different speeds, and a mean loss per epoch is known for each.
    Avoid when:
        Losses differ by orders of magnitude: ratios have no unit, so a large loss keeps its dominance, and the
        two-digit suite shows no gain over equal weights. Divide by first losses before.

    Deviations:
        Epoch means count samples, not batches, where ``counts=`` is given; a mean of 0 gives ratio 1. A window waits
        until it holds losses only, and leaves the step at hand out.

    Args:
        temperature: :math:`T` > 0; large values flatten. Default 2.0 (paper).
        window: Number of steps that a mean covers, instead of epochs; the public code has 25. Default ``None``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import DWA, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], DWA())
        >>> for seg, depth in [(4.0, 1.0), (2.0, 1.0)]:
        ...     value = loss({"seg": torch.tensor(seg), "depth": torch.tensor(depth)})
        ...     loss.update("step")
        ...     loss.update("epoch")
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.8756, 'depth': 1.1244}

    References:
        S. Liu, E. Johns, A. J. Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.
    """

    def __init__(self, temperature: float = 2.0, *, window: int | None = None, num_tasks: int | None = None) -> None:
        super().__init__()
        self.temperature = check_number(self, "temperature", temperature, low=0.0, open_low=True)
        self.window = None if window is None else check_whole(self, "window", window, low=1)
        self.update_on = "epoch" if window is None else "step"
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        zeros = torch.zeros(2, num_tasks, dtype=torch.float64)
        if self.window is None:
            self.add_task_state("running", zeros.clone(), dim=1)  # sums and counts of the epoch that runs
            self.add_task_state("means", zeros.clone(), dim=1)  # of the last epoch, and the one before; 0: unknown
        else:
            self.add_task_state("steps", zeros.new_zeros(2 * self.window, num_tasks), dim=1)  # newest first; 0: unknown
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        if self.window is None:
            self.get_buffer("running").add_(sums["seen"])
            return
        steps, (mean, known) = self.get_buffer("steps"), mean_of(sums["seen"])
        moved = torch.cat([torch.where(known, mean, steps[0]).unsqueeze(0), steps[:-1]])
        steps.copy_(torch.where(known, moved, steps))

    def refresh(self, event: Event, **signals: Any) -> None:
        if event != "epoch" or self.window is not None:
            return
        running, means = self.get_buffer("running"), self.get_buffer("means")
        mean, known = mean_of(running)
        means.copy_(torch.where(known, torch.stack([mean, means[0]]), means))
        running.zero_()

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        if self.window is None:
            last, before = self.get_buffer("means")
            ready = before != 0
        else:
            steps = self.get_buffer("steps")
            last, before = steps[: self.window].mean(0), steps[self.window :].mean(0)
            ready = steps[-1] != 0
        ratio = torch.where(ready, safe_ratio(last, before, 1.0), 1.0)
        return self.num_tasks * (ratio / self.temperature).softmax(0)

    def reset(self) -> None:
        super().reset()
        for name in self._by_task:
            self.get_buffer(name).zero_()


class Remembering(TaskWeighting):
    """A task weighting whose state starts at constants: declared with :meth:`remember`, restored by ``reset``."""

    def __init__(self) -> None:
        super().__init__()
        self._start_of: dict[str, float] = {}

    def remember(self, name: str, *shape: int, fill: float = 0.0, dim: int = 0) -> None:
        """Declare float64 state with one entry per task along ``dim``."""
        self.add_task_state(name, torch.full(shape, fill, dtype=torch.float64), dim=dim)
        self._start_of[name] = fill

    def reset(self) -> None:
        super().reset()
        for name, fill in self._start_of.items():
            self.get_buffer(name).fill_(fill)


def relative(loss: Tensor, before: Tensor, *, floor: float = 0.0) -> Tensor:
    """``loss / before``, in ``[floor, 1e100]``; 1 where there is no positive ``before``."""
    known = before > 0
    return torch.where(known, loss / torch.where(known, before, 1.0), 1.0).clamp(floor, 1e100)


def shared_out(weights: Tensor, known: Tensor) -> Tensor:
    """Sum 1: the known tasks by ``weights`` (which sum to 1 over them), every other one ``1 / K``."""
    return torch.where(known, weights * known.double().mean(), 1.0 / weights.numel())


@method(
    "igb",
    paper="Improvable Gap Balancing for Multi-Task Learning",
    venue="UAI 2023",
    acts_on="task",
    official="YanqiDai/IGB4MTL@a10deaa81928 methods/loss_weight_methods.py, experiments/nyuv2/trainer.py",
    defaults={
        "base_epoch": ("1", "authors' code: the second epoch"),
        "eps": ("1e-8", "ours, as in ScaleInvariant; the authors divide by 0 where a loss is 0"),
    },
    deviations=(
        "The base mean counts every sample once (with counts=), not every batch.",
        "A task without a base mean (first seen later) has gap 1, and gets its base from the next epoch that it is in.",
        "A loss below eps is taken as eps in the logarithm.",
    ),
    examples=({"num_tasks": 8}, {"num_tasks": 8, "base_epoch": 0}),
)
@final
class IGB(Remembering):
    r"""Weigh the tasks' log losses by the gap that is left to close: improvable gap balancing, its loss form (IGB-v1).

    .. math::
        \text{total} = \sum_k g_k \log L_k \qquad g_k = K\,\mathrm{softmax}_k\!\left(\frac{L_k}{B_k}\right) \qquad
        w_k = \frac{g_k}{L_k}

    - :math:`B_k`: mean training loss of epoch ``base_epoch``; all :math:`g_k = 1` until it has ended
    - :math:`g_k`: a constant in the backward pass

    Weights:
        :math:`g_k / L_k`, positive, detached; the :math:`g_k` sum to the number of tasks present. The total is the
        formula's and may be negative. No argument is neutral.

    State and cadence:
        Sums of the epoch that runs and the base means; ``update_on = "epoch"``. Reads the batch: micro-batches have
        their own weights, ranks share theirs.

    Use when:
        Losses of different units stay away from 0, and tasks lag behind one another after an early epoch, whose mean
        losses serve as the base.
    Avoid when:
        A loss reaches 0 or is negative, or training is only a few epochs: it is then the sum of logarithms, which does
        worse than equal weights in the two-digit suite.

    Deviations:
        The base counts samples; a task that comes later gets its own; losses are held at ``eps`` or above. IGB-v2,
        which trains a reinforcement-learning agent, is not here.

    Args:
        base_epoch: Epoch (from 0) whose mean losses are the base. Default 1 (authors' code).
        eps: Least loss in the logarithm, > 0. Default 1e-8.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import IGB, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], IGB(base_epoch=0))
        >>> value = loss({"seg": torch.tensor(4.0), "depth": torch.tensor(1.0)})
        >>> loss.update("step")
        >>> loss.update("epoch")
        >>> at = torch.tensor([2.0, 1.0])
        >>> [round(weight, 4) for weight in (at * loss.weights(at)).tolist()]
        [0.7551, 1.2449]

    References:
        Y. Dai, N. Fei, Z. Lu, "Improvable Gap Balancing for Multi-Task Learning", UAI 2023.
    """

    update_on = "epoch"

    def __init__(self, base_epoch: int = 1, *, eps: float = 1e-8, num_tasks: int | None = None) -> None:
        super().__init__()
        self.base_epoch = check_whole(self, "base_epoch", base_epoch)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.remember("running", 2, num_tasks, dim=1)  # sums and counts of the epoch that runs
        self.remember("base", num_tasks)  # 0: unknown
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        self.get_buffer("running").add_(sums["seen"])

    def refresh(self, event: Event, **signals: Any) -> None:
        if event != "epoch":
            return
        running, base = self.get_buffer("running"), self.get_buffer("base")
        mean, known = mean_of(running)
        due = known & (base == 0) & (self.position("epoch") >= self.base_epoch)
        base.copy_(torch.where(due, mean, base))
        running.zero_()

    def _gap(self, terms: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
        loss, present = self.read(terms)
        gap = number_of(present) * softmax_over(relative(loss, self.get_buffer("base")), present)
        return gap, loss.clamp_min(self.eps), present

    def weigh(self, terms: LossTerms) -> Tensor:
        gap, loss, _ = self._gap(terms)
        return gap / loss

    def formula(self, terms: LossTerms) -> Tensor:
        gap, loss, present = self._gap(terms)
        return torch.where(present, gap * loss.log(), 0.0).sum()

    def summary(self) -> dict[str, Tensor]:
        return {"base": self.get_buffer("base").clone()}


@method(
    "softadapt",
    paper="SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with Multi-Part Loss Functions",
    venue="arXiv 1912.12355, 2019",
    acts_on="task",
    official="dr-aheydari/SoftAdapt@40e2fdd47078 softadapt/algorithms, softadapt/base",
    defaults={
        "beta": ("0.1", "authors' code"),
        "variant": ("'plain'", "authors' code: the original one"),
        "by": ("'epoch'", "ours: losses of single batches are noisy"),
    },
    deviations=(
        "The slope is the last difference; the authors' code takes the derivative at the oldest of several stored "
        "points, which is the same for two.",
        "variant='normalized' divides slopes by the sum of their magnitudes; the authors' code divides by their plain "
        "sum, which turns the preference round where losses fall on balance.",
        "Weights sum to 1 from the beginning, instead of starting at 1 each.",
    ),
    examples=(
        {"num_tasks": 8},
        {"num_tasks": 8, "beta": 2.0, "variant": "normalized", "by": "step"},
        {"num_tasks": 8, "beta": -0.5, "variant": "loss_weighted", "by": "step"},
    ),
)
@final
class SoftAdapt(Remembering):
    r"""Weigh tasks by the slope of their loss: those that rise, or fall least, get more.

    .. math::
        w_k = \mathrm{softmax}_k(\beta s_k) \qquad s_k = L_k(t-1) - L_k(t-2)

    - :math:`L_k(t)`: mean training loss of epoch (or step) :math:`t`
    - ``variant="normalized"``: :math:`s_k / \sum_j |s_j|` instead of :math:`s_k`
    - ``variant="loss_weighted"``: :math:`w_k \propto \bar L_k e^{\beta s_k}`, with the mean of the last two losses

    Weights:
        In [0, 1], summing to 1; a task whose slope is not known yet has :math:`1/K`. Detached. No argument is neutral
        (``beta=0`` gives :math:`1/K`).

    State and cadence:
        The last two losses per task; ``update_on = "epoch"``, with ``by="step"`` ``"step"``. The batch at hand has no
        part in its own weights. A task unseen for a while keeps its losses.

    Use when:
        Tasks with losses of one unit that stall at different times, and mean losses steady enough for a slope to mean
        something.
    Avoid when:
        Losses differ by orders of magnitude: slopes have their units, so the largest task decides; normalise first.
        Means of single steps are noisy: let it follow epochs.

    Deviations:
        One difference instead of a longer stencil; slopes are normalised by the sum of magnitudes; weights sum to 1
        from the beginning. With ``variant="loss_weighted"`` a negative loss counts as 0.

    Args:
        beta: :math:`\beta`; positive favours the worst task, negative the best, 0 none. Default 0.1 (authors' code).
        variant: ``"plain"``, ``"normalized"`` or ``"loss_weighted"``. Default ``"plain"``.
        by: What a loss is the mean of, and when weights change: ``"epoch"`` or ``"step"``. Default ``"epoch"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, SoftAdapt
        >>> loss = MultiTaskLoss(["seg", "depth"], SoftAdapt(1.0, by="step"))
        >>> for seg, depth in [(4.0, 1.0), (2.0, 1.0)]:
        ...     value = loss({"seg": torch.tensor(seg), "depth": torch.tensor(depth)})
        ...     loss.update("step")
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.1192, 'depth': 0.8808}

    References:
        A. A. Heydari, C. A. Thompson, A. Mehmood, "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural
        Networks with Multi-Part Loss Functions", arXiv 1912.12355, 2019.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        variant: Literal["plain", "normalized", "loss_weighted"] = "plain",
        by: Literal["epoch", "step"] = "epoch",
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.beta = check_number(self, "beta", beta)
        self.variant = check_choice(self, "variant", variant, ("plain", "normalized", "loss_weighted"))
        self.by = check_choice(self, "by", by, ("epoch", "step"))
        self.update_on = by
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.remember("running", 2, num_tasks, dim=1)  # sums and counts since the last epoch or step
        self.remember("points", 2, num_tasks, dim=1)  # newest first
        self.remember("number", num_tasks)  # of points, at most 2
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        self.get_buffer("running").add_(sums["seen"])

    def refresh(self, event: Event, **signals: Any) -> None:
        if event != self.by:
            return
        running, points, number = (self.get_buffer(name) for name in ("running", "points", "number"))
        mean, known = mean_of(running)
        points.copy_(torch.where(known, torch.stack([mean, points[0]]), points))
        number.add_(known.double()).clamp_(max=2.0)
        running.zero_()

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        (last, before), known = self.get_buffer("points"), self.get_buffer("number") == 2
        slope = torch.where(known, last - before, 0.0)
        if self.variant == "normalized":
            slope = safe_ratio(slope, slope.abs().sum())
        logits = self.beta * slope
        if self.variant == "loss_weighted":
            logits = logits + (0.5 * (last + before)).clamp_min(1e-300).log()
        return shared_out(softmax_over(logits, known), known)


@method(
    "coefficient_of_variation",
    paper="Multi-Loss Weighting with Coefficient of Variations",
    venue="WACV 2021",
    acts_on="task",
    official="rickgroen/cov-weighting@2c1d439a106e losses/covweighting_loss.py",
    defaults={"eps": ("1e-8", "authors' code: added to the variance")},
    deviations=(
        "Every task has its own count of steps, so that one first seen later starts at 1 / K.",
        "A running mean of 0 gives ratio 1; the mean ratio is taken by magnitude.",
    ),
    examples=({"num_tasks": 8}, {"num_tasks": 8, "eps": 1e-2}),
)
@final
class CoefficientOfVariation(Remembering):
    r"""Weigh tasks by how much their relative loss varies: a loss that moves is one that learns.

    .. math::
        w_k = \frac{c_k}{\sum_j c_j} \qquad c_k = \frac{\sigma_k}{\mu_k} \qquad
        \ell_k(t) = \frac{L_k(t)}{\text{mean of } L_k(1), \dots, L_k(t-1)}

    - :math:`\mu_k,\ \sigma_k`: mean and standard deviation of the ratios :math:`\ell_k` of all **earlier** steps

    Weights:
        In [0, 1], summing to 1; :math:`1/K` for the first two steps of a task. Detached. No argument is neutral.

    State and cadence:
        Welford statistics per task: count, mean loss, mean ratio, sum of squares; ``update_on = "step"``. The batch at
        hand has no part in its own weights. A task that is not seen keeps its statistics.

    Use when:
        Many losses of different units, none to be favoured: a task is weighed by how much its loss still varies in
        relation to its mean, and units cancel.
    Avoid when:
        A task's loss is noise around a constant, which counts as progress here. In long runs the statistics cover all
        of training, so that weights hardly move; ratios of epoch means react sooner.

    Deviations:
        Counts per task. The authors' optional decay of the means is not here.

    Args:
        eps: Added to the variance, > 0. Default 1e-8 (authors' code).
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import CoefficientOfVariation, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], CoefficientOfVariation())
        >>> for seg, depth in [(4.0, 10.0), (2.0, 9.0)]:
        ...     value = loss({"seg": torch.tensor(seg), "depth": torch.tensor(depth)})
        ...     loss.update("step")
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.8636, 'depth': 0.1364}

    References:
        R. Groenendijk, S. Karaoglu, T. Gevers, T. Mensink, "Multi-Loss Weighting with Coefficient of Variations",
        WACV 2021.
    """

    update_on = "step"

    def __init__(self, *, eps: float = 1e-8, num_tasks: int | None = None) -> None:
        super().__init__()
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        for name in ("number", "mean_loss", "mean_ratio", "squares"):
            self.remember(name, num_tasks)
        self.add_pending("seen", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("seen", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        loss, known = mean_of(sums["seen"])
        number, mean_loss, mean_ratio, squares = (self.get_buffer(name) for name in self._start_of)
        number.add_(known.double())
        share = torch.where(known, 1.0 / number.clamp_min(1.0), 0.0)
        ratio = torch.where(known, safe_ratio(loss, mean_loss, 1.0), mean_ratio).clamp(-1e100, 1e100)
        moved = mean_ratio + share * (ratio - mean_ratio)
        squares.add_((ratio - mean_ratio) * (ratio - moved))
        mean_ratio.copy_(moved)
        mean_loss.add_(share * (torch.where(known, loss, mean_loss) - mean_loss))

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        number, squares = self.get_buffer("number"), self.get_buffer("squares")
        deviation = (squares / number.clamp_min(1.0) + self.eps).sqrt()
        known = number >= 2
        spread = torch.where(known, deviation / self.get_buffer("mean_ratio").abs().clamp_min(1e-100), 0.0)
        return shared_out(safe_ratio(spread, spread.sum()), known)
