"""Task weights from how large each task's gradient is at what the tasks share."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_choice, check_number
from ..dynamics import Event
from ..terms import LossTerms
from .base import PerTask, TaskWeighting, mean_of, number_of, safe_ratio, softmax_over
from .famo import adam

_LEAST = 1e-6
"""Least weight of a task before weights are rescaled."""
_TIE = 1e-12
"""Gradients this near to their target, relatively, are at it: rounding has no say in the direction of a step."""


class GradientWeighting(TaskWeighting):
    """Keeps means of losses and gradient norms over a step's micro-batches; subclasses say what follows from them."""

    needs = frozenset({"gradient_norm"})
    update_on = "step"

    def norm(self, terms: LossTerms) -> tuple[Tensor, Tensor] | None:
        """``(K,)`` float64 norms, and which tasks have a loss and a finite one; ``None`` where nobody took them."""
        found = terms.find("gradient_norm")
        if found is None:
            return None
        _, present = self.read(terms)
        found = found.detach().double()
        known = present & found.isfinite()
        return torch.where(known, found, 0.0), known

    def observe(self, terms: LossTerms) -> None:
        seen = self.norm(terms)
        if seen is None:
            return
        norm, known = seen
        loss, _ = self.read(terms)
        count = terms.find("count")
        number = known.double() if count is None else torch.where(known, count.double(), 0.0)
        self.accumulate("seen", torch.stack([loss * number, norm * number, number]))


