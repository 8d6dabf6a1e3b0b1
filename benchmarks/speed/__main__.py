"""Time and memory of forward and backward, interleaved in one process: ``python -m reweigh.benchmarks.speed``."""

from __future__ import annotations

import gc
import os
import random
import statistics
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from .cases import Case, Loss, cases
from .clock import record, seconds
from .memory import held_at_most


def once(loss: Loss, case: Case) -> None:
    """One forward and backward."""
    logits = case.logits.detach().requires_grad_()
    loss(logits, case.target).backward()  # type: ignore[no-untyped-call]


def least_seconds(loss: Loss, case: Case, calls: int) -> float:
    """Thread CPU time of one call: the least of a few blocks of calls."""
    return min(seconds(lambda: once(loss, case), calls) for _ in range(3))


def peak_bytes(loss: Loss, case: Case) -> int:
    """Most memory held at once during a call."""
    return held_at_most(lambda: once(loss, case))


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Ratios to the floor, the first loss, over shuffled rounds."""
    calls = max(1, int(2e5 / case.logits.numel()))
    for loss in case.losses.values():
        once(loss, case)
        once(loss, case)
    times: dict[str, list[float]] = {name: [] for name in case.losses}
    gc.disable()
    try:
        for _ in range(rounds):
            for name in random.sample(list(case.losses), len(case.losses)):
                times[name].append(least_seconds(case.losses[name], case, calls))
    finally:
        gc.enable()
    floor = times[next(iter(case.losses))]
    rows = []
    for name, loss in case.losses.items():
        ratios = [a / b for a, b in zip(times[name], floor, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
        rows.append(
            {
                "case": case.name,
                "loss": name,
                "microseconds": 1e6 * min(times[name]),
                "ratio": middle,
                "quartiles": [low, high],
                "ratio_of_minima": min(times[name]) / min(floor),
                "peak_over_logits": peak_bytes(loss, case) / (case.logits.numel() * case.logits.element_size()),
            }
        )
    return rows


def main() -> None:
    """Measure everything, print a table, write JSON where asked."""
    parser = ArgumentParser(prog="python -m reweigh.benchmarks.speed", description="What the objectives cost.")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per case")
    parser.add_argument("--out", type=str, help="file for the numbers, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for case in cases() for row in measure(case, options.rounds)]
    table = Table(title="Forward and backward against the floor (one thread, CPU time)", title_justify="left")
    for heading in ("case", "loss", "µs", "ratio [quartiles]", "of minima", "peak / logits"):
        table.add_column(heading, justify="left" if heading in ("case", "loss") else "right")
    for row in rows:
        low, high = row["quartiles"]
        table.add_row(
            row["case"],
            row["loss"],
            f"{row['microseconds']:.0f}",
            f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]",
            f"{row['ratio_of_minima']:.2f}",
            f"{row['peak_over_logits']:.2f}",
        )
    Console().print(table)
    if options.out:
        record(options.out, rows, allocator="tuned" if os.environ.get("GLIBC_TUNABLES") else "default")


if __name__ == "__main__":
    main()
