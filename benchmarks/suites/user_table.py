"""The user's own table: a class or a number to predict, of which some values are rare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from ..readers import DataError, read_table
from ..readers.common import shown
from ..readers.table import Table
from .base import Metric
from .classes import (
    BALANCED,
    ECE,
    MACRO_F1,
    METHODS,
    NATURAL,
    VAL,
    WORST,
    ClassData,
    ClassSuite,
    ClassTrial,
    FromRoot,
    ends,
)
from .regression import KERNEL, NumberData, NumberSuite, prepared
from .regression import METHODS as NUMBER_METHODS
from .regression import OWN as NUMBER_OWN

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

FILE, TARGET = "table.csv", "target"
SHARES = {"test": 0.2, "val": 0.2}
"""Of each class, or of each bin of the numbers."""
FEWEST = 5
"""Rows of a class: three for training, one for validation, one for the test."""
QUARTERS = 4
"""Bins of equal width into which the range of the numbers is cut."""
FEWEST_NUMBERS = 40
"""Rows of a bin; a smaller one is joined to its smaller neighbour."""
FEWEST_VALUES = 10
"""Different numbers that the target must have; with fewer they are classes."""
OUTER = 0.01
"""Share of the numbers at either end that are left out when the range is taken: they are in the outermost bins."""
FINE = 20
"""Bins by which the density of the numbers is estimated."""

NEEDS = f"{FILE}, a table with a header and a column {TARGET!r}"
NOTES = (
    "The authors of this program have measured nothing on these data: there is no promise, and no figure of ours to "
    "compare yours with.",
    f"Every column but {TARGET!r} is an input: numbers as they are, texts as one input per category. Leave out what "
    "is not known when the prediction is made, and what tells rows apart by name, such as an id.",
    "A missing cell is filled with the mean of its column (of a category: its share), taken over all rows, the test's "
    "too; that is all that training learns of the test's inputs. All inputs are then brought to mean 0 and variance 1 "
    "by the training part.",
    "60 % of the rows are for training, 20 % for validation and 20 % for the test, drawn at random: where rows belong "
    "together (the same person, the same day), the test is easier than new data would be.",
    "Nothing was tuned: the settings are of the usual order, the same for all methods, and the network of the last "
    "step is tested.",
)


@lru_cache(maxsize=4)
def _classes(file: Path) -> Table:
    table = read_table(file, target=TARGET, missing="mean")
    sizes = np.bincount(table.target, minlength=len(table.classes))
    if sizes.min() < FEWEST:
        rare = table.classes[int(sizes.argmin())]
        rule = f"every class must have at least {FEWEST} rows"
        raise DataError(f"{file}, column {TARGET!r}: {rule}, found class {shown(rare)} with {sizes.min()}")
    return table


@lru_cache(maxsize=4)
def _numbers(file: Path) -> Table:
    table = read_table(file, target=TARGET, kind="number", missing="mean")
    values = len(np.unique(table.target))
    if values < FEWEST_VALUES:
        rule = f"must have at least {FEWEST_VALUES} different numbers (fewer are classes)"
        raise DataError(f"{file}, column {TARGET!r}: {rule}, found {values}")
    low, high = limits(table.target)
    if low == high or len(np.unique(bins(table.target))) < 2:
        rule = f"must have two ranges of values with {FEWEST_NUMBERS} rows each"
        raise DataError(f"{file}, column {TARGET!r}: {rule}, found {len(table.target)} rows, most of them in one range")
    return table


def limits(target: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The range of the numbers, without the outermost ones."""
    low, high = np.quantile(target.astype(np.float64), [OUTER, 1.0 - OUTER])
    return float(low), float(high)


