"""Regression with a skewed target: high values are rare in training and as common as others in the test."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate, Method, Metric, Outcome, Suite, Trial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

QUARTERS = 4
"""Bins of the target, by its quartiles over all 442 samples, from low to high."""
HELD_OUT = {"test": 28, "val": 20}
"""Samples of each quarter."""
TRAIN = (60, 30, 14, 6)
"""Training samples of each quarter."""
WIDTH = 20.0
"""Of the finer bins by which the density of the target is estimated, in its own unit."""
KERNEL = {"sigma": 2.0, "radius": 2}
"""Of the Gaussian that smooths their counts: five bins wide, as in the paper."""

TRAINING: dict[str, Any] = {
    "steps": 300,
    "batch_size": 32,
    "lr": 1e-3,
    "weight_decay": 0.01,
    "hidden": 32,
}
# learning rate: the best of these by the mean absolute error of the validation data, mean over seeds 100 to 107; the
# other constants are the usual ones
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
OWN: Mapping[str, Mapping[str, Any]] = {
    "density": {"power": 1.0},
    "density_sqrt": {"power": 0.5},
    "quarters": {"power": 1.0},
    "mae": {"lr": 3e-3},
    "huber": {"delta": 1.0, "lr": 3e-3},
    "cvar": {"alpha": 0.5},
}


def quarters(target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The quarter of each sample, 0 to 3."""
    edges = np.quantile(target, np.arange(1, QUARTERS) / QUARTERS)
    found: np.ndarray[Any, Any] = np.digitize(target, edges)
    return found


def split(quarter: np.ndarray[Any, Any], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Disjoint indices of the parts; those of the thinned training part that are left over are not used."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], "val": [], "test": []}
    for value, size in enumerate(TRAIN):
        mine = rng.permutation(np.flatnonzero(quarter == value))
        start = 0
        for part, count in (*HELD_OUT.items(), ("train", size)):
            parts[part].append(mine[start : start + count])
            start += count
    return {part: np.concatenate(indices) for part, indices in parts.items()}


def smoothed(target: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The fine bin of each sample, and the smoothed number of samples in each bin (label distribution smoothing)."""
    fine = (target // WIDTH).astype(np.int64)
    return fine, density(fine)


def density(fine: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Smoothed number of samples in each bin, from the bin of each sample."""
    from scipy.ndimage import gaussian_filter1d

    counts = np.bincount(fine).astype(np.float64)
    found: np.ndarray[Any, Any] = gaussian_filter1d(
        counts, KERNEL["sigma"], radius=int(KERNEL["radius"]), mode="constant"
    )
    return found


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


@final
class DiabetesSkewed(NumberSuite):
    """Section "regression" of the default suite."""

    name = "diabetes_skewed"
    version = 1
    title = "A skewed target"
    summary = "predict the progression of diabetes; the highest quarter of the values is rare in training"
    story = (
        "A small network predicts from ten measurements how far diabetes has progressed after a year, as a number from "
        "25 to 346. The values are cut into four quarters with as many patients each. In training the higher quarters "
        "are thinned out: 60, 30, 14 and 6 patients, so that high values are rare. The test has 28 of each. Plain "
        "training (squared error) is cautious where it has seen little, and predicts too low for the highest values. "
        "Weights by inverse density make patients with rare values count more. What counts is the mean absolute error "
        "in the highest quarter, in the unit of the target; the error in the lowest one, which is common in training, "
        "is the price. In every repetition all methods get the same patients, the same initial network and the same "
        "order of batches."
    )
    notes = (
        "Data: the diabetes data of scikit-learn, 442 patients; they are real, the skew is made by leaving training "
        "samples out. No patient is in two of the training, validation and test parts. Measurements and target are "
        "brought to mean 0 and variance 1 by those of the training part; errors are given in the target's own unit.",
        "Density is the number of training samples in bins 20 wide, smoothed over five bins (label distribution "
        "smoothing). Weighted means divide by the sum of the weights.",
        "Learning rates are the best of 4 for each method by the mean absolute error of the validation data, in which "
        "all quarters count the same, over eight seeds that are not among the reported ones.",
        "Weights move the error from high to low values: what the rare quarter gains, the common one pays for in part. "
        "Where low values will be as common in use as they were in training, plain training is the better choice.",
        "A straight line behind the finished MSE model, fitted with the same weights, costs no training. Training with "
        "weights is to be measured by it: where it is as good, what was wrong with plain training was scale and level.",
        "Absolute error, Huber and CVaR do not know which values are rare; nothing is claimed of them. Balanced MSE "
        "and focal-R are not in the library, and not here.",
        "110 training and 112 test samples are few: a difference of one or two units means nothing.",
    )
    metrics = (
        Metric(
            "few_mae",
            "MAE, rare quarter",
            "Mean absolute error where the true value is in the highest quarter, which is rare in training.",
            higher_is_better=False,
            share=False,
        ),
        Metric(
            "mae",
            "MAE",
            "Mean absolute error; each quarter of the values counts the same.",
            higher_is_better=False,
            share=False,
        ),
        Metric(
            "many_mae",
            "MAE, common quarter",
            "Mean absolute error in the lowest quarter, which is the most common in training.",
            higher_is_better=False,
            share=False,
        ),
        Metric(
            "r2",
            "R2",
            "Share of the variance of the test values that is explained; below 0 is worse than their mean.",
            share=False,
        ),
        Metric(
            "val_mae",
            "MAE, val.",
            "On the validation data, by which was chosen.",
            higher_is_better=False,
            share=False,
            shown=False,
        ),
    )
    gates = (  # about half of what these seeds gave; those of the tuning gave more
        Gate("density", "few_mae", 12.0),
        Gate("density_sqrt", "few_mae", 7.5),
        Gate("posthoc", "few_mae", 12.0),
    )
    seeds = 8
    training: Mapping[str, Any] = TRAINING
    grid: Mapping[str, Mapping[str, Sequence[Any]]] = {
        name: {"lr": RATES} for name in ("mse", "density", "density_sqrt", "quarters", "mae", "huber", "cvar")
    }

    def protocol(self) -> Mapping[str, Any]:
        return {"held_out": HELD_OUT, "train": TRAIN, "width": WIDTH, "kernel": KERNEL}

    def data(self, seed: int) -> NumberData:
        from sklearn.datasets import load_diabetes

        found = load_diabetes()
        quarter = quarters(found.target)
        return prepared(found.data, found.target, quarter, split(quarter, seed), smoothed(found.target)[0])

    def objective(self, method: str, density: Tensor, sizes: Sequence[int] = TRAIN) -> Objective:
        return super().objective(method, density, sizes)


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
