"""Two overlapping digits, three tasks: which digit is left, which is right, and how much more ink the left one has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from ..readers import DataError
from .base import Gate, Method, Metric, Outcome, Suite, Trial
from .classes import MONITORED, hashed

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.lightning_callbacks import WeightingMonitor
    from reweigh.losses import MultiTaskLoss

TASKS = ("left", "right", "ink")
OVERLAP = 3
"""Columns that the two digits share, where the darker pixel wins."""
DIGITS = {"train": 1000, "val": 300, "test": 497}
"""Digits that the pairs of each part are made of; no digit is in two parts."""
PAIRS = {"train": 2000, "val": 500, "test": 1500}

# learning rate and weight decay: the best of 4 x 2 by the validation results of the three single-task models over four
# seeds that are not among the reported ones
TRAINING: dict[str, Any] = {"steps": 500, "batch_size": 64, "lr": 3e-3, "weight_decay": 0.0, "hidden": [128, 64]}
INK_WEIGHT = 3e-3
"""The tuned constant: the best of six powers by validation delta-m over the same four seeds."""
KINDS: dict[str, Any] = {"left": "categorical", "right": "categorical", "ink": "gaussian"}
"""Likelihoods for uncertainty weighting."""
SIGNS: Mapping[str, Mapping[str, float]] = {
    "left": {"left_accuracy": 1.0},
    "right": {"right_accuracy": 1.0},
    "ink": {"ink_mae": -1.0},
}
"""By task, its metrics in delta-m: 1 where higher is better."""
WARMUP, HISTORY = 30, 100
"""Of CoBa, in probes (one per step)."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "constants": {"ink": INK_WEIGHT},
    "coba": {"coba_warmup": WARMUP, "coba_history": HISTORY, "init": "first"},
    "coba_raw": {"coba_warmup": WARMUP, "coba_history": HISTORY},
    "uncertainty_first": {"init": "first"},
    "first": {"init": "first"},
}
GRID: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "constants": {"ink": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)},
}


