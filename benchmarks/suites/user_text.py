"""A language model of the user's own text: rare words, repetition, perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, final

from ..readers import DataError, read_documents
from ..readers.common import inventory
from . import topics
from .classes import FromRoot
from .language import METRICS, UNKNOWN, LanguageSuite, TextData, encoded

VOCABULARY, CONTEXT = 8000, 64
FEWEST = 20
"""Documents that a text must have, so that each part gets some."""
PLACES = ("text", "text.txt", "text.jsonl")
"""Where the text may lie in the user's folder; the first that is there is taken."""

MEANING = {
    "rare_accuracy": "Of the held-out words that are in the rarer half of the known words: the share that the model "
    "finds most likely.",
    "frequent_accuracy": "Of the words in the more common half: what the gain costs.",
}


@lru_cache(maxsize=2)
def _read(root: Path) -> list[str]:
    found = next((root / name for name in PLACES if (root / name).exists()), None)
    if found is None:
        raise DataError(f"{root}: must hold {TextLM.needs}, found {inventory(root)}")
    documents = read_documents(found)
    if len(documents) < FEWEST:
        rule = f"must hold at least {FEWEST} documents (blank lines separate those of .txt files)"
        raise DataError(f"{found}: {rule}, found {len(documents)}")
    return documents


@final
class TextLM(FromRoot, LanguageSuite):
    """The protocol of ``pydoc_lm``, larger, on any text."""

    name = "text_lm"
    version = 1
    title = "Language model of your text: rare words"
    summary = f"a language model of your own text, up to {VOCABULARY} words"
    story = (
        "A network learns to predict the next word of your text. Most of what it reads are a few common words, so "
        "plain training makes it say those; rare words, which carry the content, it seldom gets right. Weights by word "
        "frequency change that, at a price that stands in the same table: perplexity and the accuracy on frequent "
        "words. In every repetition all methods get the same documents, the same initial network and the same order of "
        "batches; which documents are held out changes from one repetition to the next."
    )
    notes = (
        "The authors of this program have measured nothing on this text: there is no promise, and no figure of ours "
        "to compare yours with.",
        "Documents are split at random: 70 % for training, 15 % for validation, 15 % for the test. Where documents "
        "repeat each other, or are pieces of one text, the test is easier than new text would be.",
        f"Words and punctuation marks are lower-cased; the {VOCABULARY - 2} most common ones of the training documents "
        "are known, all others are one unknown word, which counts neither as rare nor as frequent. Text that is not "
        "separated into words by blanks makes a poor vocabulary.",
        "Rare is the half of the known words that training saw least often; how often that is depends on the text.",
        "Weights change what the model estimates: a model that favours rare words must have a higher perplexity. "
        "Neither column means anything without the other.",
        "The unigram adjustment needs no training; a weighting that is meant to help on rare words has to beat it.",
        "Nothing was tuned: rates and sizes are of the usual order, the same for all methods, and the network of the "
        "last step is tested. 4000 steps read eight million words, again and again if there are fewer: a text far "
        "below a million words is learned by heart, and its validation perplexity shows it.",
        "A graphics card is used where there is one. Results of different machines differ in their last digits.",
    )
    metrics = tuple(replace(metric, meaning=MEANING.get(metric.name, metric.meaning)) for metric in METRICS)
    gates = ()
    seeds = 6
    needs = "text/ (of .txt or .jsonl files), text.txt or text.jsonl"
    training: Mapping[str, Any] = {
        "steps": 4000,
        "batch_size": 32,
        "lr": 3e-3,
        "weight_decay": 0.1,
        "rate_warmup": 200,
        "milestones": [0.75],
        "width": 256,
        "dropout": 0.2,
        "accelerator": "auto",
    }

    def protocol(self) -> Mapping[str, Any]:
        return {"shares": topics.SHARES, "vocabulary": VOCABULARY, "context": CONTEXT, "rare": "half of the vocabulary"}

    def read(self) -> list[str]:
        return _read(self.home)

    def data(self, seed: int) -> TextData:
        documents = self.read()
        chosen = topics.split([str(number) for number in range(len(documents))], seed)
        texts = {part: [topics.words(documents[int(name)]) for name in mine] for part, mine in chosen.items()}
        for part, mine in texts.items():
            words = sum(len(text) + 1 for text in mine)
            if words < CONTEXT:
                raise DataError(
                    f"{self.home}: the {part} part of seed {seed} must have at least {CONTEXT} words, found {words}; "
                    "give more text"
                )
        known = len({word for text in texts["train"] for word in text}) + 2
        data = encoded(texts, min(VOCABULARY, known), CONTEXT)
        seen = data.counts[UNKNOWN + 1 :]
        seen = seen[seen > 0]
        data = replace(data, rare=int(seen.median()))
        target = data.parts["test"][0][:, 1:]
        target = target[target != UNKNOWN]
        rare = int((data.counts[target] <= data.rare).sum())
        if not 0 < rare < len(target):
            found = f"{rare} rare ones of {len(target)}"
            raise DataError(
                f"{self.home}: the test part of seed {seed} must have rare and frequent words, found {found}; "
                "give more text"
            )
        return data
