"""Your own model under several objectives, with the suites' statistics and report.

:func:`compare` is what ``python -m reweigh.benchmarks compare my_package:build`` calls.
"""

from __future__ import annotations

import copy
import importlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import Progress
from .suites.base import Method, Metric, Outcome, Suite, Trial

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from rich.console import Console

    from reweigh.losses import Objective

    from .summary import Summary

ModuleFactory = Callable[["Objective"], "pl.LightningModule"]
Objectives = Sequence[str] | Mapping[str, "Objective | Callable[[], Objective] | str"]


def compare(
    module_factory: ModuleFactory,
    datamodule: pl.LightningDataModule | Callable[[int], pl.LightningDataModule],
    objectives: Objectives,
    *,
    metrics: Sequence[str],
    seeds: int = 6,
    trainer: Mapping[str, Any] | None = None,
    out: str | Path = "runs/compare",
    name: str = "compare",
    workers: int | None = 1,
    backend: str = "local",
    scheduler: str | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> Summary:
    """Train a model under each objective, on the same seeds, and compare them pair by pair.

    For every seed and objective: the seed is set, ``module_factory(objective)`` builds the module, the seed is set
    again, a ``Trainer`` fits it, tests it (``test_step``; without one it validates), and takes the metrics from what
    the module has logged. Weighting events are driven and class sizes counted. Each finished run is one line of
    ``out/runs.jsonl``; a killed comparison continues with the same call. Writes ``results.json`` and ``report.html``.

    Args:
        module_factory: From an objective to a module that calls it in ``training_step``; initial weights must depend
            on the random seed alone.
        datamodule: A data module, or a function of the seed that makes one, for a split per repetition.
        objectives: What competes, the baseline first: names (``"focal"``, ``"focal(gamma=1.5)"``; see
            :func:`reweigh.benchmarks.recipes.names`), or a mapping from names to objectives, to functions that make
            one, or to such names.
        metrics: Names that the module logs in its test, the one that is tested first; ``"-test/loss"`` where lower is
            better.
        seeds: Repetitions; with fewer than 6 there is no significance test.
        trainer: Arguments of ``pytorch_lightning.Trainer`` (``max_epochs``, ``accelerator``, ``callbacks``, ...).
        out: Folder of results.
        name: What the comparison is called in the report; one folder may hold several.
        workers: Processes; more than 1 on one device compete for it.
        backend: ``"local"``, ``"dask"`` or ``"ray"``.
        scheduler: Address of the backend's scheduler.
        console: Where tables are printed; the default is the terminal.
        command: Is written into the report; the default says ``compare``.

    Returns:
        The summary: means, paired differences with intervals, corrected tests, costs.

    Raises:
        ValueError: If a name is unknown, there are fewer than two objectives, or no metric; in a run, if the module
            does not log a metric.
        TypeError: If an argument is of another kind.
        reweigh.benchmarks.store.StoreError: If the folder holds other results of this name.

    Example:
        >>> compare(build, data, ["cross_entropy", "focal"], metrics=["test/recall"])  # doctest: +SKIP
    """
    from rich.console import Console

    from .report import report
    from .runner import run

    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"compare: seeds must be >= 1, got {seeds!r}")
    suite = OwnModel(module_factory, datamodule, objectives, metrics, seeds, trainer or {}, name)
    console = Console() if console is None else console
    folder = Path(out)
    run(
        [(suite, seeds, [method.name for method in suite.methods])],
        folder,
        workers=workers,
        command=command or f"reweigh.benchmarks.compare(..., name={name!r})",
        progress=Progress(console),
        backend=backend,
        scheduler=scheduler,
    )
    return next(summary for summary in report(folder, console) if summary.suite.name == name)


class RunError(ValueError):
    """A module that does not do what a comparison needs."""


class OwnModel(Suite):
    """A user's module and data as a suite."""

    known = False
    version = 1
    notes = (
        "In every repetition all objectives get the same random seed before the model is built and again before it is "
        "trained: the same initial weights and the same order of batches, unless the model or its data draw otherwise.",
        "The report knows the metrics by name alone: whatever the module logs.",
    )

    def __init__(
        self,
        module_factory: ModuleFactory,
        datamodule: Any,
        objectives: Objectives,
        metrics: Sequence[str],
        seeds: int,
        trainer: Mapping[str, Any],
        name: str,
    ) -> None:
        super().__init__()
        if not callable(module_factory):
            raise TypeError(f"compare: module_factory must be callable, got {type(module_factory).__name__}")
        if not callable(datamodule) and not _is_data(datamodule):
            raise TypeError(
                "compare: datamodule must be a LightningDataModule or a function of the seed, got "
                f"{type(datamodule).__name__}"
            )
        if isinstance(objectives, str) or len(objectives) < 2:
            raise ValueError(f"compare: objectives must be at least two, the baseline first, got {objectives!r}")
        if isinstance(metrics, str) or not metrics or any(not metric.strip("-") for metric in metrics):
            raise ValueError(f"compare: metrics must name at least one logged value, got {metrics!r}")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"compare: name must be letters, digits, - and _, got {name!r}")
        self.name, self.seeds = name, seeds
        self.module_factory, self.datamodule, self.trainer = module_factory, datamodule, dict(trainer)
        self.makers, methods = _contenders(objectives)
        self.methods, self.quick = tuple(methods), tuple(method.name for method in methods)
        self.metrics = tuple(
            Metric(
                metric.removeprefix("-"),
                metric.removeprefix("-"),
                "As the module logs it.",
                higher_is_better=not metric.startswith("-"),
                share=False,
            )
            for metric in metrics
        )
        factory = getattr(module_factory, "__qualname__", type(module_factory).__name__)
        self.title = name
        self.summary = f"{factory} under {len(methods)} objectives"
        self.story = (
            f"The model of {factory}, trained under {len(methods)} objectives, each on {seeds} random seeds. "
            f"Everything but the objective is the same; differences to {methods[0].label} are taken seed by seed."
        )

    def protocol(self) -> Mapping[str, Any]:
        return {}

    def settings(self, method: str) -> Mapping[str, Any]:
        return {
            "method": method,
            "objective": repr(self.makers[method]()),
            "trainer": {name: _plain(value) for name, value in self.trainer.items()},
        }

    def prepare(self, seed: int) -> Trial:
        return _OwnTrial(self, seed)


