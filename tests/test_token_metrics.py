"""Metrics of tokens: loops over what they are defined by, a library for n-grams, and the monitor's rows."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_kit import QUIET, loader, module, trainer

from reweigh.lightning_callbacks import (
    DistinctN,
    RareTokenAccuracy,
    Repetition,
    TokenFrequencyLoss,
    WeightingMonitor,
    frequency_bins,
)
from reweigh.losses import CrossEntropy, Objective
from reweigh.weighting import Focal

pytestmark = QUIET
COUNTS = [900, 400, 60, 12, 12, 3, 0]
TEXT = st.lists(st.lists(st.sampled_from([0, 1, 2, -100]), max_size=12), min_size=1, max_size=5)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any), st.integers(1, 6), st.booleans())
def test_bins_are_shares_of_the_text(counts, bins, mass):
    """By a loop from the rarest: a token is in the bin in which the middle of its share falls."""
    found = frequency_bins(counts, bins, "mass" if mass else "types").tolist()
    size = counts if mass else [int(n > 0) for n in counts]
    before = 0
    for v in sorted(range(len(counts)), key=lambda v: counts[v]):
        middle = (before + size[v] / 2) / sum(size)
        before += size[v]
        wanted = min(math.floor(middle * bins), bins - 1) if counts[v] else 0
        assert found[v] == wanted or abs(middle * bins - round(middle * bins)) < 1e-9
    order = sorted(range(len(counts)), key=lambda v: counts[v])
    assert [found[v] for v in order] == sorted(found)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 3, 4, 5, 6, -100]), st.floats(0, 10), st.sampled_from([0, 1, 2])),
        min_size=1,
        max_size=30,
    )
)
def test_losses_by_frequency_are_a_loop(rows):
    bins = frequency_bins(COUNTS, 3).tolist()
    metric = TokenFrequencyLoss(COUNTS, 3)
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    metric.update(columns[1], columns[0], columns[2])
    for place, value in enumerate(metric.compute().tolist()):
        mine = [(loss, n) for v, loss, n in rows if v != -100 and n and bins[v] == place]
        wanted = sum(loss * n for loss, n in mine) / sum(n for _, n in mine) if mine else math.nan
        assert value == pytest.approx(wanted, nan_ok=True, rel=1e-6)


def test_rare_tokens_alone():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(4, 9, 7, generator=generator), torch.randint(7, (4, 9), generator=generator)
    labels[1, 2:4] = -100
    metric, ids = RareTokenAccuracy(COUNTS, at_most=12), RareTokenAccuracy(COUNTS, at_most=12)
    metric.update(scores, labels)
    ids.update(scores.argmax(-1), labels)
    asked = [
        int(scores[b, t - 1].argmax()) == int(labels[b, t])
        for b in range(4)
        for t in range(1, 9)
        if labels[b, t] != -100 and COUNTS[labels[b, t]] <= 12
    ]
    assert metric.compute().item() == pytest.approx(sum(asked) / len(asked))
    assert ids.compute() == metric.compute()


@given(TEXT, st.integers(1, 4))
def test_n_grams_are_counted(rows, n):
    distinct, repeated, everything, shares = DistinctN(n), Repetition(n), Counter(), []
    for row in rows:
        ids = torch.tensor(row, dtype=torch.long).reshape(1, -1)
        distinct.update(ids)
        repeated.update(ids)
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        grams = [gram for gram in grams if -100 not in gram]
        everything.update(grams)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    total = everything.total() if hasattr(everything, "total") else sum(everything.values())
    wanted = len(everything) / total if total else math.nan
    assert distinct.compute().item() == pytest.approx(wanted, nan_ok=True)
    wanted = sum(shares) / len(shares) if shares else math.nan
    assert repeated.compute().item() == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize("weighting", [None, Focal(1.0)], ids=str)
def test_the_monitor_shows_losses_by_frequency(tmp_path, weighting):
    """Whether or not there is a weighting."""
    counts = [90.0, 9.0, 1.0]
    objective = Objective(CrossEntropy(), weighting)
    model = module(objective, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    monitor, data = WeightingMonitor(every_n_steps=100, token_counts=counts, bins=2), loader(ordered=False)
    trainer(tmp_path, monitor, max_epochs=1).fit(model, data)
    (row,) = monitor.history()
    loss, target = zip(*((CrossEntropy().terms(model.net(x), y).loss, y) for x, y in data), strict=True)
    metric = TokenFrequencyLoss(counts, 2)
    metric.update(torch.cat(loss), torch.cat(target))
    found = [row[f"reweigh/loss/bin_loss/{b}"] for b in range(2)]
    assert found == pytest.approx(metric.compute().tolist(), rel=1e-6)
    if weighting is None:
        assert [row[f"reweigh/loss/bin_weight/{b}"] for b in range(2)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: frequency_bins([0, 0], 2), ValueError, "token_counts must count some token"),
        (lambda: frequency_bins([1, 2], 0), ValueError, "bins"),
        (lambda: frequency_bins([1, 2], 2, "size"), ValueError, "by"),
        (lambda: RareTokenAccuracy(COUNTS, at_most=-1), ValueError, "at_most"),
        (lambda: DistinctN(0), ValueError, "n must"),
        (
            lambda: TokenFrequencyLoss(COUNTS).update(torch.zeros(2), torch.tensor([0, 7])),
            ValueError,
            r"ids in \[0, 7\), got 7",
        ),
        (lambda: TokenFrequencyLoss(COUNTS).update(torch.zeros(2), torch.zeros(2)), TypeError, "must hold token ids"),
        (
            lambda: TokenFrequencyLoss(COUNTS).update(torch.zeros(3), torch.zeros(2).long()),
            ValueError,
            "must have one shape",
        ),
        (lambda: RareTokenAccuracy(COUNTS).update(torch.zeros(2, 3), torch.zeros(2, 3).long()), ValueError, "preds"),
        (lambda: Repetition().update(torch.zeros(2, 3)), ValueError, "ids must be token ids"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
