"""Several digits on top of each other: which ones are there, where some are rare in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate, Metric, Suite
from .multilabel import ECE, MACRO_F1, MAP, METHODS, OWN, VAL, LabelData, LabelTrial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

    from reweigh.losses import Objective

CLASSES, SIDE, MOST = 10, 14, 3
"""Labels, pixels of a side, digits in an image."""
IMBALANCE = 50
"""How many times likelier the most common digit is to be drawn in training than the rarest."""
DIGITS = {"train": 1000, "val": 300, "test": 497}
"""Scans that the images of each part are made of; no scan is in two parts."""
IMAGES = {"train": 3000, "val": 800, "test": 2000}

TRAINING: dict[str, Any] = {"steps": 300, "batch_size": 64, "lr": 1e-2, "weight_decay": 0.01, "channels": [16, 32]}
RATES = (3e-3, 1e-2, 3e-2)
GRID: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "bce": {"lr": RATES, "weight_decay": (0.01, 0.1)},
    "adjusted": {"lr": RATES, "tau": (0.5, 1.0)},
    "asl": {"lr": RATES, "gamma_neg": (2.0, 4.0)},
    "focal": {"lr": RATES, "gamma": (1.0, 2.0)},
    "pos_weight": {"lr": RATES, "power": (0.5, 1.0)},
}


def overlays(
    images: np.ndarray[Any, Any], digit: np.ndarray[Any, Any], seed: int
) -> tuple[dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], list[int]]:
    """Images (in [0, 1]) and labels (0 or 1) of each part, and the digits from common to rare.

    One to three different digits, drawn by their frequency (evenly for the test), each at a random place; where they
    overlap, the darker pixel wins.
    """
    rng = np.random.default_rng(seed)
    by_size = rng.permutation(CLASSES)
    frequency = np.empty(CLASSES)
    frequency[by_size] = float(IMBALANCE) ** (-np.arange(CLASSES) / (CLASSES - 1))
    order, start, found = rng.permutation(len(images)), 0, {}
    for part, size in DIGITS.items():
        mine = order[start : start + size]
        start += size
        scans = [mine[digit[mine] == label] for label in range(CLASSES)]
        chance = np.full(CLASSES, 1 / CLASSES) if part == "test" else frequency / frequency.sum()
        canvas = np.zeros((IMAGES[part], SIDE, SIDE), np.float32)
        labels = np.zeros((IMAGES[part], CLASSES), np.float32)
        for row in range(IMAGES[part]):
            for label in rng.choice(CLASSES, rng.integers(1, MOST + 1), replace=False, p=chance):
                top, left = rng.integers(0, SIDE - 7, 2)
                spot = canvas[row, top : top + 8, left : left + 8]
                np.maximum(spot, images[rng.choice(scans[label])], out=spot)
                labels[row, label] = 1.0
        found[part] = canvas[:, None] / 16, labels
    return found, by_size.tolist()


@final
class DigitsOverlayML(Suite):
    """Section "multi-label" of the default suite."""

    name = "digits_overlay_ml"
    version = 1
    title = "Which digits are there"
    summary = "multi-label, 1 to 3 of 10 digits in an image, some 50 times rarer than others in training"
    story = (
        "Each image shows one, two or three handwritten digits, partly on top of each other; a small network has to "
        "say which. In training some digits are up to 50 times rarer than others, and of the ten labels of an image "
        "eight are absent on average; in the test each digit is as likely. Plain training (a yes or no "
        "for each label) learns to say no. In every repetition all methods get the same images, the same initial "
        "network and the same order of batches; which digits are rare changes from one repetition to the next."
    )
    notes = (
        "Data: composites of real digits (1797 scans of 8 x 8 pixels, shipped with scikit-learn) at random places of a "
        "14 x 14 image; no scan is in two of the training, validation and test parts. Validation images are drawn as "
        "the training images are.",
        "mAP does not depend on the threshold between yes and no; macro F1 at 0.5 does. Moving the threshold, "
        "for each label, to where validation data put it costs nothing: that is the row of tuned thresholds, and a "
        "method that wins in F1 at 0.5 alone has to be compared with it.",
        "The asymmetric loss has no gain in mAP here. At a third of this learning rate it has one of about 4 points, "
        "because plain training is then far from done (`tune` prints both): a comparison that had not tuned its "
        "baseline would have found it better.",
        "Learning rate and own setting of every method are the best of six pairs by mAP on validation data, over seeds "
        "that are not among the reported ones; plain training chose its weight decay instead of a setting of its own.",
    )
    methods = METHODS
    quick = ("bce", "thresholds", "asl")
    default = ("bce", "thresholds", "adjusted", "asl")
    metrics = (
        MAP,
        Metric("tail_ap", "tail-3 AP", "Mean average precision of the three labels that are rarest in training."),
        Metric("head_ap", "head-3 AP", "Mean average precision of the three most common labels."),
        MACRO_F1,
        ECE,
        VAL,
    )
    gates = (Gate("adjusted", "macro_f1", 0.08), Gate("asl", "macro_f1", 0.05))
    seeds = 6
    training: Mapping[str, Any] = TRAINING
    own = OWN
    grid = GRID
    chosen_by = "val_map"

    def protocol(self) -> Mapping[str, Any]:
        return {"digits": DIGITS, "images": IMAGES, "side": SIDE, "most": MOST, "imbalance": IMBALANCE}

    def prepare(self, seed: int) -> LabelTrial:
        return LabelTrial(self, seed)

    def data(self, seed: int) -> LabelData:
        """The split of a seed."""
        import torch
        from sklearn.datasets import load_digits

        digits = load_digits()
        found, by_size = overlays(digits.images.astype(np.float32), digits.target, seed)
        parts = {part: (torch.from_numpy(images), torch.from_numpy(labels)) for part, (images, labels) in found.items()}
        return LabelData(parts, by_size, [str(label) for label in range(CLASSES)])

    def network(self, data: LabelData, options: Mapping[str, Any]) -> nn.Module:
        """A fresh network."""
        from torch import nn

        first, second = options["channels"]
        return nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * (SIDE // 4) ** 2, len(data.by_size)),
        )

    def objective(self, method: str, data: LabelData) -> Objective:
        """The loss of a method."""
        from .multilabel import objective

        return objective(method, self.options(method), data)
