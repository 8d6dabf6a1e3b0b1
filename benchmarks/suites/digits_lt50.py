"""Long-tailed digits: real handwritten digits, made imbalanced by leaving training samples out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate, Method, Metric, Outcome, Suite, Trial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

CLASSES = 10
HELD_OUT = {"test": 45, "val": 15}
"""Samples per class."""
LARGEST, IMBALANCE = 110, 50

# lr, weight decay and batch size: the best of 4 x 2 x 3 by the *validation* balanced accuracy of plain cross-entropy
# over 5 seeds; all methods use what suits the baseline. Class-weighted means divide by the sum of the weights, as
# torch.nn.CrossEntropyLoss(weight=...) does; validation preferred that to dividing by the number of samples.
TRAINING: dict[str, Any] = {"steps": 600, "batch_size": 64, "lr": 3e-3, "weight_decay": 0.1, "hidden": [128, 64]}
BETA = 0.999
GAMMA = 2.0
MONITORED = 3
"""Every so many seeds the weights are recorded, and the time of a step is not, because recording takes time."""
DEFER = 0.8
"""Share of training before deferred re-weighting sets in."""


def class_sizes() -> list[int]:
    """Training samples per class, most frequent first: exponential from 110 to 2."""
    return [round(LARGEST * IMBALANCE ** (-rank / (CLASSES - 1))) for rank in range(CLASSES)]


def split(target: Sequence[int] | np.ndarray[Any, Any], seed: int) -> tuple[dict[str, np.ndarray[Any, Any]], list[int]]:
    """Disjoint indices of ``train``, ``val`` and ``test``, and the classes from frequent to rare."""
    target = np.asarray(target)
    rng = np.random.default_rng(seed)
    by_size = rng.permutation(CLASSES)
    parts: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "val": [], "test": []}
    for size, label in zip(class_sizes(), by_size, strict=True):
        mine = rng.permutation(np.flatnonzero(target == label))
        start = 0
        for part, count in (*HELD_OUT.items(), ("train", size)):
            parts[part].append(mine[start : start + count])
            start += count
    return {part: np.concatenate(indices) for part, indices in parts.items()}, by_size.tolist()


@final
class DigitsLT50(Suite):
    """Section "imbalanced classes" of the default suite."""

    name = "digits_lt50"
    version = 1
    title = "Long-tailed digits"
    summary = "image classification, 10 classes, training samples per class from 110 down to 2"
    story = (
        "A small network learns to read handwritten digits, but it sees 110 examples of the most common digit and only "
        "2 of the rarest. It is then tested on 45 unseen examples of every digit. Plain training (cross-entropy) "
        "neglects the rare digits; each method below changes only the loss. In every repetition all methods get the "
        "same examples, the same initial network and the same order of training batches, so differences between "
        "them are compared pair by pair; which digits are rare changes from one repetition to the next."
    )
    notes = (
        "Data: 1797 scans of 8 x 8 pixels, shipped with scikit-learn. They are real; the imbalance is made by leaving "
        "training samples out.",
        "The test set has as many samples of every class, so plain accuracy equals balanced accuracy here. Accuracy at "
        "training frequencies is what you would measure if rare classes stayed as rare as in training.",
        "Learning rate, weight decay and batch size were chosen once, on validation data, for plain cross-entropy, and "
        "are the same for all methods. The other settings are the usual ones; that class-weighted means divide by the "
        "sum of the weights was chosen on validation data, too.",
        "Post-hoc logit adjustment corrects the finished cross-entropy model and needs no training: a method that "
        "does not beat it has no case on this data.",
        "Balanced softmax and logit adjustment act on the logits, not on weights, and so have no weight curve.",
        "Nothing is claimed of focal loss: it is made for dense detection, and is shown because it is often tried on "
        "imbalanced classes.",
    )
    methods = (
        Method("ce", "cross-entropy (CE)", "Plain training: every sample counts the same."),
        Method(
            "posthoc_la",
            "post-hoc logit adjustment",
            "Takes the finished CE model and subtracts the log class frequencies from its logits.",
            trained=False,
        ),
        Method("inverse", "inverse frequency", "Each sample counts in inverse proportion to the size of its class."),
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
            "focal (gamma 2)",
            "Samples that the model already gets right count less; no class sizes.",
            claim=False,
        ),
        Method("cb_focal", "class-balanced focal", "Class-balanced weights times the focal factor."),
        Method("drw", "deferred re-weighting", "Plain CE, then class-balanced weights in the last 20 % of training."),
    )
    quick = ("ce", "posthoc_la", "inverse", "balanced_softmax", "focal")
    metrics = (
        Metric(
            "worst_recall",
            "worst recall",
            "Of the class that the model knows worst: the share of its samples it gets right.",
        ),
        Metric("tail3_recall", "tail-3 recall", "Mean recall of the three rarest classes."),
        Metric("head3_recall", "head-3 recall", "Mean recall of the three most common classes: what the gain costs."),
        Metric("balanced_accuracy", "balanced acc.", "Mean recall over all ten classes."),
        Metric("macro_f1", "macro F1", "Mean over classes of the harmonic mean of precision and recall."),
        Metric("natural_accuracy", "acc. at train freq.", "Accuracy if classes are as frequent as in training."),
        Metric(
            "accuracy", "accuracy", "Share of test samples recognised; here equal to balanced accuracy.", shown=False
        ),
        Metric("ece", "ECE", "Calibration error: how far confidence is from accuracy.", higher_is_better=False),
    )
    gates = (
        Gate("posthoc_la", "worst_recall", 0.15),
        Gate("balanced_softmax", "worst_recall", 0.15),
        Gate("cb", "worst_recall", 0.10),
        Gate("inverse", "worst_recall", 0.10),
    )
    training: Mapping[str, Any] = TRAINING

    def settings(self, method: str) -> Mapping[str, Any]:
        own: dict[str, dict[str, Any]] = {
            "posthoc_la": {"tau": 1.0},
            "inverse": {"reduction": "weighted_mean"},
            "cb": {"beta": BETA, "reduction": "weighted_mean"},
            "focal": {"gamma": GAMMA},
            "cb_focal": {"beta": BETA, "gamma": GAMMA},
            "drw": {"beta": BETA, "defer": DEFER, "reduction": "weighted_mean"},
        }
        data = {"held_out": HELD_OUT, "class_sizes": class_sizes()}
        return {"method": method, "data": data, "training": dict(self.training), **own.get(method, {})}

    def prepare(self, seed: int) -> Trial:
        return _DigitsTrial(self, seed)

    def objective(self, method: str) -> Objective:
        """The loss of a method. Class sizes are not given: ``FitStatistics`` counts them in the training data."""
        from reweigh.losses import BalancedSoftmax, CrossEntropy, FocalLoss, Objective
        from reweigh.weighting import EffectiveNumber, InverseFrequency, Piecewise

        if method == "inverse":
            return Objective(CrossEntropy(), InverseFrequency(), "weighted_mean")
        if method == "cb":
            return Objective(CrossEntropy(), EffectiveNumber(beta=BETA), "weighted_mean")
        if method == "balanced_softmax":
            return Objective(CrossEntropy(logits=BalancedSoftmax()))
        if method == "focal":
            return FocalLoss(GAMMA)
        if method == "cb_focal":
            return FocalLoss(GAMMA, alpha=EffectiveNumber(beta=BETA))
        if method == "drw":
            start = round(DEFER * self.training["steps"])
            beta = Piecewise([0.0, BETA], [start], by="step")
            return Objective(CrossEntropy(), EffectiveNumber(beta=beta), "weighted_mean")
        return Objective(CrossEntropy())


class _DigitsTrial(Trial):
    def __init__(self, suite: DigitsLT50, seed: int) -> None:
        import torch
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, target = (digits.data / 16.0).astype(np.float32), digits.target.astype(np.int64)
        self.suite, self.seed = suite, seed
        indices, self.by_size = split(target, seed)
        digest = hashlib.sha256()
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for part in sorted(indices):
            arrays = images[indices[part]], target[indices[part]]
            for array in arrays:
                digest.update(array.tobytes())
            self.parts[part] = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
        self.data_hash = digest.hexdigest()
        self.counts = torch.bincount(self.parts["train"][1], minlength=CLASSES)
        self._baseline: nn.Module | None = None

    def run(self, method: str) -> Outcome:
        from reweigh.losses import posthoc_logit_adjustment

        if method == "posthoc_la":
            # where the baseline's training was finished in an earlier call of the program, it is repeated
            baseline = self._train("ce")[0] if self._baseline is None else self._baseline
            return self._test(posthoc_logit_adjustment(self._logits(baseline), self.counts))
        net, step_ms, weights = self._train(method)
        outcome = self._test(self._logits(net))
        outcome.step_ms = step_ms
        if weights is not None and weights["step"]:
            outcome.details["weights"] = weights
        return outcome

    def _train(self, method: str) -> tuple[nn.Module, float | None, dict[str, Any] | None]:
        from torch import nn

        from reweigh.lightning_callbacks import FitStatistics, WeightingCallback, WeightingMonitor

        from .training import reproducible, train, weight_curves

        options = dict(self.suite.training)
        first, second = options.pop("hidden")
        objective = self.suite.objective(method)
        callbacks: list[Any] = [WeightingCallback(), FitStatistics()]
        monitor = None
        if self.seed % MONITORED == 0:
            # weights this uneven are meant here, so no warning
            monitor = WeightingMonitor(every_n_steps=max(1, options["steps"] // 20), warn_below=0.0)
            callbacks.append(monitor)
        with reproducible(self.seed):
            net = nn.Sequential(
                nn.Linear(64, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, CLASSES)
            )
            step_ms = train(net, objective, self.parts["train"], seed=self.seed, callbacks=callbacks, **options)
        net.eval()
        if method == "ce":
            self._baseline = net
        if monitor is None:
            return net, step_ms, None
        groups = {"head": self.by_size[:3], "middle": self.by_size[3:-3], "tail": self.by_size[-3:]}
        return net, None, weight_curves(monitor, groups)

    def _logits(self, net: nn.Module) -> Tensor:
        import torch

        from .training import reproducible

        with reproducible(self.seed), torch.no_grad():
            logits: Tensor = net(self.parts["test"][0])
        return logits

    def _test(self, logits: Tensor) -> Outcome:
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_calibration_error,
            multiclass_f1_score,
            multiclass_stat_scores,
        )

        target = self.parts["test"][1]
        right, *_, support = multiclass_stat_scores(logits, target, CLASSES, average="none").double().unbind(-1)
        recall = (right / support)[self.by_size]  # from counts: equal recalls stay equal, for the rank test
        sizes = self.counts[self.by_size]
        metrics = {
            "worst_recall": recall.min(),
            "tail3_recall": recall[-3:].mean(),
            "head3_recall": recall[:3].mean(),
            "balanced_accuracy": recall.mean(),
            "macro_f1": multiclass_f1_score(logits, target, CLASSES, average="macro"),
            "natural_accuracy": (recall * sizes).sum() / sizes.sum(),
            "accuracy": multiclass_accuracy(logits, target, CLASSES, average="micro"),
            "ece": multiclass_calibration_error(logits.softmax(-1), target, CLASSES, n_bins=15),
        }
        return Outcome(
            {name: float(value) for name, value in metrics.items()},
            details={
                "class_counts": sizes.tolist(),
                "class_recall": recall.tolist(),
                "class_names": [str(label) for label in self.by_size],
            },
        )
