"""Images with several labels, from annotations in the form of COCO (and VOC written in this form)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .common import DataError, check_folder, filled_lines, inside, listed, parse_json, read_text, shown


@dataclass(frozen=True)
class MultiLabel:
    """Images with any number of labels each."""

    paths: tuple[Path, ...]
    labels: NDArray[np.float32]
    """``(N, C)``, 1 where the image has the label, else 0."""
    names: tuple[str, ...]
    """Of the C labels."""


def read_coco(annotations: Path, images: Path, *, keep: Path | None = None) -> MultiLabel:
    """The images of a JSON file in its order; an image has a label where it has an annotation of this category.

    The file holds ``images`` (``id``, ``file_name``), ``categories`` (``id``, ``name``) and ``annotations``
    (``image_id``, ``category_id``). Categories are ordered by id. An image without annotations has no label.

    Args:
        annotations: Such as ``instances_train2017.json``.
        images: The folder that file names start from; none may leave it.
        keep: A text file with an image id or a file name on each line, for long-tailed selections such as VOC-MLT and
            COCO-MLT; by default all images are kept.

    Raises:
        DataError: JSON of another form, an id that occurs twice or is unknown, a missing image, a category without an
            image among those kept.
    """
    content = parse_json(read_text(annotations), str(annotations))
    if not isinstance(content, dict):
        raise DataError(f"{annotations}: must hold an object, found {type(content).__name__}")
    folder = check_folder(images, "an image", f"it holds the files that {annotations} names")
    files = _by_id(content, "images", "file_name", annotations)
    categories = _by_id(content, "categories", "name", annotations)
    chosen = list(files) if keep is None else _kept(keep, files, annotations)
    order = sorted(categories, key=lambda own: (isinstance(own, str), own))
    row = {own: at for at, own in enumerate(chosen)}
    column = {own: at for at, own in enumerate(order)}
    labels = np.zeros((len(row), len(column)), np.float32)
    for at, entry in enumerate(_entries(content, "annotations", annotations)):
        where = f"{annotations}, annotations[{at}]"
        image, category = _id(entry, "image_id", where), _id(entry, "category_id", where)
        if image not in files or category not in column:
            name, value = ("image_id", image) if image not in files else ("category_id", category)
            raise DataError(f"{where}: {name} must be an id of the file, found {shown(value)}")
        if image in row:
            labels[row[image], column[category]] = 1
    names = tuple(categories[own] for own in order)
    absent = [names[at] for at in np.flatnonzero(labels.max(0) == 0)]
    if absent:
        which = annotations if keep is None else keep
        raise DataError(f"{which}: every category must have an image, found none of {listed(absent)}")
    paths = tuple(inside(folder, files[own], f"{annotations}, image {shown(own)}") for own in chosen)
    return MultiLabel(paths, labels, names)


def _entries(content: Mapping[str, Any], key: str, file: Path) -> list[Mapping[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else shown(entries) if key in content else listed(list(content))
        raise DataError(f"{file}: must have a list {key!r} that is not empty, found {found}")
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{file}, {key}[{at}]: must be an object, found {shown(entry)}")
    return entries


def _id(entry: Mapping[str, Any], key: str, where: str) -> int | str:
    own: int | str | None = entry.get(key)
    if type(own) is not int and type(own) is not str:
        raise DataError(f"{where}: {key!r} must be an integer or a text, found {shown(own)}")
    return own


def _by_id(content: Mapping[str, Any], key: str, value: str, file: Path) -> dict[int | str, str]:
    """``entry[value]`` by ``entry["id"]``, both without repetition."""
    found: dict[int | str, str] = {}
    ids, seen = set[str](), set[str]()  # 7 and "7" would be one line of a list of ids
    for at, entry in enumerate(_entries(content, key, file)):
        where = f"{file}, {key}[{at}]"
        own, text = _id(entry, "id", where), entry.get(value)
        if not isinstance(text, str) or not text:
            raise DataError(f"{where}: {value!r} must be a text, found {shown(text)}")
        if str(own) in ids or text in seen:
            name, twice = ("id", own) if str(own) in ids else (value, text)
            raise DataError(f"{where}: {name!r} must occur once, found {shown(twice)} again")
        found[own] = text
        ids.add(str(own))
        seen.add(text)
    return found


def _kept(keep: Path, files: Mapping[int | str, str], annotations: Path) -> list[int | str]:
    """The ids that a file lists, in the order of the annotations."""
    by_text = {str(own): own for own in files} | {name: own for own, name in files.items()}
    kept: set[int | str] = set()
    for number, line in filled_lines(keep):
        if line not in by_text:
            raise DataError(
                f"{keep}, line {number}: must be an image id or a file name of {annotations}, found {shown(line)}"
            )
        kept.add(by_text[line])
    return [own for own in files if own in kept]
