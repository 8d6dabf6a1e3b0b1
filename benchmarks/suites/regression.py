"""A number to predict, of which some values are rare: what suites of this family share, whatever their data are."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Method, Outcome, Suite, Trial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

KERNEL = {"sigma": 2.0, "radius": 2}
"""Of the Gaussian that smooths their counts: five bins wide, as in the paper."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "density": {"power": 1.0},
    "density_sqrt": {"power": 0.5},
    "quarters": {"power": 1.0},
    "mae": {"lr": 3e-3},
    "huber": {"delta": 1.0, "lr": 3e-3},
    "cvar": {"alpha": 0.5},
}

METHODS = (
    Method("mse", "squared error (MSE)", "Plain training: every sample counts the same."),
    Method("density", "inverse density", "Samples count the more, the rarer values like theirs are."),
    Method("density_sqrt", "inverse density, root", "The same with the square root of the density: milder."),
    Method(
        "posthoc",
        "MSE, stretched after",
        "MSE's predictions put on a straight line that is fitted with the weights of inverse density.",
        trained=False,
    ),
    Method(
        "quarters",
        "inverse quarter size",
        "Each quarter of the values has the same total weight; is told the quarters of the test.",
        claim=False,
    ),
    Method("mae", "absolute error (MAE)", "The error itself, not its square.", claim=False),
    Method("huber", "Huber (delta 1)", "Squared for small errors, absolute for large ones.", claim=False),
    Method("cvar", "CVaR 50 %", "Trains on the half of each batch with the larger errors.", claim=False),
)


def density(fine: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Smoothed number of samples in each bin, from the bin of each sample."""
    from scipy.ndimage import gaussian_filter1d

    counts = np.bincount(fine).astype(np.float64)
    found: np.ndarray[Any, Any] = gaussian_filter1d(
        counts, KERNEL["sigma"], radius=int(KERNEL["radius"]), mode="constant"
    )
    return found


@dataclass(frozen=True)
class NumberData:
    """One seed's data."""

    parts: dict[str, tuple[Tensor, Tensor, Tensor]]
    """Inputs, targets and bins (of the report) of ``train``, ``val`` and ``test``."""
    center: float
    """Of the training targets."""
    scale: float
    fine: Tensor
    """Fine bin of each training sample."""
    density: Tensor
    """Smoothed training samples of each fine bin."""
    sizes: Sequence[int]
    """Training samples of each bin of the report."""
    data_hash: str


def prepared(
    inputs: np.ndarray[Any, Any],
    target: np.ndarray[Any, Any],
    bins: np.ndarray[Any, Any],
    rows: Mapping[str, np.ndarray[Any, Any]],
    fine: np.ndarray[Any, Any],
) -> NumberData:
    """The parts that ``rows`` names, inputs brought to mean 0 and variance 1 by those of ``train``."""
    import torch

    train = rows["train"]
    center, scale = inputs[train].mean(0), inputs[train].std(0)
    inputs = ((inputs - center) / np.where(scale > 0, scale, 1.0)).astype(np.float32)
    digest = hashlib.sha256()
    parts = {}
    for part, at in rows.items():
        arrays = inputs[at], target[at].astype(np.float32), bins[at]
        for array in arrays:
            digest.update(array.tobytes())
        parts[part] = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]), torch.from_numpy(arrays[2])
    return NumberData(
        parts,
        float(target[train].mean()),
        float(target[train].std()),
        torch.from_numpy(fine[train]),
        torch.from_numpy(density(fine[train])),
        np.bincount(bins[train], minlength=int(bins.max()) + 1).tolist(),
        digest.hexdigest(),
    )


