"""Data with labels and groups, from tables beside the images: Waterbirds, CelebA, and any CSV file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .common import (
    DataError,
    Sheet,
    check_folder,
    check_once,
    check_present,
    filled_lines,
    inside,
    inventory,
    is_integer,
    listed,
    read_sheet,
    shown,
)

PARTS = ("train", "val", "test")
"""What the numbers 0, 1 and 2 of a split column mean."""


@dataclass(frozen=True)
class Grouped:
    """One part of a data set with groups."""

    paths: tuple[Path, ...]
    label: NDArray[np.int64]
    """``(N,)``"""
    group: NDArray[np.int64]
    """``(N,)``, in ``[0, groups)``"""
    groups: int
    label_names: tuple[str, ...] = ()
    """By label, where the file has texts; otherwise empty."""
    group_names: tuple[str, ...] = ()


def read_waterbirds(root: Path) -> dict[str, Grouped]:
    """Waterbirds by ``metadata.csv``: label y, group ``2 * y + place``; "train", "val" and "test".

    Raises:
        DataError: A missing file or column, a value out of range, a part that lacks a group.
    """
    root = check_folder(
        root, "a Waterbirds", "it holds metadata.csv and the images that this file names", ["metadata.csv"]
    )
    sheet = read_sheet(root / "metadata.csv")
    label, place, split = (
        sheet.integers("y", (0, 1)),
        sheet.integers("place", (0, 1)),
        sheet.integers("split", range(3)),
    )
    names = sheet.column("img_filename")
    paths = _paths(root, sheet.file, sheet.numbers, names)
    return _parts(sheet.file, paths, label, 2 * label + place, split)


def read_celeba(root: Path, *, target: str = "Blond_Hair", attribute: str = "Male") -> dict[str, Grouped]:
    """CelebA by its attributes: label ``target``, group ``2 * target + attribute``; "train", "val" and "test".

    Args:
        root: Holds ``list_attr_celeba`` and ``list_eval_partition``, each as ``.csv`` or ``.txt``, and
            ``img_align_celeba/`` with the images.
        target: Name of the attribute to learn.
        attribute: Name of the attribute that makes the groups, another one.

    Raises:
        DataError: A missing file, an unknown attribute, a value other than -1 and 1, an image without a part, a part
            that lacks a group.
    """
    if target == attribute:
        raise DataError(f"read_celeba: target and attribute must differ, found {target!r} for both")
    holds = "it holds list_attr_celeba and list_eval_partition, as .csv or .txt, and img_align_celeba/"
    root = check_folder(root, "a CelebA", holds, ["img_align_celeba"])
    attributes = _celeba_attributes(_either(root, "list_attr_celeba", holds))
    label = (attributes.integers(target, (-1, 1)) + 1) // 2
    other = (attributes.integers(attribute, (-1, 1)) + 1) // 2
    names = [row[0] for row in attributes.rows]
    partition = _celeba_partition(_either(root, "list_eval_partition", holds))
    part = {row[0]: int(row[1]) for row in partition.rows}
    check_once(names, str(attributes.file))
    check_once((row[0] for row in partition.rows), str(partition.file))
    known = set(names)
    for file, alone in (
        (partition.file, [name for name in names if name not in part]),
        (attributes.file, [name for name in part if name not in known]),
    ):
        if alone:
            raise DataError(f"{file}: must name the images that the other list names, found no {listed(alone)}")
    folder = root / "img_align_celeba"
    if (folder / folder.name).is_dir():  # one more level in a common archive
        folder = folder / folder.name
    paths = _paths(folder, attributes.file, attributes.numbers, names)
    split = np.array([part[name] for name in names], np.int64)
    return _parts(attributes.file, paths, label, 2 * label + other, split)


def _either(root: Path, name: str, holds: str) -> Path:
    for suffix in (".csv", ".txt"):
        if (root / (name + suffix)).exists():
            return root / (name + suffix)
    raise DataError(f"{root}: must be a CelebA folder ({holds}), without {name}: found {inventory(root)}")


def _celeba_attributes(file: Path) -> Sheet:
    if file.suffix == ".csv":
        return read_sheet(file)
    lines = [(number, line.split()) for number, line in filled_lines(file)]
    if len(lines) < 3 or len(lines[0][1]) != 1 or not is_integer(lines[0][1][0]):
        found = shown(" ".join(lines[0][1]))
        raise DataError(f"{file}: must have the number of images, the names of attributes and lines, found {found}")
    header = ("image", *lines[1][1])
    rows = [row for _, row in lines[2:]]
    for number, row in lines[2:]:
        if len(row) != len(header):
            raise DataError(f"{file}, line {number}: must have {len(header)} columns, found {len(row)}")
    if int(lines[0][1][0]) != len(rows):
        raise DataError(f"{file}: must have the {lines[0][1][0]} images that its first line says, found {len(rows)}")
    return Sheet(file, header, rows, [number for number, _ in lines[2:]])


def _celeba_partition(file: Path) -> Sheet:
    if file.suffix == ".csv":
        sheet = read_sheet(file)
        sheet.integers("partition", range(3))
        at = sheet.header.index("partition")
        return Sheet(file, ("image", "partition"), [[row[0], row[at]] for row in sheet.rows], sheet.numbers)
    lines = [(number, line.split()) for number, line in filled_lines(file)]
    for number, row in lines:
        if len(row) != 2:
            raise DataError(f"{file}, line {number}: must be 'image part', found {len(row)} columns")
    sheet = Sheet(file, ("image", "partition"), [row for _, row in lines], [number for number, _ in lines])
    sheet.integers("partition", range(3))
    return sheet


def read_metadata(
    root: Path, file: str = "metadata.csv", *, image: str, label: str, group: str, split: str
) -> dict[str, Grouped]:
    """Any CSV file with a row per image.

    Labels and groups are integers from 0 without gaps, or texts, which are numbered in their sorted order (then
    ``label_names`` and ``group_names`` hold them). A split is 0, 1, 2 for "train", "val", "test", or any name. A part
    may lack a class or a group that another part has.

    Args:
        root: The folder of the file, from which the paths of images start.
        file: Its name.
        image: Column of paths.
        label: Column of labels.
        group: Column of groups.
        split: Column of parts.

    Raises:
        DataError: A missing file or column, an empty cell, a column of both integers and texts, a path that leaves
            ``root``, a class or a group without a sample.
    """
    root = check_folder(root, "a metadata", f"it holds {file} and the images that this file names", [file])
    sheet = read_sheet(root / file)
    labels, label_names = _numbered(sheet, label, "class")
    groups, group_names = _numbered(sheet, group, "group")
    paths = _paths(root, sheet.file, sheet.numbers, sheet.column(image))
    cells = sheet.column(split)
    for number, cell in zip(sheet.numbers, cells, strict=True):
        if not cell:
            raise DataError(f"{sheet.file}, line {number}, column {split!r}: must not be empty, found ''")
    if all(cell in ("0", "1", "2") for cell in cells):
        cells = [PARTS[int(cell)] for cell in cells]
    number_of = int(groups.max()) + 1
    found = {}
    for part in dict.fromkeys(cells):
        at = np.array([row for row, cell in enumerate(cells) if cell == part])
        own = tuple(paths[row] for row in at)
        found[part] = Grouped(own, labels[at], groups[at], number_of, label_names, group_names)
    return found


def _numbered(sheet: Sheet, name: str, what: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    cells = sheet.column(name)
    whole = is_integer(cells[0])
    rule = "must be an integer >= 0, as above" if whole else "must be a text that is no integer, as above"
    for number, cell in zip(sheet.numbers, cells, strict=True):
        where = f"{sheet.file}, line {number}, column {name!r}"
        if not cell:
            raise DataError(f"{where}: must not be empty, found ''")
        if is_integer(cell) != whole or (whole and int(cell) < 0):
            raise DataError(f"{where}: {rule}, found {shown(cell)}")
    if whole:
        array = np.array([int(cell) for cell in cells], np.int64)
        check_present(array, int(array.max()) + 1, f"{sheet.file}, column {name!r}", what)
        return array, ()
    names = sorted(set(cells))
    code = {cell: at for at, cell in enumerate(names)}
    return np.array([code[cell] for cell in cells], np.int64), tuple(names)


def _paths(folder: Path, file: Path, numbers: list[int], names: list[str]) -> list[Path]:
    return [inside(folder, name, f"{file}, line {number}") for number, name in zip(numbers, names, strict=True)]


def _parts(
    file: Path, paths: list[Path], label: NDArray[np.int64], group: NDArray[np.int64], split: NDArray[np.int64]
) -> dict[str, Grouped]:
    """Train, val and test, each with a sample of all 4 groups."""
    found = {}
    for number, part in enumerate(PARTS):
        at = np.flatnonzero(split == number)
        check_present(group[at], 4, f"{file}, {part} (split {number})", "group")
        found[part] = Grouped(tuple(paths[row] for row in at), label[at], group[at], 4)
    return found