def bins(target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bin of each number, from low to high: quarters of the range, small ones joined to a neighbour."""
    low, high = limits(target)
    found = np.digitize(target.astype(np.float64), np.linspace(low, high, QUARTERS + 1)[1:-1])
    sizes = np.bincount(found, minlength=QUARTERS).tolist()
    number = list(range(QUARTERS))  # what became of each quarter
    while len(sizes) > 1 and min(sizes) < FEWEST_NUMBERS:
        small = sizes.index(min(sizes))
        beside = [at for at in (small - 1, small + 1) if 0 <= at < len(sizes)]
        first = min(small, min(beside, key=lambda at: sizes[at]))
        sizes[first : first + 2] = [sizes[first] + sizes[first + 1]]
        number = [own - (own > first) for own in number]
    joined: np.ndarray[Any, Any] = np.asarray(number)[found]
    return joined


def fine_bins(target: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The fine bin of each number."""
    low, high = limits(target)
    place = (target.astype(np.float64) - low) * (FINE / (high - low))
    found: np.ndarray[Any, Any] = np.clip(np.floor(place), 0, FINE - 1).astype(np.int64)
    return found


def stratified(labels: np.ndarray[Any, Any], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Disjoint indices of the parts; each label is split by the same shares, at least one row each for val and test."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray[Any, Any]]] = {"train": [], **{part: [] for part in SHARES}}
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for part, share in SHARES.items():
            size = max(1, round(share * len(mine)))
            parts[part].append(mine[start : start + size])
            start += size
        parts["train"].append(mine[start:])
    return {part: np.concatenate(pieces) for part, pieces in parts.items()}


TAIL, HEAD = (
    replace(metric, label=metric.label.replace("-third", ""), meaning=meaning)
    for metric, meaning in zip(
        ends("third"),
        (
            "Mean recall of the rarest third of the classes (of two or three classes: of the rarest one).",
            "Mean recall of the most common third: what the gain costs.",
        ),
        strict=True,
    )
)


@final
class TableClasses(FromRoot, ClassSuite):
    """Classes of very different size, in a table."""

    name = "table_classes"
    version = 1
    title = "Classes of your table"
    summary = f"your own {FILE}: predict the class in the column {TARGET!r}"
    story = (
        "A small network learns to predict a class from the other columns of your table. Where some classes are much "
        "rarer than others, plain training (cross-entropy) neglects them; each method below changes only the loss. The "
        "test has the classes as frequent as your table has them. In every repetition all methods get the same rows, "
        "the same initial network and the same order of batches; which rows are held out changes from one repetition "
        "to the next."
    )
    notes = (
        *NOTES,
        "Balanced accuracy counts every class the same, however rare. Where a right answer for a common class is worth "
        "as much as one for a rare class, accuracy is the better measure, and plain training often the better choice.",
        "A class with few rows has few test rows: its recall is coarse, and so is the worst recall.",
        "Post-hoc logit adjustment corrects the finished cross-entropy model and needs no training: a method that does "
        "not beat it has no case on these data.",
    )
    methods = tuple(
        METHODS[name]
        for name in (
            "ce",
            "posthoc_la",
            "inverse",
            "sqrt_inverse",
            "cb",
            "balanced_softmax",
            "focal",
            "cb_focal",
            "drw",
        )
    )
    quick = ("ce", "posthoc_la", "inverse")
    default = ("ce", "posthoc_la", "inverse", "sqrt_inverse", "balanced_softmax", "focal")
    metrics = (
        BALANCED,
        WORST,
        TAIL,
        HEAD,
        MACRO_F1,
        Metric("accuracy", "accuracy", "Share of test rows whose class is found."),
        replace(NATURAL, shown=False),
        ECE,
        VAL,
    )
    seeds = 8
    needs = NEEDS
    training: Mapping[str, Any] = {
        "steps": 1000,
        "batch_size": 128,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "hidden": [128, 64],
    }

    def protocol(self) -> Mapping[str, Any]:
        return {"shares": SHARES, "fewest": FEWEST, "missing": "mean"}

    def read(self) -> Table:
        return _classes(self.home / FILE)

    def prepare(self, seed: int) -> ClassTrial:
        return TableTrial(self, seed)

    def data(self, seed: int) -> ClassData:
        import torch

        table = self.read()
        rows = stratified(table.target, seed)
        inputs = table.inputs.astype(np.float64)
        center, scale = inputs[rows["train"]].mean(0), inputs[rows["train"]].std(0)
        inputs = ((inputs - center) / np.where(scale > 0, scale, 1.0)).astype(np.float32)
        parts = {part: (torch.from_numpy(inputs[at]), torch.from_numpy(table.target[at])) for part, at in rows.items()}
        sizes = np.bincount(table.target[rows["train"]], minlength=len(table.classes))
        return ClassData(parts, np.argsort(-sizes, kind="stable").tolist(), table.classes)

    def network(self, data: ClassData, options: Mapping[str, Any]) -> nn.Module:
        return _network(_width(data), options["hidden"], len(data.by_size))


class TableTrial(ClassTrial):
    """One seed, of two classes or more."""

    def _train(self, method: str) -> tuple[nn.Module, float | None, dict[str, Any] | None]:
        if self.classes > 2:
            return super()._train(method)
        # two classes have none between head and tail, of which the family's weight curves need one
        from reweigh.lightning_callbacks import FitStatistics, WeightingCallback

        from .training import reproducible, train

        options, objective, data = self.suite.options(method), self.suite.objective(method), self.parts["train"]
        callbacks = [WeightingCallback(), FitStatistics()]
        with reproducible(self.seed):
            net = self.suite.network(self.data, options)
            step_ms = train(net, objective, data, options, seed=self.seed, callbacks=callbacks)
        net.eval()
        if method == "ce":
            self._baseline = net
        return net, step_ms, None


def _width(data: ClassData) -> int:
    part = data.parts["train"]
    return int(part[0].shape[1]) if isinstance(part, tuple) else 0


def _network(inputs: int, hidden: list[int], outputs: int) -> nn.Sequential:
    from torch import nn

    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


@final
class TableNumbers(FromRoot, NumberSuite):
    """A number whose values are unevenly spread, in a table."""

    name = "table_numbers"
    version = 1
    title = "A number of your table"
    summary = f"your own {FILE}: predict the number in the column {TARGET!r}, of which some values are rare"
    story = (
        "A small network learns to predict a number from the other columns of your table. The range of the numbers is "
        "cut into four ranges of equal width; most of them hold many rows and some hold few. Plain training (squared "
        "error) is cautious where it has seen little. Weights by inverse density make rows with rare values count "
        "more. What counts is the mean absolute error in the range that is rarest in training, in the unit of the "
        "target; the error in the most common one is the price. In every repetition all methods get the same rows, the "
        "same initial network and the same order of batches; which rows are held out changes from one repetition to "
        "the next."
    )
    notes = (
        *NOTES,
        "The range is that from the 1st to the 99th percentile of the target; what is outside is in the outermost "
        f"ranges. A range with fewer than {FEWEST_NUMBERS} rows is joined to its smaller neighbour, so there may be "
        "two or three ranges in place of four. Where all of them hold about as many rows, none is rare, and there is "
        "nothing to gain.",
        f"Density is the number of training rows in {FINE} bins of equal width, smoothed over five (label distribution "
        "smoothing). Weighted means divide by the sum of the weights.",
        "Weights move the error from rare to common values: where common values stay as common in use as they are in "
        "the table, and all errors cost the same, plain training is the better choice.",
        "A straight line behind the finished MSE model, fitted with the same weights, costs no training. Training with "
        "weights is to be measured by it.",
        "Absolute error, Huber and CVaR do not know which values are rare; nothing is claimed of them.",
    )
    methods = tuple(
        replace(
            method,
            label="inverse size of ranges",
            what="Each range of the values has the same total weight; is told the ranges of the test.",
        )
        if method.name == "quarters"
        else method
        for method in NUMBER_METHODS
    )
    metrics = (
        Metric(
            "few_mae",
            "MAE, rare range",
            "Mean absolute error where the true value is in the range that is rarest in training.",
            higher_is_better=False,
            share=False,
        ),
        Metric("mae", "MAE", "Mean absolute error of all test rows.", higher_is_better=False, share=False),
        Metric(
            "balanced_mae",
            "MAE, balanced",
            "Mean absolute error; each range of the values counts the same.",
            higher_is_better=False,
            share=False,
        ),
        Metric(
            "many_mae",
            "MAE, common range",
            "Mean absolute error in the range that is most common in training: what the gain costs.",
            higher_is_better=False,
            share=False,
        ),
        Metric(
            "r2",
            "R2",
            "Share of the variance of the test values that is explained; below 0 is worse than their mean.",
            share=False,
        ),
        Metric("val_mae", "MAE, val.", "On the validation data.", higher_is_better=False, share=False, shown=False),
    )
    own: Mapping[str, Mapping[str, Any]] = {
        name: {key: value for key, value in own.items() if key != "lr"} for name, own in NUMBER_OWN.items()
    }
    seeds = 8
    needs = NEEDS
    training: Mapping[str, Any] = {"steps": 1000, "batch_size": 128, "lr": 1e-3, "weight_decay": 0.1, "hidden": 64}

    def protocol(self) -> Mapping[str, Any]:
        return {
            "shares": SHARES,
            "ranges": QUARTERS,
            "fewest": FEWEST_NUMBERS,
            "outer": OUTER,
            "fine": FINE,
            "kernel": KERNEL,
            "missing": "mean",
        }

    def read(self) -> Table:
        return _numbers(self.home / FILE)

    def data(self, seed: int) -> NumberData:
        table = self.read()
        target = table.target.astype(np.float64)
        which = bins(target)
        return prepared(table.inputs.astype(np.float64), target, which, stratified(which, seed), fine_bins(target))

    def more(self, by_bin: Sequence[float]) -> dict[str, float]:
        return {"balanced_mae": float(np.mean(by_bin))}