def pairs(
    images: np.ndarray[Any, Any], target: np.ndarray[Any, Any], seed: int
) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Overlaid images (in [0, 1]), left and right class, and ink difference (in grey levels) of each part."""
    rng = np.random.default_rng(seed)
    order, start, found = rng.permutation(len(images)), 0, {}
    for part, size in DIGITS.items():
        mine = order[start : start + size]
        start += size
        left, right = rng.choice(mine, PAIRS[part]), rng.choice(mine, PAIRS[part])
        canvas = np.zeros((PAIRS[part], 8, 16 - OVERLAP), np.float32)
        canvas[:, :, :8] = images[left]
        canvas[:, :, -8:] = np.maximum(canvas[:, :, -8:], images[right])
        ink = images[left].sum((1, 2)) - images[right].sum((1, 2))
        found[part] = [canvas.reshape(PAIRS[part], -1) / 16, target[left], target[right], ink.astype(np.float32)]
    return found


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

    @abstractmethod
    def _train(
        self, method: str, tasks: tuple[str, ...], monitor: WeightingMonitor | None = None
    ) -> tuple[nn.Module, float]:
        """A network trained on these tasks, and the ms of a step."""

    @abstractmethod
    def _test(self, net: nn.Module, part: str = "test") -> dict[str, float]:
        """All metrics of all tasks."""


@final
class DigitsTwoTasks(TaskSuite):
    """Section "multi-task" of the default suite."""

    name = "digits_two_tasks"
    version = 1
    title = "Three tasks on two digits"
    summary = "two classifications and one regression in raw units, on pairs of overlapping digits"
    story = (
        "One network looks at two overlapping handwritten digits and has three tasks: name the left one, name the "
        "right one, and say how much more ink the left one has, in grey levels. The third loss is thousands of times "
        "larger than the others, only because of its unit. The methods below change nothing but the weights of the "
        "three losses. Every result is also compared with three networks that learn one task each: delta-m is the mean "
        "over tasks of the relative change to them, so 0 % means that sharing costs nothing. In every repetition all "
        "methods get the same pairs, the same initial network and the same order of training batches."
    )
    notes = (
        "Data: composites of real digits (1797 scans of 8 x 8 pixels, shipped with scikit-learn); no digit is in two "
        "of the training, validation and test parts.",
        "delta-m weighs an error in the ink and errors in the classes by their relative size; read it beside the three "
        "columns of the tasks.",
        "'first losses' divides each loss by its first training value and does nothing else. It is the baseline that "
        "adaptive methods have to beat where units differ.",
        "CoBa balances rates of convergence, not units; the claim is about CoBa on losses divided by their first "
        "values, and it is shown on raw ones as well. It sees one validation batch per step, which costs a forward "
        "pass; no other method sees validation data.",
        "Learning rate and weight decay were chosen once, on validation data, for the single-task models; the tuned "
        "constant on validation data by delta-m. Nothing else was tuned.",
    )
    methods = (
        Method("equal", "equal weights", "The three losses are added as they are."),
        Method(
            "single",
            "single-task models",
            "Three networks, one per task: what the others are measured against.",
            claim=False,
        ),
        Method("constants", "tuned constants", f"Constant weights, tuned on validation data: 1, 1 and {INK_WEIGHT:g}."),
        Method("first", "first losses", "Each loss is divided by its value on the first batch."),
        Method("coba", "CoBa (first losses)", "Follows how fast each task's validation loss converges."),
        Method("coba_raw", "CoBa (raw units)", "The same on the losses as they are.", claim=False),
        Method("uncertainty", "uncertainty", "Learns a noise level per task.", claim=False),
        Method("uncertainty_first", "uncertainty (first losses)", "The same on divided losses.", claim=False),
        Method("dwa", "DWA", "Weighs tasks by how slowly their training loss falls.", claim=False),
        Method("scale_invariant", "sum of logarithms", "Adds the logarithms of the losses.", claim=False),
    )
    quick = ("equal", "single", "coba")
    default = ("equal", "single", "first", "coba", "uncertainty_first")
    metrics = (
        Metric("delta_m", "delta-m", "Mean over the tasks of the relative change to the single-task models."),
        Metric("left_accuracy", "left acc.", "Share of left digits recognised."),
        Metric("right_accuracy", "right acc.", "Share of right digits recognised."),
        Metric(
            "ink_mae", "ink MAE", "Mean absolute error of the ink, in grey levels.", higher_is_better=False, share=False
        ),
        Metric("val_delta_m", "delta-m, val.", "On the validation data.", shown=False),
    )
    gates = (Gate("first", "delta_m", 0.20), Gate("coba", "delta_m", 0.20))
    seeds = 6
    training: Mapping[str, Any] = TRAINING
    grid = GRID

    own = OWN
    tasks = TASKS
    signs = SIGNS
    kinds = KINDS

    def protocol(self) -> Mapping[str, Any]:
        return {"digits": DIGITS, "pairs": PAIRS, "overlap": OVERLAP}

    def prepare(self, seed: int) -> Trial:
        return _PairsTrial(self, seed)

    def objective(self, method: str) -> MultiTaskLoss:
        from reweigh.losses import MultiTaskLoss

        if method == "constants":
            return MultiTaskLoss(TASKS, {"left": 1.0, "right": 1.0, "ink": self.options(method)["ink"]})
        return super().objective(method)


class _PairsTrial(TaskTrial):
    def __init__(self, suite: DigitsTwoTasks, seed: int) -> None:
        import torch
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.suite, self.seed = suite, seed
        found = pairs(digits.images.astype(np.float32), digits.target.astype(np.int64), seed)
        self.parts: dict[str, tuple[Tensor, ...]] = {
            part: tuple(torch.from_numpy(array) for array in arrays) for part, arrays in found.items()
        }
        self.data_hash = hashed(self.parts)
        self._alone = {}

    def _train(
        self, method: str, tasks: tuple[str, ...], monitor: WeightingMonitor | None = None
    ) -> tuple[nn.Module, float]:
        from torch.utils.data import DataLoader, TensorDataset

        from reweigh.lightning_callbacks import ValidationProbe, WeightingCallback

        from .training import reproducible, train
        from .two_digits import Pairs, TwoDigits

        options = self.suite.options(method)
        callbacks: list[Any] = [WeightingCallback()]
        if method in ("coba", "coba_raw"):
            val = DataLoader(TensorDataset(*self.parts["val"]), batch_size=options["batch_size"], drop_last=True)
            callbacks.append(ValidationProbe(dataloader=val))
        if monitor is not None:
            callbacks.append(monitor)
        with reproducible(self.seed):
            net = TwoDigits(self.parts["train"][0].shape[1], *options["hidden"])
            step_ms = train(
                net,
                self.suite.objective(method),
                self.parts["train"],
                options,
                seed=self.seed,
                callbacks=callbacks,
                module=Pairs.of(tasks),
            )
        return net.eval(), step_ms

    def _test(self, net: nn.Module, part: str = "test") -> dict[str, float]:
        import torch
        from torchmetrics.functional.classification import multiclass_accuracy
        from torchmetrics.functional.regression import mean_absolute_error

        from .training import reproducible

        images, left, right, ink = self.parts[part]
        with reproducible(self.seed), torch.no_grad():
            found = net(images)
        return {
            "left_accuracy": float(multiclass_accuracy(found["left"], left, 10, average="micro")),
            "right_accuracy": float(multiclass_accuracy(found["right"], right, 10, average="micro")),
            "ink_mae": float(mean_absolute_error(found["ink"], ink)),
        }


def delta_m(found: Mapping[str, float], alone: Mapping[str, float]) -> float:
    """Mean over tasks of the relative change to single-task models, positive where better."""
    return relative_change(found, alone, SIGNS)


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
