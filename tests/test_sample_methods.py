"""What is remembered of samples: identities of AdaWAC, weight tables and relative difficulty, and their extremes."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from reweigh.losses import AdaWACLoss, CrossEntropy, FromLoss, GCELoss, Objective, StackedLosses
from reweigh.losses.functional import adawac_loss
from reweigh.weighting import AdaWAC, Focal, Linear, LossTerms, RelativeDifficulty, SampleWeight

F64 = torch.float64
few = settings(max_examples=30, deadline=None)
finite = st.floats(0.0, 20.0, allow_nan=False, width=32)


def at(*numbers):
    return torch.tensor(numbers, dtype=torch.long)


def pair(first, second, **meta):
    return LossTerms(torch.stack([torch.as_tensor(first, dtype=F64), torch.as_tensor(second, dtype=F64)], 1), **meta)


def learn(weighting, *batches):
    """A step for each batch, which may be several micro-batches."""
    for batch in batches:
        for part in batch if isinstance(batch, list) else [batch]:
            weighting.observe(part)
        weighting.update("step")
    return weighting


# AdaWAC


@few
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=12), st.floats(0.0, 3.0))
def test_the_weight_is_the_sigmoid_of_all_differences(history, lr):
    weighting = AdaWAC(3, lr=lr)
    total = 0.0
    for first, second in history:
        batch = pair([first], [second], index=at(1))
        total += lr * (first - second)
        found = weighting.weigh(batch)[0].tolist()
        assert found == pytest.approx([1 / (1 + math.exp(-total)), 1 / (1 + math.exp(total))], rel=2e-4, abs=1e-7)
        assert sum(found) == pytest.approx(1.0, abs=1e-12)
        learn(weighting, batch)
    assert weighting.logit.rows.flatten().tolist() == pytest.approx([0.0, total, 0.0], rel=1e-5, abs=2e-5)


@few
@given(st.lists(finite, min_size=2, max_size=8), finite)
def test_equal_losses_are_a_fixed_point(losses, start):
    weighting = AdaWAC(8)
    weighting.logit.rows.fill_(start)
    before = weighting.logit.rows.clone()
    batch = pair(losses, losses, index=torch.arange(len(losses)))
    expected = torch.sigmoid(before[: len(losses), 0]).double()
    torch.testing.assert_close(weighting.weigh(batch)[:, 0], expected, rtol=1e-6, atol=0)
    learn(weighting, batch)
    assert torch.equal(weighting.logit.rows, before)


def test_no_rate_is_no_learning_and_half_the_sum():
    loss = AdaWACLoss(4, lr=0.0)
    value = loss(torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([1.0, 5.0]), index=at(0, 2))
    assert value.item() == pytest.approx((3 + 1 + 1 + 5) / 4)


@pytest.mark.parametrize("size", [80.0, 800.0, 1e4, 1e30])
def test_large_differences_neither_overflow_nor_stick(size):
    """The authors' product of exponentials is NaN at 800, and 0 for good once it is 0."""
    loss = AdaWACLoss(1)
    big, small = torch.tensor([size], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    value = loss(big, small, index=at(0))
    value.backward()
    assert value.isfinite()
    assert big.grad.item() == 1.0
    assert small.grad.item() == pytest.approx(math.exp(-size), rel=1e-5, abs=1e-40)
    loss.update("step")
    back = loss.weights(torch.tensor([0.0]), torch.tensor([size]), index=at(0))
    assert back.tolist() == [[0.5, 0.5]]


def test_losses_that_are_not_finite_are_not_learned():
    weighting = AdaWAC(3)
    weighting.logit.rows.fill_(0.5)
    bad = [float("nan"), float("inf"), 2.0]
    learn(weighting, pair(bad, [1.0, 1.0, 1.0], index=at(0, 1, 2)))
    assert weighting.logit.rows.flatten().tolist() == [0.5, 0.5, 1.5]


def test_a_sample_in_several_micro_batches_moves_once_by_its_mean():
    weighting = AdaWAC(2)
    learn(weighting, [pair([3.0, 1.0], [1.0, 1.0], index=at(0, 1)), pair([5.0], [1.0], index=at(0))])
    assert weighting.logit.rows.flatten().tolist() == [3.0, 0.0]


def test_one_loss_alone_says_nothing_of_the_difference():
    """Where the other is masked, the sample keeps its logit, whatever stands there."""
    weighting = AdaWAC(2)
    weighting.logit.rows.fill_(1.0)
    half = pair([3.0, 2.0], [0.0, 1.0], index=at(0, 1), mask=torch.tensor([[True, False], [True, True]]))
    sure = 1 / (1 + math.exp(-1.0))
    assert weighting.weigh(half)[0].tolist() == pytest.approx([sure, 1 - sure], rel=1e-6)
    learn(weighting, half)
    assert weighting.logit.rows.flatten().tolist() == [1.0, 2.0]


def test_masked_samples_may_carry_any_index():
    loss = AdaWACLoss(2)
    first, second = torch.tensor([2.0, 7.0], requires_grad=True), torch.tensor([1.0, float("nan")])
    value = loss(first, second, index=at(1, -100), mask=torch.tensor([True, False]))
    alone = AdaWACLoss(2)(first[:1], second[:1], index=at(1))
    assert value.item() == alone.item()
    loss.update("step")
    assert loss.weighting.logit.rows.flatten().tolist() == [0.0, 1.0]


def test_a_schedule_of_rates():
    weighting = AdaWAC(1, lr=Linear(0.0, 1.0, duration=2, by="step"))
    batch = pair([2.0], [1.0], index=at(0))
    learn(weighting, batch, batch, batch)
    assert weighting.logit.rows.item() == pytest.approx(0.0 + 0.5 + 1.0)


def test_the_twin_with_the_logits_after_the_visit_is_the_loss():
    first, second = torch.rand(5, dtype=F64), torch.rand(5, dtype=F64)
    index = torch.arange(5)
    loss = AdaWACLoss(5)
    for _ in range(3):
        logits = loss.weighting.logit.rows.flatten().double() + (first - second)
        value = loss(first.requires_grad_(), second, index=index)
        torch.testing.assert_close(value, adawac_loss(first, second, logits), rtol=1e-12, atol=0)
        loss.update("step")


def test_it_composes():
    objective = Objective(StackedLosses(2), (AdaWAC(4) * 2.0).clip(max=1.2), "batch_mean")
    found = objective.weights(torch.tensor([4.0]), torch.tensor([0.0]), index=at(1))
    assert found.tolist() == [[pytest.approx(1.2), pytest.approx(2 / (1 + math.exp(4)), rel=1e-5)]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdaWAC(0), ValueError, "num_samples must be >= 1"),
        (lambda: AdaWAC(3, lr=-1.0), ValueError, "lr must be finite and >= 0"),
        (lambda: AdaWAC(3).weigh(LossTerms(torch.ones(2), index=at(0, 1))), ValueError, r"must be \(samples, 2\)"),
        (lambda: AdaWAC(3).weigh(LossTerms(torch.ones(2, 3), index=at(0, 1))), ValueError, r"must be \(samples, 2\)"),
        (lambda: AdaWACLoss(3)(torch.ones(2), index=at(0, 1)), TypeError, "takes 2 tensors of losses, got 1 input"),
        (
            lambda: AdaWACLoss(3)(torch.ones(2), torch.ones(3), index=at(0, 1)),
            ValueError,
            r"input 1 must hold one loss per sample, \(2,\), got \(3,\)",
        ),
        (lambda: AdaWACLoss(3)(torch.ones(2, 2), torch.ones(2, 2), index=at(0, 1)), ValueError, "one loss per sample"),
        (lambda: AdaWACLoss(3)(torch.ones(2), torch.ones(2, dtype=torch.long), index=at(0, 1)), TypeError, "input 1"),
        (lambda: StackedLosses(0), ValueError, "num_losses must be >= 1"),
    ],
)
def test_what_adawac_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


