"""Task weights learned by gradient, together with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_choice, check_number
from ..dynamics import Event
from ..terms import LossTerms
from .base import TaskWeighting

Likelihood = Literal["gaussian", "laplace", "categorical"]
_FORMS: dict[str, tuple[float, float]] = {"gaussian": (0.5, 1.0), "laplace": (1.0, 0.5), "categorical": (1.0, 1.0)}
"""Likelihood: factor of the loss, and how many times s its exponent is (w = factor exp(-share s))."""


class LogScale(TaskWeighting):
    """One learned number s per task, kept in a range; subclasses say what it does to the loss."""

    detached = False
    update_on = "step"

    def __init__(self, init: float | Sequence[float] | Mapping[str, float], bounds: tuple[float, float]) -> None:
        super().__init__()
        low, high = (check_number(self, "bounds", bound) for bound in bounds)
        if low >= high:
            raise ValueError(f"{type(self).__name__}: bounds must be (low, high) with low < high, got {bounds!r}")
        self.bounds = (low, high)
        self._init = init
        self.symmetric = isinstance(init, (int, float))

    def prepare(self, num_tasks: int) -> None:
        start = self.per_task("init", self._init, low=self.bounds[0], high=self.bounds[1])
        self.add_task_parameter("log_scale", start.to(torch.get_default_dtype()))
        self.track_events()

    def scale(self) -> Tensor:
        """``(K,)`` float64 s, in its range; the gradient of a value outside is that at the edge."""
        s = self.get_parameter("log_scale").double()
        return s + (s.clamp(*self.bounds) - s).detach()

    def refresh(self, event: Event, **signals: Any) -> None:
        if event == "step":
            self.get_parameter("log_scale").clamp_(*self.bounds)

    def reset(self) -> None:
        super().reset()
        if self.tasks:
            with torch.no_grad():
                self.get_parameter("log_scale").copy_(self.per_task("init", self._init))

    def summary(self) -> dict[str, Tensor]:
        return {"log_scale": self.scale().detach()}


@method(
    "uncertainty",
    paper="Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
    venue="CVPR 2018",
    acts_on="task",
    official="yaringal/multi-task-learning-example@86e2c882",
    defaults={
        "kind": ("'gaussian'", "LibMTL, TorchJD: every task a regression"),
        "init": ("0.0", "authors' example, TorchJD; LibMTL has -0.5"),
        "bounds": ("(-10.0, 10.0)", "ours: float16 overflows at -11"),
    },
    deviations=(
        "s is held in bounds: in the forward pass at once, in the parameter at every step event.",
        "An absent task gets no regulariser, which would pull its s down.",
    ),
    examples=(
        {"num_tasks": 8},
        {"num_tasks": 8, "init": 0.25, "kind": ["gaussian", "laplace", "categorical", "gaussian"] * 2},
    ),
)
@final
class Uncertainty(LogScale):
    r"""Learn a noise level per task, and divide by it: homoscedastic uncertainty.

    .. math::
        \text{total} = \sum_k w_k L_k + \tfrac12 s_k \qquad
        w_k = \begin{cases} \tfrac12 e^{-s_k} & \text{gaussian (squared error)} \\
        e^{-s_k/2} & \text{laplace (absolute error)} \\ e^{-s_k} & \text{categorical (cross entropy)} \end{cases}

    - :math:`s_k = \log \sigma_k^2`: learned

    Weights:
        :math:`w_k` as above, with gradient into :math:`s_k` (and none into the model beyond :math:`w_k`). The total may
        be **negative**: at the optimum it is :math:`\tfrac12(1 + \log L_k)` for a gaussian task. That is no fault; log
        the unweighted losses, or use :class:`RevisedUncertainty`. No argument is neutral.

    State and cadence:
        The parameter ``log_scale`` in your optimizer; put it into a group without weight decay
        (``loss.parameter_groups()``). Held in ``bounds`` at every step. Ranks agree, because its gradient is averaged.

    Use when:
        Tasks have losses that are negative log-likelihoods up to scale.
    Avoid when:
        A task's loss reaches 0 (its weight grows up to the bound) or is negative, or losses are in raw units and
        training is short: :math:`s` starts far from :math:`\log L`; use ``init="first"`` of the objective.

    Deviations:
        ``s`` is bounded; absent tasks have no regulariser.

    Args:
        kind: Likelihood of all tasks, or one per task. Default ``"gaussian"``.
        init: First value of :math:`s`, one or one per task. Default 0.0.
        bounds: Range of :math:`s`. Default (-10, 10).
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, Uncertainty
        >>> loss = MultiTaskLoss(["seg", "depth"], Uncertainty({"seg": "categorical", "depth": "gaussian"}))
        >>> loss({"seg": torch.tensor(2.0), "depth": torch.tensor(4.0)}).item()
        4.0
        >>> [group["weight_decay"] for group in loss.parameter_groups()]
        [0.0]

    References:
        A. Kendall, Y. Gal, R. Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics", CVPR 2018.
    """

    def __init__(
        self,
        kind: Likelihood | Sequence[Likelihood] | Mapping[str, Likelihood] = "gaussian",
        *,
        init: float | Sequence[float] | Mapping[str, float] = 0.0,
        bounds: tuple[float, float] = (-10.0, 10.0),
        num_tasks: int | None = None,
    ) -> None:
        super().__init__(init, bounds)
        self.kind = kind
        self.symmetric = self.symmetric and isinstance(kind, str)
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        super().prepare(num_tasks)
        kinds = [check_choice(self, "kind", kind, tuple(_FORMS)) for kind in self.each_task("kind", self.kind)]
        table = torch.tensor([_FORMS[kind] for kind in kinds], dtype=torch.float64)
        self.add_table("factor", table[:, 0].contiguous())
        self.add_table("share", table[:, 1].contiguous())

    def weigh(self, terms: LossTerms) -> Tensor:
        _, present = self.read(terms)
        s = self.scale()
        weights = self.get_buffer("factor") * torch.exp(-self.get_buffer("share") * s)
        return torch.where(present, weights, 0.0)

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor:
        _, present = self.read(terms)
        return 0.5 * torch.where(present, self.scale(), 0.0).sum().to(terms.loss.dtype)
