"""Imbalanced classes: what suites of this family share, whatever their data and network are."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..readers import DataError
from .base import Method, Metric, Outcome, Suite, Trial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from typing import TypeAlias

    from torch import Tensor, nn

    from reweigh.losses import Objective

    from .vision import ImageSet

    Part: TypeAlias = tuple[Tensor, ...] | ImageSet
    """Inputs and what belongs to them, in memory or read batch by batch."""

BETA = 0.999
GAMMA = 2.0
DEFER = 0.8
"""Share of training before deferred re-weighting sets in."""
MONITORED = 3
"""Every so many seeds the weights are recorded, and the time of a step is not, because recording takes time."""

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("ce", "cross-entropy (CE)", "Plain training: every sample counts the same."),
        Method(
            "posthoc_la",
            "post-hoc logit adjustment",
            "Takes the finished CE model and subtracts the log class frequencies from its logits.",
            trained=False,
        ),
        Method("inverse", "inverse frequency", "Each sample counts in inverse proportion to the size of its class."),
        Method(
            "sqrt_inverse",
            "square root of inverse",
            "Each sample counts in inverse proportion to the square root of its class's size.",
        ),
        Method(
            "cb",
            "class-balanced",
            f"Weights by the inverse effective number of samples (beta {BETA}), a bit milder than inverse frequency.",
        ),
        Method(
            "balanced_softmax",
            "balanced softmax",
            "Adds the log class sizes to the logits during training, so that the model need not learn them.",
        ),
        Method(
            "focal",
            f"focal (gamma {GAMMA:g})",
            "Samples that the model already gets right count less; no class sizes.",
            claim=False,
        ),
        Method("cb_focal", "class-balanced focal", f"Class-balanced weights times the focal factor (gamma {GAMMA:g})."),
        Method(
            "drw",
            "deferred re-weighting",
            f"Plain CE, then class-balanced weights in the last {100 * (1 - DEFER):.0f} % of training.",
        ),
    )
}

OWN: Mapping[str, Mapping[str, Any]] = {
    "posthoc_la": {"tau": 1.0},
    "inverse": {"reduction": "weighted_mean"},
    "sqrt_inverse": {"power": 0.5, "reduction": "weighted_mean"},
    "cb": {"beta": BETA, "reduction": "weighted_mean"},
    "focal": {"gamma": GAMMA},
    "cb_focal": {"beta": BETA, "gamma": GAMMA},
    "drw": {"beta": BETA, "defer": DEFER, "reduction": "weighted_mean"},
}
"""The usual settings."""

WORST = Metric(
    "worst_recall", "worst recall", "Of the class that the model knows worst: the share of its samples it gets right."
)
BALANCED = Metric("balanced_accuracy", "balanced acc.", "Mean recall over all classes.")
MACRO_F1 = Metric("macro_f1", "macro F1", "Mean over classes of the harmonic mean of precision and recall.")
NATURAL = Metric("natural_accuracy", "acc. at train freq.", "Accuracy if classes are as frequent as in training.")
VAL = Metric("val_balanced_accuracy", "balanced acc., val.", "On the validation data.", shown=False)
ECE = Metric("ece", "ECE", "Calibration error: how far confidence is from accuracy.", higher_is_better=False)


def ends(number: str) -> tuple[Metric, Metric]:
    """The metrics of the rarest and of the most common third of the classes; ``number`` says how many those are."""
    return (
        Metric("tail_recall", f"tail-{number} recall", f"Mean recall of the {number} rarest classes."),
        Metric(
            "head_recall",
            f"head-{number} recall",
            f"Mean recall of the {number} most common classes: what the gain costs.",
        ),
    )


@dataclass(frozen=True)
class ClassData:
    """One seed's data."""

    parts: Mapping[str, Part]
    """Inputs and targets of ``train``, ``test`` and, where some are set apart, ``val``."""
    by_size: list[int]
    """Classes from the most common to the rarest."""
    names: Sequence[str]
    """Of the classes, by number."""


