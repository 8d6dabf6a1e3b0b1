"""Which words of Python's help topics stand in quotation marks, once the marks are gone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, final

from . import topics
from .tagging import AROUND, TagData, TagSuite, windows

VOCABULARY = 3000
SHARES = {"test": 0.2, "val": 0.2}

TRAINING: dict[str, Any] = {
    "steps": 300,
    "batch_size": 256,
    "lr": 3e-2,
    "weight_decay": 0.1,
    "width": 32,
    "hidden": 64,
}
RATES = (3e-3, 1e-2, 3e-2)
GRID: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "ce": {"lr": RATES, "weight_decay": (0.01, 0.1)},
    "ce_dice": {"lr": RATES, "dice": (0.5, 1.0)},
    "sqrt_weight": {"lr": RATES, "power": (0.25, 0.5)},
    "full_weight": {"lr": RATES},
    "focal": {"lr": RATES, "gamma": (1.0, 2.0)},
    "dice": {"lr": RATES, "weight_decay": (0.01, 0.1)},
}


def tagged(text: str) -> list[tuple[str, bool]]:
    """Words of a text, and whether each stood in double quotation marks on one line; the marks are left out."""
    found: list[tuple[str, bool]] = []
    for piece in re.split(r'("[^"\n]{1,60}")', text):
        inside = len(piece) > 2 and piece.startswith('"') and piece.endswith('"')
        found += [(word, inside) for word in topics.words(piece.replace('"', " "))]
    return found


@final
class PydocQuotes(TagSuite):
    """Section "token tagging" of the default suite."""

    name = "pydoc_quotes"
    version = 1
    title = "Tokens in quotation marks"
    summary = "token tagging, 9 % positive: which words of Python's help topics stood in quotation marks"
    story = (
        "Python's help topics put pieces of code in quotation marks. The marks are taken out, and a small network has "
        f"to say for each word, from it and the {AROUND} words on either side, whether it stood in them. About 9 of "
        "100 do. What counts is F1, the harmonic mean of precision and recall, which plain training does not aim at. "
        "In every repetition all methods get the same texts, the same initial network and the same order of batches; "
        "which topics are held out changes from one repetition to the next."
    )
    notes = (
        "Data: the help topics of the running Python (their number and length change with its version), split by "
        "topic: 60 % for training, 20 % for validation, 20 % for the test.",
        "Moving the threshold costs nothing and gives most of what weights give in F1 at 0.5; the column "
        "with a tuned threshold says what a method has learned beyond that.",
        "Learning rate and own settings of every method are the best of at most six pairs, by F1 at 0.5 on validation "
        "text, over seeds that are not among the reported ones.",
        "Nothing is claimed here. At a tenth of its learning rate plain training is 3 points of F1 behind CE + dice "
        "(`tune` prints both); at the rate that suits it, it is not.",
        "Dice compares the positives of a batch as a whole. Alone it is unstable; nothing is claimed of it.",
    )
    seeds = 6
    training: Mapping[str, Any] = TRAINING
    grid = GRID

    def unavailable(self) -> str | None:
        return topics.unavailable()

    def protocol(self) -> Mapping[str, Any]:
        return {"shares": SHARES, "vocabulary": VOCABULARY, "around": AROUND}

    def data(self, seed: int) -> TagData:
        texts = topics.topics()
        chosen = topics.split(sorted(texts), seed, SHARES)
        parts = windows({part: [tagged(texts[name]) for name in names] for part, names in chosen.items()}, VOCABULARY)
        return TagData(parts, VOCABULARY)
