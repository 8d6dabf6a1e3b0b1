"""Long-tailed digits with wrong labels: 40 % of the training labels are replaced by another class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only

    pass

CLASSES = 10
HELD_OUT = {"test": 45, "val": 15}
"""Samples per class."""
LARGEST, IMBALANCE = 110, 10
"""Mild on purpose: in the smallest class 7 of 11 labels stay right, while some 19 wrong ones come from other classes."""
NOISE = 0.4

TRAINING: dict[str, Any] = {"steps": 600, "batch_size": 64, "hidden": [128, 64], "look_every": 20}
DEFAULT = {"lr": 3e-3, "weight_decay": 0.1}
TUNED: dict[str, dict[str, Any]] = {}
FIXED: dict[str, dict[str, Any]] = {}


def class_sizes() -> list[int]:
    """Training samples per true class, most frequent first: exponential from 110 to 11."""
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


def corrupted(target: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Labels of which 40 % of each class, chosen at random, are another class, each other one as likely."""
    given = target.copy()
    for label in np.unique(target):
        mine = rng.permutation(np.flatnonzero(target == label))[: round(NOISE * int((target == label).sum()))]
        given[mine] = (label + rng.integers(1, CLASSES, len(mine))) % CLASSES
    return given
