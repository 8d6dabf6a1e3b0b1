"""What a suite is: a data set, a fixed protocol, the methods that compete, and what was promised of them."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A number measured on the test split."""

    name: str
    label: str
    """Column heading."""
    meaning: str
    """One sentence for a reader who has never seen it."""
    higher_is_better: bool = True
    share: bool = True
    """Between 0 and 1; shown in percent."""
    shown: bool = True
    """False: in ``results.json`` only."""


@dataclass(frozen=True)
class Method:
    """One competitor."""

    name: str
    label: str
    what: str
    """One sentence for a reader who has never seen it."""
    claim: bool = True
    """False: shown, but nothing is claimed of it."""
    trained: bool = True
    """False: derived from the baseline's model, without a training of its own."""


@dataclass(frozen=True)
class Gate:
    """A promise: the mean paired difference is at least this good, and its 95 % t interval excludes 0."""

    method: str
    metric: str
    at_least: float


@dataclass
class Outcome:
    """What one method achieved on one seed."""

    metrics: dict[str, float]
    step_ms: float | None = None
    """Median wall time of a training step; ``None`` without a training, or where it was not measured."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the figures need, in JSON types. ``class_counts`` and ``class_recall`` (same order, most frequent class
    first) and ``weights`` (see :func:`reweigh.benchmarks.suites.training.weight_curves`) are drawn where present."""


class Trial(ABC):
    """One seed: the split, the initial weights and the batch order that all methods share."""

    data_hash: str
    """SHA-256 of all arrays of the split."""

    @abstractmethod
    def run(self, method: str) -> Outcome:
        """Train (where needed) and test one method. The same call gives the same metrics, bit by bit."""


class Suite(ABC):
    """A benchmark. Hyper-parameters are constants of the class, chosen on validation splits only."""

    name: str
    version: int
    """Goes up when results stop being comparable with older ones."""
    title: str
    summary: str
    """One line for ``list``."""
    story: str
    """What is compared, on what, and how, in words for a newcomer; shown at the head of the report."""
    notes: Sequence[str] = ()
    """What a careful reader has to know; shown below the tables."""
    methods: Sequence[Method]
    """The first is the baseline."""
    quick: Sequence[str]
    """Names of the methods of ``--quick``."""
    metrics: Sequence[Metric]
    """The first is the primary one: gates aside, tests are made on it only."""
    gates: Sequence[Gate] = ()
    seeds: int = 10

    def __init__(self, data_root: Path | None = None) -> None:
        self.data_root = data_root

    @abstractmethod
    def settings(self, method: str) -> Mapping[str, Any]:
        """Everything that decides a method's result except the seed, in JSON types."""

    @abstractmethod
    def prepare(self, seed: int) -> Trial:
        """The split of one seed."""

    @property
    def baseline(self) -> Method:
        """What the others are compared with."""
        return self.methods[0]

    @property
    def primary(self) -> Metric:
        """The metric that is tested."""
        return self.metrics[0]

    def method(self, name: str) -> Method:
        """The method of that name."""
        return next(method for method in self.methods if method.name == name)

    def metric(self, name: str) -> Metric:
        """The metric of that name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def fingerprint(self, method: str) -> str:
        """Changes when a result of this method stops being comparable with earlier ones."""
        text = json.dumps([self.name, self.version, self.settings(method)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
