"""Put a run's numbers on record: ``python -m reweigh.benchmarks.publish DIR``.

Writes ``benchmarks/results/<suite>.json`` of the source tree (settings, seeds, data hash, versions, every metric of
every method; not the single runs) and the tables between the ``results`` marks of all pages. A test keeps files and
pages equal.

Marks: ``<!-- results: overview -->``, ``<!-- results: differences SUITE -->``, ``<!-- results: values SUITE -->``; each
ends with ``<!-- results: end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .suites import SUITES, Metric, Suite
from .summary import signed, value

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(
    r"(<!-- results: (overview|differences|values)(?: (\w+))? -->\n).*?(<!-- results: end -->)", re.DOTALL
)
DASH = "\N{EN DASH}"


def record(folder: Path) -> list[Path]:
    """Write the committed files of a folder's full results; ``ValueError`` where a suite was not run in full."""
    results = folder / "results.json"
    if not results.is_file():
        raise ValueError(f"{folder} must be a folder of `reweigh.benchmarks run`, found no results.json there")
    found = json.loads(results.read_text(encoding="utf-8"))
    environment = found["sessions"][-1]["environment"]
    kept = {"python": environment["python"], "versions": environment["versions"], "machine": environment["machine"]}
    written = []
    for suite in found["suites"]:
        kind = SUITES.get(suite["suite"])
        if kind is None or kind.from_root:
            continue  # numbers on somebody's own data are not ours to show
        if len(suite["seeds"]) < kind.seeds or len(suite["summary"]) < len(kind.methods):
            raise ValueError(f"{folder} does not hold a full run of {kind.name}: run it with --full")
        command = f"python -m reweigh.benchmarks run {kind.name} --full"
        skipped = ("runs", "data_hash_by_seed", "remarks")
        body = {key: value for key, value in suite.items() if key not in skipped}
        path = RESULTS / f"{kind.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({"command": command, "environment": kept, **body}, indent=1) + "\n", encoding="utf-8"
        )
        written.append(path)
    return written


def pages() -> Iterator[Path]:
    """Every page that shows results."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if MARK.search(path.read_text(encoding="utf-8")):
            yield path


def filled(text: str) -> str:
    """A page's text with what the committed files say between its marks."""

    def block(match: re.Match[str]) -> str:
        kind, name = match[2], match[3]
        body = overview() if kind == "overview" else differences(name) if kind == "differences" else values(name)
        return f"{match[1]}{body}{match[4]}"

    return MARK.sub(block, text)


def committed(name: str) -> dict[str, Any]:
    """The committed results of a suite."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def overview() -> str:
    """One line per suite: its baseline, the method with the largest claimed gain, and what that costs."""
    lines = [
        "| data set | what counts | plain | best of our claims | difference, [95 % interval] | clearly worse |",
        "|---|---|---:|---|---|---|",
    ]
    for name, kind in SUITES.items():
        if not (RESULTS / f"{name}.json").exists():
            continue
        found, suite = committed(name), kind()
        base, *others = found["summary"]
        primary = suite.primary
        sign = 1.0 if primary.higher_is_better else -1.0
        claimed = [row for row in others if row["claim"]]
        best = max(claimed, key=lambda row: sign * row["versus_baseline"][primary.name]["mean"], default=None)
        cells = [
            suite.title,
            primary.label + ("" if primary.higher_is_better else " (lower is better)"),
            value(primary, base["mean"][primary.name]),
        ]
        if best is None:
            cells += [DASH] * 3
        else:
            cells += [suite.method(best["method"]).label, _difference(primary, best), _price(suite, best)]
        lines.append(f"| {' | '.join(cells)} |")
    primaries = [kind().primary for name, kind in SUITES.items() if (RESULTS / f"{name}.json").exists()]
    lines += ["", legend(primaries, "our claims: methods of which a suite promises something that `check` tests")]
    return "\n".join(lines) + "\n"


def legend(metrics: Sequence[Metric], *more: str) -> str:
    """What columns and marks mean, for a reader who has never seen them."""
    said = {metric.label: metric.meaning[0].lower() + metric.meaning[1:].rstrip(".") for metric in metrics}
    return "; ".join([*(f"*{label}*: {meaning}" for label, meaning in said.items()), *more]) + "."


def differences(name: str) -> str:
    """A table of a suite's differences to its baseline, in Markdown."""
    suite, found, base, others, metrics = _parts(name)
    lines = [
        f"{suite.title} ({suite.summary}), {len(found['seeds'])} paired repetitions: difference to "
        f"{suite.baseline.label} in points, [95 % interval], number of repetitions in which it is better. Losers and "
        f"costs stand in the same table. Made by `{found['command']}`.",
        "",
        f"| | {' | '.join(_heading(metric) for metric in metrics)} |",
        "|---" * (len(metrics) + 1) + "|",
        f"| {suite.baseline.label} | "
        + " | ".join(value(metric, base["mean"][metric.name]) for metric in metrics)
        + " |",
    ]
    for row in others:
        cells = []
        for metric in metrics:
            versus = row["versus_baseline"][metric.name]
            if metric is suite.primary:
                cells.append(f"{_difference(metric, row)} {versus['wins']}/{versus['n']}")
            else:
                cells.append(signed(metric, versus["mean"]))
        lines.append(f"| {_label(suite, row)} | {' | '.join(cells)} |")
    lines += ["", legend(metrics, *_claims(others))]
    return "\n".join(lines) + "\n"