class ClassSuite(Suite):
    """One label per sample, classes of very different size."""

    own = OWN
    chosen_by = "val_balanced_accuracy"

    @abstractmethod
    def data(self, seed: int) -> ClassData:
        """The split of a seed."""

    @abstractmethod
    def network(self, data: ClassData, options: Mapping[str, Any]) -> nn.Module:
        """A fresh network."""

    def prepare(self, seed: int) -> ClassTrial:
        return ClassTrial(self, seed)

    def objective(self, method: str) -> Objective:
        """The loss of a method. Class sizes are not given: ``FitStatistics`` counts them in the training data."""
        from reweigh.losses import BalancedSoftmax, CrossEntropy, FocalLoss, Objective
        from reweigh.weighting import EffectiveNumber, InverseFrequency, Piecewise

        own = self.options(method)
        if method in ("inverse", "sqrt_inverse"):
            return Objective(CrossEntropy(), InverseFrequency(power=own.get("power", 1.0)), own["reduction"])
        if method == "cb":
            return Objective(CrossEntropy(), EffectiveNumber(beta=own["beta"]), own["reduction"])
        if method == "balanced_softmax":
            return Objective(CrossEntropy(logits=BalancedSoftmax()))
        if method == "focal":
            return FocalLoss(own["gamma"])
        if method == "cb_focal":
            return FocalLoss(own["gamma"], alpha=EffectiveNumber(beta=own["beta"]))
        if method == "drw":
            beta = Piecewise([0.0, own["beta"]], [round(own["defer"] * own["steps"])], by="step")
            return Objective(CrossEntropy(), EffectiveNumber(beta=beta), own["reduction"])
        return Objective(CrossEntropy())


