"""Task weights learned by gradient, together with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..base import method
from ..config import check_choice, check_number
from ..dynamics import Event
from ..schedules import Schedule, check_hyper, value_of
from ..terms import LossTerms
from .base import TaskWeighting, softmax_over

Likelihood = Literal["gaussian", "laplace", "categorical"]
_FORMS: dict[str, tuple[float, float]] = {"gaussian": (0.5, 1.0), "laplace": (1.0, 0.5), "categorical": (1.0, 1.0)}
"""Likelihood: factor of the loss, and how many times s its exponent is (w = factor exp(-share s))."""


def straight_through(free: Tensor, held: Tensor) -> Tensor:
    """The value of ``held`` with the gradient of ``free``: exactly so, however far they are apart."""
    return held.detach() + (free - free.detach())


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
        self.add_task_parameter("log_scale", start)
        self.track_events()

    def scale(self) -> Tensor:
        """``(K,)`` float64 s, in its range; the gradient of a value outside is that at the edge."""
        s = self.get_parameter("log_scale").double()
        return straight_through(s, s.clamp(*self.bounds))

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
        Task losses are negative log-likelihoods up to scale, and a noise level per task can be learned in a parameter
        group without weight decay.
    Avoid when:
        A loss reaches 0 or is negative, or units are raw: no certain gain over equal weights in the two-digit suite
        then, and short of tuned constants there with losses divided by their first values.

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


@method(
    "revised_uncertainty",
    paper="Auxiliary Tasks in Multi-task Learning",
    venue="arXiv 1805.06334, 2018",
    acts_on="task",
    official="fengxiaoming520/RLMiniStyler rl/__init__.py; Mikoto10032/AutomaticWeightedLoss@40b15304 (neither by the "
    "authors of the paper)",
    defaults={
        "init": ("0.0", "sigma = 1, as in both"),
        "raw": ("False", "ours: sigma itself may cross 0"),
        "bounds": ("(-10.0, 10.0)", "ours, as for Uncertainty"),
    },
    deviations=(
        "The learned number is log sigma^2, not sigma, unless raw=True.",
        "sigma is held in bounds: in the forward pass at once, in the parameter at every step event.",
        "An absent task gets no regulariser.",
    ),
    examples=({"num_tasks": 8}, {"init": 0.5, "num_tasks": 8}, {"raw": True, "num_tasks": 8}),
)
@final
class RevisedUncertainty(LogScale):
    r"""Learn a noise level per task, with a regulariser that keeps the total from being negative.

    .. math:: \text{total} = \sum_k \frac{L_k}{2 \sigma_k^2} + \log(1 + \sigma_k^2) \qquad
        w_k = \frac{1}{2 \sigma_k^2} = \tfrac12 e^{-s_k}

    - :math:`s_k = \log \sigma_k^2`: learned (with ``raw=True``, :math:`\sigma_k`)

    Weights:
        As above, with gradient into :math:`s_k`. At the optimum
        :math:`\sigma_k^2 = (L_k + \sqrt{L_k^2 + 8 L_k}) / 4`: unlike :class:`Uncertainty`, the result depends on
        the losses' units. The total is never negative where losses are not. No argument is neutral.

    State and cadence:
        The parameter ``log_scale`` (``raw``: ``sigma``) in your optimizer; put it into a group without weight decay
        (``loss.parameter_groups()``). Held in ``bounds`` at every step. Ranks agree, because its gradient is averaged.

    Use when:
        Learned task uncertainties whose total has to stay positive, or a model with an automatic weighted loss that is
        to be reproduced.
    Avoid when:
        Losses are in raw units, far from where the learned scales begin: divide by first losses. Tuned constants beat
        the related uncertainty weighting in the two-digit suite.

    Deviations:
        Learns :math:`\log \sigma^2` unless ``raw``; it is bounded; absent tasks have no regulariser.

    Args:
        init: First value of :math:`s`, one or one per task. Default 0.0, which is :math:`\sigma = 1`.
        raw: Learn :math:`\sigma` itself, as the published classes do. Default False.
        bounds: Range of :math:`s`. Default (-10, 10).
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, RevisedUncertainty
        >>> loss = MultiTaskLoss(["content", "style"], RevisedUncertainty())
        >>> value = loss({"content": torch.tensor(2.0), "style": torch.tensor(4.0)})
        >>> round(value.item(), 4)  # 0.5 (2 + 4) + 2 log 2
        4.3863
        >>> value.backward()
        >>> loss.weighting.log_scale.grad  # both losses above 1: sigma is to grow
        tensor([-0.5000, -1.5000])

    References:
        L. Liebel, M. Körner, "Auxiliary Tasks in Multi-task Learning", arXiv 1805.06334, 2018.
    """

    def __init__(
        self,
        init: float | Sequence[float] | Mapping[str, float] = 0.0,
        *,
        raw: bool = False,
        bounds: tuple[float, float] = (-10.0, 10.0),
        num_tasks: int | None = None,
    ) -> None:
        super().__init__(init, bounds)
        self.raw = raw
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        if not self.raw:
            super().prepare(num_tasks)
            return
        self.add_task_parameter("sigma", self._first())
        self.track_events()

    def _first(self) -> Tensor:
        return (0.5 * self.per_task("init", self._init, low=self.bounds[0], high=self.bounds[1])).exp()

    def _held(self, sigma: Tensor) -> Tensor:
        """The same sign, a size in bounds."""
        low, high = (math.exp(0.5 * bound) for bound in self.bounds)
        return sigma.abs().clamp(low, high).copysign(sigma)

    def scale(self) -> Tensor:
        if not self.raw:
            return super().scale()
        sigma = self.get_parameter("sigma").double()
        return straight_through(sigma, self._held(sigma)).square().log()

    def refresh(self, event: Event, **signals: Any) -> None:
        if not self.raw:
            super().refresh(event, **signals)
        elif event == "step":
            sigma = self.get_parameter("sigma")
            sigma.copy_(self._held(sigma))

    def reset(self) -> None:
        if not self.raw:
            super().reset()
            return
        TaskWeighting.reset(self)
        if self.tasks:
            with torch.no_grad():
                self.get_parameter("sigma").copy_(self._first())

    def weigh(self, terms: LossTerms) -> Tensor:
        _, present = self.read(terms)
        return torch.where(present, 0.5 * torch.exp(-self.scale()), 0.0)

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor:
        _, present = self.read(terms)
        return torch.where(present, softplus(self.scale()), 0.0).sum().to(terms.loss.dtype)


@method(
    "imtl_l",
    paper="Towards Impartial Multi-task Learning (its loss balance)",
    venue="ICLR 2021",
    acts_on="task",
    official="SimplexLab/TorchJD 0.18.0 torchjd/scalarization/_imtl_l.py (not by the authors of the paper)",
    defaults={"init": ("0.0", "TorchJD"), "bounds": ("(-10.0, 10.0)", "ours, as for Uncertainty")},
    deviations=(
        "s is held in bounds: in the forward pass at once, in the parameter at every step event.",
        "An absent task gets no regulariser.",
    ),
    examples=({"num_tasks": 8}, {"init": 0.25, "num_tasks": 8}),
)
@final
class IMTLL(LogScale):
    r"""Learn a factor per task that brings every scaled loss to 1: impartial learning, the loss part (IMTL-L).

    .. math:: \text{total} = \sum_k e^{s_k} L_k - s_k \qquad w_k = e^{s_k}

    - :math:`s_k`: learned

    Weights:
        As above, with gradient into :math:`s_k`. At the optimum :math:`w_k L_k = 1`, and the total is
        :math:`\sum_k 1 + \log L_k`, which may be **negative**. Twice :class:`Uncertainty` (gaussian) with the sign
        of :math:`s` turned: with the same learning rate it moves faster. No argument is neutral.

    State and cadence:
        The parameter ``log_scale`` in your optimizer; put it into a group without weight decay
        (``loss.parameter_groups()``). Held in ``bounds`` at every step. Ranks agree, because its gradient is averaged.

    Use when:
        Positive losses of different units and noisy batches: learned factors, which move slowly, settle to the gradient
        of the sum of logarithms.
    Avoid when:
        A loss reaches 0 or is negative, or losses are large at first: divide them by their first values. The sum of
        logarithms is worse than equal weights in the two-digit suite.

    Deviations:
        ``s`` is bounded; absent tasks have no regulariser. The paper's gradient balance (IMTL-G) is not part of it.

    Args:
        init: First value of :math:`s`, one or one per task. Default 0.0.
        bounds: Range of :math:`s`. Default (-10, 10).
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import IMTLL, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], IMTLL())
        >>> value = loss({"seg": torch.tensor(2.0), "depth": torch.tensor(4.0)})
        >>> value.backward()
        >>> value.item(), loss.weighting.log_scale.grad
        (6.0, tensor([1., 3.]))

    References:
        L. Liu, Y. Li, Z. Kuang, J.-H. Xue, Y. Chen, W. Yang, Q. Liao, W. Zhang, "Towards Impartial Multi-task
        Learning", ICLR 2021.
    """

    def __init__(
        self,
        init: float | Sequence[float] | Mapping[str, float] = 0.0,
        *,
        bounds: tuple[float, float] = (-10.0, 10.0),
        num_tasks: int | None = None,
    ) -> None:
        super().__init__(init, bounds)
        self.start(num_tasks)

    def weigh(self, terms: LossTerms) -> Tensor:
        _, present = self.read(terms)
        return torch.where(present, self.scale().exp(), 0.0)

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor:
        _, present = self.read(terms)
        return -torch.where(present, self.scale(), 0.0).sum().to(terms.loss.dtype)


@method(
    "learned_softmax",
    paper="Learning deep abdominal CT registration through adaptive loss weighting and synthetic data generation",
    venue="PLOS ONE 2023",
    acts_on="task",
    official="jpdefrutos/DDMR@a27d55fca336 ddmr/layers/uncertainty_weighting.py",
    defaults={"prior": ("1.0", "authors' code"), "entropy": ("0.0", "authors' code has no such term")},
    deviations=(
        "Absent tasks are left out of the softmax.",
        "The prior is a constant beside the learned number instead of its first value: the same trajectory.",
        "Regularisers of the model are not weighed on their own; name them as tasks, or add them to the total.",
    ),
    examples=({"num_tasks": 8}, {"prior": [1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0, 0.1], "num_tasks": 8, "entropy": 0.5}),
)
@final
class LearnedSoftmax(TaskWeighting):
    r"""Learn how a total weight of 1 is shared, by gradient descent on the weighted loss itself.

    .. math:: \text{total} = \sum_k w_k L_k - \lambda H(w) \qquad w = \mathrm{softmax}(\log c + a) \qquad
        H(w) = -\sum_k w_k \log w_k

    - :math:`a_k`: learned, at first 0; :math:`c_k`: ``prior``
    - :math:`\lambda`: ``entropy``

    The paper has :math:`\lambda = 0`. Nothing then holds the weights: lowering the total means moving weight to the
    **smallest loss**, and the only stable end is all weight there. With :math:`\lambda > 0` the end is
    :math:`w = \mathrm{softmax}(-L / \lambda)`.

    Weights:
        Positive, summing to 1, with gradient into :math:`a`. No argument is neutral.

    State and cadence:
        The parameter ``offset`` in your optimizer; put it into a group without weight decay
        (``loss.parameter_groups()``). Ranks agree, because its gradient is averaged.

    Use when:
        You reproduce the paper's registration model, or know good weights and want training to move them a little, at a
        small learning rate.
    Avoid when:
        Training is long or losses differ in size, and the entropy term is 0: all weight ends at the task with the
        smallest loss. Constant weights do not collapse.

    Deviations:
        ``entropy`` is ours. The paper's layer weighs regularisers in a second softmax; here they are tasks as others.

    Args:
        prior: First weights up to a common factor, > 0, one for all, one per task in order, or by name. Default 1.
        entropy: :math:`\lambda \ge 0`, or a schedule. Default 0.0 (paper).
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import LearnedSoftmax, MultiTaskLoss
        >>> loss = MultiTaskLoss(["similarity", "dice"], LearnedSoftmax({"similarity": 3.0, "dice": 1.0}))
        >>> value = loss({"similarity": torch.tensor(1.0), "dice": torch.tensor(2.0)})
        >>> value.backward()
        >>> round(value.item(), 4), loss.weighting.offset.grad
        (1.25, tensor([-0.1875,  0.1875]))

    References:
        J. Pérez de Frutos, A. Pedersen, E. Pelanis, D. Bouget, S. Survarachakan, T. Langø, O.-J. Elle, F. Lindseth,
        "Learning deep abdominal CT registration through adaptive loss weighting and synthetic data generation",
        PLOS ONE 2023.
    """

    detached = False
    update_on = "step"

    def __init__(
        self,
        prior: float | Sequence[float] | Mapping[str, float] = 1.0,
        *,
        entropy: float | Schedule = 0.0,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.entropy = check_hyper(self, "entropy", entropy, low=0.0)
        self._prior = prior
        self.symmetric = isinstance(prior, (int, float))
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.add_table("log_prior", self.per_task("prior", self._prior, low=0.0, open_low=True).log())
        self.add_task_parameter("offset", torch.zeros(num_tasks))

    def logits(self) -> Tensor:
        """``(K,)`` float64, what the softmax is taken of."""
        return self.get_buffer("log_prior") + self.get_parameter("offset")

    def weigh(self, terms: LossTerms) -> Tensor:
        _, present = self.read(terms)
        return softmax_over(self.logits(), present)

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        if self.entropy == 0.0:
            return None
        own = self.weigh(terms)  # not the weights of a product that this is part of
        entropy = -torch.where(own > 0, own * torch.where(own > 0, own, 1.0).log(), 0.0).sum()
        return (-value_of(self.entropy) * entropy).to(terms.loss.dtype)

    def reset(self) -> None:
        super().reset()
        if self.tasks:
            with torch.no_grad():
                self.get_parameter("offset").zero_()

    def summary(self) -> dict[str, Tensor]:
        return {"logits": self.logits().detach()}
