"""Several labels per sample: what suites of this family share, whatever their data and network are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .base import Method, Metric, Outcome, Trial
from .classes import answers, behind, hashed

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

    from .classes import Part

METHODS = (
    Method("bce", "cross-entropy (BCE)", "Plain training: every label of every image counts the same."),
    Method(
        "thresholds",
        "BCE, tuned thresholds",
        "The same network; the threshold between yes and no is where validation data put it, label by label.",
        claim=False,
        trained=False,
    ),
    Method(
        "adjusted",
        "BCE, prior-adjusted",
        "Adds half of each label's log-odds of being there to the logits during training.",
    ),
    Method("asl", "asymmetric (ASL)", "Absent labels that the network is sure of count much less, or not at all."),
    Method("focal", "focal (gamma 1)", "Labels that the network already gets right count less.", claim=False),
    Method(
        "pos_weight",
        "positive weights",
        "Present labels count more, by the square root of how rare they are, label by label.",
        claim=False,
    ),
)
MAP = Metric("map", "mAP", "Mean over labels of the average precision.")
MACRO_F1 = Metric("macro_f1", "macro F1 at 0.5", "Mean over labels of F1, where yes is a probability above 0.5.")
ECE = Metric("ece", "ECE", "Calibration error: how far probabilities are from frequencies.", higher_is_better=False)
VAL = Metric("val_map", "mAP, val.", "On the validation data.", shown=False)
OWN: Mapping[str, Mapping[str, Any]] = {
    "adjusted": {"tau": 0.5},
    "asl": {"gamma_neg": 4.0, "gamma_pos": 0.0, "clip": 0.05},
    "focal": {"gamma": 1.0},
    "pos_weight": {"power": 0.5},
}


@dataclass(frozen=True)
class LabelData:
    """One seed's data."""

    parts: Mapping[str, Part]
    """Inputs and labels (0 or 1) of ``train``, ``val`` and ``test``."""
    by_size: list[int]
    """Labels from the most common to the rarest in training."""
    names: Sequence[str]
    weights: bytes = b""
    """SHA-256 of the weights that networks start from, where they are given."""


class LabelSuite(Protocol):
    """What a trial asks of its suite."""

    training: Mapping[str, Any]

    def data(self, seed: int) -> LabelData: ...

    def network(self, data: LabelData, options: Mapping[str, Any]) -> nn.Module: ...

    def objective(self, method: str, data: LabelData) -> Objective: ...

    def options(self, method: str) -> dict[str, Any]: ...


def objective(method: str, own: Mapping[str, Any], data: LabelData) -> Objective:
    """The loss of a method, with its settings."""
    from reweigh.losses import (
        AsymmetricLoss,
        BinaryCrossEntropy,
        BinaryLogitAdjustment,
        Objective,
        SigmoidFocalLoss,
    )

    labels = behind(data.parts["train"])[0].double()
    present, samples = labels.sum(0), len(labels)
    if method == "adjusted":
        transform = BinaryLogitAdjustment(present, samples=samples, tau=own["tau"])
        return Objective(BinaryCrossEntropy(logits=transform))
    if method == "asl":
        return AsymmetricLoss(own["gamma_neg"], own["gamma_pos"], clip=own["clip"], reduction="mean")
    if method == "focal":
        return SigmoidFocalLoss(own["gamma"], alpha=None, reduction="mean")
    if method == "pos_weight":
        odds = (samples - present) / present.clamp(min=1.0)
        return Objective(BinaryCrossEntropy(pos_weight=odds ** own["power"]))
    return Objective(BinaryCrossEntropy())


class LabelTrial(Trial):
    """One seed of a multi-label suite."""

    def __init__(self, suite: LabelSuite, seed: int) -> None:
        self.suite, self.seed = suite, seed
        self.data = suite.data(seed)
        self.parts, self.by_size = self.data.parts, self.data.by_size
        self.third = max(1, len(self.by_size) // 3)
        self.counts = behind(self.parts["train"])[0].long().sum(0)
        self.data_hash = hashed(self.parts, self.data.weights)
        self._baseline: nn.Module | None = None

    def run(self, method: str) -> Outcome:
        step_ms = None
        if method == "thresholds":
            # where the baseline's training was finished in an earlier call of the program, it is repeated
            net = self._train("bce")[0] if self._baseline is None else self._baseline
            lines = best_lines(self._logits(net, "val").sigmoid(), self._truth("val"))
        else:
            net, step_ms = self._train(method)
            lines = None
        outcome = self._test(self._logits(net, "test"), self._logits(net, "val"), lines)
        outcome.step_ms = step_ms
        return outcome

    def _train(self, method: str) -> tuple[nn.Module, float]:
        from reweigh.lightning_callbacks import WeightingCallback

        from .training import reproducible, train

        options = self.suite.options(method)
        with reproducible(self.seed):
            net = self.suite.network(self.data, options)
            loss, data = self.suite.objective(method, self.data), self.parts["train"]
            order = None if isinstance(data, tuple) else data.order(options["batch_size"], self.seed)
            callbacks = [WeightingCallback()]
            step_ms = train(net, loss, data, options, seed=self.seed, callbacks=callbacks, order=order)
        net.eval()
        if method == "bce":
            self._baseline = net
        return net, step_ms

    def _logits(self, net: nn.Module, part: str) -> Tensor:
        import torch

        from .training import reproducible

        with reproducible(self.seed), torch.no_grad():
            return answers(net, self.parts[part], self.suite.training, 1024)

    def _truth(self, part: str) -> Tensor:
        return behind(self.parts[part])[0].long()

    def _test(self, logits: Tensor, val: Tensor, lines: Tensor | None) -> Outcome:
        import torch
        from torchmetrics.functional.classification import (
            binary_calibration_error,
            multilabel_average_precision,
            multilabel_f1_score,
        )

        target, labels = self._truth("test"), len(self.by_size)
        truth = self._truth("val")
        known = truth.any(0)  # a label that the validation data lack has no precision there
        p = logits.sigmoid()
        precision = multilabel_average_precision(p, target, labels, average="none")[self.by_size].double()
        said = (p > (torch.tensor(0.5) if lines is None else lines)).long()
        metrics = {
            "map": precision.mean(),
            "tail_ap": precision[-self.third :].mean(),
            "head_ap": precision[: self.third].mean(),
            "macro_f1": multilabel_f1_score(said, target, labels, average="macro"),
            "ece": binary_calibration_error(p.flatten(), target.flatten(), n_bins=15),
            "val_map": multilabel_average_precision(val.sigmoid()[:, known], truth[:, known], int(known.sum())),
        }
        return Outcome(
            {name: float(value) for name, value in metrics.items()},
            details={
                "class_counts": self.counts[self.by_size].tolist(),
                "class_precision": precision.tolist(),
                "class_names": [self.data.names[label] for label in self.by_size],
            },
        )


def best_lines(p: Tensor, target: Tensor) -> Tensor:
    """The threshold between yes and no, label by label, for the largest F1; 0.5 where a label never occurs."""
    import torch

    lines = []
    for column, truth in zip(p.T.double(), target.T, strict=True):
        if not truth.any():
            lines.append(0.5)
            continue
        order = column.argsort(descending=True)
        hits = truth[order].double().cumsum(0)
        f1 = 2 * hits / (torch.arange(1, len(order) + 1) + hits[-1])
        last = int(f1.argmax())
        below = column[order[last + 1]] if last + 1 < len(order) else torch.tensor(0.0, dtype=torch.float64)
        lines.append(float((column[order[last]] + below) / 2))
    return torch.tensor(lines, dtype=p.dtype)
