"""What the readers share: the error, text files, CSV files, paths that stay inside a folder."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file or folder, the rule and what was found."""


def shown(value: object) -> str:
    """A value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Collection[object], most: int = 8) -> str:
    """Names for a message: the first few, and how many there are."""
    if not names:
        return "nothing"
    some = ", ".join(shown(name) for _, name in zip(range(most), names, strict=False))
    return some if len(names) <= most else f"{some}, ... ({len(names)} in all)"


def check_folder(root: Path, kind: str, holds: str, needs: Iterable[str] = ()) -> Path:
    """``root`` if it is a folder with all of ``needs``; otherwise a :class:`DataError` that says what belongs in it."""
    root = Path(root)
    if not os.path.isdir(root):  # unlike Path.is_dir, no exception for names that the system refuses
        found = "a file" if os.path.exists(root) else "nothing"
        raise DataError(f"{root}: must be {kind} folder ({holds}), found {found} at this path")
    missing = [name for name in needs if not (root / name).exists()]
    if missing:
        raise DataError(f"{root}: must be {kind} folder ({holds}), without {listed(missing)}: found {inventory(root)}")
    return root


def inventory(root: Path) -> str:
    """The names in a folder, for a message."""
    try:
        return listed(sorted(os.listdir(root)))
    except OSError as error:
        return f"that it cannot be listed ({error.strerror})"


def read_bytes(file: Path) -> bytes:
    """The bytes of a file that exists, can be read and is not empty."""
    file = Path(file)
    if not os.path.exists(file):
        raise DataError(f"{file}: must be a file, found nothing at this path")
    if os.path.isdir(file):
        raise DataError(f"{file}: must be a file, found a folder")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: must be readable, found {error.strerror}") from None
    if not data:
        raise DataError(f"{file}: must not be empty, found 0 bytes")
    return data


def read_text(file: Path) -> str:
    """A UTF-8 text without a byte order mark, its lines ended by line feeds alone; errors name the line."""
    data = read_bytes(file)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = data[error.start : error.start + 1]
        raise DataError(f"{file}, line {line}: must be UTF-8, found the byte {found!r}") from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise DataError(f"{file}: must not be empty, found white space only")
    return text


def filled_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of the lines that are not blank, without white space at their ends."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def parse_json(text: str, where: str) -> Any:
    """JSON of any form; ``where`` begins the message of an error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: must be JSON, found an error at line {error.lineno} ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers of too many digits, lists nested too deeply
        raise DataError(f"{where}: must be JSON, found {error}") from None


def is_integer(text: str) -> bool:
    """Whether a text is an integer in ASCII digits that fits 64 bits; ``int`` alone also takes ``1_0``."""
    return re.fullmatch(r"[+-]?[0-9]{1,18}", text) is not None


def inside(folder: Path, name: str, where: str) -> Path:
    """The existing file ``name`` below ``folder``; absolute paths and ``..`` are refused, Windows ones too."""
    here, windows = PurePosixPath(name), PureWindowsPath(name)
    if here.is_absolute() or windows.drive or windows.root or ".." in (*here.parts, *windows.parts):
        raise DataError(f"{where}: a path must stay below {folder}, found {shown(name)}")
    path = folder / name
    if not os.path.isfile(path):
        raise DataError(f"{where}: must name a file below {folder}, found no file {shown(name)}")
    return path


def check_once(names: Iterable[str], where: str) -> None:
    """No name occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{where}: a name must occur once, found {shown(name)} again")
        seen.add(name)


def check_present(labels: NDArray[np.int64], number: int, where: str, what: str = "class") -> None:
    """Every one of ``number`` classes has a sample; their labels are known to be in range."""
    present = set(np.unique(labels).tolist())
    if len(present) < number:
        gap = next(label for label in range(number) if label not in present)
        raise DataError(
            f"{where}: every {what} in [0, {number}) must have a sample, found none of {what} {gap} "
            f"({number - len(present)} are missing)"
        )


@dataclass(frozen=True)
class Sheet:
    """A CSV file: cells without white space at their ends, as many in each row as the header has names."""

    file: Path
    header: tuple[str, ...]
    rows: list[list[str]]
    numbers: list[int]
    """The line in the file at which each row ends."""

    def column(self, name: str) -> list[str]:
        """The cells of a column."""
        if name not in self.header:
            raise DataError(f"{self.file}: must have a column {name!r}, found {listed(self.header)}")
        at = self.header.index(name)
        return [row[at] for row in self.rows]

    def integers(self, name: str, allowed: Sequence[int] | None = None) -> NDArray[np.int64]:
        """A column of integers, all of them among ``allowed``."""
        cells = self.column(name)
        rule = f"be one of {', '.join(map(str, allowed))}" if allowed is not None else "be an integer"
        for number, cell in zip(self.numbers, cells, strict=True):
            if not is_integer(cell) or (allowed is not None and int(cell) not in allowed):
                raise DataError(f"{self.file}, line {number}, column {name!r}: must {rule}, found {shown(cell)}")
        return np.array([int(cell) for cell in cells], np.int64)


def read_sheet(file: Path) -> Sheet:
    """A CSV file with a header and at least one row; blank lines are left out."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    header: tuple[str, ...] = ()
    rows: list[list[str]] = []
    numbers: list[int] = []
    try:
        for cells in reader:
            row = [cell.strip() for cell in cells]
            if not any(row) and len(row) <= 1:
                continue
            if not header:
                header = tuple(row)
            elif len(row) != len(header):
                rule = f"must have the {len(header)} columns of the header"
                raise DataError(f"{file}, line {reader.line_num}: {rule}, found {len(row)}")
            else:
                rows.append(row)
                numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: must be CSV, found an error ({error})") from None
    check_once(header, f"{file}, header")
    if not rows:
        raise DataError(f"{file}: must have rows below its header, found none")
    return Sheet(Path(file), header, rows, numbers)
