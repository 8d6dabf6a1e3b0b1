"""Task weights that do not look at losses: constants and schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, final

import torch
from torch import Tensor

from ..base import Scope, method
from ..config import check_choice, check_number, check_whole
from ..schedules import By, Cosine, Linear, Schedule, check_hyper, value_of
from ..terms import LossTerms
from .base import TaskWeighting


@method(
    "fixed",
    paper="none",
    venue="textbook",
    acts_on="task",
    neutral={"weights": 1.0, "num_tasks": 8},
    examples=({"weights": [0.5, 1.0, 2.0, 4.0, 1.0, 1.0, 0.0, 3.0], "num_tasks": 8},),
)
@final
class Fixed(TaskWeighting):
    r"""Give each task the weight you name; any of them may be a schedule.

    .. math:: \text{total} = \sum_k c_k L_k

    - :math:`c_k`: the weight of task :math:`k`

    Weights:
        :math:`c_k \ge 0`, whatever the losses are. Detached. All ones is neutral.

    State and cadence:
        None of its own; ``update_on = "never"``. Schedules inside move by their own steps or epochs.

    Use when:
        Losses are in comparable units, or good weights are known or can be tuned on validation data: the baseline that
        adaptive methods have to beat, and do not in the two-digit suite.
    Avoid when:
        Losses have units of their own and nobody tunes: dividing them by their first values does nearly as well as
        tuned constants in the two-digit suite.

    Deviations:
        None: there is no paper.

    Args:
        weights: One number >= 0 for all tasks, one per task in their order, or one per task by name. Each may be a
            schedule. Default 1.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import Fixed, Linear, MultiTaskLoss
        >>> ramp = Linear(0.0, 1.0, duration=2, by="step")
        >>> loss = MultiTaskLoss(["seg", "depth"], Fixed({"seg": 1.0, "depth": ramp}))
        >>> loss.update("step")
        >>> loss({"seg": torch.tensor(2.0), "depth": torch.tensor(4.0)})
        tensor(4.)

    References:
        None (textbook).
    """

    scope: Scope = "global"

    def __init__(
        self,
        weights: float | Schedule | Sequence[float | Schedule] | Mapping[str, float | Schedule] = 1.0,
        *,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self._weights = weights
        self.symmetric = isinstance(weights, (int, float))
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        values = self.each_task("weights", self._weights)
        checked = [check_hyper(self, "weights", value, low=0.0) for value in values]
        self.schedules = torch.nn.ModuleDict(
            {str(place): value for place, value in enumerate(checked) if isinstance(value, Schedule)}
        )
        numbers = [0.0 if isinstance(value, Schedule) else value for value in checked]
        self.add_table("numbers", torch.tensor(numbers, dtype=torch.float64))

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        weights = self.get_buffer("numbers")
        if len(self.schedules):
            weights = weights.clone()
            for place, schedule in self.schedules.items():
                if isinstance(schedule, Schedule):
                    weights[int(place)] = value_of(schedule)
        return weights


@method(
    "staged",
    paper="Order Matters in the Presence of Dataset Imbalance for Multilingual Learning (its two stages)",
    venue="NeurIPS 2023",
    acts_on="task",
    defaults={"by": ("'step'", "ours")},
    neutral={"stages": {0: 1.0}, "num_tasks": 8},
    examples=(
        {"stages": {0: 1.0, 3: [0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 3.0]}, "num_tasks": 8},
        {"stages": {2: 0.5, 0: [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 1: 2.0}, "num_tasks": 8, "by": "epoch"},
    ),
)
@final
class Staged(TaskWeighting):
    r"""Train in stages: constant weights from one step or epoch to the next stage.

    .. math:: w_k(t) = c_{k,i} \qquad \text{for } t_i \le t < t_{i+1}

    - :math:`t_i`: first step or epoch of stage :math:`i`, from 0
    - :math:`c_{k,i}`: the stage's weight of task :math:`k`

    Weights:
        :math:`c_{k,i} \ge 0`, whatever the losses are. Detached. One stage of ones is neutral.

    State and cadence:
        The number of steps or epochs behind us; ``update_on`` is what ``by`` says.

    Use when:
        Tasks come one after another, as high-resource languages before the full mixture do, or another task weighting
        should begin at a given step or epoch.
    Avoid when:
        A jump of the weights upsets the optimizer: a ramp is gentler. A task of weight 0 is still computed: leave it
        out of the batch instead.

    Deviations:
        None. The paper samples tasks by stage; a weight of 0 has their gradient left out, but still computes it: do not
        load what has no weight.

    Args:
        stages: Weights by first step or epoch, which must include 0: one number for all tasks, one per task in order,
            or by name.
        by: ``"step"`` or ``"epoch"``. Default ``"step"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, Staged
        >>> loss = MultiTaskLoss(["de", "ro"], Staged({0: {"de": 1.0, "ro": 0.0}, 2: 1.0}))
        >>> for step in range(3):
        ...     print(loss({"de": torch.tensor(2.0), "ro": torch.tensor(4.0)}).item())
        ...     loss.update("step")
        2.0
        2.0
        6.0

    References:
        D. Choi, D. Xin, H. Dadkhahi, J. Gilmer, A. Garg, O. Firat, C.-K. Yeh, A. M. Dai, B. Ghorbani, "Order Matters
        in the Presence of Dataset Imbalance for Multilingual Learning", NeurIPS 2023.
    """

    def __init__(
        self,
        stages: Mapping[int, float | Sequence[float] | Mapping[str, float]],
        *,
        by: By = "step",
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(stages, Mapping):
            raise TypeError(f"Staged: stages must be a mapping from first steps to weights, got {stages!r}")
        self._stages = {check_whole(self, "stages", first): stages[first] for first in stages}
        if 0 not in self._stages:
            raise ValueError(f"Staged: stages must include 0, got {', '.join(map(str, stages)) or 'nothing'}")
        check_choice(self, "by", by, ("step", "epoch"))
        self.by: By = by
        self.update_on = by
        self.symmetric = all(isinstance(value, (int, float)) for value in stages.values())
        self.track_events()
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        firsts = sorted(self._stages)
        self.add_table("firsts", torch.tensor(firsts))
        self.add_table("table", torch.stack([self.per_task("stages", self._stages[t], low=0.0) for t in firsts]))

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        stage = (self.position(self.by) >= self.get_buffer("firsts")).sum() - 1
        return self.get_buffer("table").index_select(0, stage.reshape(1)).squeeze(0)


@method(
    "ramp",
    paper="none",
    venue="textbook",
    acts_on="task",
    defaults={
        "start": ("0.0", "ours"),
        "end": ("1.0", "ours"),
        "shape": ("'linear'", "ours"),
        "by": ("'step'", "ours"),
    },
    neutral={"task": 0, "start": 1.0, "duration": 2, "num_tasks": 8},
    examples=(
        {"task": 2, "duration": 3, "num_tasks": 8},
        {"task": "5", "start": 2.0, "end": 0.5, "duration": 2, "delay": 1, "shape": "cosine", "num_tasks": 8},
    ),
)
@final
class Ramp(TaskWeighting):
    r"""Fade one task in or out, and leave the others alone.

    .. math:: w_j(t) = a + (b - a)\, r\big(\tfrac{t - d}{n}\big) \qquad w_k = 1 \text{ for } k \ne j

    - :math:`j`: ``task``; :math:`a, b`: ``start``, ``end``; :math:`d, n`: ``delay``, ``duration``
    - :math:`r`: the identity, or half a cosine wave, held in :math:`[0, 1]`

    Weights:
        The task's schedule, 1 for every other; detached. ``start=1`` and ``end=1`` are neutral.

    State and cadence:
        The schedule's position, which moves by steps or epochs. None of its own; ``update_on = "never"``.

    Use when:
        One auxiliary task should come in late or leave before the end, alone or in a product with another task
        weighting.
    Avoid when:
        Weights have to keep their sum, which those of a product need not. An auxiliary task that helps throughout needs
        a constant weight only.

    Deviations:
        None: there is no paper.

    Args:
        task: Name or number of the task.
        start: Weight >= 0 before the ramp. Default 0.0.
        end: Weight >= 0 after it. Default 1.0.
        duration: Number of steps or epochs it takes.
        delay: Steps or epochs before it starts. Default 0.
        shape: ``"linear"`` or ``"cosine"``. Default ``"linear"``.
        by: ``"step"`` or ``"epoch"``. Default ``"step"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import DWA, MultiTaskLoss, Ramp
        >>> loss = MultiTaskLoss(["main", "aux"], Ramp("aux", duration=4) * DWA())
        >>> loss.update("step")
        >>> {name: weight.item() for name, weight in loss.weights.items()}
        {'main': 1.0, 'aux': 0.25}

    References:
        None (textbook).
    """

    symmetric = False

    def __init__(
        self,
        task: str | int,
        *,
        start: float = 0.0,
        end: float = 1.0,
        duration: int,
        delay: int = 0,
        shape: Literal["linear", "cosine"] = "linear",
        by: By = "step",
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(task, (str, int)) or isinstance(task, bool):
            raise TypeError(f"Ramp: task must be a name or a number, got {task!r}")
        self.task = task if isinstance(task, str) else check_whole(self, "task", task)
        start, end = (check_number(self, name, value, low=0.0) for name, value in (("start", start), ("end", end)))
        kind = Linear if check_choice(self, "shape", shape, ("linear", "cosine")) == "linear" else Cosine
        self.schedule = kind(start, end, duration=duration, delay=delay, by=by)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        known = self.task in self.tasks if isinstance(self.task, str) else self.task < num_tasks
        if not known:
            raise ValueError(f"Ramp: task must be one of {', '.join(self.tasks)}, got {self.task!r}")
        place = self.tasks.index(self.task) if isinstance(self.task, str) else self.task
        self.add_table("chosen", torch.arange(num_tasks) == place)

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        return torch.where(self.get_buffer("chosen"), self.schedule(), 1.0)


def mixing_probabilities(counts: Sequence[float] | Mapping[str, float], temperature: float | Schedule = 5.0) -> Tensor:
    r"""How often each task (language, domain, data set) is drawn under temperature sampling, for samplers.

    .. math:: q_k = n_k^{1/T} \Big/ \sum_j n_j^{1/T}

    Args:
        counts: Number of samples of each, > 0, in order or by name.
        temperature: :math:`T` > 0, or a schedule, whose value now is taken; 1 draws by size, infinity evenly.

    Returns:
        ``(K,)`` float64, in the order of ``counts``.

    Example:
        >>> from reweigh import mixing_probabilities
        >>> mixing_probabilities({"de": 8000, "ro": 1000}, temperature=3.0)
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    values = counts.values() if isinstance(counts, Mapping) else counts
    numbers = [check_number("mixing_probabilities", "counts", n, low=0.0, open_low=True) for n in values]
    if not numbers:
        raise ValueError("mixing_probabilities: counts must not be empty")
    held = check_hyper("mixing_probabilities", "temperature", temperature, low=0.0, open_low=True)
    return _tempered(torch.tensor(numbers, dtype=torch.float64).log(), value_of(held))