class ClassTrial(Trial):
    """One seed of a :class:`ClassSuite`."""

    def __init__(self, suite: ClassSuite, seed: int) -> None:
        import torch

        self.suite, self.seed = suite, seed
        data = suite.data(seed)
        self.data, self.parts, self.by_size = data, data.parts, data.by_size
        self.classes = len(data.by_size)
        self.third = max(1, self.classes // 3)
        self.counts = torch.bincount(behind(self.parts["train"])[0], minlength=self.classes)
        self.data_hash = hashed(self.parts)
        self._baseline: nn.Module | None = None

    def run(self, method: str) -> Outcome:
        from reweigh.losses import posthoc_logit_adjustment

        if method == "posthoc_la":
            # where the baseline's training was finished in an earlier call of the program, it is repeated
            baseline = self._train("ce")[0] if self._baseline is None else self._baseline
            tau, found = self.suite.options(method)["tau"], self._logits(baseline)
            return self._test(
                {part: posthoc_logit_adjustment(logits, self.counts, tau=tau) for part, logits in found.items()}
            )
        net, step_ms, weights = self._train(method)
        outcome = self._test(self._logits(net))
        outcome.step_ms = step_ms
        if weights is not None and weights["step"]:
            outcome.details["weights"] = weights
        return outcome

    def _train(self, method: str) -> tuple[nn.Module, float | None, dict[str, Any] | None]:
        from reweigh.lightning_callbacks import FitStatistics, WeightingCallback, WeightingMonitor

        from .training import reproducible, train, weight_curves

        options, objective = self.suite.options(method), self.suite.objective(method)
        data = self.parts["train"]
        callbacks: list[Any] = [WeightingCallback(), FitStatistics()]
        monitor = None
        if self.seed % MONITORED == 0:
            # weights this uneven are meant here, so no warning
            monitor = WeightingMonitor(every_n_steps=max(1, options["steps"] // 20), warn_below=0.0)
            callbacks.append(monitor)
        with reproducible(self.seed):
            net = self.suite.network(self.data, options)
            order = None if isinstance(data, tuple) else data.order(options["batch_size"], self.seed)
            step_ms = train(net, objective, data, options, seed=self.seed, callbacks=callbacks, order=order)
        net.eval()
        if method == "ce":
            self._baseline = net
        if monitor is None:
            return net, step_ms, None
        third = self.third
        groups = {"head": self.by_size[:third], "middle": self.by_size[third:-third], "tail": self.by_size[-third:]}
        return net, None, weight_curves(monitor, {name: some for name, some in groups.items() if some})

    def _logits(self, net: nn.Module) -> dict[str, Tensor]:
        """Of the test data, and of the validation data where there are any."""
        import torch

        from .training import reproducible

        found = {}
        with reproducible(self.seed), torch.no_grad():
            for part in sorted(self.parts.keys() - {"train"}):
                found[part] = answers(net, self.parts[part], self.suite.training, 4096)
        return found

    def _test(self, found: Mapping[str, Tensor]) -> Outcome:
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_calibration_error,
            multiclass_f1_score,
            multiclass_stat_scores,
        )

        classes, third = self.classes, self.third
        logits, target = found["test"], behind(self.parts["test"])[0]
        right, *_, support = multiclass_stat_scores(logits, target, classes, average="none").double().unbind(-1)
        recall = (right / support)[self.by_size]  # from counts: equal recalls stay equal, for the rank test
        sizes = self.counts[self.by_size]
        metrics = {
            "worst_recall": recall.min(),
            "tail_recall": recall[-third:].mean(),
            "head_recall": recall[:third].mean(),
            "balanced_accuracy": recall.mean(),
            "macro_f1": multiclass_f1_score(logits, target, classes, average="macro"),
            "natural_accuracy": (recall * sizes).sum() / sizes.sum(),
            "accuracy": multiclass_accuracy(logits, target, classes, average="micro"),
            "ece": multiclass_calibration_error(logits.softmax(-1), target, classes, n_bins=15),
        }
        if "val" in found:
            truth = behind(self.parts["val"])[0]
            metrics["val_balanced_accuracy"] = multiclass_accuracy(found["val"], truth, classes, average="macro")
        return Outcome(
            {name: float(value) for name, value in metrics.items()},
            details={
                "class_counts": sizes.tolist(),
                "class_recall": recall.tolist(),
                "class_names": [self.data.names[label] for label in self.by_size],
                "reliability": reliability(logits.softmax(-1), target),
            },
        )


def exponential(largest: int, imbalance: float, classes: int) -> list[int]:
    """Samples per class, most common first, from ``largest`` down to ``largest / imbalance``."""
    return [round(largest * imbalance ** (-rank / (classes - 1))) for rank in range(classes)]


def long_tail(
    target: Sequence[int] | np.ndarray[Any, Any], sizes: Sequence[int], held_out: Mapping[str, int], seed: int
) -> tuple[dict[str, np.ndarray[Any, Any]], list[int]]:
    """Disjoint indices of ``train``, ``val`` and ``test``, and the classes from common to rare, in random order.

    ``held_out`` samples of each class go to the other parts, and as many as ``sizes`` says to ``train``.
    """
    target = np.asarray(target)
    rng = np.random.default_rng(seed)
    by_size = rng.permutation(len(sizes))
    parts: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "val": [], "test": []}
    for size, label in zip(sizes, by_size, strict=True):
        mine = rng.permutation(np.flatnonzero(target == label))
        start = 0
        for part, count in (*held_out.items(), ("train", size)):
            parts[part].append(mine[start : start + count])
            start += count
    return {part: np.concatenate(indices) for part, indices in parts.items()}, by_size.tolist()


def reliability(probabilities: Tensor, target: Tensor, bins: int = 15) -> list[tuple[int, float, float]]:
    """Number of samples, mean confidence and share of right answers in each bin of confidence that has any."""
    confidence, answer = probabilities.double().max(-1)
    right, place = (answer == target).double(), (confidence * bins).long().clamp(max=bins - 1)
    found = []
    for number in range(bins):
        mine = place == number
        if mine.any():
            found.append((int(mine.sum()), float(confidence[mine].mean()), float(right[mine].mean())))
    return found


def behind(part: Part) -> tuple[Tensor, ...]:
    """What stands behind the inputs: the target, and what else there is."""
    return part[1:] if isinstance(part, tuple) else part.behind


def answers(net: nn.Module, part: Part, options: Mapping[str, Any], size: int) -> Tensor:
    """What a network says of a part, so many samples of it at a time; gradients are the caller's affair."""
    import torch

    if not isinstance(part, tuple):
        from .vision import outputs

        return outputs(net, part, options)
    inputs = part[0]
    return torch.cat([net(inputs[start : start + size]) for start in range(0, len(inputs), size)])


def hashed(parts: Mapping[str, Sequence[Tensor] | ImageSet], more: bytes = b"") -> str:
    """SHA-256 of all tensors (and names of files), part by part, and of ``more``."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        if not isinstance(part, Sequence):
            digest.update(part.digest())
            continue
        for tensor in part:
            array: np.ndarray[Any, Any] = tensor.contiguous().numpy()
            digest.update(array.tobytes())
    digest.update(more)
    return digest.hexdigest()


class FromRoot(Suite):
    """A suite on the user's own data. Inherit from it before the family."""

    from_root = True
    slow = True
    needs: str
    """What has to lie under ``--data-root``."""
    folders: Sequence[str] = ()
    """Where the data may lie in the user's folder; where none of these is there, they lie in it."""
    modules: Mapping[str, str] = {}
    """Modules that reading needs, and the packages that have them."""

    @abstractmethod
    def read(self) -> Any:
        """What the parts are made of.

        Raises:
            DataError: Data that are missing, or cannot be used.
        """

    @property
    def home(self) -> Path:
        """The folder of the data."""
        if self.data_root is None:
            raise DataError(f"{self.name} needs --data-root with {self.needs}")
        inner = (self.data_root / name for name in self.folders)
        return next((folder for folder in inner if folder.is_dir()), self.data_root)

    def unavailable(self) -> str | None:
        if self.data_root is None:
            return f"needs --data-root with {self.needs}"
        for module, package in self.modules.items():
            if find_spec(module) is None:
                return f"needs {package}: pip install {package}"
        try:
            self.read()
        except DataError as error:
            return str(error)
        return None
