"""Few positive tokens among many: what suites of this family share, whatever their text is."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Method, Metric, Outcome, Suite, Trial
from .classes import hashed

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

AROUND = 3
"""Tokens that are read to the left and to the right of the one in question."""
OUTSIDE, UNKNOWN = 0, 1
"""Ids of what is beyond the ends of a text, and of words that are not in the vocabulary."""

METHODS = (
    Method("ce", "cross-entropy (CE)", "Plain training: every token counts the same."),
    Method(
        "threshold",
        "CE, tuned threshold",
        "The same network; the threshold between yes and no is where validation data put it.",
        claim=False,
        trained=False,
    ),
    Method(
        "ce_dice",
        "CE + dice",
        "Adds a loss that compares the predicted positives with the true ones as a whole.",
        claim=False,
    ),
    Method("sqrt_weight", "power of odds", "Positives count more, by a small power of how rare they are.", claim=False),
    Method("full_weight", "odds", "Positives count as much in sum as negatives.", claim=False),
    Method("focal", "focal (gamma 1)", "Tokens that the network already gets right count less.", claim=False),
    Method("dice", "dice alone", "The comparison as a whole, without cross-entropy.", claim=False),
)
METRICS = (
    Metric(
        "f1", "F1 at 0.5", "Harmonic mean of precision and recall of the positives; yes above a probability of 0.5."
    ),
    Metric("f1_tuned", "F1, tuned", "The same, with the threshold that validation data chose: what is learned."),
    Metric("precision", "precision", "Of the tokens said to be positive: the share that are."),
    Metric("recall", "recall", "Of the positive tokens: the share that are found."),
    Metric("average_precision", "average precision", "Area under precision over recall; depends on no line."),
    Metric(
        "bias",
        "bias",
        "How far the mean probability is from the share of positives, in either direction.",
        higher_is_better=False,
    ),
    Metric("val_f1", "F1 at 0.5, val.", "On the validation text.", shown=False),
)
OWN: Mapping[str, Mapping[str, Any]] = {
    "ce_dice": {"dice": 1.0, "lr": 1e-2},
    "sqrt_weight": {"power": 0.25, "lr": 1e-2},
    "full_weight": {"power": 1.0},
    "focal": {"gamma": 1.0},
    "dice": {"lr": 1e-2},
}


@dataclass(frozen=True)
class TagData:
    """One seed's data."""

    parts: dict[str, tuple[Tensor, Tensor]]
    """Windows ``(N, 2 AROUND + 1)`` of ids and labels ``(N, 1)``, 0 or 1, of ``train``, ``val`` and ``test``."""
    vocabulary: int