class _OwnTrial(Trial):
    data_hash = ""

    def __init__(self, suite: OwnModel, seed: int) -> None:
        self.suite, self.seed = suite, seed

    def run(self, method: str) -> Outcome:
        import pytorch_lightning as pl
        from pytorch_lightning.utilities.model_helpers import is_overridden

        from reweigh.lightning_callbacks import FitStatistics, WeightingCallback

        from .suites.training import FirstBatch, StepTimer, quiet

        suite = self.suite
        timer, first = StepTimer(), FirstBatch()
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {"enable_model_summary": False, **copy.deepcopy(suite.trainer)}
        given = options.pop("callbacks", None) or []
        callbacks: list[Any] = [timer, first, *(given if isinstance(given, Sequence) else [given])]
        for kind in (WeightingCallback, FitStatistics):
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind())
        with quiet():
            pl.seed_everything(self.seed, workers=True, verbose=False)
            objective = suite.makers[method]()
            data = suite.datamodule
            # a module keeps what it has prepared: every run gets its own
            data = copy.deepcopy(data) if _is_data(data) else data(self.seed)
            pl.seed_everything(self.seed, workers=True, verbose=False)
            module = suite.module_factory(objective)
            pl.seed_everything(self.seed, workers=True, verbose=False)
            trainer = pl.Trainer(callbacks=callbacks, **options)
            trainer.fit(module, datamodule=data)
            look = trainer.test if is_overridden("test_step", module) else trainer.validate
            found = {name: value for row in look(module, datamodule=data, verbose=False) for name, value in row.items()}
        lacking = [metric.name for metric in suite.metrics if metric.name not in found]
        if lacking:
            raise RunError(f"compare: the module must log {', '.join(lacking)}, it logs {', '.join(found) or 'none'}")
        return Outcome(
            {metric.name: float(found[metric.name]) for metric in suite.metrics},
            step_ms=timer.milliseconds if len(timer.starts) > 1 else None,
            details={"start": first.found},
        )


def _is_data(value: Any) -> bool:
    """Whether it is a data module, and not what makes one."""
    return hasattr(value, "train_dataloader") and not isinstance(value, type)


def _contenders(objectives: Objectives) -> tuple[dict[str, Callable[[], Objective]], list[Method]]:
    """What makes each objective, and its words."""
    from reweigh.losses import Objective

    from .recipes import named

    pairs = objectives.items() if isinstance(objectives, Mapping) else [(text, text) for text in objectives]
    makers: dict[str, Callable[[], Objective]] = {}
    methods = []
    for name, what in pairs:
        if isinstance(what, str):
            make, about = named(what)
        elif isinstance(what, Objective):
            make, about = _copier(what), repr(what)
        elif callable(what):
            make, about = what, repr(what())
        else:
            raise TypeError(
                f"compare: objective {name!r} must be a name, an Objective or a function that makes one, got "
                f"{type(what).__name__}"
            )
        if name in makers:
            raise ValueError(f"compare: objectives must have different names, got {name!r} twice")
        makers[name] = make
        methods.append(Method(name, name, about))
    return makers, methods


def _copier(objective: Objective) -> Callable[[], Objective]:
    return lambda: copy.deepcopy(objective)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(type(value))


def load(target: str) -> dict[str, Any]:
    """What ``package.module:function`` returns, as arguments of :func:`compare`.

    The function returns ``(module_factory, datamodule)``, or a mapping with ``module_factory``, ``datamodule`` and any
    of ``objectives``, ``metrics``, ``trainer``.

    Raises:
        ValueError: If there is no such function, or it returns something else.
    """
    place, _, name = target.partition(":")
    if not place or not name:
        raise ValueError(f"compare: the target must read package.module:function, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(place), name, None)
    except ModuleNotFoundError as error:
        if error.name and place.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ValueError(f"compare: no module {place!r} from here ({Path.cwd()})") from error
    if not callable(build):
        raise ValueError(f"compare: {place} has no function {name!r}")
    found = build()
    if isinstance(found, tuple) and len(found) == 2:
        return {"module_factory": found[0], "datamodule": found[1]}
    keys = {"module_factory", "datamodule", "objectives", "metrics", "trainer"}
    if isinstance(found, Mapping) and {"module_factory", "datamodule"} <= set(found) <= keys:
        return dict(found)
    raise ValueError(
        f"compare: {target} must return (module_factory, datamodule) or a mapping with those and any of objectives, "
        f"metrics, trainer; got {type(found).__name__}"
    )


def line(arguments: Sequence[str]) -> str:
    """The command, as one would type it."""
    return f"python -m reweigh.benchmarks {shlex.join(arguments)}"
