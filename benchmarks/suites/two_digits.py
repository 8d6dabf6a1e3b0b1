"""The network and the LightningModule of :mod:`reweigh.benchmarks.suites.digits_two_tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from .training import Classifier


class TwoDigits(nn.Module):
    """A shared trunk and a head per task."""

    def __init__(self, inputs: int, first: int, second: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(second, size) for task, size in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of both digits, and the ink difference."""
        shared = self.trunk(images)
        found = {task: head(shared) for task, head in self.heads.items()}
        return {**found, "ink": found["ink"].squeeze(1)}


HEADS = {"left": 10, "right": 10, "ink": 1}


class Pairs(Classifier):
    """Trains on some of the tasks; the others are absent."""

    tasks: tuple[str, ...] = tuple(HEADS)

    @classmethod
    def of(cls, tasks: tuple[str, ...]) -> type[Pairs]:
        """The module for these tasks."""
        return cast("type[Pairs]", type(cls.__name__, (cls,), {"tasks": tasks}))

    def task_losses(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Unweighted losses by task."""
        images, left, right, ink = batch
        found = self.net(images)
        losses = {
            "left": F.cross_entropy(found["left"], left),
            "right": F.cross_entropy(found["right"], right),
            "ink": F.mse_loss(found["ink"], ink),
        }
        return {task: losses[task] for task in self.tasks}

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return cast(Tensor, self.objective(self.task_losses(batch)))
