"""What the committed benchmark results say of a registered method.

A row of a suite is a method of its own (``cb_focal``, ``pdl_half``), so which registered classes take part in it is
read from the objective that the suite itself builds for it.
"""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from reweigh.benchmarks.publish import RESULTS, committed
from reweigh.benchmarks.speed.methods import OUT as METHODS
from reweigh.benchmarks.suites import SUITES
from reweigh.benchmarks.suites.base import Suite
from reweigh.benchmarks.summary import signed
from reweigh.losses import Objective
from reweigh.losses.criteria.joint import Joint

from .records import entries, logit_transforms


@dataclass(frozen=True)
class Row:
    """One row of a suite's committed table."""

    suite: str
    title: str
    label: str
    what: str
    claim: bool
    metric: str
    difference: str
    """Of the primary metric, to the baseline, with its interval, in Markdown."""
    baseline: str
    wins: str
    relative_time: float | None


@dataclass(frozen=True)
class Cost:
    """What a training call takes with a method and without, at one size of the batch."""

    kind: str
    method: str
    samples: int
    microseconds: float
    plain: str | None
    """The criterion beside it; ``None`` where no plain one takes such inputs."""
    plain_microseconds: float | None


@cache
def _costs() -> tuple[Cost, ...]:
    return tuple(Cost(**row) for row in json.loads(METHODS.read_text(encoding="utf-8"))["rows"])


def costs(kind: str, name: str) -> list[Cost]:
    """A method's rows; ``LookupError`` where there is none."""
    found = [row for row in _costs() if (row.kind, row.method) == (kind, name)]
    if not found:
        raise LookupError(f"{kind}/{name}: no measured cost; run python -m reweigh.benchmarks.speed.methods")
    return found


def _labels() -> Any:
    """Data of a multi-label suite, as far as its objectives look at them."""
    return SimpleNamespace(parts={"train": (torch.eye(10), torch.eye(10))})


STAND_INS: dict[str, Callable[[], Any]] = {
    "counts": lambda: torch.arange(1, 1001),
    "group_counts": lambda: torch.tensor([40, 30, 20, 10]),
    "density": lambda: torch.tensor([4.0, 3.0, 2.0, 1.0]),
    "sizes": lambda: [40, 30, 20, 10],
    "positives": lambda: 0.1,
    "data": _labels,
}
"""What stands for the data in ``suite.objective(method, ...)``, by the parameter's name: kinds matter, sizes do not."""


def objective_of(suite: Suite, method: str) -> Objective | None:
    """The objective that a suite trains a method with; ``None`` where it trains none."""
    build = getattr(suite, "objective", None)
    if build is None or not suite.method(method).trained:
        return None
    asked = [name for name in inspect.signature(build).parameters if name != "method"]
    unknown = [name for name in asked if name not in STAND_INS]
    if unknown:
        raise LookupError(f"{suite.name}: say in STAND_INS what stands for {', '.join(unknown)}")
    made = build(method, **{name: STAND_INS[name]() for name in asked})
    return made if isinstance(made, Objective) else None


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """All modules inside, itself included; not the coefficients that ``a + 0.5 * b`` keeps in a weighting."""
    yield module
    sums = isinstance(module, Objective) and isinstance(module.criterion, Joint)
    for name, child in module.named_children():
        if not (sums and name == "weighting"):
            yield from parts(child)


@cache
def rows() -> dict[tuple[str, str], list[Row]]:
    """Rows by (kind, name) of the classes that take part in them, in the order of the suites."""
    by_class = {entry.cls: (entry.kind, entry.name) for entry in entries()}
    by_class |= {cls: ("logits", cls.__name__) for cls in logit_transforms()}
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for name, kind in SUITES.items():
        if not (RESULTS / f"{name}.json").exists():
            continue
        suite, table = kind(), committed(name)
        base, *others = table["summary"]
        plain = repr(objective_of(suite, base["method"]))
        for summary in others:
            objective = objective_of(suite, summary["method"])
            if objective is None or repr(objective) == plain:
                continue  # what differs is not the loss
            row = _row(suite, summary)
            for key in sorted({by_class[type(part)] for part in parts(objective) if type(part) in by_class}):
                found[key].append(row)
    return dict(found)


def _row(suite: Suite, summary: dict[str, Any]) -> Row:
    method, primary = suite.method(summary["method"]), suite.primary
    versus = summary["versus_baseline"][primary.name]
    mean, low, high = (signed(primary, versus[name]) for name in ("mean", "t_low", "t_high"))
    return Row(
        suite=suite.name,
        title=suite.title,
        label=method.label,
        what=method.what,
        claim=method.claim,
        metric=primary.label + ("" if primary.higher_is_better else " (lower is better)"),
        difference=f"**{mean}** [{low}, {high}]",
        baseline=suite.baseline.label,
        wins=f"{versus['wins']}/{versus['n']}",
        relative_time=summary["relative_step_time"],
    )
