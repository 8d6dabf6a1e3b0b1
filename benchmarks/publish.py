"""Put a run's numbers on record: ``python -m reweigh.benchmarks.publish DIR``.

Writes ``benchmarks/results/<suite>.json`` of the source tree (settings, seeds, data hash, versions, every metric of
every method; not the single runs) and the tables between the ``results`` marks of the pages that show it. A test keeps
files and pages equal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .suites import SUITES
from .summary import value

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
EXAMPLES = ROOT / "docs" / "examples"
PAGES = {
    "digits_lt50": ROOT / "README.md",
    "digits_two_tasks": EXAMPLES / "multitask.md",
    "digits_spurious": EXAMPLES / "robust_groups.md",
    "digits_lt_noisy": EXAMPLES / "noisy_labels.md",
}
"""Where each suite's table stands."""
SHOWN = ("worst_recall", "tail_recall", "head_recall", "balanced_accuracy", "macro_f1", "ece")


def record(folder: Path) -> list[Path]:
    """Write the committed files of a folder's full results; ``ValueError`` where a suite was not run in full."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    environment = found["sessions"][-1]["environment"]
    kept = {"python": environment["python"], "versions": environment["versions"], "machine": environment["machine"]}
    written = []
    for suite in found["suites"]:
        kind = SUITES[suite["suite"]]
        if len(suite["seeds"]) < kind.seeds or len(suite["summary"]) < len(kind.methods):
            raise ValueError(f"{folder} does not hold a full run of {kind.name}: run it without --quick and --methods")
        command = f"python -m reweigh.benchmarks run {kind.name}"
        skipped = ("runs", "data_hash_by_seed", "remarks")
        body = {key: value for key, value in suite.items() if key not in skipped}
        path = RESULTS / f"{kind.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({"command": command, "environment": kept, **body}, indent=1) + "\n", encoding="utf-8"
        )
        written.append(path)
    return written


def table(name: str) -> str:
    """The README's table of a suite, in Markdown, from the committed file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    suite = SUITES[name]()
    labels = {method.name: method for method in suite.methods}
    metrics = [metric for metric in suite.metrics if metric.name in SHOWN]
    base, *others = found["summary"]
    others.sort(key=lambda row: -row["versus_baseline"][found["primary"]]["mean"])
    headings = [metric.label + ("" if metric.higher_is_better else " (lower is better)") for metric in metrics]
    lines = [
        f"{suite.title} ({suite.summary}), {len(found['seeds'])} paired repetitions: difference to "
        f"{labels[base['method']].label} in points, [95 % interval], better in so many repetitions. Losers and "
        f"costs stand in the same table. Made by `{found['command']}`, the command behind `make demo`.",
        "",
        f"| | {' | '.join(headings)} |",
        "|---" * (len(metrics) + 1) + "|",
        f"| {labels[base['method']].label} | "
        + " | ".join(f"{100 * base['mean'][metric.name]:.1f} %" for metric in metrics)
        + " |",
    ]
    for row in others:
        cells = []
        for metric in metrics:
            versus = row["versus_baseline"][metric.name]
            cell = _signed(versus["mean"])
            if metric.name == found["primary"]:
                low, high = _signed(versus["t_low"]), _signed(versus["t_high"])
                cell = f"**{cell}** [{low}, {high}] {versus['wins']}/{versus['n']}"
            cells.append(cell)
        claim = "" if row["claim"] else " (no claim)"
        lines.append(f"| {labels[row['method']].label}{claim} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def values(name: str) -> str:
    """A table of a suite's means, and of the primary metric's differences, in Markdown, from the committed file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    suite = SUITES[name]()
    labels = {method.name: method for method in suite.methods}
    metrics = [metric for metric in suite.metrics if metric.shown]
    base, *others = found["summary"]
    others.sort(key=lambda row: -row["versus_baseline"][found["primary"]]["mean"])
    headings = [metric.label + ("" if metric.higher_is_better else " (lower is better)") for metric in metrics]
    lines = [
        f"{suite.title} ({suite.summary}), means of {len(found['seeds'])} paired repetitions, and the difference in "
        f"{suite.primary.label} to {labels[base['method']].label} in points, [95 % interval]. Made by "
        f"`{found['command']}`.",
        "",
        f"| | {' | '.join(headings)} | difference | time per step |",
        "|---" * (len(metrics) + 3) + "|",
    ]
    for row in [base, *others]:
        cells = [value(metric, row["mean"][metric.name]) for metric in metrics]
        cells = [cell.replace("-", "\N{MINUS SIGN}") for cell in cells]
        versus = row.get("versus_baseline") or {}
        difference = "\N{EN DASH}"
        if found["primary"] in versus:
            one = versus[found["primary"]]
            difference = f"**{_signed(one['mean'])}** [{_signed(one['t_low'])}, {_signed(one['t_high'])}]"
        claim = "" if labels[row["method"]].claim else " (no claim)"
        time = row["relative_step_time"]
        cells += [difference, "\N{EN DASH}" if time is None else f"\N{MULTIPLICATION SIGN}{time:.1f}"]
        lines.append(f"| {labels[row['method']].label}{claim} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def block(name: str) -> str:
    """What stands between the marks of a suite's page."""
    return table(name) if name == "digits_lt50" else values(name)


def page_with(block: str, text: str) -> str:
    """A page's text with the block between its marks."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + block + END + rest.split(END)[1]


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def main(folder: str) -> None:
    """Record a folder and rewrite the tables of its suites."""
    for path in record(Path(folder)):
        print(f"wrote {path.relative_to(ROOT)}")
        page = PAGES[path.stem]
        page.write_text(page_with(block(path.stem), page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m reweigh.benchmarks.publish DIR")
    main(sys.argv[1])
