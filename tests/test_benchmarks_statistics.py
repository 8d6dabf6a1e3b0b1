"""The paired statistics, against scipy and against numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from reweigh.benchmarks.statistics import holm, paired


def test_hand_numbers():
    found = paired([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])  # differences .1 .2 .3: mean .2, sd .1
    assert found.n == 3
    assert found.mean == pytest.approx(0.2)
    assert found.d_z == pytest.approx(2.0)
    half = 4.302652729911275 * 0.1 / 3**0.5  # t quantile of 2 degrees of freedom
    assert (found.t_low, found.t_high) == pytest.approx((0.2 - half, 0.2 + half))
    assert not found.clear
    assert (found.wins, found.ties) == (3, 0)
    assert found.p == pytest.approx(0.25)  # all of one sign: 2 / 2**3


def test_equals_scipy():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.3, 1.0, 10), rng.normal(0.0, 1.0, 10)
    found = paired(a, b)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.t_low, found.t_high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert found.boot_low < found.mean < found.boot_high
    assert paired(a, b) == found  # the bootstrap is seeded


def test_ten_wins_of_ten_reach_the_smallest_p():
    found = paired(np.arange(1, 11) / 10, np.zeros(10))
    assert found.p == pytest.approx(2 / 2**10)
    assert found.clear
    assert found.wins == 10


def test_lower_is_better_turns_the_wins_around():
    assert paired([0.1, 0.3], [0.2, 0.2], higher_is_better=False).wins == 1
    assert paired([0.1, 0.1], [0.2, 0.2], higher_is_better=False).wins == 2


def test_steps_of_equal_size_are_ties():
    found = paired([2 / 45, 3 / 45, 1 / 45, 1 / 45], [1 / 45, 2 / 45, 0.0, 1 / 45])
    assert (found.wins, found.ties) == (3, 1)
    assert found.p == pytest.approx(0.25)  # three equal steps up and a zero
    assert len({(k + 1) / 45 - k / 45 for k in (1, 2, 3, 4)}) == 4  # not equal as floats
    found = paired([2 / 45, 3 / 45, 4 / 45, 4 / 45], [1 / 45, 2 / 45, 3 / 45, 5 / 45])
    assert found.p == pytest.approx(2 * 5 / 16)  # all ranks 2.5, three of four up


@pytest.mark.parametrize(
    ("a", "mean", "interval", "p"),
    [([0.5], 0.1, (None, None), None), ([0.4] * 3, 0.0, (0.0, 0.0), 1.0), ([0.5] * 3, 0.1, (0.1, 0.1), 0.25)],
)
def test_no_spread_and_one_seed_give_no_nan(a, mean, interval, p):
    found = paired(a, [0.4] * len(a))
    assert found.mean == pytest.approx(mean)
    assert (found.t_low, found.t_high) == pytest.approx(interval) if interval[0] is not None else found.t_low is None
    assert found.p == (None if p is None else pytest.approx(p))
    assert found.d_z is None


def test_lengths_must_match():
    with pytest.raises(ValueError, match="as many values"):
        paired([0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match="at least one"):
        paired([], [])


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1, then made monotone
    assert holm([0.04, 0.005, 0.03, 0.01]) == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
