"""From a folder of runs to a table on the terminal, ``results.json`` and ``report.html``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .page import page
from .store import RUNS, Contents, Store, StoreError, complaint
from .suites import SUITES, Metric, Recorded, Suite
from .summary import FEWEST_FOR_TEST, Row, Summary, interval, probability, signed, summarize, value

RESULTS, REPORT = "results.json", "report.html"


def read(folder: Path, console: Console) -> tuple[list[Summary], Contents]:
    """The summaries of a folder, in the order of the program's suites, and what it holds.

    Raises:
        StoreError: If the folder holds nothing that can be reported.
    """
    store = Store(folder)
    if not store.path.is_file():
        raise StoreError(
            f"{folder} has no {RUNS}; make one with: python -m reweigh.benchmarks run SUITE --out {folder}"
        )
    contents = store.read()
    if contents.broken:
        _say(console, complaint(store.path, contents))
    suites: dict[str, Suite] = {name: kind() for name, kind in SUITES.items()}
    for session in contents.sessions:
        for name, description in session.get("suites", {}).items():
            suites.setdefault(name, Recorded(description))
    names = {run.suite for run in contents.runs.values()}
    unknown = sorted(names - set(suites))
    if unknown:
        _say(console, f"left out, unknown to this version: {', '.join(unknown)}")
    summaries = [summarize(suite, contents.of(name)) for name, suite in suites.items() if name in names]
    if not summaries:
        raise StoreError(f"{store.path} holds no finished run; start one with: python -m reweigh.benchmarks run SUITE")
    return summaries, contents


def report(folder: Path, console: Console) -> list[Summary]:
    """Write both files from the runs alone, print the tables, and return the summaries.

    Raises:
        StoreError: If the folder holds nothing that can be reported.
    """
    summaries, contents = read(folder, console)
    if len(summaries) > 1:
        overview(summaries, console)
    for summary in summaries:
        show(summary, console)
    _write(folder / RESULTS, json.dumps(results(summaries, contents), indent=1, allow_nan=False) + "\n")
    _write(folder / REPORT, page(summaries, contents.sessions))
    _say(console, f"report: {folder / REPORT}   numbers: {folder / RESULTS}")
    return summaries


def overview(summaries: Sequence[Summary], console: Console) -> None:
    """Print what each suite's methods do to its first column, the best first."""
    table = _table("Overview: first column of each suite, difference to its baseline", "baseline", "difference", "")
    table.columns[0].header = "suite, method"
    for summary in summaries:
        metric = summary.suite.primary
        base = summary.baseline
        table.add_row(
            f"{summary.suite.name}: {metric.label}{'' if metric.higher_is_better else ' (lower is better)'}",
            value(metric, base.means[metric.name]),
            "",
            "",
            style="bold",
        )
        for row in summary.others:
            found = row.versus[metric.name]
            table.add_row(
                f"  {row.method.label}",
                "",
                f"{signed(metric, found.mean)} {interval(metric, found)}",
                verdict(row, metric),
            )
    console.print(table)


def verdict(row: Row, metric: Metric) -> str:
    """Better, worse, or neither, in a word."""
    found = row.versus[metric.name]
    if not found.clear:
        return "no clear difference" if found.t_low is not None else "one repetition"
    return "better" if (found.mean > 0) == metric.higher_is_better else "worse"


def remarks(summary: Summary) -> list[str]:
    """What limits these results, in words."""
    found = []
    n = len(summary.seeds)
    if not summary.full:
        found.append(f"A quick look: {n} of {summary.suite.seeds} repetitions. No gates are evaluated.")
    if n < FEWEST_FOR_TEST:
        found.append(
            f"No significance tests: with fewer than {FEWEST_FOR_TEST} pairs the Wilcoxon test cannot reach .05."
        )
    absent = [
        method.label for method in summary.suite.methods if method.name not in {r.method.name for r in summary.rows}
    ]
    if absent:
        found.append(f"Not run: {', '.join(absent)}.")
    if summary.missing:
        found.append(f"Incomplete: {summary.missing} runs are missing; the command that made it will continue it.")
    if not summary.current:
        found.append("Made with other settings than this version's; gates are not evaluated.")
    return found


