"""The command line: ``list``, ``run``, ``report``, ``check``, ``compare``, ``advise``, ``tune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .advice import advice_from, show_advice
from .own import OwnModel, RunError, line, load
from .progress import Progress
from .readers import DataError
from .recipes import split
from .report import read, report
from .runner import BACKENDS, run
from .store import StoreError
from .suites import SUITES, Suite
from .summary import value
from .tune import FIRST_SEED, differs, tune

QUICK_SEEDS, FULL_SEEDS = 3, 10


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
    train.add_argument("--first-seed", type=int, default=0, metavar="N", help="seeds are counted from here")
    train.add_argument("--full", action="store_true", help="all methods of each suite, at least 10 seeds")
    train.add_argument("--methods", type=str, metavar="A,B", help="only these; the baseline is always added")
    _placement(train)
    train.add_argument("--out", type=str, default="runs/benchmarks", metavar="DIR", help="folder of results")
    train.add_argument("--data-root", type=str, metavar="DIR", help="your own data sets, for suites that need them")
    train.add_argument("--strict", action="store_true", help="exit with status 1 if a gate fails")
    commands.add_subcommand("run", train, help="train what is missing, then report")

    judge = ArgumentParser(description="Check the promises of a folder's suites: status 0 if all hold, 1 if one fails.")
    judge.add_argument("folder", type=str, metavar="DIR", help="folder of results")
    commands.add_subcommand("check", judge, help="check the promises of a folder")

    own = ArgumentParser(description="Your own LightningModule under several objectives, compared like the suites.")
    own.add_argument("target", type=str, metavar="PACKAGE:FUNCTION", help="returns (module_factory, datamodule)")
    own.add_argument("--objectives", type=str, metavar="A,B(x=1)", help="names, the baseline first")
    own.add_argument("--metrics", type=str, metavar="A,-B", help="logged in the test, - where lower is better")
    own.add_argument("--seeds", type=int, default=6, help="number of repetitions")
    own.add_argument("--name", type=str, default="compare", help="what the report calls it")
    own.add_argument("--out", type=str, default="runs/compare", metavar="DIR", help="folder of results")
    for option in ("--max-epochs", "--max-steps"):
        own.add_argument(option, type=int, help="of the Trainer")
    own.add_argument("--accelerator", type=str, help="of the Trainer")
    _placement(own, "1, because they would compete for a device")
    commands.add_subcommand("compare", own, help="your own model under several objectives")

    look = ArgumentParser(description="What the imbalance of your data is, and which objectives are worth trying.")
    look.add_argument("file", type=str, nargs="?", metavar="FILE", help="CSV with a header, or text to count words in")
    look.add_argument("--counts", type=str, metavar="900,50,3", help="class sizes instead of a file")
    look.add_argument("--target", type=str, metavar="COLUMN", help="the column of labels (or of numbers) in a CSV")
    look.add_argument("--group", type=str, metavar="COLUMN", help="the column of groups in a CSV")
    commands.add_subcommand("advise", look, help="the imbalance of your data, and what to try")

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


def _placement(parser: ArgumentParser, usual: str = "the number of cores") -> None:
    parser.add_argument("--workers", type=int, help=f"processes; the default is {usual}")
    parser.add_argument("--backend", type=str, choices=BACKENDS, default="local", help="where they run")
    parser.add_argument("--scheduler", type=str, metavar="ADDRESS", help="of the backend; the default starts one here")


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
        if options.command == "check":
            return _check(Path(options.check.folder), console)
        if options.command == "compare":
            return _compare(options.compare, line(arguments), console)
        if options.command == "advise":
            return _advise(options.advise, console)
        if options.command == "tune":
            return _tune(options.tune, console)
        return _run(options.run, line(arguments), console)
    except ModuleNotFoundError as error:
        if error.name not in ("distributed", "ray"):
            raise
        print(f"error: this backend needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    except (UsageError, StoreError, DataError, RunError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept, and the same command continues", file=sys.stderr)
        return 130


def _list(console: Console) -> int:
    for name, kind in SUITES.items():
        suite = kind()
        console.print(f"{name}: {suite.summary}", markup=False, highlight=False, soft_wrap=True)
        if (why := suite.unavailable()) is not None:
            console.print(f"  not here: {why}", markup=False, highlight=False, soft_wrap=True)
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
    _positive(options)
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


def _check(folder: Path, console: Console) -> int:
    summaries, _ = read(folder, console)
    gates = [gate for summary in summaries for gate in summary.gates]
    for gate in gates:
        console.print(gate.text, markup=False, highlight=False, soft_wrap=True)
    passed, failed = (sum(gate.passed is value for gate in gates) for value in (True, False))
    left = len(gates) - passed - failed
    console.print(f"{passed} promises hold, {failed} fail, {left} could not be checked", markup=False, highlight=False)
    if not passed + failed:
        raise UsageError(f"{folder} holds nothing that can be checked: run the suites with all their seeds first")
    return 1 if failed else 0


def _compare(options: Namespace, command: str, console: Console) -> int:
    _positive(options)
    try:
        arguments = load(options.target)
        trainer = dict(arguments.pop("trainer", {}))
        for name in ("max_epochs", "max_steps", "accelerator"):
            if (given := getattr(options, name)) is not None:
                trainer[name] = given
        if options.objectives:
            arguments["objectives"] = split(options.objectives)
        if options.metrics:
            arguments["metrics"] = [name.strip() for name in options.metrics.split(",") if name.strip()]
        for name in ("objectives", "metrics"):
            if name not in arguments:
                raise UsageError(f"--{name} must be given here or by {options.target}")
        suite = OwnModel(seeds=options.seeds, trainer=trainer, name=options.name, **arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    run(
        [(suite, options.seeds, [method.name for method in suite.methods])],
        Path(options.out),
        workers=options.workers or 1,
        command=command,
        progress=Progress(console),
        backend=options.backend,
        scheduler=options.scheduler,
    )
    report(Path(options.out), console)
    return 0


def _advise(options: Namespace, console: Console) -> int:
    if (options.file is None) == (options.counts is None):
        raise UsageError("advise needs a file or --counts")
    try:
        found = advice_from(options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    show_advice(found, console)
    return 0


def _positive(options: Namespace) -> None:
    for name, number in (("--seeds", options.seeds), ("--workers", options.workers)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be >= 1, got {number}")


def _run(options: Namespace, command: str, console: Console) -> int:
    root = None if options.data_root is None else Path(options.data_root)
    if root is not None and not root.is_dir():
        raise UsageError(f"--data-root must name an existing folder, got {str(root)!r}")
    _positive(options)
    if options.first_seed < 0:
        raise UsageError(f"--first-seed must be >= 0, got {options.first_seed}")
    everything = "all" in options.suites
    names = list(SUITES) if everything else list(dict.fromkeys(options.suites))
    suites = [SUITES[_known("suite", name, list(SUITES))](root) for name in names]
    progress, able = Progress(console), []
    for suite in suites:
        why = suite.unavailable()
        if why is None and everything and options.quick and suite.slow:
            progress.say(f"{suite.name} is left out of a quick look; name it to see it")
        elif why is None:
            able.append(suite)
        elif not everything or not suite.from_root or root is not None:
            progress.say(f"{suite.name} is left out: {why}")
    if not able:
        raise UsageError("there is nothing to run")
    grid = [(suite, *_size(suite, options)) for suite in able]
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out must name a folder, got the file {str(folder)!r}")
    run(
        grid,
        folder,
        workers=options.workers,
        command=command,
        progress=progress,
        backend=options.backend,
        scheduler=options.scheduler,
        first_seed=options.first_seed,
    )
    summaries = report(folder, console)
    failed = [gate for summary in summaries for gate in summary.gates if gate.passed is False]
    return 1 if failed and options.strict else 0


def _size(suite: Suite, options: Namespace) -> tuple[int, list[str]]:
    if options.quick and options.full:
        raise UsageError("--quick and --full exclude each other")
    usual = QUICK_SEEDS if options.quick else max(suite.seeds, FULL_SEEDS) if options.full else suite.seeds
    seeds = options.seeds or usual
    known = [method.name for method in suite.methods]
    if options.methods is None:
        chosen = suite.quick if options.quick else () if options.full else suite.default
        return seeds, list(chosen or known)
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
