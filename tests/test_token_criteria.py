"""Numbers as numbers, and words that were said before: loops over the definitions, SciPy's distances, hand values."""

import math

import pytest
import torch

from reweigh.losses import CausalLM, NumberTokens, Objective, Unlikelihood, packed_position_ids
from reweigh.weighting import Focal, PowerLawDecay

F64 = torch.float64
VALUES = [math.nan, 0.0, 1.0, 2.5, math.nan, -3.0, 10.0]


def case(length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(3, length, 7, generator=generator, dtype=F64)
    labels = torch.randint(7, (3, length), generator=generator)
    labels[0, 2:4] = -100
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kind", ["was", "mse", "abs_diff"])
def test_numbers_by_loops_and_scipys_distance(kind, shift):
    stats = pytest.importorskip("scipy.stats")
    logits, labels = case()
    losses = Objective(NumberTokens(VALUES, kind, shift=shift), None, "none")(logits, labels)
    numbers = [v for v, value in enumerate(VALUES) if not math.isnan(value)]
    counted = 0
    for b in range(3):
        for t in range(9):
            label = int(labels[b, t])
            if label == -100 or label not in numbers or (shift and t == 0):
                assert losses[b, t] == 0
                continue
            p = logits[b, t - shift, numbers].softmax(0).tolist()
            values = [VALUES[v] for v in numbers]
            mean = sum(x * y for x, y in zip(p, values, strict=True))
            wanted = {
                "was": stats.wasserstein_distance(values, [VALUES[label]], p),
                "mse": (mean - VALUES[label]) ** 2,
                "abs_diff": abs(mean - VALUES[label]),
            }[kind]
            assert losses[b, t].item() == pytest.approx(wanted)
            counted += 1
    whole = Objective(NumberTokens(VALUES, kind, shift=shift))(logits, labels)
    assert whole.item() == pytest.approx(losses.sum().item() / counted)


def test_numbers_that_lie_one_apart():
    """The area between distribution functions, which is how the authors write the distance."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 10, generator=generator, dtype=F64)
    labels = torch.randint(10, (2, 6), generator=generator)
    found = Objective(NumberTokens(range(10), shift=False), None, "none")(logits, labels)
    step = torch.nn.functional.one_hot(labels, 10).double().cumsum(-1)
    torch.testing.assert_close(found, (logits.softmax(-1).cumsum(-1) - step).abs().sum(-1))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kind", ["numbers", "said before"])
def test_logits_of_ignored_labels_may_be_anything(kind, shift):
    criterion = NumberTokens(VALUES, shift=shift) if kind == "numbers" else Unlikelihood(shift=shift)
    logits, labels = case()
    ignored = (labels == -100).roll(-int(shift), 1)
    ignored[:, -1] |= shift
    slopes = []
    for garbage in (0.0, math.nan, math.inf):
        dirty = logits.detach().masked_fill(ignored.unsqueeze(-1), garbage).requires_grad_()
        (slope,) = torch.autograd.grad(Objective(criterion)(dirty, labels), dirty)
        slopes.append(slope)
    assert not slopes[0][ignored].any()
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0], rtol=0, atol=0)


@pytest.mark.parametrize("criterion", [NumberTokens(VALUES), NumberTokens(VALUES, "mse"), Unlikelihood()], ids=repr)
def test_gradients_are_those_of_differences(criterion):
    logits, labels = case(6)
    assert torch.autograd.gradcheck(lambda x: Objective(criterion)(x, labels), (logits,))


def test_other_tokens_logits_take_no_part():
    logits, labels = case()
    objective = Objective(NumberTokens(VALUES))
    changed = logits.detach().clone()
    changed[..., [0, 4]] = 1e6
    torch.testing.assert_close(objective(changed, labels), objective(logits, labels).detach(), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(objective(logits, labels), logits)
    assert not slope[..., [0, 4]].any()


def test_a_batch_without_numbers_is_zero_with_a_graph():
    logits, _ = case()
    value = Objective(NumberTokens(VALUES))(logits, torch.full((3, 9), 4))
    (slope,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert not slope.any()


@pytest.mark.parametrize("shift", [True, False])
def test_unlikelihood_by_loops(shift):
    logits, labels = case(12)
    losses = Objective(Unlikelihood(shift=shift), None, "none")(logits, labels)
    for b in range(3):
        said: list[int] = []
        for t, label in enumerate(labels[b].tolist()):
            wanted = 0.0
            if label != -100 and not (shift and t == 0):
                p = logits[b, t - shift].softmax(0).tolist()
                wanted = -sum(math.log(max(1.0 - p[c], 1e-5)) for c in set(said) - {label})
            assert losses[b, t].item() == pytest.approx(wanted, abs=1e-12)
            said += [label] if label != -100 else []


def test_nothing_repeated_nothing_to_pay_for():
    """What was said before is never likely: with probability 0 it costs 0, and the sum is cross-entropy."""
    labels = torch.tensor([[0, 1, 2, 3]])
    logits = torch.full((1, 4, 4), -math.inf, dtype=F64)
    for t in range(3):
        logits[0, t, t + 1 :] = torch.arange(3.0 - t, dtype=F64)
    logits[0, 3] = 0.0
    assert Objective(Unlikelihood())(logits, labels) == 0
    both = Objective(CausalLM()) + Objective(Unlikelihood())
    assert both(logits, labels) == Objective(CausalLM())(logits, labels)


def test_the_floor_bounds_what_is_sure():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 99.0], [0.0, 99.0]]], dtype=F64).flip(-1).requires_grad_()
    value = Objective(Unlikelihood(shift=False), None, "sum")(logits, torch.tensor([[0, 1, 1]]))
    assert value.item() == pytest.approx(-2 * math.log(1e-5))
    (slope,) = torch.autograd.grad(value, logits)
    assert slope.isfinite().all()


def test_packed_sequences_do_not_know_each_other():
    logits, labels = case(12, seed=1)
    places = packed_position_ids(torch.tensor([0, 5, 12])).expand(3, -1)
    for criterion in (Unlikelihood(), NumberTokens(VALUES)):
        found = Objective(criterion, None, "none")(logits, labels, position_ids=places)
        apart = [Objective(criterion, None, "none")(logits[:, s], labels[:, s]) for s in (slice(0, 5), slice(5, 12))]
        torch.testing.assert_close(found, torch.cat(apart, 1), rtol=1e-12, atol=1e-14)


def test_they_are_weighed_and_added_like_other_criteria():
    logits, labels = case()
    by = PowerLawDecay([9, 5, 3, 1, 1, 1, 1], alpha=0.5)
    numbers = NumberTokens(VALUES)
    total = Objective(CausalLM(), Focal(1.0)) + 0.3 * Objective(numbers, by)
    parts = Objective(CausalLM(), Focal(1.0))(logits, labels) + 0.3 * Objective(numbers, by)(logits, labels)
    torch.testing.assert_close(total(logits, labels), parts)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NumberTokens([math.nan, math.nan]), ValueError, "at least one number"),
        (lambda: NumberTokens([math.inf, 1.0]), ValueError, "values must be"),
        (lambda: NumberTokens([[1.0]]), ValueError, "values must be"),
        (lambda: NumberTokens([1.0], "mae"), ValueError, "kind"),
        (lambda: NumberTokens(["7", 1.0]), TypeError, "values must be a sequence of numbers.*got list"),
        (lambda: NumberTokens(7), TypeError, "values must be a sequence of numbers.*got int"),
        (lambda: NumberTokens(torch.zeros(3, dtype=torch.complex64)), TypeError, "values must be.*complex64"),
        (lambda: Unlikelihood(floor=0.0), ValueError, "floor"),
        (lambda: Objective(NumberTokens([1.0, 2.0]))(*case()), ValueError, r"one entry per token \(7\), got 2"),
        (lambda: Objective(Unlikelihood())(case()[0], case()[1][:, :3]), ValueError, "labels"),
        (lambda: Objective(Unlikelihood())(case()[0], case()[1] + 7), ValueError, r"in \[0, 7\)"),
        (lambda: Objective(Unlikelihood())(case()[0], case()[1].double()), TypeError, "token indices"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