def windows(
    texts: Mapping[str, Sequence[Sequence[tuple[str, bool]]]], vocabulary: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A window for each token; the most common words of the training texts are known."""
    import torch

    common = Counter(word for text in texts["train"] for word, _ in text)
    known = sorted(common, key=lambda word: (-common[word], word))[: vocabulary - 2]
    number = {word: place for place, word in enumerate(known, 2)}
    parts = {}
    for part, mine in texts.items():
        rows, labels = [], []
        for text in mine:
            ids = [OUTSIDE] * AROUND + [number.get(word, UNKNOWN) for word, _ in text] + [OUTSIDE] * AROUND
            rows.append(torch.tensor(ids).unfold(0, 2 * AROUND + 1, 1))
            labels.append(torch.tensor([[float(label)] for _, label in text]))
        parts[part] = torch.cat(rows), torch.cat(labels)
    return parts


class TagSuite(Suite):
    """Is a token of the kind that is sought: a window of words, a small network, one logit."""

    methods = METHODS
    quick = ("ce", "threshold", "ce_dice")
    default = ("ce", "threshold", "ce_dice", "sqrt_weight")
    metrics = METRICS
    own = OWN
    chosen_by = "val_f1"

    @abstractmethod
    def data(self, seed: int) -> TagData:
        """The split of a seed."""

    def prepare(self, seed: int) -> TagTrial:
        return TagTrial(self, seed)

    def objective(self, method: str, positives: float) -> Objective:
        """The loss of a method, for a share of positives."""
        from reweigh.losses import BinaryCrossEntropy, DiceLoss, Objective, SigmoidFocalLoss

        own = self.options(method)
        if method in ("dice", "ce_dice"):
            dice = DiceLoss(activation="sigmoid", over="batch")
            return dice if method == "dice" else Objective(BinaryCrossEntropy()) + own["dice"] * dice
        if method in ("sqrt_weight", "full_weight"):
            odds = (1.0 - positives) / positives
            return Objective(BinaryCrossEntropy(pos_weight=odds ** own["power"]))
        if method == "focal":
            return SigmoidFocalLoss(own["gamma"], alpha=None, reduction="mean")
        return Objective(BinaryCrossEntropy())


class TagTrial(Trial):
    """One seed of a :class:`TagSuite`."""

    def __init__(self, suite: TagSuite, seed: int) -> None:
        self.suite, self.seed = suite, seed
        self.data = suite.data(seed)
        self.parts = self.data.parts
        self.data_hash = hashed(self.parts)
        self._baseline: nn.Module | None = None

    def run(self, method: str) -> Outcome:
        from .multilabel import best_lines

        step_ms, line = None, 0.5
        if method == "threshold":
            # where the baseline's training was finished in an earlier call of the program, it is repeated
            net = self._train("ce")[0] if self._baseline is None else self._baseline
        else:
            net, step_ms = self._train(method)
        p = {part: self._probabilities(net, part) for part in ("test", "val")}
        tuned = float(best_lines(p["val"][:, None], self.parts["val"][1].long()))
        outcome = self._test(p["test"], p["val"], tuned if method == "threshold" else line, tuned)
        outcome.step_ms = step_ms
        return outcome

    def _train(self, method: str) -> tuple[nn.Module, float]:
        from torch import nn

        from reweigh.lightning_callbacks import WeightingCallback

        from .training import reproducible, train

        options = self.suite.options(method)
        width = options["width"]
        with reproducible(self.seed):
            net = nn.Sequential(
                nn.Embedding(self.data.vocabulary, width),
                nn.Flatten(),
                nn.Linear((2 * AROUND + 1) * width, options["hidden"]),
                nn.ReLU(),
                nn.Linear(options["hidden"], 1),
            )
            loss = self.suite.objective(method, float(self.parts["train"][1].mean()))
            step_ms = train(net, loss, self.parts["train"], options, seed=self.seed, callbacks=[WeightingCallback()])
        net.eval()
        if method == "ce":
            self._baseline = net
        return net, step_ms

    def _probabilities(self, net: nn.Module, part: str) -> Tensor:
        import torch

        from .training import reproducible

        inputs = self.parts[part][0]
        with reproducible(self.seed), torch.no_grad():
            return torch.cat([net(inputs[at : at + 8192]) for at in range(0, len(inputs), 8192)]).sigmoid().squeeze(1)

    def _test(self, p: Tensor, val: Tensor, line: float, tuned: float) -> Outcome:
        from torchmetrics.functional.classification import (
            binary_average_precision,
            binary_f1_score,
            binary_precision,
            binary_recall,
        )

        target, truth = (self.parts[part][1].squeeze(1).long() for part in ("test", "val"))
        metrics = {
            "f1": binary_f1_score(p, target, threshold=line),
            "f1_tuned": binary_f1_score(p, target, threshold=tuned),
            "precision": binary_precision(p, target, threshold=line),
            "recall": binary_recall(p, target, threshold=line),
            "average_precision": binary_average_precision(p, target),
            "bias": (p.double().mean() - target.double().mean()).abs(),
            "val_f1": binary_f1_score(val, truth, threshold=line),
        }
        return Outcome({name: float(value) for name, value in metrics.items()})
