"""Task weights from what the last optimizer step did to every loss."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ..base import method
from ..config import check_number
from ..terms import LossTerms
from .base import PerTask, TaskWeighting, mean_of, softmax_over

BETAS = (0.9, 0.999)
"""Adam's decay rates, which nobody changes here."""


def adam(slope: Tensor, moments: Tensor, steps: Tensor, known: Tensor, lr: float) -> Tensor:
    """Adam's move for a slope ``(K,)``; 0 where it is not known, where ``moments`` (2, K) and ``steps`` stay too."""
    steps.add_(known)
    first = BETAS[0] * moments[0] + (1.0 - BETAS[0]) * slope
    second = BETAS[1] * moments[1] + (1.0 - BETAS[1]) * slope.square()
    moments.copy_(torch.where(known, torch.stack([first, second]), moments))
    taken = steps.double().clamp_min(1.0)
    root = second.sqrt() / (1.0 - BETAS[1] ** taken).sqrt() + 1e-8
    return torch.where(known, -lr * first / (1.0 - BETAS[0] ** taken) / root, 0.0)


@method(
    "famo",
    paper="FAMO: Fast Adaptive Multitask Optimization",
    venue="NeurIPS 2023",
    acts_on="task",
    official="Cranial-XIX/FAMO@0a6ad06dbdd5 famo.py",
    defaults={
        "lr": ("0.025", "paper, authors' code"),
        "weight_decay": ("1e-3", "paper's Algorithm 2, LibMTL, TorchJD; the authors' code has 0.01 and 1e-5"),
        "min_losses": ("0.0", "authors' code"),
        "eps": ("1e-8", "authors' code"),
        "next_batch": ("False", "paper: the same batch"),
    },
    deviations=(
        "A task whose loss is missing before or after the step keeps its logit and its moments.",
        "A loss below its minimum counts as the minimum, where the authors take the logarithm of a negative number.",
        "The shared gradient is not clipped: that is the optimizer's side of the loop.",
    ),
    examples=(
        {"num_tasks": 8},
        {"num_tasks": 8, "min_losses": [0.01] * 4 + [0.2] * 4, "weight_decay": 0.0},
        {"num_tasks": 8, "lr": 0.1, "next_batch": True},
    ),
)
@final
class FAMO(TaskWeighting):
    r"""Let every task's loss fall by the same fraction: look at what a step did, and shift weight to who gained less.

    .. math::
        \text{total} = c \sum_k z_k \log D_k \qquad z = \mathrm{softmax}(\xi) \qquad D_k = L_k - b_k + \epsilon \qquad
        c = \Big(\sum_k \frac{z_k}{D_k}\Big)^{-1}

    After the optimizer's step, with the losses :math:`D'` of the **same** data:

    .. math:: \xi \leftarrow \mathrm{Adam}\big(\xi,\ J^\top \delta + \gamma\,\xi\big) \qquad
        \delta_k = \log D_k - \log D'_k \qquad J = \mathrm{diag}(z) - z z^\top

    - :math:`b_k`: ``min_losses``, :math:`\gamma`: ``weight_decay``

    Weights:
        :math:`c\,z_k / D_k`, that is :math:`\mathrm{softmax}(\xi - \log D)`: they sum to 1. Detached. An absent task
        has none, and the others sum to 1. No argument is neutral.

    State and cadence:
        Logits ``logits``, their Adam moments and step numbers per task, all saved: a resumed run goes on bit for bit.
        ``update_on = "step"``. The losses before the step are those of the training calls (their mean over
        micro-batches and ranks), the losses after it arrive by ``update("step", losses=...)`` or, where there are
        several micro-batches, by ``observe_after(losses)`` for each of them before ``update("step")``. Where they do
        not come (an optimizer step that was skipped under AMP), the logits stay.

    Use when:
        No task may be left behind, the units of the losses differ, and one more forward pass per step, without
        gradient, is affordable.
    Avoid when:
        Losses are negative or reach 0, or dropout and augmentation differ between the two passes: the measured change
        is then noise. With losses of one unit, constant weights are simpler.

    Deviations:
        Tasks without a loss before and after are left alone; a loss below its minimum counts as the minimum; no
        clipping.

    Args:
        lr: Adam's learning rate, >= 0. Default 0.025 (paper).
        weight_decay: :math:`\gamma` >= 0, added to the gradient as torch's Adam does. Default 1e-3.
        min_losses: The least value each loss can reach, one or one per task. Default 0.0.
        eps: Added to every :math:`D`, > 0. Default 1e-8.
        next_batch: Take each step's own losses as what the step before led to, which needs no extra forward pass. They
            are of other data, so :math:`\delta` is biased by how hard the batches are, and comes a step late.
            Default ``False``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import FAMO, MultiTaskLoss
        >>> loss = MultiTaskLoss(["seg", "depth"], FAMO())
        >>> value = loss({"seg": torch.tensor(2.0), "depth": torch.tensor(4.0)})
        >>> # value.backward(); optimizer.step(); then the same data again
        >>> loss.update("step", losses={"seg": torch.tensor(1.0), "depth": torch.tensor(4.0)})
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'seg': 0.6555, 'depth': 0.3445}

        With two micro-batches per step:

        >>> micro_batches = [{"seg": torch.tensor(1.0)}, {"depth": torch.tensor(3.0)}]
        >>> values = [loss(losses) for losses in micro_batches]
        >>> for losses in micro_batches:
        ...     loss.observe_after(losses)
        >>> loss.update("step")

    References:
        B. Liu, Y. Feng, P. Stone, Q. Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023.
    """

    update_on = "step"

    def __init__(
        self,
        *,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        min_losses: PerTask = 0.0,
        eps: float = 1e-8,
        next_batch: bool = False,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.lr = check_number(self, "lr", lr, low=0.0)
        self.weight_decay = check_number(self, "weight_decay", weight_decay, low=0.0)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        if not isinstance(next_batch, bool):
            raise TypeError(f"FAMO: next_batch must be a bool, got {next_batch!r} ({type(next_batch).__name__})")
        self.next_batch = next_batch
        self.feeds = frozenset() if next_batch else frozenset({"after"})
        self.symmetric = isinstance(min_losses, (int, float))
        self._least = min_losses
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        self.add_table("least", self.per_task("min_losses", self._least))
        self.add_task_state("logits", torch.zeros(num_tasks, dtype=torch.float64))
        self.add_task_state("moments", torch.zeros(2, num_tasks, dtype=torch.float64), dim=1)
        self.add_task_state("moves", torch.zeros(num_tasks, dtype=torch.int64))
        self.add_pending("before", 2, num_tasks)
        if self.next_batch:
            self.add_task_state("previous", torch.zeros(2, num_tasks, dtype=torch.float64), dim=1)  # as tallies
        else:
            self.add_pending("after", 2, num_tasks)

    def observe(self, terms: LossTerms) -> None:
        self.accumulate("before", self.tallies(terms))

    def observe_after(self, terms: LossTerms) -> None:
        if not self.next_batch:
            self.accumulate("after", self.tallies(terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        if self.next_batch:
            previous, now = self.get_buffer("previous"), sums["before"]
            self._learn(previous, now)
            previous.copy_(torch.where(now[1] > 0, now, previous))
        else:
            self._learn(sums["before"], sums["after"])

    def _learn(self, before: Tensor, after: Tensor) -> None:
        """Move the logits by what lies between two tallies."""
        (old, here), (new, there) = mean_of(before), mean_of(after)
        known = here & there
        fell = torch.where(known, self._log_gap(old) - self._log_gap(new), 0.0)
        logits = self.get_buffer("logits")
        z = softmax_over(logits, known)
        slope = z * (fell - (z * fell).sum()) + self.weight_decay * logits
        logits.add_(adam(slope, self.get_buffer("moments"), self.get_buffer("moves"), known, self.lr))

    def _log_gap(self, loss: Tensor) -> Tensor:
        return ((loss - self.get_buffer("least")).clamp_min(0.0) + self.eps).log()

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        return softmax_over(self.get_buffer("logits") - self._log_gap(loss), present)

    def formula(self, terms: LossTerms) -> Tensor:
        loss, present = self.read(terms)
        z, gap = softmax_over(self.get_buffer("logits"), present), self._log_gap(loss)
        inverse = (z * (-gap).exp()).sum()
        some = inverse > 0
        return torch.where(some, (z * gap).sum() / torch.where(some, inverse, 1.0), 0.0)

    def summary(self) -> dict[str, Tensor]:
        return {"logits": self.get_buffer("logits").clone()}

    def reset(self) -> None:
        super().reset()
        for name in ("logits", "moments", "moves", "previous"):
            if name in self._buffers:
                self.get_buffer(name).zero_()
