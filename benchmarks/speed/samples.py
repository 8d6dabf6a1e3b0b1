"""What a table of all training samples costs: ``python -m reweigh.benchmarks.speed.samples``.

The table alone: a batch noted, copies of a sample brought together, the table read and written at as many random
places. An update is that and everything else that an optimizer step asks of :class:`~reweigh.weighting.AdaWAC`. Time is
CPU time of one thread, in rounds that go through all tables in a new order; nothing is asserted.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from reweigh.weighting import AdaWAC, LossTerms
from reweigh.weighting.sample import note

from .clock import record, seconds

SIZES = [10**5, 10**6, 10**7]
BATCH = 1024
OUT = Path(__file__).parent / "results" / "samples.json"
MEASURED = ("table", "update", "weigh")


def steppers(subject: AdaWAC, size: int, batch: int) -> dict[str, Callable[[], Any]]:
    """What is measured, each over and over on batches of random samples, as an epoch brings them."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        LossTerms(torch.rand(batch, 2, generator=generator), index=torch.randint(size, (batch,), generator=generator))
        for _ in range(64)
    ]
    number = 0

    def following() -> LossTerms:
        nonlocal number
        number += 1
        return batches[number % len(batches)]

    def table() -> None:
        with torch.no_grad():
            terms = following()
            found = subject.logit.seen(note(subject, terms, terms.loss[:, 0]))
            subject.logit.write(found.samples, found.before + found.means.float())

    def update() -> None:
        with torch.no_grad():
            subject.observe(following())
            subject.update("step")

    def weigh() -> None:
        with torch.no_grad():
            subject.weigh(following())

    return dict(zip(MEASURED, (table, update, weigh), strict=True))


def checkpoint_bytes(subject: AdaWAC) -> int:
    """Size of a checkpoint of the weighting alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        torch.save(subject.state_dict(), path)
        return path.stat().st_size


def measure(sizes: list[int], batch: int, rounds: int, calls: int, folder: str | None) -> list[dict[str, Any]]:
    """A row per number of samples and place where the table is kept."""
    places = [None] if folder is None else [None, folder]
    made = {(size, place): AdaWAC(size, storage=place) for size in sizes for place in places}
    steps = {key: steppers(subject, key[0], batch) for key, subject in made.items()}
    times: dict[tuple[int, str | None], dict[str, list[float]]] = {key: {n: [] for n in MEASURED} for key in steps}
    for own in steps.values():
        for step in own.values():
            seconds(step, 64)
    gc.disable()
    try:
        for _ in range(rounds):
            for key in random.sample(list(steps), len(steps)):
                for name, step in steps[key].items():
                    times[key][name].append(1e6 * seconds(step, calls))
    finally:
        gc.enable()
    return [
        {
            "samples": size,
            "storage": "memory" if place is None else "file",
            "batch": batch,
            **{f"{name}_minimum_us": min(found) for name, found in own.items()},
            **{f"{name}_median_us": statistics.median(found) for name, found in own.items()},
            "checkpoint_bytes": checkpoint_bytes(made[size, place]),
        }
        for (size, place), own in times.items()
    ]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = ArgumentParser(prog="python -m reweigh.benchmarks.speed.samples", description=__doc__)
    parser.add_argument("--sizes", type=list[int], default=SIZES, help="numbers of samples")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples per step")
    parser.add_argument("--rounds", type=int, default=25, help="rounds over all tables")
    parser.add_argument("--calls", type=int, default=50, help="steps per round")
    parser.add_argument("--storage", type=str, metavar="DIR", help="measure tables mapped to files there as well")
    parser.add_argument("--out", type=str, default=str(OUT), help="file for the numbers, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.sizes, options.batch, options.rounds, options.calls, options.storage)
    table = Table(
        title=f"A table of samples, batch {options.batch}: CPU time of one thread in µs, least (median)",
        title_justify="left",
    )
    for heading in ("samples", "kept in", "table", "update", "weights", "checkpoint"):
        table.add_column(heading, justify="left" if heading == "kept in" else "right")
    for row in rows:
        table.add_row(
            f"{row['samples']:,}",
            row["storage"],
            *(f"{row[f'{name}_minimum_us']:.0f} ({row[f'{name}_median_us']:.0f})" for name in MEASURED),
            f"{row['checkpoint_bytes'] / 2**20:.1f} MiB",
        )
    Console().print(table)
    record(options.out, rows)


if __name__ == "__main__":
    main()
