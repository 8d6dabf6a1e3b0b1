"""Two overlapping digits, three tasks: which digit is left, which is right, and how much more ink the left one has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate, Method, Metric, Trial
from .classes import hashed
from .tasks import TaskSuite, TaskTrial, relative_change

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import MultiTaskLoss

    from .training import Classifier

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

    def _network(self, options: Mapping[str, Any]) -> nn.Module:
        from .two_digits import TwoDigits

        return TwoDigits(self.parts["train"][0].shape[1], *options["hidden"])

    def _module(self, tasks: tuple[str, ...]) -> type[Classifier]:
        from .two_digits import Pairs

        return Pairs.of(tasks)

    def _probed(self, options: Mapping[str, Any]) -> Iterable[Any]:
        from torch.utils.data import DataLoader, TensorDataset

        return DataLoader(TensorDataset(*self.parts["val"]), batch_size=options["batch_size"], drop_last=True)

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
