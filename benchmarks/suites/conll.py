"""Sequence labelling on the user's own column files (CoNLL): most tokens are outside of what is sought."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from ..readers import DataError, Span, SpanScore, read_conll, span_f1, spans
from ..readers.common import inventory
from .base import Method, Metric, Outcome, Published, Suite, Trial
from .classes import FromRoot

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

    from .tagger import Sentences

FILES = (
    {"train": "train.txt", "val": "dev.txt", "test": "test.txt"},
    {"train": "eng.train", "val": "eng.testa", "test": "eng.testb"},
)
"""Names of the parts; those whose training file is there are taken."""
OUTSIDE = "O"
UNKNOWN = 1
"""Id of words that are not in the vocabulary; 0 is beyond the end of a sentence."""
VOCABULARY, SEEN = 20_000, 2
"""Words that are known at most, and how often training must have them: so that it meets unknown ones."""
SHAPES = 7
"""Of words: beyond the end, digits, lower case, capitalised, upper case, other letters, the rest."""
SHIFTS = tuple(step / 2 for step in range(-8, 9))
"""What the tuned threshold may add to the logit of O."""

Sentence = tuple[list[str], list[str]]

DICE = "Li et al. 2020 (dice loss for NLP), the README of their code; BERT as a reader of questions (MRC)"

METHODS = (
    Method("ce", "cross-entropy (CE)", "Plain training: every token counts the same."),
    Method(
        "threshold",
        "CE, tuned threshold",
        "The same network; how much O has to be ahead of the other tags is what validation data prefer.",
        claim=False,
        trained=False,
    ),
    Method(
        "posthoc_la",
        "post-hoc logit adjustment",
        "Takes the finished CE model and subtracts the log tag frequencies from its logits.",
        claim=False,
        trained=False,
    ),
    Method("dice", "self-adjusting dice", "Compares probability and truth token by token; sure tokens count less."),
    Method("ce_dice", "CE + dice", "Adds the two losses."),
    Method("focal", "focal (gamma 2)", "Tokens that the network already gets right count less.", claim=False),
    Method("inverse", "inverse frequency", "Each token counts in inverse proportion to the frequency of its tag."),
    Method(
        "cb",
        "class-balanced",
        "Weights by the inverse effective number of tokens (beta 0.9999), milder than inverse frequency.",
    ),
)


@lru_cache(maxsize=2)
def _read(root: Path) -> dict[str, list[Sentence]]:
    names = next((names for names in FILES if (root / names["train"]).exists()), None)
    if names is None:
        raise DataError(f"{root}: must hold {Conll.needs}, found {inventory(root)}")
    parts = {}
    for part, name in names.items():
        parts[part] = read_conll(root / name)
        for number, (_, tags) in enumerate(parts[part], 1):
            _check(tags, f"{root / name}, sentence {number}")
        kinds = {tag for _, tags in parts[part] for tag in tags}
        if OUTSIDE not in kinds or len(kinds) < 2:
            raise DataError(f"{root / name}: must have the tag {OUTSIDE} and another one, found {', '.join(kinds)}")
    return parts


def _check(tags: Sequence[str], where: str) -> None:
    try:
        spans(tags)
    except DataError as error:
        raise DataError(f"{where}: {str(error).removeprefix('spans: ')}") from None


def normalised(word: str) -> str:
    """A word as the vocabulary has it: in lower case, each digit as 0."""
    return re.sub(r"\d", "0", word.lower())


def shape(word: str) -> int:
    """The number of a word's shape, from 1 on."""
    if any(letter.isdigit() for letter in word):
        return 1
    if not any(letter.isalpha() for letter in word):
        return 6
    if word.islower():
        return 2
    if word.isupper():
        return 4
    return 3 if word[0].isupper() and word[1:].islower() else 5


@dataclass(frozen=True)
class TagData:
    """The parts, encoded."""

    parts: Mapping[str, Sentences]
    tags: Sequence[str]
    """Of the training file, sorted, O first; a tag of another file that is not among them has the id -1."""
    words: int
    """Size of the vocabulary, with unknown words and what is beyond the end."""
    counts: Tensor
    """Training tokens of each tag."""
    spans: Mapping[str, Sequence[set[Span]]]
    """The true ones, of each sentence of ``val`` and ``test``."""


