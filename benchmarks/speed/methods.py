"""What every registered method adds to a training call: ``python -m reweigh.benchmarks.speed.methods``.

A call is forward, backward and the step's event, as a training loop makes them. It is measured beside the same call of
the plain criterion that the method's terms come from (:data:`reweigh.losses.conformance.CRITERION_FOR`), on the same
inputs: those of the conformance suite, with four classes, in float32. With more classes the criterion costs more and a
weighting of terms does not. Methods are found in the registries. Time is CPU time of one thread, the two calls taking
turns; nothing is asserted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from reweigh import losses, weighting
from reweigh.losses import BinaryCrossEntropy, Objective
from reweigh.losses.conformance import CRITERION_FOR, example_meta, ready
from reweigh.weighting.registry import Method

from .clock import record, seconds

OUT = Path(__file__).parent / "results" / "methods.json"
SAMPLES = (64, 16384)
IN_PAIRS = (64, 512)
"""Samples where every two of them make a term."""


def subject(kind: str, name: str, size: int) -> tuple[Objective, Method]:
    """The objective to measure, with tables for as many samples as a batch brings, and its record."""
    registry: Any = losses.registry if kind == "objective" else weighting.registry
    method: Method = registry.record(name)
    given: Mapping[str, Any] = method.examples[0]
    if "num_samples" in given:
        listed = {key: value * (size // len(value)) for key, value in given.items() if key == "weights"}
        given = {**given, **listed, "num_samples": size}
    made = registry.create(name, **given)
    return ready(made if kind == "objective" else Objective(CRITERION_FOR[method.acts_on](), made)), method


def plain(objective: Objective, acts_on: str) -> Objective | None:
    """The criterion alone that takes the same inputs; ``None`` where no criterion without settings does."""
    wanted = looks(objective)
    for kind in dict.fromkeys((acts_on, *CRITERION_FOR)):
        found = Objective(CRITERION_FOR[kind]())
        if looks(found) == wanted and (kind == acts_on or found.criterion.independent):
            return found
    return None


def looks(objective: Objective) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    """Shapes and types of the inputs."""
    inputs = objective.example_inputs(8)
    return [(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None for value in inputs]


def caller(objective: Objective, size: int, *, bare: bool = False) -> Callable[[], None]:
    """Forward, backward and the step's event, over and over on one batch."""
    torch.manual_seed(0)
    objective.float().train()

    def single(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    first, *rest = (single(value) for value in objective.example_inputs(size))
    if isinstance(objective.criterion, BinaryCrossEntropy):
        rest = [target.round() for target in rest]  # the suite makes soft labels, which are rare in training
    meta = {} if bare else {key: single(value) for key, value in example_meta(objective, len(first)).items()}
    step = 0

    def call() -> None:
        nonlocal step
        leaf = first.detach().requires_grad_()
        objective(leaf, *rest, **meta).sum().backward()
        objective.update("step", index=step)
        step += 1

    return call


def measure(kind: str, name: str, rounds: int) -> list[dict[str, Any]]:
    """A row per size of the batch."""
    rows = []
    acts_on = subject(kind, name, SAMPLES[0])[1].acts_on
    for size in {"pair": IN_PAIRS, "task": SAMPLES[:1]}.get(acts_on, SAMPLES):
        objective = subject(kind, name, size)[0]
        beside = plain(objective, acts_on)
        calls = [caller(objective, size), *([] if beside is None else [caller(beside, size, bare=True)])]
        for call in calls:
            seconds(call, 3)
        times = max(1, min(50, int(0.02 / max(seconds(call, 1) for call in calls))))
        gc.disable()
        try:
            found = [
                min(own) for own in zip(*([seconds(call, times) for call in calls] for _ in range(rounds)), strict=True)
            ]
        finally:
            gc.enable()
        rows.append(
            {
                "kind": kind,
                "method": name,
                "samples": size,
                "microseconds": round(1e6 * found[0], 1),
                "plain": None if beside is None else type(beside.criterion).__name__,
                "plain_microseconds": None if beside is None else round(1e6 * found[1], 1),
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = ArgumentParser(prog="python -m reweigh.benchmarks.speed.methods", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of both calls")
    parser.add_argument("--only", type=list[str], help="names of methods; default: every registered one")
    parser.add_argument("--out", type=str, default=str(OUT), help="file for the numbers, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [("weighting", name) for name in weighting.available()]
    found += [("objective", name) for name in losses.available()]
    wanted = [one for one in found if options.only is None or one[1] in options.only]
    rows = [row for kind, name in track(wanted, "methods") for row in measure(kind, name, options.rounds)]
    table = Table(title="A training call with the method and without, least CPU time", title_justify="left")
    for heading in ("method", "samples", "µs", "beside", "µs ", "ratio"):
        table.add_column(heading, justify="left" if heading in ("method", "beside") else "right")
    for row in rows:
        table.add_row(
            f"{row['kind']} {row['method']}",
            str(row["samples"]),
            f"{row['microseconds']:.0f}",
            *(
                ("", "", "")
                if row["plain"] is None
                else (
                    row["plain"],
                    f"{row['plain_microseconds']:.0f}",
                    f"{row['microseconds'] / row['plain_microseconds']:.2f}",
                )
            ),
        )
    Console().print(table)
    record(options.out, rows)


if __name__ == "__main__":
    main()
