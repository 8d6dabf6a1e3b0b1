"""Several tasks of one network: what suites of this family share, whatever their data and network are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..readers import DataError
from .base import Outcome, Suite, Trial
from .classes import MONITORED

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

    from reweigh.lightning_callbacks import WeightingMonitor
    from reweigh.losses import MultiTaskLoss

    from .training import Classifier


class TaskSuite(Suite):
    """Several tasks of one network, measured against a network for each of them."""

    tasks: tuple[str, ...]
    signs: Mapping[str, Mapping[str, float]]
    """By task, its metrics in delta-m: 1 where higher is better, -1 where lower is."""
    kinds: Mapping[str, Any]
    """Likelihoods for uncertainty weighting."""
    chosen_by = "val_delta_m"

    def objective(self, method: str) -> MultiTaskLoss:
        """The loss of a method."""
        from reweigh.losses import MultiTaskLoss
        from reweigh.weighting import DWA, CoBa, ScaleInvariant, Uncertainty

        own = self.options(method)
        if method in ("coba", "coba_raw"):
            coba = CoBa(warmup=own["coba_warmup"], history=own["coba_history"])
            return MultiTaskLoss(self.tasks, coba, init=own.get("init"))
        if method in ("uncertainty", "uncertainty_first"):
            return MultiTaskLoss(self.tasks, Uncertainty(self.kinds), init=own.get("init"))
        if method == "first":
            return MultiTaskLoss(self.tasks, init=own["init"])
        if method == "dwa":
            return MultiTaskLoss(self.tasks, DWA())
        if method == "scale_invariant":
            return MultiTaskLoss(self.tasks, ScaleInvariant())
        return MultiTaskLoss(self.tasks)


class TaskTrial(Trial):
    """One seed of a :class:`TaskSuite`."""

    suite: TaskSuite
    seed: int
    parts: Mapping[str, Any]
    """What :func:`~reweigh.benchmarks.suites.training.train` takes, by part."""
    _alone: dict[str, dict[str, float]]

    def run(self, method: str) -> Outcome:
        from reweigh.lightning_callbacks import WeightingMonitor

        from .training import task_curves

        alone, tasks = self._single(), self.suite.tasks
        step_ms = monitor = None
        if method == "single":
            found = alone
        else:
            if self.seed % MONITORED == 0:
                monitor = WeightingMonitor(every_n_steps=max(1, self.suite.training["steps"] // 20), warn_below=0.0)
            net, step_ms = self._train(method, tasks, monitor)
            found = {part: self._test(net, part) for part in alone}
        changes = {part: relative_change(found[part], alone[part], self.suite.signs) for part in alone}
        return Outcome(
            {"delta_m": changes["test"], **found["test"], "val_delta_m": changes["val"]},
            step_ms=step_ms if monitor is None else None,  # recording takes time
            details={} if monitor is None else {"tasks": task_curves(monitor, tasks)},
        )

    def _single(self) -> dict[str, dict[str, float]]:
        """Each task's result of its own model, on both parts; trained once per trial."""
        if not self._alone:
            nets = {task: self._train("equal", (task,))[0] for task in self.suite.tasks}
            for part in ("test", "val"):
                tests = {task: self._test(net, part) for task, net in nets.items()}
                self._alone[part] = {
                    metric: tests[task][metric] for task, own in self.suite.signs.items() for metric in own
                }
        return self._alone

    def _train(
        self, method: str, tasks: tuple[str, ...], monitor: WeightingMonitor | None = None
    ) -> tuple[nn.Module, float]:
        """A network trained on these tasks, and the ms of a step."""
        from reweigh.lightning_callbacks import ValidationProbe, WeightingCallback

        from .training import reproducible, train

        options = self.suite.options(method)
        callbacks: list[Any] = [WeightingCallback()]
        if method in ("coba", "coba_raw"):
            callbacks.append(ValidationProbe(dataloader=self._probed(options)))
        if monitor is not None:
            callbacks.append(monitor)
        with reproducible(self.seed):
            net = self._network(options)
            step_ms = train(
                net,
                self.suite.objective(method),
                self.parts["train"],
                options,
                seed=self.seed,
                callbacks=callbacks,
                module=self._module(tasks),
            )
        return net.eval(), step_ms

    @abstractmethod
    def _network(self, options: Mapping[str, Any]) -> nn.Module:
        """A fresh network."""

    @abstractmethod
    def _module(self, tasks: tuple[str, ...]) -> type[Classifier]:
        """What trains it on some of the tasks."""

    @abstractmethod
    def _probed(self, options: Mapping[str, Any]) -> Iterable[Any]:
        """Batches of the validation data, whose losses CoBa follows."""

    @abstractmethod
    def _test(self, net: nn.Module, part: str = "test") -> dict[str, float]:
        """All metrics of all tasks."""


def relative_change(
    found: Mapping[str, float], alone: Mapping[str, float], signs: Mapping[str, Mapping[str, float]]
) -> float:
    """Mean over tasks of the mean over a task's metrics of the relative change, positive where better.

    Raises:
        DataError: A single-task model with a metric of 0, to which nothing is relative.
    """
    for own in signs.values():
        for name in own:
            if alone[name] == 0.0:
                raise DataError(f"delta-m: single-task models must have a {name} other than 0; train them longer")
    changes = [
        sum(sign * (found[name] / alone[name] - 1.0) for name, sign in own.items()) / len(own) for own in signs.values()
    ]
    return sum(changes) / len(changes)