def values(name: str) -> str:
    """A table of a suite's means, and of the primary metric's differences, in Markdown."""
    suite, found, base, others, metrics = _parts(name)
    unit = "points" if suite.primary.share else "its own unit"
    lines = [
        f"{suite.title} ({suite.summary}), means of {len(found['seeds'])} paired repetitions, and the difference in "
        f"{suite.primary.label} to {suite.baseline.label} in {unit}, [95 % interval]. Made by `{found['command']}`.",
        "",
        f"| | {' | '.join(_heading(metric) for metric in metrics)} | difference | time per step |",
        "|---" * (len(metrics) + 3) + "|",
    ]
    for row in [base, *others]:
        cells = [value(metric, row["mean"][metric.name]) for metric in metrics]
        time = row["relative_step_time"]
        cells.append(_difference(suite.primary, row) if row["versus_baseline"] else DASH)
        cells.append(DASH if time is None else f"\N{MULTIPLICATION SIGN}{time:.1f}")
        lines.append(f"| {_label(suite, row)} | {' | '.join(cells)} |")
    lines += ["", legend(metrics, *_claims(others))]
    return "\n".join(lines) + "\n"


def _parts(name: str) -> tuple[Suite, dict[str, Any], dict[str, Any], list[dict[str, Any]], list[Metric]]:
    """A suite, its results, its baseline's row, the others' (best first), and the metrics that are shown."""
    suite, found = SUITES[name](), committed(name)
    base, *others = found["summary"]
    sign = -1.0 if suite.primary.higher_is_better else 1.0
    others.sort(key=lambda row: sign * row["versus_baseline"][found["primary"]]["mean"])
    return suite, found, base, others, [metric for metric in suite.metrics if metric.shown]


def _claims(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [] if all(row["claim"] for row in rows) else ["(no claim): nothing is promised of it"]


def _heading(metric: Metric) -> str:
    return metric.label + ("" if metric.higher_is_better else " (lower is better)")


def _label(suite: Suite, row: dict[str, Any]) -> str:
    method = suite.method(row["method"])
    return method.label + ("" if method.claim else " (no claim)")


def _difference(metric: Metric, row: dict[str, Any]) -> str:
    versus = row["versus_baseline"][metric.name]
    return (
        f"**{signed(metric, versus['mean'])}** [{signed(metric, versus['t_low'])}, {signed(metric, versus['t_high'])}]"
    )


def _price(suite: Suite, row: dict[str, Any]) -> str:
    worse = []
    for metric in suite.metrics:
        versus = row["versus_baseline"][metric.name]
        clear = versus["t_high"] < 0 if metric.higher_is_better else versus["t_low"] > 0
        if metric.shown and clear:
            worse.append(f"{metric.label} {signed(metric, versus['mean'])}")
    return ", ".join(worse) or "nothing"


def main(folder: str | None) -> None:
    """Record a folder (or nothing new) and rewrite the tables of all pages."""
    for path in [] if folder is None else record(Path(folder)):
        print(f"wrote {path.relative_to(ROOT)}")
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit("usage: python -m reweigh.benchmarks.publish [DIR]")
    try:
        main(sys.argv[1] if len(sys.argv) == 2 else None)
    except ValueError as error:
        sys.exit(f"error: {error}")
