"""Weak groups: what suites share in which a shortcut holds in most of the training data, and the worst group counts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Method, Metric, Outcome, Suite, Trial
from .classes import answers, behind, hashed

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

    from .classes import Part
    from .training import EpochOrder

TIMES = 20
"""How often a sample counts in JTT's second training that its first one gets wrong."""

WHOLE = 1 << 20
"""Samples in memory are looked at all at once."""

METHODS: Sequence[Method] = (
    Method("erm", "plain training (ERM)", "Cross-entropy: every sample counts the same."),
    Method("group_dro", "group DRO", "Weighs groups by a running estimate of which one does worst."),
    Method(
        "group_dro_adjusted",
        "group DRO, adjusted",
        "The same, with small groups' losses raised by C / sqrt(size), for what they lose from training to test.",
    ),
    Method("group_dro_balanced", "group DRO, balanced batches", "Group DRO on batches with equal shares of groups."),
    Method("resampling", "group resampling", "Plain loss on batches with equal shares of groups."),
    Method("group_weights", "group weights", "Each sample counts in inverse proportion to the size of its group."),
    Method(
        "jtt",
        "Just Train Twice (JTT)",
        f"What a first training gets wrong counts {TIMES} times in a second one; no groups.",
        claim=False,
    ),
    Method("cvar", "CVaR 20 %", "Trains on the worst fifth of each batch; no groups.", claim=False),
    Method("kl_dro", "KL-DRO", "Weighs samples of a batch by the exponential of their loss; no groups.", claim=False),
    Method("focal", "focal (gamma 2)", "Samples already got right count less; no groups.", claim=False),
    Method("gce", "GCE (q 0.7)", "Made for wrong labels: samples that are got wrong count less.", claim=False),
)

WORST_GROUP = Metric("worst_group", "worst group", "Accuracy in the group that is served worst.")
AVERAGE = Metric("average", "average", "Mean accuracy of the four groups.")
GAP = Metric("gap", "gap", "Average minus worst group: how uneven the service is.", higher_is_better=False)
TRAIN_AVERAGE = Metric("train_average", "acc. at train freq.", "Accuracy if groups are as frequent as in training.")
VAL_WORST_GROUP = Metric(
    "val_worst_group", "worst group, val.", "On the validation data, by which was chosen.", shown=False
)


@dataclass(frozen=True)
class GroupData:
    """One seed's data."""

    parts: Mapping[str, Part]
    """Inputs, targets and groups of ``train``, ``val`` and ``test``."""
    names: Sequence[str]
    """Of the groups, by number."""
    weights: bytes = b""
    """SHA-256 of the weights that networks start from, where they are given."""


class GroupSuite(Suite):
    """Samples with a label and a group. ``training`` has ``look_every``: steps between looks at validation data."""

    methods = METHODS
    metrics: Sequence[Metric] = (WORST_GROUP, AVERAGE, GAP, TRAIN_AVERAGE, VAL_WORST_GROUP)
    chosen_by = "val_worst_group"

    @abstractmethod
    def data(self, seed: int) -> GroupData:
        """The split of a seed."""

    @abstractmethod
    def network(self, data: GroupData, options: Mapping[str, Any]) -> nn.Module:
        """A fresh network."""

    def more(self, accuracies: Tensor) -> dict[str, Tensor]:
        """Metrics of its own, from the accuracy of each group."""
        return {}

    def prepare(self, seed: int) -> GroupTrial:
        return GroupTrial(self, seed)

    def objective(self, method: str, group_counts: Tensor) -> Objective:
        """The loss of a method."""
        from reweigh.losses import (
            CrossEntropy,
            CVaRLoss,
            FocalLoss,
            GCELoss,
            GroupDROLoss,
            KLDROLoss,
            Objective,
        )
        from reweigh.weighting import GroupFrequency

        own = self.options(method)
        if method in ("group_dro", "group_dro_balanced"):
            return GroupDROLoss(len(group_counts), step_size=own["step_size"])
        if method == "group_dro_adjusted":
            return GroupDROLoss(
                len(group_counts),
                step_size=own["step_size"],
                adjustment=own["adjustment"],
                group_counts=group_counts,
            )
        if method == "group_weights":
            return Objective(CrossEntropy(), GroupFrequency(group_counts), "weighted_mean")
        if method == "cvar":
            return CVaRLoss(own["alpha"])
        if method == "kl_dro":
            return KLDROLoss(own["temperature"])
        if method == "focal":
            return FocalLoss(own["gamma"])
        if method == "gce":
            return GCELoss(own["q"])
        return Objective(CrossEntropy())