# weight tables


def test_a_new_table_is_neutral():
    logits, target = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64), at(0, 1, 2, 0, 1, 2)
    weighted = Objective(CrossEntropy(), Focal(2.0) * SampleWeight(9))
    assert torch.equal(
        weighted(logits, target, index=torch.arange(6)), Objective(CrossEntropy(), Focal(2.0))(logits, target)
    )


@few
@given(st.lists(st.floats(0.0, 1e6, width=32), min_size=6, max_size=6))
def test_the_table_is_sample_weight_for_a_weighted_mean(weights):
    """The quotient is that of samples that count so many times."""
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    target, index = at(0, 1, 2, 0, 1, 2), torch.randperm(6, generator=torch.Generator().manual_seed(2))
    objective = Objective(CrossEntropy(), SampleWeight(6, weights=weights), "weighted_mean")
    given_weights = torch.tensor(weights, dtype=F64)[index]
    found = objective(logits, target, index=index)
    if given_weights.sum() > 0:
        loss = cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(found, (given_weights * loss).sum() / given_weights.sum(), rtol=1e-9, atol=1e-12)
    else:
        assert found.item() == 0.0


def test_all_terms_of_a_sample_have_its_weight():
    objective = Objective(FromLoss(lambda x: x), SampleWeight(3, weights=[1.0, 0.0, 4.0]), "none")
    assert objective(torch.ones(2, 3), index=at(2, 1)).tolist() == [[4.0] * 3, [0.0] * 3]


