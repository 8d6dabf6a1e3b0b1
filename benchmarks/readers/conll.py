"""Tagged sentences in columns (CoNLL), the spans that tags stand for, and their F1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

from .common import DataError, read_text, shown

Span = tuple[str, int, int]
"""Type, first token, and the token after the last."""

_TAG = re.compile(r"O|([BIES])(?:-(.+))?")


class SpanScore(NamedTuple):
    """Shares of spans that agree in type and both ends; 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float


def read_conll(file: Path, *, token: int = 0, tag: int = -1) -> list[tuple[list[str], list[str]]]:
    """The sentences of a file, each as tokens and tags.

    Columns are separated by white space, sentences by blank lines; ``-DOCSTART-`` lines are left out.

    Args:
        file: Such as ``eng.train``.
        token: The column of tokens; negative numbers count from the end.
        tag: The column of tags.

    Raises:
        DataError: A missing or empty file, a line whose number of columns differs from the first one's or is too small.
    """
    sentences: list[tuple[list[str], list[str]]] = []
    tokens: list[str] = []
    tags: list[str] = []
    width = 0
    for number, line in enumerate([*read_text(file).split("\n"), ""], start=1):
        columns = line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if tokens:
                sentences.append((tokens, tags))
                tokens, tags = [], []
            continue
        width = width or len(columns)
        if len(columns) != width:
            raise DataError(f"{file}, line {number}: must have {width} columns, as above, found {len(columns)}")
        if not all(-width <= column < width for column in (token, tag)) or (token - tag) % width == 0:
            rule = f"must have different columns {token} (token) and {tag} (tag)"
            raise DataError(f"{file}, line {number}: {rule}, found {width} columns")
        tokens.append(columns[token])
        tags.append(columns[tag])
    if not sentences:
        raise DataError(f"{file}: must have a sentence, found none")
    return sentences


def spans(tags: Sequence[str]) -> set[Span]:
    """The spans ``(type, start, end)`` of IOB1, IOB2 or BIOES tags, ``end`` exclusive, by the rules of conlleval.

    A span starts at B and S, and at I and E after O, E, S or another type; it ends before the next start or O. So every
    sequence has spans, those that break the rules of their scheme too.

    Raises:
        DataError: A tag that is neither O nor B, I, E or S, alone or with ``-type``.
    """
    found: set[Span] = set()
    start, kind, closed = 0, "", True  # closed: the next tag cannot go on with the span
    open_span = False
    for at, tag in enumerate([*tags, "O"]):
        match = _TAG.fullmatch(tag)
        if match is None:
            raise DataError(
                f"spans: a tag must be O, or B, I, E or S with '-type', found {shown(tag)} (number {at + 1})"
            )
        mark, own = match[1], match[2] or ""
        begins = mark is not None and (mark in "BS" or closed or own != kind)
        if open_span and (begins or mark is None):
            found.add((kind, start, at))
        if begins:
            start = at
        open_span, kind, closed = mark is not None, own, mark is None or mark in "ES"
    return found


def span_f1(found: Sequence[AbstractSet[Span]], wanted: Sequence[AbstractSet[Span]]) -> SpanScore:
    """Precision, recall and F1 of the spans of all sentences together.

    Args:
        found: The spans of each sentence, from :func:`spans` of the predicted tags.
        wanted: Those of the true tags.

    Raises:
        DataError: Different numbers of sentences.
    """
    if len(found) != len(wanted):
        raise DataError(f"span_f1: both must have as many sentences, found {len(found)} and {len(wanted)}")
    right = sum(len(ours & theirs) for ours, theirs in zip(found, wanted, strict=True))
    ours, theirs = sum(map(len, found)), sum(map(len, wanted))
    return SpanScore(
        right / ours if ours else 0.0,
        right / theirs if theirs else 0.0,
        2 * right / (ours + theirs) if ours + theirs else 0.0,
    )