class GroupTrial(Trial):
    """One seed of a :class:`GroupSuite`."""

    def __init__(self, suite: GroupSuite, seed: int) -> None:
        import torch

        self.suite, self.seed = suite, seed
        self.data = suite.data(seed)
        self.parts, self.groups = self.data.parts, len(self.data.names)
        self.data_hash = hashed(self.parts, self.data.weights)
        self.counts = torch.bincount(behind(self.parts["train"])[1], minlength=self.groups)

    def run(self, method: str) -> Outcome:
        details: dict[str, Any] = {}
        before = 0.0
        weights = None
        if method == "jtt":
            weights, before, details["first_training"] = self._errors()
        net, step_ms, step = self._train(method, weights)
        outcome = self._test(net)
        outcome.step_ms = step_ms + before / self.suite.training["steps"]
        outcome.details.update(details, chosen_step=step)
        return outcome

    def _errors(self) -> tuple[Tensor, float, dict[str, Any]]:
        """JTT's sample weights, the milliseconds that they took, and how the errors lie in the groups."""
        import torch

        from .training import reproducible

        own = self.suite.options("jtt")
        steps = min(own["first_steps"], own["steps"])
        net, step_ms, _ = self._train("erm", None, steps=steps, choose=False)
        target, group = behind(self.parts["train"])
        with reproducible(self.seed), torch.no_grad():
            wrong = self._logits(net, "train").argmax(1) != target
        by_group = torch.bincount(group[wrong], minlength=self.groups)
        return torch.where(wrong, float(own["times"]), 1.0), steps * step_ms, {"errors": by_group.tolist()}

    def _train(
        self, method: str, weights: Tensor | None, *, steps: int | None = None, choose: bool = True
    ) -> tuple[nn.Module, float, int | None]:
        """The network, the milliseconds of a step, and the step at which the validation data chose it."""
        from reweigh.lightning_callbacks import WeightingCallback

        from .training import Classifier, KeepBest, reproducible, train

        options = self.suite.options(method)
        options["steps"] = steps or options["steps"]
        data, names = self.parts["train"], ["group"]
        if weights is not None:
            data = (*data, weights) if isinstance(data, tuple) else data.plus(weights)
            names.append("sample_weight")
        order = self._order(method, options["batch_size"])
        if not isinstance(data, tuple):
            order = data.order(options["batch_size"], self.seed, order)
        best = KeepBest(self._validate, options["look_every"])
        with reproducible(self.seed):
            net = self.suite.network(self.data, options)
            step_ms = train(
                net,
                self.suite.objective(method, self.counts),
                data,
                options,
                seed=self.seed,
                callbacks=[WeightingCallback(), *([best] if choose else [])],
                module=Classifier.taking(*names),
                order=order,
            )
        return net.eval(), step_ms, best.step

    def _order(self, method: str, batch_size: int) -> EpochOrder | None:
        """Other batches than the common ones, for methods that draw them by group."""
        from reweigh.weighting import group_sampling_weights

        from .training import WeightedOrder

        if method not in ("resampling", "group_dro_balanced"):
            return None
        return WeightedOrder(group_sampling_weights(behind(self.parts["train"])[1]), batch_size, self.seed)

    def _logits(self, net: nn.Module, part: str) -> Tensor:
        return answers(net, self.parts[part], self.suite.training, WHOLE)

    def _accuracies(self, net: nn.Module, part: str) -> Tensor:
        """Of each group, from counts: equal accuracies are equal numbers."""
        import torch

        from reweigh.lightning_callbacks import GroupAccuracy

        target, group = behind(self.parts[part])
        with torch.no_grad():
            found: Tensor = GroupAccuracy(self.groups)(self._logits(net, part), target, group)
        return found.double()

    def _validate(self, net: nn.Module) -> tuple[float, float]:
        found = self._accuracies(net, "val")
        return float(found.min()), float(found.mean())

    def _test(self, net: nn.Module) -> Outcome:
        import torch

        from .training import reproducible

        with reproducible(self.seed):
            found, chosen = self._accuracies(net, "test"), self._validate(net)[0]
        sizes = self.counts.double()
        average = found.mean()
        metrics = {
            "worst_group": found.min(),
            "average": average,
            "gap": average - found.min(),
            "train_average": (found * sizes).sum() / sizes.sum(),
            **self.suite.more(found),
            "val_worst_group": torch.tensor(chosen),
        }
        return Outcome(
            {name: float(value) for name, value in metrics.items()},
            details={
                "group_counts": self.counts.tolist(),
                "group_accuracy": found.tolist(),
                "group_names": list(self.data.names),
            },
        )
