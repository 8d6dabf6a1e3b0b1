"""The folder of results: one JSON line per finished run, safe against kills and against two writers.

A line is appended with a single write and synced, under a lock. A file is never rewritten without a copy beside it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNS = "runs.jsonl"
_LOCK = ".runs.lock"

Key = tuple[str, str, int]
"""Suite, method, seed."""


class StoreError(ValueError):
    """A folder that cannot be used as it is; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    suite: str
    method: str
    seed: int
    version: int
    fingerprint: str
    """Of the method's settings; see :meth:`reweigh.benchmarks.suites.Suite.fingerprint`."""
    data_hash: str
    metrics: dict[str, float]
    step_ms: float | None
    details: dict[str, Any]
    session: str
    """Which call of the program made it."""

    @property
    def key(self) -> Key:
        """What may exist once."""
        return self.suite, self.method, self.seed


@dataclass
class Contents:
    """What a folder holds."""

    runs: dict[Key, Run] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    """Numbers of unreadable lines, from 1."""
    unfinished: bool = False
    """Whether the last line was cut off, as by a kill in the middle of a write."""

    def of(self, suite: str) -> list[Run]:
        """The runs of one suite."""
        return [run for run in self.runs.values() if run.suite == suite]


class Store:
    """The runs in a folder.

    Args:
        folder: Created by the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / RUNS

    def read(self) -> Contents:
        """Everything readable; the first of equal keys counts."""
        contents = Contents()
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _parse(line)
            if record is None:
                contents.broken.append(number)
                contents.unfinished = contents.unfinished or number == len(lines)
            elif isinstance(record, Run):
                contents.runs.setdefault(record.key, record)
            else:
                contents.sessions.append(record)
        return contents

    def append_run(self, run: Run) -> None:
        """Write a finished run, unless another process was faster."""
        self._append({"kind": "run", **vars(run)}, run.key)

    def append_session(self, session: dict[str, Any]) -> None:
        """Write how the program was called."""
        self._append({"kind": "session", **session})

    def _append(self, record: dict[str, Any], key: Key | None = None) -> None:
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if key in self.read().runs:
                return
            if self.path.exists() and not _ends_line(self.path):
                line = b"\n" + line  # never glue a result to what a killed writer left
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def repair(self) -> str | None:
        """Take unreadable lines out, keeping a copy of the file as it was; returns what was done, if anything."""
        if not self.path.exists():
            return None
        with self._locked():
            contents = self.read()
            if not contents.broken:
                return None
            backup = next(path for path in _backups(self.path) if not path.exists())
            shutil.copy2(self.path, backup)
            lines = self.path.read_bytes().split(b"\n")
            kept = [line for number, line in enumerate(lines, 1) if line.strip() and number not in contents.broken]
            scratch = self.path.with_suffix(".new")
            with open(scratch, "wb") as file:
                file.write(b"".join(line + b"\n" for line in kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.path)
        return f"{complaint(self.path, contents)}; the file as it was is kept as {backup.name}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / _LOCK, "ab") as file:
            if sys.platform == "win32":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                try:
                    yield
                finally:
                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)  # released with the file
                yield


def complaint(path: Path, contents: Contents) -> str:
    """What is wrong with the lines of a file, in words."""
    middle = contents.broken[:-1] if contents.unfinished else contents.broken
    parts = []
    if contents.unfinished:
        parts.append("the last line was cut off (a run stopped while it was written) and is dropped")
    if middle:
        numbers = ", ".join(map(str, middle[:5])) + (", ..." if len(middle) > 5 else "")
        parts.append(f"{'line' if len(middle) == 1 else 'lines'} {numbers} cannot be read and are left out")
    return f"{path.name}: {'; '.join(parts)} ({len(contents.runs)} runs are intact, what is missing is run again)"


def _parse(line: bytes) -> Run | dict[str, Any] | None:
    try:
        record = json.loads(line)
        kind = record.pop("kind")
        if kind == "session":
            return record if isinstance(record.get("id"), str) and isinstance(record.get("command"), str) else None
        run = Run(**record)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    numbers = isinstance(run.metrics, dict) and all(
        isinstance(value, (int, float)) and math.isfinite(value) for value in run.metrics.values()
    )
    whole = type(run.seed) is int and all(isinstance(text, str) for text in (run.suite, run.method, run.fingerprint))
    return run if kind == "run" and numbers and whole and isinstance(run.details, dict) else None


def _ends_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _backups(path: Path) -> Iterator[Path]:
    yield path.with_name(path.name + ".bak")
    number = 1
    while True:
        yield path.with_name(f"{path.name}.bak{number}")
        number += 1
