"""Regression with a skewed target: high values are rare in training and as common as others in the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from .base import Gate, Metric
from .regression import KERNEL, NumberData, NumberSuite, density, prepared

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor

    from reweigh.losses import Objective

QUARTERS = 4
"""Bins of the target, by its quartiles over all 442 samples, from low to high."""
HELD_OUT = {"test": 28, "val": 20}
"""Samples of each quarter."""
TRAIN = (60, 30, 14, 6)
"""Training samples of each quarter."""
WIDTH = 20.0
"""Of the finer bins by which the density of the target is estimated, in its own unit."""

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
