"""How a suite's settings were chosen: its whole grid, on validation data, on seeds that no report has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import joblib

from .suites import Suite

FIRST_SEED = 100
"""Reports count their seeds from 0."""


@dataclass(frozen=True)
class Candidate:
    """One combination of settings of one method."""

    method: str
    own: dict[str, Any]
    scores: list[float]
    """Of the suite's ``chosen_by``, seed by seed."""

    @property
    def mean(self) -> float:
        """What is compared."""
        return fmean(self.scores)


def candidates(suite: Suite, method: str) -> list[dict[str, Any]]:
    """All combinations of a method's grid."""
    grid = suite.grid.get(method, {})
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []


def tune(suite: Suite, methods: Sequence[str], *, seeds: int, workers: int | None) -> list[Candidate]:
    """Score every combination of the methods' grids; the best of each method comes first.

    Raises:
        ValueError: If a method has no grid.
    """
    asked = []
    for method in methods:
        found = candidates(suite, method)
        if not found:
            raise ValueError(f"{suite.name} has no grid for {method!r}; its settings are the usual ones")
        asked += [(method, own) for own in found]
    tasks = [(method, own, seed) for seed in range(FIRST_SEED, FIRST_SEED + seeds) for method, own in asked]
    jobs = min(workers or joblib.cpu_count(), len(tasks))
    scores = joblib.Parallel(n_jobs=jobs, batch_size=1)(
        joblib.delayed(_score)(suite, method, own, seed) for method, own, seed in tasks
    )
    rows = [
        Candidate(method, own, [scores[turn * len(asked) + place] for turn in range(seeds)])
        for place, (method, own) in enumerate(asked)
    ]
    sign = -1.0 if suite.metric(suite.chosen_by).higher_is_better else 1.0
    order = {method: place for place, method in enumerate(methods)}
    return sorted(rows, key=lambda row: (order[row.method], sign * row.mean))


def differs(suite: Suite, best: Candidate) -> bool:
    """Whether the suite's own settings are not the best ones."""
    options = suite.options(best.method)
    return any(options.get(name) != value for name, value in best.own.items())


def _score(suite: Suite, method: str, own: dict[str, Any], seed: int) -> float:
    return suite.with_own(method, own).prepare(seed).run(method).metrics[suite.chosen_by]
