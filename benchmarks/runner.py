"""Trains what is missing: a grid of suites and seeds, on all cores, resumable after any kill."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import joblib

from .environment import describe
from .progress import Progress
from .store import RUNS, Contents, Run, Store, StoreError
from .suites import Suite

ATTEMPTS = 4
"""How often work is handed out before workers that die are given up on."""
BACKENDS = ("local", "dask", "ray")


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


def plan(suite: Suite, seeds: int, methods: Sequence[str], contents: Contents, first: int = 0) -> list[Unit]:
    """What is still to be done of ``seeds`` seeds from ``first`` on, in units."""
    units = []
    for seed in range(first, first + seeds):
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
    backend: str = "local",
    scheduler: str | None = None,
    first_seed: int = 0,
) -> Contents:
    """Fill the folder with what is missing of each (suite, number of seeds, methods).

    Work goes through :class:`joblib.Parallel`: in local processes, or where ``backend`` says. The folder need not be
    visible there. What a worker that died had not finished is done again, at most :data:`ATTEMPTS` times.

    Args:
        suites: What is wanted.
        folder: Of results.
        workers: At a time; the default is the number of cores.
        command: Is written down beside the results.
        progress: Is told.
        backend: ``"local"``; ``"dask"`` and ``"ray"``, where those are installed.
        scheduler: Address of Dask's scheduler or of Ray's cluster; the default is one on this machine.
        first_seed: Seeds are counted from here.

    Raises:
        StoreError: If the folder holds results that new ones cannot be compared with.
        RuntimeError: If workers keep dying.
    """
    store, grid = Store(folder), list(suites)
    repaired = store.repair()
    if repaired:
        progress.say(repaired)
    contents = store.read()
    for suite, _, _ in grid:
        check(suite, contents)
    asked = sum(seeds * len(methods) for _, seeds, methods in grid)
    units = _missing(grid, contents, first_seed)
    missing = sum(len(unit.methods) for unit in units)
    if not missing:
        progress.say(f"all {asked} runs are there already; nothing to train")
        return contents
    session = uuid.uuid4().hex[:8]
    started = time.time()
    with placed(backend, scheduler, workers) as found:
        workers = workers or found or joblib.cpu_count()
        at_once = min(workers, len(units))
        store.append_session(
            {
                "id": session,
                "command": command,
                "workers": at_once,
                "started": int(started),
                "environment": describe(),
                "suites": {suite.name: suite.description() for suite, _, _ in grid if not suite.known},
            }
        )
        if missing < asked:
            progress.say(f"{asked - missing} of {asked} runs are there already and are kept")
        progress.say(f"training {missing} models or corrections, {at_once} at a time")
        with progress.watch(store, missing):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    _work_off(spread(units, workers), workers, store, session, progress)
                    break
                except BrokenProcessPool as error:
                    units = _missing(grid, store.read(), first_seed)
                    if attempt == ATTEMPTS and units:
                        left = sum(len(unit.methods) for unit in units)
                        raise RuntimeError(
                            f"workers died {ATTEMPTS} times (out of memory?); {left} runs are missing. What was "
                            "finished is kept, and the same command continues."
                        ) from error
                    progress.say("a worker died; what it had not finished is done again")
    progress.say(f"trained in {time.time() - started:.0f} s")
    return store.read()


def _missing(grid: Sequence[tuple[Suite, int, Sequence[str]]], contents: Contents, first: int) -> list[Unit]:
    units: list[Unit] = []
    for suite, seeds, methods in grid:
        ordered = [method.name for method in suite.methods if method.name in methods]
        units += plan(suite, seeds, ordered, contents, first)
    return units


def _work_off(units: list[Unit], workers: int, store: Store, session: str, progress: Progress) -> None:
    parallel = joblib.Parallel(n_jobs=min(workers, len(units)), batch_size=1)
    streams = bool(getattr(parallel._backend, "supports_return_generator", False))
    # a backend that gives nothing before all is done gets a few units at a time, so that a kill loses only those
    size = len(units) if streams else 2 * workers
    for start in range(0, len(units), size):
        tasks = (joblib.delayed(work)(unit, store.folder, session) for unit in units[start : start + size])
        kind = "generator_unordered" if streams else "list"
        for done in joblib.Parallel(n_jobs=min(workers, len(units)), return_as=kind, batch_size=1)(tasks):
            for finished in done:
                store.append_run(finished)  # does nothing where the worker has done it
            if done:
                progress.finished(done[0].suite, done[0].seed, len(done))


@contextmanager
def placed(backend: str, scheduler: str | None, workers: int | None) -> Iterator[int | None]:
    """Take what :class:`joblib.Parallel` does inside to a backend; gives the number of workers where that knows.

    Raises:
        ModuleNotFoundError: If the backend is not installed.
    """
    if backend == "local":
        yield None
        return
    if backend == "dask":
        dask: Any = import_module("distributed")
        with ExitStack() as stack:
            address: Any = scheduler
            if address is None:
                number = workers or joblib.cpu_count()
                address = stack.enter_context(
                    dask.LocalCluster(n_workers=number, threads_per_worker=1, dashboard_address=None)
                )
            client = stack.enter_context(dask.Client(address))
            stack.enter_context(joblib.parallel_config(backend="dask"))
            yield sum(client.nthreads().values())
        return
    ray: Any = import_module("ray")
    ray.init(address=scheduler, num_cpus=None if scheduler else workers, ignore_reinit_error=True)
    import_module("ray.util.joblib").register_ray()
    with joblib.parallel_config(backend="ray"):
        yield int(ray.cluster_resources().get("CPU", 1))
