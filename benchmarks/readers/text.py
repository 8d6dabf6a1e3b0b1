"""Documents from plain text and JSON lines."""

from __future__ import annotations

import re
from pathlib import Path

from .common import DataError, filled_lines, inventory, listed, parse_json, read_text, shown

_SUFFIXES = (".jsonl", ".txt")


def read_documents(path: Path, *, field: str = "text") -> list[str]:
    """The documents of a ``.txt`` file, a ``.jsonl`` file, or all such files of a folder in the order of their names.

    Documents in a ``.txt`` file are separated by blank lines and stripped. A line of a ``.jsonl`` file is an object
    whose ``field`` is a document, taken as it is. Folders inside a folder and files whose name starts with a dot are
    left out.

    Raises:
        DataError: A missing or empty file, another suffix, a folder without such a file, invalid UTF-8 or JSON (by file
            and line), a missing or empty field.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path, field)
    files = sorted(
        (file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file()),
        key=lambda file: file.name,
    )
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise DataError(f"{path}: must hold .txt or .jsonl files, found {inventory(path)}")
    return [document for file in files for document in _read_file(file, field)]


def _read_file(file: Path, field: str) -> list[str]:
    if file.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{file}: must be a .txt or .jsonl file or a folder of these, found the suffix {file.suffix!r}")
    if file.suffix.lower() == ".txt":
        return [document.strip() for document in re.split(r"\n[^\S\n]*\n", read_text(file)) if document.strip()]
    documents = []
    for number, line in filled_lines(file):
        where = f"{file}, line {number}"
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise DataError(f"{where}: must be an object, found {shown(record)}")
        if field not in record:
            raise DataError(f"{where}: must have a field {field!r}, found {listed(list(record))}")
        document = record[field]
        if not isinstance(document, str) or not document.strip():
            raise DataError(f"{where}: field {field!r} must be a text that is not empty, found {shown(document)}")
        documents.append(document)
    return documents