@method(
    "grad_norm",
    paper="GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    venue="ICML 2018",
    acts_on="task",
    official="none; the softmax form is median-research-group/LibMTL@4336804847ea LibMTL/weighting/GradNorm.py",
    defaults={
        "alpha": ("1.5", "LibMTL"),
        "lr": ("0.025", "ours"),
        "form": ("'paper'", "paper"),
        "optimizer": ("'sgd'", "ours: plain descent, as the closed form suggests"),
    },
    deviations=(
        "The weights have an optimizer of their own, so that nobody's weight decay reaches them.",
        "The gradient of the balancing loss is taken in closed form, which needs no second derivative.",
        "Weights are at least 1e-6 before they are rescaled; a gradient within 1e-12 of its target is at it.",
        "A task that is absent, or whose gradient is not finite, keeps its weight; the others share the rest.",
        "Over micro-batches the norms are averaged, not the gradients.",
    ),
    neutral={"num_tasks": 8, "lr": 0.0},
    examples=(
        {"num_tasks": 8},
        {"num_tasks": 8, "alpha": 0.5, "lr": 0.1, "form": "softmax"},
        {"num_tasks": 8, "optimizer": "adam"},
    ),
)
@final
class GradNorm(GradientWeighting):
    r"""Give tasks gradients of one size, and larger ones to tasks that learn slowly.

    .. math::
        w \leftarrow w - \eta\, \nabla_w \sum_k \big| G_k - \bar G\, r_k^{\alpha} \big| \qquad
        G_k = w_k \lVert \nabla_W L_k \rVert \qquad
        r_k = \frac{L_k / L_k(0)}{\operatorname{mean}_j L_j / L_j(0)}

    - :math:`W`: the last shared layer, ``shared=`` of the call; :math:`\bar G`: mean of :math:`G`
    - :math:`\bar G\, r_k^\alpha` is held constant, so that the gradient is
      :math:`\operatorname{sign}(G_k - \bar G r_k^\alpha)\, \lVert \nabla_W L_k \rVert`

    Weights:
        Positive, with sum K, 1 at first. Detached. ``form="paper"`` moves the weights themselves and rescales them,
        ``form="softmax"`` moves :math:`s` in :math:`w = K\,\mathrm{softmax}(s)`. The point of rest is
        :math:`w_k \propto r_k^\alpha / \lVert \nabla_W L_k \rVert`, where the targets add up to the gradients, as for
        :math:`\alpha` 0 or 1; otherwise there is none. ``lr=0`` is neutral.

    State and cadence:
        Weights (or :math:`s`), first losses and the optimizer's moments, all saved; ``update_on = "step"``. Each
        training call takes one partial backward pass per present task, from its loss down to ``shared``; means over
        micro-batches are taken. The softmax form compares with the mean losses of the first epoch, in which weights
        stay 1, and needs the ``epoch`` event. Ranks: a gradient at parameters is that of the joined batch, exactly (one
        all-reduce of K times as many numbers as they have).

    Use when:
        One task's gradient drowns the others' in a shared trunk, and one more partial backward pass per task, down to a
        shared layer, is affordable.
    Avoid when:
        Tasks share no layer, or losses are negative or 0 at first. Where losses merely differ in unit, dividing them by
        their first values costs nothing and comes first.

    Deviations:
        An optimizer of its own; closed form; a least weight; ties; absent tasks keep their weight; norms are averaged
        over micro-batches.

    Args:
        alpha: Strength of the pull towards one learning rate, >= 0; 0 is gradients of one size. Default 1.5 (LibMTL).
        lr: :math:`\eta` >= 0. Default 0.025.
        form: ``"paper"`` or ``"softmax"`` (LibMTL). Default ``"paper"``.
        optimizer: ``"sgd"`` or ``"adam"``, whose steps do not depend on the losses' common scale. Default ``"sgd"``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` and ``gradient_norm`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import GradNorm, MultiTaskLoss
        >>> layer = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> loss = MultiTaskLoss(["seg", "depth"], GradNorm(lr=0.1))
        >>> value = loss({"seg": layer.sum(), "depth": 3 * layer.sum()}, shared=layer)
        >>> value.backward()
        >>> loss.update("step")
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 1.3294, 'depth': 0.6706}

    References:
        Z. Chen, V. Badrinarayanan, C.-Y. Lee, A. Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss
        Balancing in Deep Multitask Networks", ICML 2018.
    """

    def __init__(
        self,
        alpha: float = 1.5,
        *,
        lr: float = 0.025,
        form: Literal["paper", "softmax"] = "paper",
        optimizer: Literal["sgd", "adam"] = "sgd",
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_number(self, "alpha", alpha, low=0.0)
        self.lr = check_number(self, "lr", lr, low=0.0)
        self.form = check_choice(self, "form", form, ("paper", "softmax"))
        self.optimizer = check_choice(self, "optimizer", optimizer, ("sgd", "adam"))
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        zeros = torch.zeros(2, num_tasks, dtype=torch.float64)
        self.add_task_state("level", torch.ones(num_tasks, dtype=torch.float64))  # w, or s of the softmax form
        self.add_task_state("first", zeros[0].clone())  # losses to compare with; 0: unknown
        if self.form == "softmax":
            self.add_task_state("running", zeros.clone(), dim=1)  # sums and counts of the epoch that runs
        if self.optimizer == "adam":
            self.add_task_state("moments", zeros.clone(), dim=1)
            self.add_task_state("moves", torch.zeros(num_tasks, dtype=torch.int64))
        self.add_pending("seen", 3, num_tasks)

    def weigh(self, terms: LossTerms) -> Tensor:
        self.read(terms)
        return self._weights().clone()

    def _weights(self) -> Tensor:
        level = self.get_buffer("level")
        return level if self.form == "paper" else self.num_tasks * level.softmax(0)

    def commit(self, sums: dict[str, Tensor]) -> None:
        seen, first = sums["seen"], self.get_buffer("first")
        (loss, here), (norm, _) = mean_of(seen[::2]), mean_of(seen[1:])
        if self.form == "paper":
            first.copy_(torch.where((first == 0) & here, loss.clamp_min(0.0), first))
        else:
            self.get_buffer("running").add_(seen[::2])
        known = here & (first > 0)
        slope, weights, level = self._slope(loss, norm, known), self._weights(), self.get_buffer("level")
        if self.form == "paper":
            moved = torch.where(known, (level + self._move(slope, known)).clamp_min(_LEAST), 0.0)
            left = self.num_tasks - torch.where(known, 0.0, level).sum()
            level.copy_(torch.where(known, moved * safe_ratio(left, moved.sum()), level))
        else:
            part = softmax_over(level, known)  # as if the known ones were all, on what the others leave
            own = torch.where(known, weights, 0.0).sum() * part
            moved = level + self._move(own * (slope - (part * slope).sum()), known)
            some = known & ~known.all()
            level.copy_(torch.where(some, moved + _height(level, known) - _height(moved, known), moved))

    def _slope(self, loss: Tensor, norm: Tensor, known: Tensor) -> Tensor:
        """The balancing loss's gradient with respect to the weights, 0 for tasks that are not known."""
        number = number_of(known).clamp_min(1.0)
        ratio = torch.where(known, safe_ratio(loss.clamp_min(0.0), self.get_buffer("first")), 0.0)
        pace = safe_ratio(ratio, ratio.sum() / number, 1.0).pow(self.alpha).clamp(max=1e100)
        size = torch.where(known, self._weights() * norm, 0.0)
        target = size.sum() / number * pace
        gap = size - target
        return torch.where(known & (gap.abs() > _TIE * target), gap.sign() * norm, 0.0)

    def _move(self, slope: Tensor, known: Tensor) -> Tensor:
        if self.optimizer == "adam":
            return adam(slope, self.get_buffer("moments"), self.get_buffer("moves"), known, self.lr)
        return -self.lr * slope

    def refresh(self, event: Event, **signals: object) -> None:
        if event != "epoch" or self.form == "paper":
            return
        first, (mean, known) = self.get_buffer("first"), mean_of(self.get_buffer("running"))
        first.copy_(torch.where((first == 0) & known, mean.clamp_min(0.0), first))
        self.get_buffer("running").zero_()

    def reset(self) -> None:
        super().reset()
        for name in self._by_task:
            self.get_buffer(name).fill_(float(name == "level"))


@method(
    "output_gradient",
    paper="High Fidelity Neural Audio Compression",
    venue="TMLR 2023",
    acts_on="task",
    official="facebookresearch/encodec@30838f83b744 encodec/balancer.py",
    defaults={
        "shares": ("1.0", "ours; the authors have no default"),
        "total_norm": ("1.0", "authors' code"),
        "decay": ("0.999", "authors' code"),
        "eps": ("1e-12", "authors' code"),
    },
    deviations=(
        "The weights act on each loss as a whole, not only on the part of its gradient that passes the output.",
        "Norms are those of the joined batch, so that ranks and one process agree; the authors average local norms.",
        "A norm that is not finite is left out. Before any norm was seen, each counts as 1.",
    ),
    examples=({"num_tasks": 8}, {"num_tasks": 8, "shares": [1.0, 2.0] * 4, "decay": 0.5, "total_norm": 3.0}),
)
@final
class OutputGradientBalancer(GradientWeighting):
    r"""Give each task a fixed share of the gradient at the model's output, whatever its loss looks like.

    .. math::
        w_k = \frac{R\, c_k}{\sum_j c_j} \Big/ \big( \epsilon + \mathrm{EMA}\,\lVert \nabla_y L_k \rVert \big)

    - :math:`y`: the model's output, ``shared=`` of the call; the norm is the mean of each sample's
    - :math:`c_k`: ``shares``, :math:`R`: ``total_norm``; the running mean is corrected for its start

    Weights:
        As above, over the present tasks; this batch's norm is in the mean already. At first the weighted gradients have
        norms :math:`R c_k / \sum c` exactly. Detached. No argument is neutral.

    State and cadence:
        Numerator and denominator of each running mean, saved; ``update_on = "step"``. Each training call takes one
        partial backward pass per present task, from its loss to the output, which is cheap where the model is large.
        Micro-batches are averaged; ranks add K norms.

    Use when:
        Several losses compare one output with one target, as spectral, waveform and adversarial losses do, and each
        should have a fixed share of the gradient there.
    Avoid when:
        Tasks have heads of their own and share no output: balance at the last shared layer. A loss whose gradient was 0
        for long returns with a huge weight.

    Deviations:
        Weights act on whole losses; norms are of the joined batch; norms that are not finite are left out.

    Args:
        shares: :math:`c_k` > 0, one for all or one per task. Default 1.0.
        total_norm: :math:`R` > 0. Default 1.0.
        decay: Of the running mean, in [0, 1). Default 0.999.
        eps: Added to the mean norm, > 0. Default 1e-12.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss``, ``gradient_norm`` (and ``sample_gradient_norm`` where activations are shared) of shape ``(K,)``;
        returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import MultiTaskLoss, OutputGradientBalancer
        >>> output = torch.zeros(2, 4, requires_grad=True) * 1.0
        >>> loss = MultiTaskLoss(["wave", "mel"], OutputGradientBalancer({"wave": 1.0, "mel": 3.0}))
        >>> losses = {"wave": (output - 1).square().mean(), "mel": 100 * (output - 2).square().mean()}
        >>> value = loss(losses, shared=output)
        >>> loss.update("step")
        >>> for name, weight in loss.weights.items():
        ...     (grad,) = torch.autograd.grad(weight * losses[name], output, retain_graph=True)
        ...     print(name, round(grad.norm(dim=1).mean().item(), 4))
        wave 0.25
        mel 0.75

    References:
        A. Defossez, J. Copet, G. Synnaeve, Y. Adi, "High Fidelity Neural Audio Compression", TMLR 2023.
    """

    def __init__(
        self,
        shares: PerTask = 1.0,
        *,
        total_norm: float = 1.0,
        decay: float = 0.999,
        eps: float = 1e-12,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.total_norm = check_number(self, "total_norm", total_norm, low=0.0, open_low=True)
        self.decay = check_number(self, "decay", decay, low=0.0, high=1.0, open_high=True)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.symmetric = isinstance(shares, (int, float))
        self._shares = shares
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.add_table("share", self.per_task("shares", self._shares, low=0.0, open_low=True))
        self.add_task_state("average", torch.zeros(2, num_tasks, dtype=torch.float64), dim=1)  # sum and its weight
        self.add_pending("seen", 3, num_tasks)

    def norm(self, terms: LossTerms) -> tuple[Tensor, Tensor] | None:
        per_sample = terms.find("sample_gradient_norm")
        if per_sample is not None:
            terms = terms._replace(extras={**(terms.extras or {}), "gradient_norm": per_sample})
        return super().norm(terms)

    def _with(self, norm: Tensor, known: Tensor) -> Tensor:
        """``(2, K)`` running mean that has taken in one more norm of the known tasks."""
        old = self.get_buffer("average")
        return torch.where(known, self.decay * old + torch.stack([norm, torch.ones_like(norm)]), old)

    def weigh(self, terms: LossTerms) -> Tensor:
        _, present = self.read(terms)
        seen = self.norm(terms)
        total, weight = self.get_buffer("average") if seen is None else self._with(*seen)
        share = torch.where(present, self.get_buffer("share"), 0.0)
        part = self.total_norm * safe_ratio(share, share.sum())
        return part / (self.eps + safe_ratio(total, weight, 1.0))

    def commit(self, sums: dict[str, Tensor]) -> None:
        mean, known = mean_of(sums["seen"][1:])
        self.get_buffer("average").copy_(self._with(mean, known))

    def summary(self) -> dict[str, Tensor]:
        return {"gradient_norm": safe_ratio(*self.get_buffer("average"))}

    def reset(self) -> None:
        super().reset()
        if self.tasks:
            self.get_buffer("average").zero_()


def _height(level: Tensor, known: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of the known ones; finite where there are none."""
    total = torch.where(known, level, -torch.inf).logsumexp(0)
    return torch.where(total.isfinite(), total, 0.0)