def _tempered(logs: Tensor, temperature: float | Tensor) -> Tensor:
    return ((logs - logs.max()) / temperature).softmax(0)


@method(
    "temperature_mixing",
    paper="Order Matters in the Presence of Dataset Imbalance for Multilingual Learning (as a baseline)",
    venue="NeurIPS 2023",
    acts_on="task",
    defaults={"temperature": ("5.0", "usual in multilingual translation"), "drawn": ("'by_size'", "ours")},
    deviations=("Weights instead of sampling: the same expectation, another variance.",),
    neutral={"counts": [9.0, 1.0, 4.0, 2.0, 7.0, 3.0, 5.0, 8.0], "temperature": 1.0, "num_tasks": 8},
    examples=(
        {"counts": [40, 10, 20, 30, 50, 12, 25, 15], "num_tasks": 8},
        {"counts": [40, 10, 20, 30, 50, 12, 25, 15], "temperature": 2.0, "drawn": "evenly", "num_tasks": 8},
    ),
)
@final
class TemperatureMixing(TaskWeighting):
    r"""Weigh tasks as if they were sampled at a temperature: small ones more than their size, less than evenly.

    .. math:: w_k = \frac{q_k}{p_k} \qquad q_k = \frac{n_k^{1/T}}{\sum_j n_j^{1/T}}

    - :math:`n_k`: ``counts``, the sizes of the data sets
    - :math:`T`: ``temperature``; 1 mixes by size, :math:`\infty` evenly
    - :math:`p_k`: how often tasks do arrive: :math:`n_k / \sum_j n_j` (``drawn="by_size"``), or :math:`1/K`
      (``drawn="evenly"``)

    Weights:
        Constants, whatever the losses are; detached. Their mean over :math:`p` is 1. :math:`T = 1` with
        ``drawn="by_size"`` is neutral.

    State and cadence:
        None of its own; ``update_on = "never"``. A schedule inside moves by its own steps or epochs.

    Use when:
        Data sets or languages of very different sizes are trained together, and the sampler cannot be changed.
    Avoid when:
        You can sample: sampling at the same temperature spends nothing on samples of small weight, and repeats of a
        small task are not one sample with a large weight.

    Deviations:
        Weights instead of sampling.

    Args:
        counts: Sizes > 0, in the tasks' order or by name.
        temperature: :math:`T` > 0, or a schedule. Default 5.0.
        drawn: ``"by_size"``: batches hold tasks in proportion to their sizes, as where each is of one task, drawn from
            the joined data. ``"evenly"``: every batch has a loss of every task. Default ``"by_size"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> from reweigh import MultiTaskLoss, TemperatureMixing
        >>> sizes = {"de": 8000, "ro": 1000}
        >>> loss = MultiTaskLoss(["de", "ro"], TemperatureMixing(sizes, temperature=3.0))
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'de': 0.75, 'ro': 3.0}

    References:
        D. Choi, D. Xin, H. Dadkhahi, J. Gilmer, A. Garg, O. Firat, C.-K. Yeh, A. M. Dai, B. Ghorbani, "Order Matters
        in the Presence of Dataset Imbalance for Multilingual Learning", NeurIPS 2023.
    """

    symmetric = False

    def __init__(
        self,
        counts: Sequence[float] | Mapping[str, float],
        *,
        temperature: float | Schedule = 5.0,
        drawn: Literal["by_size", "evenly"] = "by_size",
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(counts, (Mapping, Sequence, Tensor)):
            raise TypeError(f"TemperatureMixing: counts must be one number per task, got {counts!r}")
        self._counts = counts
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        self.drawn = check_choice(self, "drawn", drawn, ("by_size", "evenly"))
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        counts = self.per_task("counts", self._counts, low=0.0, open_low=True)
        self.add_table("logs", counts.log())
        arriving = counts / counts.sum() if self.drawn == "by_size" else torch.ones_like(counts) / num_tasks
        self.add_table("arriving", arriving)

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        return _tempered(self.get_buffer("logs"), value_of(self.temperature)) / self.get_buffer("arriving")