def encoded(parts: Mapping[str, Sequence[Sentence]]) -> TagData:
    """Ids of words and tags; both are those of the training part."""
    import torch

    from .tagger import Sentences

    common = Counter(normalised(word) for words, _ in parts["train"] for word in words)
    known = [word for word in common if common[word] >= SEEN]
    known = sorted(known, key=lambda word: (-common[word], word))[:VOCABULARY]
    number = {word: place for place, word in enumerate(known, UNKNOWN + 1)}
    tags = [OUTSIDE, *sorted({tag for _, own in parts["train"] for tag in own} - {OUTSIDE})]
    place = {tag: at for at, tag in enumerate(tags)}
    found = {}
    for part, sentences in parts.items():
        features = [
            torch.tensor([[number.get(normalised(word), UNKNOWN), shape(word)] for word in words])
            for words, _ in sentences
        ]
        found[part] = Sentences(features, [torch.tensor([place.get(tag, -1) for tag in own]) for _, own in sentences])
    counts = torch.bincount(torch.cat(list(found["train"].targets)), minlength=len(tags))
    true = {part: [spans(own) for _, own in parts[part]] for part in ("val", "test")}
    return TagData(found, tags, len(known) + 2, counts, true)


@final
class Conll(FromRoot, Suite):
    """Named entities, chunks, or whatever else the last column tags."""

    name = "conll"
    version = 1
    title = "Sequence labelling (CoNLL)"
    summary = "your own CoNLL files (words and tags in columns): find spans, judged by their F1"
    story = (
        "A small network reads your sentences and gives each word a tag: the beginning or the inside of a span, such "
        "as a name, or O for outside. Most words are outside, so a network that says O too often is right most of the "
        "time and finds too little. Each method changes only the loss. What counts is the F1 of whole spans: both ends "
        "and the type must be right. Every method keeps the network of the training step whose spans were best on the "
        "validation file. In every repetition all methods get the same initial network and the same order of batches; "
        "the split is that of your files."
    )
    notes = (
        "The authors of this program have measured nothing on these data: there is no promise, and no figure of ours "
        "to compare yours with.",
        "The paper's figures are of BERT, which has read much text before and turns each type into a question with two "
        "yes-or-no answers per word. Here a small network starts from random weights and tags directly: expect figures "
        "far below, and compare methods with each other only.",
        "Words are the first column and tags the last; a tag scheme (IOB1, IOB2, BIOES) is used as it is, and spans "
        "are counted as conlleval does. Tags are chosen word by word. A tag that the training file does not have is "
        "never found.",
        "Dice alone changes how sure the network has to be; a tuned threshold and CE + dice stand beside it, as moving "
        "it looks like learning. A method that does not beat the tuned threshold has no case on these data.",
        "Dice has the settings of the authors' scripts, per word over all tags; CE + dice adds both with weight 1. A "
        "network that starts from random weights may end up calling every word O with dice alone. "
        "Nothing was tuned: rates and sizes are of the usual order, the same for all methods.",
        "Accuracy on O is the price of finding more.",
        "A graphics card is used where there is one. Results of different machines differ in their last digits.",
    )
    methods = METHODS
    quick = ("ce", "threshold", "ce_dice")
    default = ("ce", "threshold", "posthoc_la", "dice", "ce_dice", "inverse")
    metrics = (
        Metric("f1", "span F1", "Harmonic mean of precision and recall of whole spans."),
        Metric("precision", "precision", "Of the spans that are found: the share that are right."),
        Metric("recall", "recall", "Of the true spans: the share that are found."),
        Metric("outside_accuracy", "acc. on O", "Of the words outside of all spans: the share that is called so."),
        Metric("val_f1", "span F1, val.", "On the validation file, by which was chosen.", shown=False),
    )
    published = (
        Published("focal, BERT", "span F1, CoNLL03, %", "93.08", DICE),
        Published("dice, BERT", "span F1, CoNLL03, %", "93.21", DICE),
        Published("focal, BERT", "span F1, OntoNotes 5, %", "91.12", DICE),
        Published("dice, BERT", "span F1, OntoNotes 5, %", "92.01", DICE),
    )
    seeds = 6
    needs = "train.txt, dev.txt and test.txt, or eng.train, eng.testa and eng.testb (words and tags in columns)"
    folders = ("conll2003", "conll03", "conll")
    training: Mapping[str, Any] = {
        "steps": 6000,
        "batch_size": 32,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "look_every": 400,
        "width": 100,
        "shape_width": 16,
        "hidden": 128,
        "dropout": 0.5,
        "accelerator": "auto",
    }
    own: Mapping[str, Mapping[str, Any]] = {
        "threshold": {"shifts": list(SHIFTS)},
        "posthoc_la": {"tau": 1.0},
        "dice": {"alpha": 0.01, "smooth": 1.0},
        "ce_dice": {"alpha": 0.01, "smooth": 1.0, "dice": 1.0},
        "focal": {"gamma": 2.0},
        "inverse": {"power": 1.0, "reduction": "weighted_mean"},
        "cb": {"beta": 0.9999, "reduction": "weighted_mean"},
    }
    chosen_by = "val_f1"

    def protocol(self) -> Mapping[str, Any]:
        return {"vocabulary": VOCABULARY, "seen": SEEN, "shapes": SHAPES}

    def read(self) -> dict[str, list[Sentence]]:
        return _read(self.home)

    def prepare(self, seed: int) -> ConllTrial:
        return ConllTrial(self, seed)

    def objective(self, method: str, counts: Tensor) -> Objective:
        """The loss of a method, for the training tokens of each tag."""
        from reweigh.losses import CrossEntropy, FocalLoss, Objective, SelfAdjustingDiceLoss
        from reweigh.weighting import EffectiveNumber, InverseFrequency

        own = self.options(method)
        if method in ("dice", "ce_dice"):
            dice = SelfAdjustingDiceLoss(own["alpha"], smooth=own["smooth"])
            return dice if method == "dice" else Objective(CrossEntropy()) + own["dice"] * dice
        if method == "focal":
            return FocalLoss(own["gamma"])
        if method == "inverse":
            return Objective(CrossEntropy(), InverseFrequency(counts, power=own["power"]), own["reduction"])
        if method == "cb":
            return Objective(CrossEntropy(), EffectiveNumber(counts, beta=own["beta"]), own["reduction"])
        return Objective(CrossEntropy())