def test_numbers_of_every_kind_can_be_set():
    weighting = SampleWeight(6)
    weighting.set(np.array([0, 2]), np.array([2.0, 3.0]))
    weighting.set(at(3), torch.tensor(4.0))
    weighting.set(range(4, 6), [5, 6])
    assert weighting.table.rows.flatten().tolist() == [2.0, 1.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("weights", [float("nan"), float("inf"), [1.0, -1.0]])
def test_weights_that_are_none_are_refused_and_change_nothing(weights):
    weighting = SampleWeight(4)
    with pytest.raises(ValueError, match="SampleWeight: weights must be finite and >= 0"):
        weighting.set([1, 2], weights)
    with pytest.raises(ValueError, match=r"index must be in \[0, 4\)"):
        weighting.set([1, 4], 2.0)
    assert (weighting.table.rows == 1).all()


# relative difficulty


def difficulty(own, biased, category, index=None, classes=3, **meta):
    own = torch.as_tensor(own, dtype=F64)
    return LossTerms(
        own,
        category=torch.as_tensor(category),
        num_classes=classes,
        index=torch.arange(len(own)) if index is None else torch.as_tensor(index),
        extras={"biased_loss": torch.as_tensor(biased, dtype=F64)},
        **meta,
    )


batches = st.lists(st.tuples(st.floats(1e-3, 10.0), st.floats(1e-3, 10.0), st.integers(0, 2)), min_size=1, max_size=10)


@few
@given(batches)
def test_weights_of_swapped_networks_add_up_to_one_and_lie_between(rows):
    own, biased, category = map(list, zip(*rows, strict=True))
    straight, swapped = RelativeDifficulty(10, 3), RelativeDifficulty(10, 3)
    for _ in range(3):
        here, there = difficulty(own, biased, category), difficulty(biased, own, category)
        left, right = straight.weigh(here), swapped.weigh(there)
        assert ((left >= 0) & (left <= 1)).all()
        torch.testing.assert_close(left + right, torch.ones_like(left), rtol=0, atol=1e-12)
        learn(straight, here)
        learn(swapped, there)


@few
@given(batches, st.floats(0.1, 10.0))
def test_only_what_is_hard_within_the_class_matters(rows, factor):
    """A network whose losses of a class are all larger by a factor has the same shares: that is the normalisation."""
    own, biased, category = map(list, zip(*rows, strict=True))
    larger = [value * factor if c == 1 else value for value, c in zip(biased, category, strict=True)]
    plain, scaled = RelativeDifficulty(10, 3), RelativeDifficulty(10, 3)
    for _ in range(3):
        one, other = difficulty(own, biased, category), difficulty(own, larger, category)
        torch.testing.assert_close(plain.weigh(one), scaled.weigh(other), rtol=1e-6, atol=1e-9)
        learn(plain, one)
        learn(scaled, other)


def authors(batches, size, classes, keep=0.7):
    """Running losses that the first visit starts, divided by the largest of the class in the whole table."""
    running = [[0.0] * size, [0.0] * size]
    visited, label = [False] * size, {}
    out = []
    for batch in batches:
        for biased, own, c, i in batch:
            for kept, value in zip(running, (biased, own), strict=True):
                kept[i] = keep * kept[i] + (1 - keep * visited[i]) * value
            visited[i], label[i] = True, c
        found = []
        for _, _, c, i in batch:
            b, d = (kept[i] / max(kept[j] for j in label if label[j] == c) for kept in running)
            found.append(b / (b + d + 1e-8))
        out.append(found)
    return out


def test_it_is_the_authors_where_the_largest_losses_are_known():
    """Their search of the table and our running maximum agree once the hardest samples of each class were seen."""
    generator = torch.Generator().manual_seed(3)
    size, classes = 30, 3
    category = torch.arange(size) % classes
    hardest = [0, 1, 2]  # with losses that stay above all others
    calls = []
    for step in range(12):
        index = at(*hardest) if step == 0 else 3 + torch.randperm(size - 3, generator=generator)[:6]
        losses = (
            torch.full((2, 3), 9.0, dtype=F64) if step == 0 else 5 * torch.rand(2, 6, generator=generator, dtype=F64)
        )
        calls.append((index, losses))
    weighting = RelativeDifficulty(size, classes)
    found = []
    for index, (biased, own) in calls:
        batch = difficulty(own, biased, category[index], index)
        found.append(weighting.weigh(batch).tolist())
        learn(weighting, batch)
    rows = [list(zip(b.tolist(), d.tolist(), category[i].tolist(), i.tolist(), strict=True)) for i, (b, d) in calls]
    for ours, theirs in zip(found, authors(rows, size, classes), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_epoch_forgets_a_largest_loss_that_is_no_more():
    weighting = RelativeDifficulty(2, 1, smoothing=1.0)
    learn(weighting, difficulty([8.0, 2.0], [8.0, 2.0], [0, 0], classes=1))
    assert weighting.class_max.tolist() == [[8.0, 8.0]]
    learn(weighting, difficulty([1.0, 2.0], [1.0, 2.0], [0, 0], classes=1))
    assert weighting.class_max.tolist() == [[8.0, 8.0]]
    weighting.update("epoch")
    assert weighting.class_max.tolist() == [[2.0, 2.0]]


def test_the_first_visit_starts_the_running_losses_and_others_mix():
    weighting = RelativeDifficulty(4, 2, smoothing=0.25)
    learn(weighting, difficulty([4.0], [8.0], [1], [2], classes=2))
    assert weighting.losses.rows.tolist() == [[-1.0] * 3, [-1.0] * 3, [8.0, 4.0, 1.0], [-1.0] * 3]
    learn(weighting, difficulty([0.0], [4.0], [1], [2], classes=2))
    assert weighting.losses.rows[2].tolist() == [7.0, 3.0, 1.0]


def test_extreme_losses_keep_the_weights_finite():
    weighting = RelativeDifficulty(5, 2)
    batch = difficulty([1e4, 0.0, 0.0, 1e-300, 1e38], [0.0, 1e4, 0.0, 1e-300, 1e38], [0, 0, 1, 1, 1], classes=2)
    for _ in range(3):
        found = weighting.weigh(batch)
        assert found.isfinite().all()
        assert found[:3].tolist() == [0.0, 1.0, 0.5]
        learn(weighting, batch)


def test_what_is_not_finite_is_not_learned():
    weighting = RelativeDifficulty(3, 1)
    learn(weighting, difficulty([float("nan"), 1.0, 2.0], [1.0, float("inf"), 2.0], [0, 0, 0], classes=1))
    assert weighting.losses.rows[:, 2].tolist() == [-1.0, -1.0, 0.0]
    assert weighting.class_max.tolist() == [[2.0, 2.0]]


def test_masked_samples_teach_nothing_whatever_stands_there():
    weighting = RelativeDifficulty(3, 2)
    nan = float("nan")
    masked = difficulty([0.0, 2.0], [nan, 2.0], [0, 1], [-5, 1], classes=2, mask=torch.tensor([False, True]))
    assert weighting.weigh(masked)[1] == 0.5
    learn(weighting, masked)
    assert weighting.losses.rows[:, 2].tolist() == [-1.0, 1.0, -1.0]


def test_the_biased_networks_gradient_has_no_further_factor():
    """The authors weigh cross-entropy by q p^q; the paper's loss has the gradient of cross-entropy times p^q."""
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(4), dtype=F64, requires_grad=True)
    target = at(0, 1, 2, 0, 1)
    (found,) = torch.autograd.grad(GCELoss(q=0.7)(logits, target), logits)
    p = logits.detach().softmax(1).gather(1, target[:, None]).squeeze(1)
    (wanted,) = torch.autograd.grad((p**0.7 * cross_entropy(logits, target, reduction="none")).mean(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RelativeDifficulty(3, 0), ValueError, "num_classes must be >= 1"),
        (lambda: RelativeDifficulty(3, 2, smoothing=0.0), ValueError, "smoothing must be finite and > 0"),
        (lambda: RelativeDifficulty(3, 2, smoothing=1.5), ValueError, "smoothing must be finite and > 0 and <= 1"),
        (
            lambda: Objective(CrossEntropy(), RelativeDifficulty(3, 2))(torch.zeros(1, 2), at(0), index=at(0)),
            ValueError,
            "'biased_loss' is missing; pass biased_loss=",
        ),
        (
            lambda: Objective(CrossEntropy(), RelativeDifficulty(3, 5)).weights(
                torch.zeros(1, 2), at(0), index=at(0), biased_loss=torch.ones(1)
            ),
            ValueError,
            "has 5 class weights, but the criterion has 2 classes",
        ),
        (
            lambda: learn(RelativeDifficulty(3, 2), LossTerms(torch.ones(2, 2), index=at(0, 1))),
            ValueError,
            r"learns from one term per sample, got terms of shape \(2, 2\)",
        ),
    ],
)
def test_what_relative_difficulty_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


# all of them


@pytest.mark.parametrize("make", [lambda: AdaWAC(4), lambda: RelativeDifficulty(4, 2)], ids=["adawac", "difficulty"])
def test_training_that_goes_on_from_a_checkpoint_is_the_same(make):
    def batch(step):
        generator = torch.Generator().manual_seed(step)
        index = torch.randperm(4, generator=generator)[:3]
        losses = torch.rand(2, 3, generator=generator, dtype=F64)
        if isinstance(whole, AdaWAC):
            return pair(*losses, index=index)
        return difficulty(*losses, index % 2, index, classes=2)

    whole = make()
    for step in range(6):
        if step == 3:
            resumed = make()
            resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
            later = [resumed.weigh(batch(step))]
        learn(whole, batch(step))
        if step >= 3:
            learn(resumed, batch(step))
            later.append(resumed.weigh(batch(step + 1)))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert all(found.isfinite().all() for found in later)
