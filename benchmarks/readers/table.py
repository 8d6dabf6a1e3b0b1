"""Tables of numbers and categories, from CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .common import DataError, Sheet, is_integer, listed, read_sheet, shown

MAX_CATEGORIES = 1000
"""Of one column; more of them are names or numbers, not categories."""

_MISSING = {"", "na", "n/a", "nan", "null", "?"}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Table:
    """A table ready for training."""

    inputs: NDArray[np.float32]
    """``(N, D)``"""
    target: NDArray[np.int64] | NDArray[np.float32]
    """``(N,)``: classes, or numbers."""
    group: NDArray[np.int64] | None
    """``(N,)``, where a group column was named."""
    names: tuple[str, ...]
    """Of the D inputs: the column's name, or ``column=category``."""
    classes: tuple[str, ...] = ()
    """Names of the classes, where the target has them."""
    group_names: tuple[str, ...] = ()


def read_table(
    file: Path,
    *,
    target: str,
    group: str | None = None,
    ignore: Sequence[str] = (),
    categories: Sequence[str] = (),
    kind: Literal["classes", "number"] = "classes",
    missing: Literal["error", "mean"] = "error",
) -> Table:
    """A CSV file with a header; every column but those named here becomes inputs.

    A column of numbers is one input; a column of texts is one input per category, 1 for the row's own and 0 for the
    others, in sorted order. Missing are cells that are empty, ``NA``, ``N/A``, ``NaN``, ``null`` or ``?``.

    Args:
        file: The CSV file.
        target: Column to predict; it may not have missing cells.
        group: Column of groups, numbered like classes; no input.
        ignore: Columns to leave out.
        categories: Columns that are categories though they hold numbers.
        kind: Of the target: "classes" (numbered in sorted order, numeric where all are integers) or "number".
        missing: "error", or "mean" to fill in the column's mean; for categories, their shares.

    Raises:
        DataError: A missing column, a missing cell (with line and column), a column with both numbers and texts that
            ``categories`` does not name, a number that is not finite, a target of one class, or no input.
    """
    if kind not in ("classes", "number") or missing not in ("error", "mean"):
        rule = "kind must be 'classes' or 'number', missing 'error' or 'mean'"
        raise DataError(f"read_table: {rule}, found {kind!r} and {missing!r}")
    sheet = read_sheet(file)
    special = [target, *([] if group is None else [group])]
    for name in (*special, *ignore, *categories):
        sheet.column(name)
    both = [name for name in special if name in ignore or name in categories]
    if both or group == target:
        raise DataError(f"read_table: a column must have one use, found two for {(both or [target])[0]!r}")
    names: list[str] = []
    columns: list[NDArray[np.float64]] = []
    for name in sheet.header:
        if name in special or name in ignore:
            continue
        found, own = _inputs(sheet, name, name in categories, missing)
        columns.append(found)
        names.extend(own)
    if not columns:
        raise DataError(f"{file}: must have an input column besides {listed([*special, *ignore])}, found none")
    inputs = np.concatenate(columns, axis=1).astype(np.float32)
    groups, group_names = (None, ()) if group is None else _codes(sheet, group)
    if kind == "number":
        return Table(inputs, _targets(sheet, target), groups, tuple(names), (), group_names)
    labels, classes = _codes(sheet, target)
    if len(classes) < 2:
        raise DataError(f"{file}, column {target!r}: must have at least 2 classes, found {listed(classes)}")
    return Table(inputs, labels, groups, tuple(names), classes, group_names)


def _absent(cell: str) -> bool:
    return cell.casefold() in _MISSING


def _refuse(sheet: Sheet, name: str, row: int, rule: str) -> DataError:
    cell = sheet.column(name)[row]
    return DataError(f"{sheet.file}, line {sheet.numbers[row]}, column {name!r}: {rule}, found {shown(cell)}")


def _inputs(sheet: Sheet, name: str, categorical: bool, missing: str) -> tuple[NDArray[np.float64], list[str]]:
    """``(N, 1)`` or ``(N, categories)``, and the names of the inputs."""
    cells = sheet.column(name)
    absent = [_absent(cell) for cell in cells]
    if all(absent):
        raise DataError(f"{sheet.file}, column {name!r}: must have values, found only missing cells")
    if missing == "error" and any(absent):
        raise _refuse(sheet, name, absent.index(True), "must not be missing (or choose missing='mean')")
    present = [row for row, gone in enumerate(absent) if not gone]
    numeric = [row for row in present if _NUMBER.fullmatch(cells[row])]
    if numeric and len(numeric) < len(present) and not categorical:
        odd = next(row for row in present if not _NUMBER.fullmatch(cells[row]))
        raise _refuse(sheet, name, odd, "must be a number, as others of the column (or name it in categories)")
    if numeric and not categorical:
        known = _numbers(sheet, name, cells, present)
        values = np.full((len(cells), 1), known.mean())
        values[present, 0] = known
        return values, [name]
    found = sorted({cells[row] for row in present})
    if len(found) > MAX_CATEGORIES:
        rule = f"must have at most {MAX_CATEGORIES} categories (or name it in ignore)"
        raise DataError(f"{sheet.file}, column {name!r}: {rule}, found {len(found)}")
    code = {cell: at for at, cell in enumerate(found)}
    hot = np.zeros((len(cells), len(found)))
    hot[present, [code[cells[row]] for row in present]] = 1
    hot[absent] = hot[present].mean(0)
    return hot, [f"{name}={cell}" for cell in found]


def _numbers(sheet: Sheet, name: str, cells: list[str], rows: Sequence[int]) -> NDArray[np.float64]:
    values = np.array([float(cells[row]) for row in rows])
    strange = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max))
    if len(strange):
        raise _refuse(sheet, name, rows[strange[0]], "must be finite in 32 bits")
    return values


def _targets(sheet: Sheet, name: str) -> NDArray[np.float32]:
    cells = sheet.column(name)
    for row, cell in enumerate(cells):
        if not _NUMBER.fullmatch(cell):
            raise _refuse(sheet, name, row, "must be a number")
    return _numbers(sheet, name, cells, range(len(cells))).astype(np.float32)


def _codes(sheet: Sheet, name: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The cells, numbered in sorted order, and their names."""
    cells = sheet.column(name)
    for row, cell in enumerate(cells):
        if _absent(cell):
            raise _refuse(sheet, name, row, "must not be missing")
    distinct = set(cells)
    numeric = all(is_integer(cell) for cell in distinct)
    names = sorted(distinct, key=lambda cell: (int(cell), cell) if numeric else (0, cell))
    code = {cell: at for at, cell in enumerate(names)}
    return np.array([code[cell] for cell in cells], np.int64), tuple(names)
