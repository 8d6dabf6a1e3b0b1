"""Task weights that do not look at losses: constants and schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from ..base import Scope, method
from ..schedules import Schedule, check_hyper, value_of
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
        The tasks' losses are in comparable units, or good weights are known. Tuned constants are the baseline that
        adaptive methods have to beat.
    Avoid when:
        Losses have units: divide them by their first values (``MultiTaskLoss(..., init="first")``).

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