class ConllTrial(Trial):
    """One seed: the initial network and the order of batches."""

    def __init__(self, suite: Conll, seed: int) -> None:
        from .vision import place

        self.suite, self.seed = suite, seed
        self.device = place(suite.training)
        self.data = encoded(suite.read())
        self.parts, self.counts = self.data.parts, self.data.counts
        digest = hashlib.sha256("\n".join(self.data.tags).encode())
        for part in sorted(self.parts):
            digest.update(self.parts[part].digest())
        self.data_hash = digest.hexdigest()
        self._baseline: nn.Module | None = None

    def run(self, method: str) -> Outcome:
        from reweigh.losses import posthoc_logit_adjustment

        step_ms = step = None
        if method in ("threshold", "posthoc_la"):
            # where the baseline's training was finished in an earlier call of the program, it is repeated
            net = self._train("ce")[0] if self._baseline is None else self._baseline
        else:
            net, step_ms, step = self._train(method)
        found = self._logits(net)
        details: dict[str, Any] = {} if step is None else {"chosen_step": step}
        if method == "posthoc_la":
            tau = self.suite.options(method)["tau"]
            found = {
                part: posthoc_logit_adjustment(mine, self.counts.clamp(min=1), tau=tau) for part, mine in found.items()
            }
        elif method == "threshold":
            shift = self._line(found["val"], self.suite.options(method)["shifts"])
            found, details["shift"] = {part: _shifted(mine, shift) for part, mine in found.items()}, shift
        return Outcome(self._test(found), step_ms, details)

    def _line(self, val: Tensor, shifts: Sequence[float]) -> float:
        """What is added to the logit of O for the best F1; of equals the one that changes least."""
        scores = {shift: self._score(_shifted(val, shift), "val").f1 for shift in shifts}
        return max(shifts, key=lambda shift: (scores[shift], -abs(shift)))

    def _train(self, method: str) -> tuple[nn.Module, float, int | None]:
        from reweigh.lightning_callbacks import WeightingCallback

        from .tagger import Tagger, Tagging, logits
        from .training import KeepBest, reproducible, train

        options = self.suite.options(method)
        best = KeepBest(lambda net: self._score(logits(net, self.parts["val"], 256), "val").f1, options["look_every"])
        with reproducible(self.seed):
            net = Tagger(self.data.words, SHAPES, len(self.data.tags), options)
            step_ms = train(
                net,
                self.suite.objective(method, self.counts),
                self.parts["train"],
                options,
                seed=self.seed,
                callbacks=[WeightingCallback(), best],
                module=Tagging,
            )
        net.eval()
        if method == "ce":
            self._baseline = net
        return net, step_ms, best.step

    def _logits(self, net: nn.Module) -> dict[str, Tensor]:
        from .tagger import logits
        from .training import reproducible

        with reproducible(self.seed):
            net.to(self.device)
            found = {part: logits(net, self.parts[part], 256) for part in ("val", "test")}
            net.cpu()
        return found

    def _score(self, found: Tensor, part: str) -> SpanScore:
        """Of the spans that logits of all tokens stand for."""
        names, at, mine = self.data.tags, 0, []
        answer = [names[tag] for tag in found.argmax(-1).tolist()]
        for tags in self.parts[part].targets:
            mine.append(spans(answer[at : at + len(tags)]))
            at += len(tags)
        return span_f1(mine, self.data.spans[part])

    def _test(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        import torch

        precision, recall, f1 = self._score(found["test"], "test")
        outside = torch.cat(list(self.parts["test"].targets)) == 0
        right = found["test"].argmax(-1)[outside] == 0
        return {
            "f1": f1,
            "precision": precision,
            "recall": recall,
            "outside_accuracy": float(right.double().mean()),
            "val_f1": self._score(found["val"], "val").f1,
        }


def _shifted(logits: Tensor, shift: float) -> Tensor:
    """Logits with something added to that of O."""
    found = logits.clone()
    found[:, 0] += shift
    return found
