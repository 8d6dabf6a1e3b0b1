"""Unicode categories: the imbalance of the world's scripts, as the standard library has it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate
from .classes import BALANCED, ECE, MACRO_F1, METHODS, NATURAL, VAL, WORST, ClassData, ClassSuite, ends

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

FEWEST = 25
"""Smaller categories are left out."""
HELD_OUT = {"test": (0.24, 150), "val": (0.12, 50)}
"""Share of each category, and at most so many samples."""
WORDS, LENGTH = 4000, 12
"""Most common words of the training names that are known, and words of a name that are read."""
NAMED_BY_RULE = re.compile(r"(CJK (UNIFIED|COMPATIBILITY) IDEOGRAPH|TANGUT IDEOGRAPH|KHITAN SMALL SCRIPT CHARACTER)-")
"""Names that say nothing but a number; Hangul syllables, named by rule too, are a block of their own."""
MEANING = {
    "Ll": "lowercase letter",
    "Lu": "uppercase letter",
    "Lo": "other letter",
    "Lm": "modifier letter",
    "Mn": "non-spacing mark",
    "Mc": "spacing mark",
    "Nd": "decimal digit",
    "Nl": "letter number",
    "No": "other number",
    "Pd": "dash",
    "Ps": "opening bracket",
    "Pe": "closing bracket",
    "Po": "other punctuation",
    "Sc": "currency",
    "Sk": "modifier symbol",
    "Sm": "mathematical symbol",
    "So": "other symbol",
    "Cf": "format character",
    "Zs": "space",
}

TRAINING: dict[str, Any] = {"steps": 450, "batch_size": 256, "lr": 3e-2, "weight_decay": 0.01, "width": 48}
GRID: Mapping[str, Mapping[str, Sequence[Any]]] = {"ce": {"lr": (1e-2, 3e-2, 1e-1), "weight_decay": (0.01, 0.1)}}


@cache
def characters() -> tuple[list[list[str]], list[str]]:
    """Words of the name, and the category, of every character whose name is its own."""
    names, categories = [], []
    for point in range(0x110000):
        character = chr(point)
        name = unicodedata.name(character, "")
        if not name or 0xAC00 <= point <= 0xD7A3 or NAMED_BY_RULE.match(name):
            continue
        names.append(name.replace("-", " ").split())
        categories.append(unicodedata.category(character))
    common = {name for name, number in Counter(categories).items() if number >= FEWEST}
    kept = [place for place, name in enumerate(categories) if name in common]
    return [names[place] for place in kept], [categories[place] for place in kept]


@final
class UnicodeCategory(ClassSuite):
    """Section "imbalanced classes, as they are" of the default suite."""

    name = "unicode_category"
    version = 1
    title = "Unicode categories"
    summary = "text classification, natural imbalance of 500 and more: a character's category from its name"
    story = (
        "Every Unicode character has a name, such as LATIN SMALL LETTER A WITH ACUTE, and a category, such as "
        "lowercase letter. A small network reads the words of the name and has to tell the category. Some categories "
        "have thousands of characters and some have two dozen; nothing was left out to make it so. The test has up to "
        "150 unseen characters of each category. In every repetition all methods get the same characters, the same "
        "initial network and the same order of training batches."
    )
    notes = (
        "Data: Python's own table of Unicode names (which grows with Python's versions), without characters whose name "
        "is made by rule (ideographs, Hangul syllables) and without categories of fewer than 25.",
        "How much there is to gain depends on how well plain training is tuned; here the learning rate is the one that "
        "suits it best (`tune` prints what others give).",
        "The rarest categories have few test characters (24 %, at least 6), so their recall is coarse; means over "
        "categories and repetitions are not.",
        "Learning rate, weight decay and width were chosen once, on validation data, for plain cross-entropy, and are "
        "the same for all methods; their other settings are the usual ones.",
    )
    methods = tuple(
        METHODS[name]
        for name in ("ce", "posthoc_la", "inverse", "sqrt_inverse", "cb", "balanced_softmax", "focal", "drw")
    )
    quick = ("ce", "posthoc_la", "inverse")
    default = ("ce", "posthoc_la", "inverse", "sqrt_inverse", "balanced_softmax", "focal")
    metrics = (BALANCED, *ends("6"), WORST, MACRO_F1, NATURAL, ECE, VAL)
    gates = (
        Gate("inverse", "balanced_accuracy", 0.03),
        Gate("sqrt_inverse", "balanced_accuracy", 0.025),
        Gate("balanced_softmax", "balanced_accuracy", 0.03),
    )
    seeds = 6
    training: Mapping[str, Any] = TRAINING
    grid = GRID

    def protocol(self) -> Mapping[str, Any]:
        shares = {part: list(limits) for part, limits in HELD_OUT.items()}
        return {"held_out": shares, "fewest": FEWEST, "words": WORDS, "length": LENGTH}

    def data(self, seed: int) -> ClassData:
        import torch

        names, categories = characters()
        classes = sorted(set(categories))
        target = np.array([classes.index(name) for name in categories])
        rng = np.random.default_rng(seed)
        places: dict[str, list[np.ndarray[Any, Any]]] = {"test": [], "val": [], "train": []}
        for label in range(len(classes)):
            mine = rng.permutation(np.flatnonzero(target == label))
            start = 0
            for part, (share, most) in HELD_OUT.items():
                size = min(round(share * len(mine)), most)
                places[part].append(mine[start : start + size])
                start += size
            places["train"].append(mine[start:])
        at = {part: np.concatenate(pieces) for part, pieces in places.items()}
        counts = Counter(word for place in at["train"] for word in set(names[place]))
        known = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
        number = {word: place for place, word in enumerate(known, 1)}

        def encoded(chosen: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            rows = np.zeros((len(chosen), LENGTH), np.int64)
            for row, place in zip(rows, chosen, strict=True):
                found = [number[word] for word in names[place] if word in number][:LENGTH]
                row[: len(found)] = found
            return rows

        parts = {
            part: (torch.from_numpy(encoded(chosen)), torch.from_numpy(target[chosen])) for part, chosen in at.items()
        }
        sizes = np.bincount(target[at["train"]], minlength=len(classes))
        by_size = np.argsort(-sizes, kind="stable").tolist()
        return ClassData(parts, by_size, [MEANING.get(name, name) for name in classes])

    def network(self, data: ClassData, options: Mapping[str, Any]) -> nn.Module:
        from torch import nn

        width = options["width"]
        return nn.Sequential(
            nn.EmbeddingBag(WORDS + 1, width, mode="mean", padding_idx=0),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, len(data.by_size)),
        )