class NumberSuite(Suite):
    """A number to predict, of which some values are rare in training."""

    methods: Sequence[Method] = METHODS
    quick = ("mse", "posthoc", "density")
    default = ("mse", "posthoc", "density", "density_sqrt")
    own = OWN
    chosen_by = "val_mae"

    @abstractmethod
    def data(self, seed: int) -> NumberData:
        """The split of a seed."""

    def prepare(self, seed: int) -> NumberTrial:
        return NumberTrial(self, seed)

    def more(self, by_bin: Sequence[float]) -> dict[str, float]:
        """Metrics of its own, from the mean absolute error of each bin."""
        return {}

    def objective(self, method: str, density: Tensor, sizes: Sequence[int]) -> Objective:
        """The loss of a method, for smoothed counts of the fine bins and for sizes of the bins of the report."""
        from torch import nn

        from reweigh.losses import FromLoss, Objective
        from reweigh.weighting import CVaR, GroupFrequency

        own = self.options(method)
        squared = FromLoss(nn.MSELoss(reduction="none"))
        if method == "mae":
            return Objective(FromLoss(nn.L1Loss(reduction="none")))
        if method == "huber":
            return Objective(FromLoss(nn.HuberLoss(reduction="none", delta=own["delta"])))
        if method == "cvar":
            return Objective(squared, CVaR(own["alpha"]))
        if method in ("density", "density_sqrt"):
            return Objective(squared, GroupFrequency(density, power=own["power"]), "weighted_mean")
        if method == "quarters":
            return Objective(squared, GroupFrequency(sizes, power=own["power"]), "weighted_mean")
        return Objective(squared)


class NumberTrial(Trial):
    """One seed of a :class:`NumberSuite`."""

    def __init__(self, suite: NumberSuite, seed: int) -> None:
        self.suite, self.seed = suite, seed
        self.data = data = suite.data(seed)
        self.parts, self.center, self.scale = data.parts, data.center, data.scale
        self.fine, self.density, self.data_hash = data.fine, data.density, data.data_hash
        self._plain: nn.Module | None = None

    def run(self, method: str) -> Outcome:
        if method == "posthoc":
            net = self._plain or self._train("mse")[0]
            return self._test(self._stretched(net))
        net, step_ms = self._train(method)
        if method == "mse":
            self._plain = net
        outcome = self._test(net)
        outcome.step_ms = step_ms
        return outcome

    def _stretched(self, net: nn.Module) -> nn.Module:
        """The network with a straight line behind it: the weighted least squares fit to the training targets."""
        import torch
        from torch import nn

        from .training import reproducible

        inputs, target, _ = self.parts["train"]
        with reproducible(self.seed), torch.no_grad():
            found = net(inputs).double().numpy()
        wanted = (target.double().numpy() - self.center) / self.scale
        weights = 1.0 / self.density[self.fine].numpy()
        slope, offset = np.polyfit(found, wanted, 1, w=np.sqrt(weights))  # polyfit squares them
        line = nn.Linear(1, 1)
        with torch.no_grad():
            line.weight.fill_(float(slope))
            line.bias.fill_(float(offset))
        return nn.Sequential(net, nn.Unflatten(0, (-1, 1)), line, nn.Flatten(0)).eval()

    def _train(self, method: str) -> tuple[nn.Module, float]:
        from torch import nn

        from reweigh.lightning_callbacks import WeightingCallback

        from .training import Classifier, reproducible, train

        options = self.suite.options(method)
        inputs, target, quarter = self.parts["train"]
        group = quarter if method == "quarters" else self.fine
        with reproducible(self.seed):
            net = nn.Sequential(
                nn.Linear(inputs.shape[1], options["hidden"]), nn.ReLU(), nn.Linear(options["hidden"], 1), nn.Flatten(0)
            )
            step_ms = train(
                net,
                self.suite.objective(method, self.density, self.data.sizes),
                (inputs, (target - self.center) / self.scale, group),
                options,
                seed=self.seed,
                callbacks=[WeightingCallback()],
                module=Classifier.taking("group"),
            )
        return net.eval(), step_ms

    def _test(self, net: nn.Module) -> Outcome:
        import torch
        from torchmetrics.functional.regression import mean_absolute_error, r2_score

        from .training import reproducible

        with reproducible(self.seed), torch.no_grad():
            inputs, target, which = self.parts["test"]
            found = net(inputs) * self.scale + self.center
            sizes = self.data.sizes
            by_bin = [
                float(mean_absolute_error(found[which == value], target[which == value])) for value in range(len(sizes))
            ]
            val_inputs, val_target, _ = self.parts["val"]
            chosen = mean_absolute_error(net(val_inputs) * self.scale + self.center, val_target)
            metrics = {
                "few_mae": by_bin[int(np.argmin(sizes))],
                "mae": float(mean_absolute_error(found, target)),
                "many_mae": by_bin[int(np.argmax(sizes))],
                "r2": float(r2_score(found, target)),
                "val_mae": float(chosen),
                **self.suite.more(by_bin),
            }
        return Outcome(metrics, details={"quarter_mae": by_bin})
