"""Trains what is missing: a grid of suites and seeds, on all cores, resumable after any kill."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib

from .environment import describe
from .progress import Progress
from .store import RUNS, Contents, Run, Store, StoreError
from .suites import Suite


@dataclass(frozen=True)
class Unit:
    """One piece of work: all missing methods of one seed, so that they share split, initial weights and baseline."""

    suite: Suite
    seed: int
    methods: tuple[str, ...]


def check(suite: Suite, contents: Contents) -> None:
    """Refuse to add to results that are not comparable with new ones.

    Raises:
        StoreError: If the folder holds runs of this suite made with other settings or by another version.
    """
    known = {method.name for method in suite.methods}
    foreign = [
        run
        for run in contents.of(suite.name)
        if run.method not in known or run.fingerprint != suite.fingerprint(run.method)
    ]
    if foreign:
        methods = ", ".join(sorted({run.method for run in foreign}))
        versions = ", ".join(sorted({str(run.version) for run in foreign}))
        raise StoreError(
            f"{RUNS} holds {len(foreign)} runs of {suite.name} made with other settings (suite version {versions}, now "
            f"{suite.version}; methods {methods}); new runs would not be comparable with them. Choose another --out, "
            f"or move {RUNS} away. Nothing was changed."
        )


def plan(suite: Suite, seeds: int, methods: Sequence[str], contents: Contents) -> list[Unit]:
    """What is still to be done, in units."""
    units = []
    for seed in range(seeds):
        missing = tuple(method for method in methods if (suite.name, method, seed) not in contents.runs)
        if missing:
            units.append(Unit(suite, seed, missing))
    return units


def spread(units: list[Unit], workers: int) -> list[Unit]:
    """Split the last unit in two where it would otherwise be trained alone while other workers have nothing to do."""
    if workers < 2 or len(units) % workers != 1:
        return units
    *others, last = units
    tied = [name for name in last.methods if name == last.suite.baseline.name or not last.suite.method(name).trained]
    free = [name for name in last.methods if name not in tied]
    cut = max(0, len(free) - len(last.methods) // 2)
    halves = (*tied, *free[:cut]), tuple(free[cut:])
    return others + [Unit(last.suite, last.seed, methods) for methods in halves if methods]


def work(unit: Unit, folder: Path, session: str) -> list[Run]:
    """Do one unit, writing each run down as soon as it is finished. Runs in a worker process."""
    suite, store = unit.suite, Store(folder)
    trial, runs = suite.prepare(unit.seed), []
    for method in unit.methods:
        contents = store.read()
        if (suite.name, method, unit.seed) in contents.runs:  # another process shares the folder
            continue
        others = {run.data_hash for run in contents.of(suite.name) if run.seed == unit.seed}
        if others - {trial.data_hash}:
            raise StoreError(
                f"{RUNS} holds runs of {suite.name}, seed {unit.seed}, made on other data (another version "
                "of the data's package?); new runs would not be paired with them. Choose another --out."
            )
        outcome = trial.run(method)
        run = Run(
            suite=suite.name,
            method=method,
            seed=unit.seed,
            version=suite.version,
            fingerprint=suite.fingerprint(method),
            data_hash=trial.data_hash,
            metrics=outcome.metrics,
            step_ms=outcome.step_ms,
            details=outcome.details,
            session=session,
        )
        if folder.is_dir():  # not on a remote worker, whose runs the caller writes down
            store.append_run(run)
        runs.append(run)
    return runs


def run(
    suites: Iterable[tuple[Suite, int, Sequence[str]]],
    folder: Path,
    *,
    workers: int | None,
    command: str,
    progress: Progress,
) -> Contents:
    """Fill the folder with what is missing of each (suite, number of seeds, methods).

    Work goes through :class:`joblib.Parallel`, so ``joblib.parallel_config(backend=...)`` around the call moves it to
    any backend of processes that yields results as they come; the folder need not be visible there.

    Raises:
        StoreError: If the folder holds results that new ones cannot be compared with.
    """
    store = Store(folder)
    repaired = store.repair()
    if repaired:
        progress.say(repaired)
    contents = store.read()
    units: list[Unit] = []
    asked = 0
    for suite, seeds, methods in suites:
        check(suite, contents)
        ordered = [method.name for method in suite.methods if method.name in methods]
        units += plan(suite, seeds, ordered, contents)
        asked += seeds * len(ordered)
    missing = sum(len(unit.methods) for unit in units)
    if not missing:
        progress.say(f"all {asked} runs are there already; nothing to train")
        return contents
    units = spread(units, workers or joblib.cpu_count())
    workers = min(workers or joblib.cpu_count(), len(units))
    session = uuid.uuid4().hex[:8]
    started = time.time()
    store.append_session(
        {"id": session, "command": command, "workers": workers, "started": int(started), "environment": describe()}
    )
    if missing < asked:
        progress.say(f"{asked - missing} of {asked} runs are there already and are kept")
    progress.say(f"training {missing} models or corrections, {workers} at a time")
    tasks = (joblib.delayed(work)(unit, folder, session) for unit in units)
    with progress.watch(store, missing):
        results = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)(tasks)
        for done in results:
            for finished in done:
                store.append_run(finished)  # does nothing where the worker has done it
            if done:
                progress.finished(done[0].suite, done[0].seed, len(done))
    progress.say(f"trained in {time.time() - started:.0f} s")
    return store.read()
