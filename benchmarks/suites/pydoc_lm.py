"""A language model of Python's help topics: rare words, repetition, perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from . import topics
from .language import LanguageSuite, TextData, encoded

VOCABULARY, CONTEXT = 1000, 32

TRAINING: dict[str, Any] = {"steps": 250, "batch_size": 32, "lr": 3e-2, "weight_decay": 0.1, "width": 64}
RATES = (3e-3, 1e-2, 3e-2)
GRID: Mapping[str, Mapping[str, Sequence[Any]]] = {"ce": {"lr": RATES, "weight_decay": (0.01, 0.1)}}


@final
class PydocLM(LanguageSuite):
    """Section "language model" of the default suite."""

    name = "pydoc_lm"
    version = 1
    title = "Language model: rare words"
    summary = f"a small language model of Python's help topics, {VOCABULARY} words"
    story = (
        "A small network learns to predict the next word of Python's help topics. Most of what it reads are a few "
        "common words, so plain training makes it say those; rare words, which carry the content, it seldom gets "
        "right. Weights by word frequency change that, at a price that stands in the same table: perplexity and the "
        "accuracy on frequent words. In every repetition all methods get the same texts, the same initial network and "
        "the same order of batches; which topics are held out changes from one repetition to the next."
    )
    notes = (
        "Data: the help topics of the running Python (their number and length change with its version), split by "
        "topic: 70 % for training, 15 % for validation, 15 % for the test.",
        f"The {VOCABULARY - 2} most common words of the training topics are known; all others are one unknown word, "
        "which counts neither as rare nor as frequent.",
        "Weights change what the model estimates: a model that favours rare words must have a higher perplexity. "
        "Neither column means anything without the other.",
        "The unigram adjustment needs no training; a weighting that is meant to help on rare words has to beat it. It "
        "pays more perplexity for fewer rare words here, and makes the model repeat itself.",
        "TLDR was made for chat models that answer everything with the same few sentences; all that is promised of it "
        "here is that it does little harm.",
        "Learning rate and weight decay were chosen once, on validation text, for plain training, and are the same for "
        "all methods; the exponents are fixed beforehand.",
    )
    seeds = 6
    training: Mapping[str, Any] = TRAINING
    grid = GRID

    def unavailable(self) -> str | None:
        return topics.unavailable()

    def protocol(self) -> Mapping[str, Any]:
        return {"shares": topics.SHARES, "vocabulary": VOCABULARY, "context": CONTEXT}

    def data(self, seed: int) -> TextData:
        texts = topics.topics()
        chosen = topics.split(sorted(texts), seed)
        return encoded(
            {part: [topics.words(texts[name]) for name in names] for part, names in chosen.items()},
            VOCABULARY,
            CONTEXT,
        )