def show(summary: Summary, console: Console) -> None:
    """Print the tables of one suite, losers and costs included."""
    suite, primary = summary.suite, summary.suite.primary
    shown = [metric for metric in suite.metrics if metric.shown]
    headings = [metric.label + ("" if metric.higher_is_better else " \N{DOWNWARDS ARROW}") for metric in shown]
    wide = console.width >= 90
    title = (
        f"{suite.title}: mean over {len(summary.seeds)} repetitions, shares in %; time of a step relative to the first"
    )
    means = _table(title, *headings, "step time")
    for row in [summary.baseline, *summary.others]:
        means.add_row(_label(row, wide), *(_bare(metric, row.means[metric.name]) for metric in shown), cost(row))
    console.print(means)

    tests = _table(
        f"{primary.label}: difference to {suite.baseline.label}, paired by repetition, {_unit(primary)}",
        *("mean", "95 % t interval", "95 % bootstrap", "d_z", "better in", "p (Holm)"),
    )
    others = _table(f"other columns: mean difference to {suite.baseline.label}", *headings[1:])
    for row in summary.others:
        label, found = _label(row, wide) + ("" if row.method.claim else " (no claim)"), row.versus[primary.name]
        tests.add_row(
            label,
            signed(primary, found.mean),
            interval(primary, found),
            interval(primary, found, boot=True),
            effect(found.d_z),
            f"{found.wins}/{found.n}",
            probability(row.p_holm),
        )
        cells = (signed(metric, row.versus[metric.name].mean) + _star(row, metric.name) for metric in shown[1:])
        others.add_row(label, *cells)
    console.print(tests)
    console.print(others)
    _say(console, "* = the 95 % t interval of this difference excludes 0; \N{DOWNWARDS ARROW} = lower is better")
    for figure in suite.published:
        _say(console, f"theirs  {figure.method}: {figure.metric} {figure.figure} ({figure.source})")
    for remark in remarks(summary):
        _say(console, remark)
    if summary.full:
        for gate in summary.gates:
            _say(console, f"gate  {gate.text}")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("method", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _label(row: Row, wide: bool) -> str:
    return row.method.label if wide else row.method.name


def _bare(metric: Metric, number: float) -> str:
    return value(metric, number).removesuffix(" %")


def _unit(metric: Metric) -> str:
    return "in points" if metric.share else "in its own unit"


def effect(d_z: float | None) -> str:
    """An effect size."""
    return "\N{EN DASH}" if d_z is None else f"{d_z:.1f}".replace("-", "\N{MINUS SIGN}")


def cost(row: Row) -> str:
    """Time per step relative to the baseline."""
    if not row.method.trained:
        return "none"
    if row.cost is None:
        return "\N{EN DASH}"
    return f"\N{MULTIPLICATION SIGN}{row.cost:.2f}"


def results(summaries: list[Summary], contents: Contents) -> dict[str, Any]:
    """Everything, for machines."""
    return {"schema": 1, "sessions": contents.sessions, "suites": [_result(summary) for summary in summaries]}


def _result(summary: Summary) -> dict[str, Any]:
    suite = summary.suite
    hashes = {run.seed: run.data_hash for row in summary.rows for run in row.runs}
    whole = hashlib.sha256("".join(hashes[seed] for seed in sorted(hashes)).encode()).hexdigest()
    return {
        "suite": suite.name,
        "version": suite.version,
        "baseline": suite.baseline.name,
        "primary": suite.primary.name,
        "seeds": summary.seeds,
        "data_hash": whole,
        "data_hash_by_seed": {str(seed): hashes[seed] for seed in sorted(hashes)},
        "remarks": remarks(summary),
        "summary": [
            {
                "method": row.method.name,
                "n": len(row.runs),
                "settings": suite.settings(row.method.name) if summary.current else None,
                "mean": row.means,
                "versus_baseline": {name: asdict(found) for name, found in row.versus.items()},
                "p_holm": row.p_holm,
                "relative_step_time": row.cost,
                "claim": row.method.claim,
            }
            for row in summary.rows
        ],
        "gates": [{**asdict(gate.gate), "passed": gate.passed, "text": gate.text} for gate in summary.gates],
        "runs": [vars(run) for row in summary.rows for run in row.runs],
    }


def _star(row: Row, metric: str) -> str:
    return "*" if row.versus[metric].clear else " "


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}")  # a reader never sees half a report
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
