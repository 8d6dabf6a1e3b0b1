"""Long-tailed digits: real handwritten digits, made imbalanced by leaving training samples out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate, Metric
from .classes import (
    BALANCED,
    ECE,
    MACRO_F1,
    METHODS,
    NATURAL,
    VAL,
    WORST,
    ClassData,
    ClassSuite,
    ends,
    exponential,
    long_tail,
)

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

CLASSES = 10
HELD_OUT = {"test": 45, "val": 15}
"""Samples per class."""
LARGEST, IMBALANCE = 110, 50

# lr, weight decay and batch size: the best of 4 x 2 x 3 by the *validation* balanced accuracy of plain cross-entropy
# over 5 seeds; all methods use what suits the baseline. Class-weighted means divide by the sum of the weights, as
# torch.nn.CrossEntropyLoss(weight=...) does; validation preferred that to dividing by the number of samples.
TRAINING: dict[str, Any] = {"steps": 600, "batch_size": 64, "lr": 3e-3, "weight_decay": 0.1, "hidden": [128, 64]}
GRID: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "ce": {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "weight_decay": (0.01, 0.1), "batch_size": (32, 64, 128)}
}


def class_sizes() -> list[int]:
    """Training samples per class, most frequent first: exponential from 110 to 2."""
    return exponential(LARGEST, IMBALANCE, CLASSES)


def split(target: Sequence[int] | np.ndarray[Any, Any], seed: int) -> tuple[dict[str, np.ndarray[Any, Any]], list[int]]:
    """Disjoint indices of ``train``, ``val`` and ``test``, and the classes from frequent to rare."""
    return long_tail(target, class_sizes(), HELD_OUT, seed)


@final
class DigitsLT50(ClassSuite):
    """Section "imbalanced classes" of the default suite."""

    name = "digits_lt50"
    version = 2
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
    methods = tuple(
        METHODS[name] for name in ("ce", "posthoc_la", "inverse", "cb", "balanced_softmax", "focal", "cb_focal", "drw")
    )
    quick = ("ce", "posthoc_la", "balanced_softmax")
    default = ("ce", "posthoc_la", "inverse", "cb", "balanced_softmax", "focal")
    metrics = (
        WORST,
        *ends("3"),
        BALANCED,
        MACRO_F1,
        NATURAL,
        Metric(
            "accuracy", "accuracy", "Share of test samples recognised; here equal to balanced accuracy.", shown=False
        ),
        ECE,
        VAL,
    )
    gates = (
        Gate("posthoc_la", "worst_recall", 0.15),
        Gate("balanced_softmax", "worst_recall", 0.15),
        Gate("cb", "worst_recall", 0.08),  # both had +.16 on seeds 0 to 9, and +.10 and +.11 on ten others
        Gate("inverse", "worst_recall", 0.08),
    )
    training: Mapping[str, Any] = TRAINING
    grid = GRID

    def protocol(self) -> Mapping[str, Any]:
        return {"held_out": HELD_OUT, "class_sizes": class_sizes()}

    def data(self, seed: int) -> ClassData:
        import torch
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, target = (digits.data / 16.0).astype(np.float32), digits.target.astype(np.int64)
        indices, by_size = split(target, seed)
        parts = {part: (torch.from_numpy(images[at]), torch.from_numpy(target[at])) for part, at in indices.items()}
        return ClassData(parts, by_size, [str(label) for label in range(CLASSES)])

    def network(self, data: ClassData, options: Mapping[str, Any]) -> nn.Module:
        from torch import nn

        first, second = options["hidden"]
        return nn.Sequential(
            nn.Linear(64, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, CLASSES)
        )
