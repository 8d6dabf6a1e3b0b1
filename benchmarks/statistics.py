"""Paired comparisons, all tests by scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """A method minus the baseline, seed by seed. ``None`` where the number of seeds does not allow an answer."""

    n: int
    mean: float
    t_low: float | None
    """95 % t interval of the mean difference."""
    t_high: float | None
    boot_low: float | None
    """95 % bootstrap (percentile) interval of the mean difference."""
    boot_high: float | None
    d_z: float | None
    """Effect size: mean difference over the standard deviation of the differences."""
    wins: int
    """Seeds on which the method is better."""
    ties: int
    p: float | None
    """Wilcoxon signed-rank test, two-sided, before any correction."""

    @property
    def clear(self) -> bool:
        """Whether the t interval excludes 0."""
        return self.t_low is not None and self.t_high is not None and (self.t_low > 0 or self.t_high < 0)


def paired(method: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool = True) -> Paired:
    """Compare two methods measured on the same seeds, in the same order.

    Raises:
        ValueError: If the lengths differ or there is no seed.

    Example:
        >>> result = paired([0.6, 0.7, 0.65], [0.3, 0.5, 0.4])
        >>> round(result.mean, 3), result.wins
        (0.25, 3)
    """
    if len(method) != len(baseline) or not len(method):
        raise ValueError(f"paired: needs as many values of both, at least one; got {len(method)} and {len(baseline)}")
    a, b = np.asarray(method, dtype=float), np.asarray(baseline, dtype=float)
    difference = np.round(a - b, 12)  # 1/45 minus 0 is the same step as 2/45 minus 1/45: ties must be ties
    n, mean = len(difference), float(difference.mean())
    better = difference > 0 if higher_is_better else difference < 0
    wins, ties = int(better.sum()), int((difference == 0).sum())
    if n == 1:
        return Paired(n, mean, None, None, None, None, None, wins, ties, None)
    if np.ptp(difference) == 0:  # no spread: scipy would divide by 0
        p = 1.0 if mean == 0 else float(stats.wilcoxon(difference, method="exact").pvalue)
        return Paired(n, mean, mean, mean, mean, mean, None, wins, ties, p)
    t = stats.ttest_1samp(difference, 0.0).confidence_interval(LEVEL)
    boot = stats.bootstrap(
        (difference,),
        np.mean,
        confidence_level=LEVEL,
        method="percentile",
        n_resamples=9999,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    d_z = mean / float(difference.std(ddof=1))
    p = float(stats.wilcoxon(difference).pvalue)
    return Paired(n, mean, float(t.low), float(t.high), float(boot.low), float(boot.high), d_z, wins, ties, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (which scipy lacks): p-values that hold for all comparisons together.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
