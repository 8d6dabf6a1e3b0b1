"""What task weightings cost beside the model: ``python -m reweigh.benchmarks.speed.tasks``.

One step of a weighting is what a training loop asks of it between two forwards: the losses observed (those of
training, of validation, or after the step, as it declares), the event sent, the weights asked for. Time is CPU time of
one thread, in rounds that go through all weightings in a new order; nothing is asserted.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from reweigh import weighting
from reweigh.weighting import LossTerms, TaskWeighting
from reweigh.weighting.conformance import task_terms

from .clock import record, seconds

TASKS = (2, 8, 64)
OUT = Path(__file__).parent / "results" / "tasks.json"
HISTORY = 400
"""Steps before the first measured one: every window is full then."""


def terms_for(subject: TaskWeighting, seed: int) -> LossTerms:
    """Losses of all tasks in float64, with the statistics that a weighting names and no others."""
    made = task_terms(seed, subject.num_tasks)
    extras = {name: value for name, value in (made.extras or {}).items() if name in subject.needs}
    return made._replace(extras=extras or None)


def built(name: str, num_tasks: int) -> TaskWeighting | None:
    """The method with its defaults, or ``None`` where it has arguments without any, or no state that moves by step."""
    try:
        made = weighting.create(name, num_tasks=num_tasks)
    except TypeError:
        return None
    return made if isinstance(made, TaskWeighting) and made.update_on in ("step", "validation") else None


def stepper(subject: TaskWeighting) -> Callable[[], Tensor]:
    """One step, over and over on the same few batches."""
    batches = [terms_for(subject, seed) for seed in range(8)]
    number = 0

    def step() -> Tensor:
        nonlocal number
        terms = batches[number % len(batches)]
        number += 1
        with torch.no_grad():
            if subject.update_on == "validation":
                subject.observe_validation(terms)
                subject.update("validation")
            else:
                subject.observe(terms)
                if "after" in subject.feeds:
                    subject.observe_after(terms)
                subject.update("step")
            return subject.weigh(terms)

    return step


def host_reads(step: Callable[[], Tensor]) -> int:
    """How often a step waits for a number on the host."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return sum(event.count for event in found.key_averages() if event.key == "aten::_local_scalar_dense")


def measure(names: list[str], rounds: int, calls: int) -> list[dict[str, Any]]:
    """A row per weighting and number of tasks."""
    steps = {(name, size): stepper(made) for name in names for size in TASKS if (made := built(name, size))}
    for step in steps.values():
        for _ in range(HISTORY):
            step()
    reads = {key: host_reads(step) for key, step in steps.items()}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    gc.disable()
    try:
        for _ in range(rounds):
            for key in random.sample(list(steps), len(steps)):
                times[key].append(seconds(steps[key], calls))
    finally:
        gc.enable()
    return [
        {
            "weighting": name,
            "tasks": size,
            "minimum_us": 1e6 * min(found),
            "median_us": 1e6 * statistics.median(found),
            "host_reads": reads[name, size],
        }
        for (name, size), found in times.items()
    ]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = ArgumentParser(prog="python -m reweigh.benchmarks.speed.tasks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="rounds over all weightings")
    parser.add_argument("--calls", type=int, default=20, help="steps per round")
    parser.add_argument("--only", type=list[str], help="names of weightings; default: every registered one")
    parser.add_argument("--out", type=str, default=str(OUT), help="file for the numbers, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only or [
        name for name in weighting.available() if weighting.registry.record(name).acts_on == "task"
    ]
    rows = measure(names, options.rounds, options.calls)
    table = Table(
        title="One step of a task weighting: CPU time of one thread in µs, least (median)", title_justify="left"
    )
    for heading in ("weighting", *(f"{size} tasks" for size in TASKS), f"{TASKS[-1]} / {TASKS[0]}", "host reads"):
        table.add_column(heading, justify="left" if heading == "weighting" else "right")
    for name in dict.fromkeys(row["weighting"] for row in rows):
        own = {row["tasks"]: row for row in rows if row["weighting"] == name}
        table.add_row(
            name,
            *(f"{own[size]['minimum_us']:.1f} ({own[size]['median_us']:.1f})" for size in TASKS),
            f"{own[TASKS[-1]]['minimum_us'] / own[TASKS[0]]['minimum_us']:.2f}",
            str(max(row["host_reads"] for row in own.values())),
        )
    Console().print(table)
    record(options.out, rows)


if __name__ == "__main__":
    main()
