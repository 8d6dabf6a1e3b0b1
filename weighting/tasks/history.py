"""Task weights from how losses went so far."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_number, check_whole
from ..dynamics import Event
from ..terms import LossTerms
from .base import TaskWeighting, mean_of, safe_ratio


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
        Tasks have losses of one unit and learn at different speeds.
    Avoid when:
        Losses differ by orders of magnitude: ratios are unit-free, so a large loss keeps its dominance; combine with
        ``init="first"``.

    Deviations:
        Epoch means count samples, not batches, where ``counts=`` is given; a mean of 0 gives ratio 1.

    Args:
        temperature: :math:`T` > 0; large values flatten. Default 2.0 (paper).
        window: Number of steps that a mean covers, instead of epochs. Default ``None``.
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
