"""Python's help topics: English prose about Python that most distributions bring along."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

SHARES = {"test": 0.15, "val": 0.15}


@cache
def topics() -> dict[str, str]:
    """Texts by name; empty where this Python comes without them."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:
        return {}
    return dict(found)


def unavailable() -> str | None:
    """Why there is no text, in one line."""
    return None if topics() else "this Python was distributed without its help topics (pydoc_data)"


def words(text: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def split(names: Sequence[str], seed: int, shares: Mapping[str, float] = SHARES) -> dict[str, list[str]]:
    """Names by part, in random order; ``train`` is what the others leave."""
    order = [names[place] for place in np.random.default_rng(seed).permutation(len(names))]
    found, start = {}, 0
    for part, share in shares.items():
        size = round(share * len(names))
        found[part] = order[start : start + size]
        start += size
    return {**found, "train": order[start:]}
