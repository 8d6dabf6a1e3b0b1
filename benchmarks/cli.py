"""The command line: ``list``, ``run SUITE...``, ``report DIR``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .progress import Progress
from .report import report
from .runner import run
from .store import StoreError
from .suites import SUITES, Suite
from .summary import value
from .tune import FIRST_SEED, differs, tune

QUICK_SEEDS = 3


class UsageError(ValueError):
    """A call that names something that does not exist or makes no sense."""


def parser() -> ArgumentParser:
    """The argument parser."""
    top = ArgumentParser(prog="python -m reweigh.benchmarks", description="Compare losses fairly, on real data.")
    commands = top.add_subcommands(dest="command")
    commands.add_subcommand("list", ArgumentParser(), help="what can be run")

    train = ArgumentParser(description="Train and compare. Stopped runs continue with the same command.")
    train.add_argument("suites", nargs="+", metavar="SUITE", help="names from `list`, or `all`")
    train.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SEEDS} seeds, fewer methods, no tests and no gates"
    )
    train.add_argument("--seeds", type=int, help="number of repetitions; the default is the suite's own, usually 10")
    train.add_argument("--methods", type=str, metavar="A,B", help="only these; the baseline is always added")
    train.add_argument("--workers", type=int, help="processes; the default is the number of cores")
    train.add_argument("--out", type=str, default="runs/benchmarks", metavar="DIR", help="folder of results")
    train.add_argument("--data-root", type=str, metavar="DIR", help="your own data sets, for suites that need them")
    train.add_argument("--strict", action="store_true", help="exit with status 1 if a gate fails")
    commands.add_subcommand("run", train, help="train what is missing, then report")

    again = ArgumentParser(description="Rebuild table, results.json and report.html from runs.jsonl alone.")
    again.add_argument("folder", type=str, metavar="DIR", help="folder of results")
    commands.add_subcommand("report", again, help="rebuild the report of a folder")

    choose = ArgumentParser(description="Try every combination of a suite's grid on validation data, seeds 100 and on.")
    choose.add_argument("suite", type=str, metavar="SUITE", help="a name from `list`")
    choose.add_argument("--methods", type=str, metavar="A,B", help="only these; the default is all that have a grid")
    choose.add_argument("--seeds", type=int, default=6, help="number of repetitions")
    choose.add_argument("--workers", type=int, help="processes; the default is the number of cores")
    commands.add_subcommand("tune", choose, help="how a suite's settings were chosen, again")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 2 for a wrong call, 1 for a failed gate with ``--strict``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a log has no width of its own
    try:
        if options.command == "list":
            return _list(console)
        if options.command == "report":
            report(Path(options.report.folder), console)
            return 0
        if options.command == "tune":
            return _tune(options.tune, console)
        return _run(options.run, f"python -m reweigh.benchmarks {shlex.join(arguments)}", console)
    except (UsageError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept, and the same command continues", file=sys.stderr)
        return 130


def _list(console: Console) -> int:
    for name, kind in SUITES.items():
        suite = kind()
        console.print(f"{name}: {suite.summary}", markup=False, highlight=False, soft_wrap=True)
        for method in suite.methods:
            mark = "  (baseline)" if method is suite.baseline else ""
            console.print(f"  {method.name:18}{method.what}{mark}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _tune(options: Namespace, console: Console) -> int:
    suite = SUITES[_known("suite", options.suite, list(SUITES))]()
    with_grid = [method.name for method in suite.methods if method.name in suite.grid]
    if not with_grid:
        raise UsageError(f"{suite.name} has no grid")
    asked = [name.strip() for name in (options.methods or "").split(",") if name.strip()] or with_grid
    names = [_known("method with a grid", name, with_grid) for name in asked]
    for name, number in (("--seeds", options.seeds), ("--workers", options.workers)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be >= 1, got {number}")
    rows = tune(suite, names, seeds=options.seeds, workers=options.workers)
    metric = suite.metric(suite.chosen_by)
    table = Table(
        title=f"{suite.title}: {metric.label}, mean over {options.seeds} seeds from {FIRST_SEED}", box=SIMPLE_HEAD
    )
    for heading in ("method", "settings", metric.label):
        table.add_column(heading, justify="right" if heading == metric.label else "left")
    for row in rows:
        settings = ", ".join(f"{name} {setting}" for name, setting in row.own.items())
        table.add_row(row.method, settings, value(metric, row.mean))
    console.print(table)
    for name in names:
        best = next(row for row in rows if row.method == name)
        said = "the suite has others" if differs(suite, best) else "as in the suite"
        console.print(f"{name}: best {best.own}, {said}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _run(options: Namespace, command: str, console: Console) -> int:
    root = None if options.data_root is None else Path(options.data_root)
    if root is not None and not root.is_dir():
        raise UsageError(f"--data-root must name an existing folder, got {str(root)!r}")
    for name, number in (("--seeds", options.seeds), ("--workers", options.workers)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be >= 1, got {number}")
    names = list(SUITES) if "all" in options.suites else list(dict.fromkeys(options.suites))
    suites = [SUITES[_known("suite", name, list(SUITES))](root) for name in names]
    grid = [(suite, *_size(suite, options)) for suite in suites]
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out must name a folder, got the file {str(folder)!r}")
    run(grid, folder, workers=options.workers, command=command, progress=Progress(console))
    summaries = report(folder, console)
    failed = [gate for summary in summaries for gate in summary.gates if gate.passed is False]
    return 1 if failed and options.strict else 0


def _size(suite: Suite, options: Namespace) -> tuple[int, list[str]]:
    seeds = options.seeds or (QUICK_SEEDS if options.quick else suite.seeds)
    known = [method.name for method in suite.methods]
    if options.methods is None:
        return seeds, list(suite.quick) if options.quick else known
    asked = [name.strip() for name in options.methods.split(",") if name.strip()]
    if not asked:
        raise UsageError(f"--methods must name at least one method; {suite.name} has {', '.join(known)}")
    chosen = [_known("method", name, known) for name in asked]
    return seeds, list(dict.fromkeys([suite.baseline.name, *chosen]))


def _known(kind: str, name: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}"
    raise UsageError(f"unknown {kind} {name!r}; {hint}")
