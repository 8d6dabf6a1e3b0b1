"""Task weights in closed form of the batch's own losses; nothing is remembered."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ..base import method
from ..config import check_number
from ..terms import LossTerms
from .base import TaskWeighting


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
        Losses have different units and stay away from 0.
    Avoid when:
        A task's loss reaches 0, where its weight would grow without bound (``eps`` bounds it), or is negative.

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
