"""What a suite is: a data set, a fixed protocol, the methods that compete, and what was promised of them."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


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
    """A promise about the paired difference to the baseline, or to the method that ``versus`` names.

    ``at_least``: the mean is better by at least this much (a positive number, also where lower is
    better), and its 95 % t interval excludes 0. ``within``: the mean is at most
    this share of the baseline's mean, in either direction: no harm, and no gain.
    """

    method: str
    metric: str
    at_least: float | None = None
    within: float | None = None
    versus: str | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.within is None):
            raise ValueError("Gate: give one of at_least and within")
        if (self.at_least or self.within or 0.0) <= 0.0:
            raise ValueError(f"Gate: the bound must be > 0, whichever direction is better, got {self}")


@dataclass(frozen=True)
class Published:
    """A figure of a paper, shown beside ours as theirs: other code, other hardware, often other settings."""

    method: str
    """As the paper calls it."""
    metric: str
    """As the paper calls it."""
    figure: str
    source: str
    """Paper and table, or the authors' code."""


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
    slow: bool = False
    """Whether ``run all --quick`` leaves it out."""
    default: Sequence[str] = ()
    """Names of the methods that are run if nothing else is said; none: all."""
    metrics: Sequence[Metric]
    """The first is the primary one: gates aside, tests are made on it only."""
    gates: Sequence[Gate] = ()
    published: Sequence[Published] = ()
    """Figures of papers on the same data."""
    seeds: int = 10
    from_root: bool = False
    """Whether the data are the user's, under ``data_root``."""
    known: bool = True
    """Whether the program has it by name; otherwise its words are kept with its results."""

    training: Mapping[str, Any]
    """What all methods share, in JSON types."""
    own: Mapping[str, Mapping[str, Any]] = {}
    """What a method has of its own, by method; where it names something of ``training``, it replaces that."""
    grid: Mapping[str, Mapping[str, Sequence[Any]]] = {}
    """What the settings were chosen among, by method: names and values, all combinations of which ``tune`` tries."""
    chosen_by: str
    """The metric, on validation data, by which that is done."""

    def __init__(self, data_root: Path | None = None) -> None:
        self.data_root = data_root

    def unavailable(self) -> str | None:
        """Why the suite cannot run here, in one line; ``None`` where it can."""
        return None

    @abstractmethod
    def protocol(self) -> Mapping[str, Any]:
        """What the data of a seed depend on, in JSON types."""

    @abstractmethod
    def prepare(self, seed: int) -> Trial:
        """The split of one seed."""

    def options(self, method: str) -> dict[str, Any]:
        """All settings of a method."""
        return {**self.training, **self.own.get(method, {})}

    def settings(self, method: str) -> Mapping[str, Any]:
        """Everything that decides a method's result except the seed, in JSON types."""
        own = self.own.get(method, {})
        return {"method": method, "data": dict(self.protocol()), "training": dict(self.training), **own}

    def with_own(self, method: str, own: Mapping[str, Any]) -> Self:
        """This suite with other settings of one method."""
        other = copy.copy(self)
        other.own = {**self.own, method: {**self.own.get(method, {}), **own}}
        return other

    def description(self) -> dict[str, Any]:
        """What a report needs of the suite, in JSON types; :class:`Recorded` reads it."""
        return {
            **{name: getattr(self, name) for name in ("name", "version", "title", "summary", "story", "seeds")},
            "notes": list(self.notes),
            "methods": [asdict(method) for method in self.methods],
            "metrics": [asdict(metric) for metric in self.metrics],
            "gates": [asdict(gate) for gate in self.gates],
            "published": [asdict(figure) for figure in self.published],
            "settings": {method.name: dict(self.settings(method.name)) for method in self.methods},
        }

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


class Recorded(Suite):
    """A suite of which only its description is there: enough for a report, not for a run."""

    known = False

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.name, self.version = str(description["name"]), int(description["version"])
        self.title, self.summary, self.story = (str(description[name]) for name in ("title", "summary", "story"))
        self.notes, self.seeds = tuple(description["notes"]), int(description["seeds"])
        self.methods = tuple(Method(**method) for method in description["methods"])
        self.metrics = tuple(Metric(**metric) for metric in description["metrics"])
        self.gates = tuple(Gate(**gate) for gate in description["gates"])
        self.published = tuple(Published(**figure) for figure in description["published"])
        self.quick = tuple(method.name for method in self.methods)
        self._settings: Mapping[str, Mapping[str, Any]] = description["settings"]

    def protocol(self) -> Mapping[str, Any]:
        return {}

    def settings(self, method: str) -> Mapping[str, Any]:
        return self._settings[method]

    def prepare(self, seed: int) -> Trial:
        raise NotImplementedError(f"{self.name} is known from its results alone, so it cannot be run")
