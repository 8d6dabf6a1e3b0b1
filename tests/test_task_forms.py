"""What closed-form, learned, random and scheduled task weights must satisfy, and what published ones get wrong."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reweigh import (
    DWA,
    IMTLL,
    RLW,
    STCH,
    UWO,
    UWSO,
    Fixed,
    GeometricMean,
    LearnedSoftmax,
    Linear,
    LogSTCH,
    MultiTaskLoss,
    Ramp,
    RevisedUncertainty,
    ScaleInvariant,
    Staged,
    TemperatureMixing,
    Uncertainty,
    mixing_probabilities,
    weighting,
)

F64 = torch.float64
TASKS = ["a", "b", "c"]
ROW = [2.8, 44.8, 0.09]
LOSSES = st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3)
CLOSED = [GeometricMean(), ScaleInvariant(), UWO(), UWSO(), STCH(), STCH(0.01), LogSTCH()]


def leaf(values, dtype=F64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def double(values):
    return torch.tensor(values, dtype=F64)


def called(weighting, row, *, dtype=F64, **meta):
    """Total and its gradient in the losses."""
    loss = weighting if isinstance(weighting, MultiTaskLoss) else MultiTaskLoss(list("abcdefgh")[: len(row)], weighting)
    losses = leaf(row, dtype)
    total = loss(losses, **meta)
    return total.detach(), torch.autograd.grad(total, losses)[0]


def close(found, wanted, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=F64), torch.as_tensor(wanted, dtype=F64), rtol=rtol, atol=atol
    )


def weights_of(loss):
    return torch.stack([*loss.weights.values()])


# geometric mean, scale invariant, UW-O


@given(LOSSES, st.floats(0.01, 100.0))
def test_geometric_mean(row, factor):
    """Homogeneous of degree 1, equal parts for all tasks, and the direction of the sum of logarithms."""
    total, slopes = called(GeometricMean(), row)
    close(total, math.prod(row) ** (1 / 3))
    close((slopes * double(row)).sum(), total)
    scaled, scaled_slopes = called(GeometricMean(), [factor * loss for loss in row])
    close(scaled, factor * total, rtol=1e-10)
    close(scaled_slopes, slopes, rtol=1e-10)
    close(slopes, called(ScaleInvariant(), row)[1] * total / 3)


def test_geometric_mean_does_not_underflow():
    """A product of twenty losses of 1e-3 is 0 in float32."""
    names = [f"task{k}" for k in range(20)]
    losses = torch.full((20,), 1e-3, requires_grad=True)
    total = MultiTaskLoss(names, GeometricMean())(losses)
    total.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.item(), 1e-3, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(losses.grad, torch.full((20,), 0.05), rtol=1e-6, atol=0.0)
    assert losses.detach().prod() == 0


@pytest.mark.parametrize("weighting", CLOSED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
@pytest.mark.parametrize("row", [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1e-5, 1e-5, 1.0], [1e4, 1e4, 1e-4]], ids=str)
def test_losses_near_zero_leave_everything_finite(weighting, dtype, row):
    """TorchJD's geometric mean has a gradient of nan at 0; a softmax of 1 / L in float16 is nan at 1e-5."""
    total, slopes = called(copy.deepcopy(weighting), row, dtype=dtype)
    assert total.isfinite()
    assert slopes.isfinite().all()


def test_absent_tasks_leave_means_and_softmaxes():
    for method in CLOSED:
        mask = torch.tensor([True, False, True])
        total, slopes = called(copy.deepcopy(method), ROW, mask=mask)
        alone, alone_slopes = called(copy.deepcopy(method), [ROW[0], ROW[2]])
        close(total, alone)
        close(slopes[mask], alone_slopes)
        assert slopes[1] == 0


@given(LOSSES)
def test_the_total_of_uwo_is_the_number_of_tasks(row):
    total, slopes = called(UWO(eps=1e-30), row)
    close(total, 3.0)
    close(slopes, called(ScaleInvariant(), row)[1])


@given(LOSSES, st.floats(0.01, 100.0))
def test_units_do_not_matter_to_the_model(row, factor):
    """For what lies behind the loss, L -> c L changes nothing: the weight is divided by c."""
    changed = [factor * row[0], *row[1:]]
    for method in (ScaleInvariant(), UWO(eps=1e-30)):
        before, after = called(method, row)[1], called(copy.deepcopy(method), changed)[1]
        close(after * double([factor, 1.0, 1.0]), before, rtol=1e-10)


# UW-SO


def test_uwso_limits():
    close(called(UWSO(1e12), ROW)[1], [1 / 3] * 3, rtol=1e-9)
    close(called(UWSO(1e-12), ROW)[1], [0.0, 0.0, 1.0])
    close(called(UWSO(1e-300), ROW)[1], [0.0, 0.0, 1.0])
    close(called(UWSO(0.3), [2.0, 2.0, 2.0])[1], [1 / 3] * 3)


@given(LOSSES, st.floats(0.1, 100.0))
def test_uwso_sums(row, temperature):
    total, slopes = called(UWSO(temperature), row)
    close(slopes.sum(), 1.0)
    close(total, (slopes * double(row)).sum())
    close(called(UWSO(temperature, normalize="sum_to_k"), row)[1], 3.0 * slopes)
    assert (slopes >= 0).all()


def test_uwso_in_float16_is_the_softmax_of_the_rounded_losses():
    row = torch.tensor([1e-5, 2e-5, 1.0], dtype=torch.float16)
    wanted = (1.0 / (row.double() + 1e-8) / 1e5).softmax(0)
    found = called(UWSO(1e5), row.tolist(), dtype=torch.float16)[1]
    assert (torch.tensor(1.0, dtype=torch.float16) / row).isinf().any()
    close(found, wanted, rtol=1e-3)


def test_uwso_takes_a_schedule():
    loss = MultiTaskLoss(TASKS, UWSO(Linear(1.0, 10.0, duration=1, by="step")))
    for temperature in (1.0, 10.0):
        close(called(loss, ROW)[1], called(UWSO(temperature), ROW)[1])
        loss.update("step")


# smooth Tchebycheff


@given(LOSSES)
def test_stch_limits(row):
    """A small mu leaves the maximum, a large one the mean (and a constant)."""
    total, slopes = called(STCH(1e-9), row)
    close(total, max(row) / 3, atol=1e-6)
    mean, even = called(STCH(1e9), row)
    close(even, [1 / 9] * 3, rtol=1e-5)
    close(mean - 1e9 * math.log(3), sum(row) / 9, rtol=1e-3, atol=1e-3)
    if sorted(row)[-1] > sorted(row)[-2] + 1e-6:
        close(slopes, torch.nn.functional.one_hot(double(row).argmax(), 3).double() / 3)


@given(LOSSES, st.floats(0.05, 5.0))
def test_stch_value_and_gradient_are_those_of_the_formula(row, mu):
    preferences, reference = [0.2, 0.0, 1.5], {"a": 0.1, "b": -0.3, "c": 0.0}
    losses = leaf(row)
    scaled = double(preferences) * (losses - double([0.1, -0.3, 0.0]))
    wanted = mu * (scaled / mu).logsumexp(0)
    total, slopes = called(STCH(mu, preferences=preferences, reference=reference), row)
    close(total, wanted.detach(), rtol=1e-10)
    close(slopes, torch.autograd.grad(wanted, losses)[0], rtol=1e-10)


def test_stch_does_not_overflow():
    total, slopes = called(STCH(1e-8), [1e30, 1e30, 1.0])
    close(total, 1e30 / 3)
    close(slopes, [1 / 6, 1 / 6, 0.0])


def log_stch(nadir, **arguments):
    loss = MultiTaskLoss(TASKS, LogSTCH(nadir_epoch=0, **arguments))
    loss(double(nadir))
    loss.update("step")
    loss.update("epoch")
    return loss


@given(LOSSES, LOSSES)
def test_log_stch(row, nadir):
    """At mu = 1 in closed form; its parts sum to K; at the nadir all tasks count the same."""
    loss, unit = log_stch(nadir), [one / low for one, low in zip(row, nadir, strict=True)]
    total, slopes = called(loss, row)
    close(total, 3.0 * math.log(sum(unit)))
    close(slopes, [3.0 / (low * sum(unit)) for low in nadir])
    other = log_stch(nadir, mu=0.3)
    close((called(other, row)[1] * double(row)).sum(), 3.0)
    close(called(other, nadir)[1], [1.0 / low for low in nadir])


def test_log_stch_is_the_sum_of_logarithms_until_the_nadir_is_known():
    loss = MultiTaskLoss(TASKS, LogSTCH(nadir_epoch=1))
    for epoch, row in enumerate(([5.0, 5.0, 5.0], [2.0, 4.0, 8.0])):
        for found, wanted in zip(called(loss, row), called(ScaleInvariant(), row), strict=True):
            close(found, wanted)
        loss.update("step")
        assert (loss.weighting.get_buffer("nadir") == 0).all()
        loss.update("epoch", index=epoch)
    close(loss.weighting.get_buffer("nadir"), [2.0, 4.0, 8.0])  # of epoch 1 only


def test_log_stch_waits_for_a_task_that_the_nadir_epoch_did_not_have():
    loss = MultiTaskLoss(TASKS, LogSTCH(nadir_epoch=0))
    for epoch, losses in enumerate(({"a": 2.0, "b": 4.0}, {"a": 1.0, "b": 1.0, "c": 5.0})):
        loss({name: double(value) for name, value in losses.items()}, counts={"a": 3.0})
        if epoch:
            weights = weights_of(loss)
            close(weights[2], 1 / 5)  # as in the sum of logarithms
            close(weights[0] + weights[1], 2.0)
        loss.update("step")
        loss.update("epoch")
    close(loss.weighting.get_buffer("nadir"), [2.0, 4.0, 5.0])


def test_log_stch_nadir_counts_samples():
    loss = MultiTaskLoss(TASKS, LogSTCH(nadir_epoch=0))
    for row, counts in (([1.0, 1.0, 1.0], [3.0, 1.0, 1.0]), ([5.0, 3.0, 2.0], [1.0, 1.0, 3.0])):
        loss(torch.tensor(row), counts=torch.tensor(counts))
        loss.update("step")
    loss.update("epoch")
    close(loss.weighting.get_buffer("nadir"), [2.0, 2.0, 1.75])


# random weights


def test_random_weights_are_a_function_of_seed_and_step():
    one, two, other = (MultiTaskLoss(TASKS, RLW(seed)) for seed in (4, 4, 5))
    torch.manual_seed(123)
    seen = []
    for step in range(20):
        torch.rand(step)  # whatever else is drawn
        close(weights_of(one), weights_of(two), rtol=0.0, atol=0.0)
        assert not torch.equal(weights_of(one), weights_of(other))
        seen.append(weights_of(one))
        for loss in (one, two, other):
            loss.update("step", index=step)
    assert len({tuple(row.tolist()) for row in seen}) == 20
    before = torch.get_rng_state()
    one.update("step")
    assert torch.equal(before, torch.get_rng_state())


def test_random_weights_resume_at_the_step_whatever_came_before():
    """After a skipped index, too; and in the middle of nothing else but the clock."""
    loss, again = (MultiTaskLoss(TASKS, RLW(1)) for _ in range(2))
    for index in (0, 1, 7):
        loss.update("step", index=index)
    again.load_state_dict(loss.state_dict())
    assert set(loss.weighting.state_dict()) == {"clock"}
    for index in (8, 9):
        close(weights_of(again), weights_of(loss), rtol=0.0, atol=0.0)
        for part in (loss, again):
            part.update("step", index=index)
    close(weights_of(again), weights_of(loss), rtol=0.0, atol=0.0)


def test_random_weights_are_equal_in_expectation():
    """Moments of 3000 steps within five standard errors; steps are not correlated."""
    made = RLW(num_tasks=4)
    draws, weights = [], []
    terms = weighting.LossTerms(torch.ones(4))
    for _ in range(3000):
        draws.append(made.get_buffer("draw").clone())
        weights.append(made.weigh(terms))
        made.update("step")
    draws, weights = torch.stack(draws), torch.stack(weights)
    close(weights.sum(1), torch.ones(3000))
    assert ((weights.mean(0) - 0.25).abs() < 5 * weights.std(0) / 3000**0.5).all()
    assert (draws.mean(0).abs() < 5 / 3000**0.5).all()
    assert ((draws.var(0) - 1).abs() < 5 * (2 / 3000) ** 0.5).all()
    assert ((draws[1:] * draws[:-1]).mean(0).abs() < 5 / 3000**0.5).all()


# learned


@given(LOSSES)
def test_uncertainty_at_its_optimum(row):
    """s = log L has no gradient, and half of the scale-invariant loss is what is left."""
    loss = MultiTaskLoss(TASKS, Uncertainty()).double()
    loss.weighting.log_scale.data = double(row).log()
    losses = leaf(row)
    total = loss(losses)
    slope_s, slope = torch.autograd.grad(total, [loss.weighting.log_scale, losses])
    logs, slope_logs = called(ScaleInvariant(), row)
    close(slope_s, [0.0] * 3)
    close(total.detach(), 0.5 * (3.0 + logs))
    close(slope, 0.5 * slope_logs)


@given(LOSSES, st.lists(st.floats(-3.0, 3.0), min_size=3, max_size=3))
def test_imtl_l_is_twice_uncertainty_with_the_sign_turned(row, s):
    imtl, uncertainty = (MultiTaskLoss(TASKS, kind()).double() for kind in (IMTLL, Uncertainty))
    imtl.weighting.log_scale.data = double(s)
    uncertainty.weighting.log_scale.data = -double(s)
    (left, *left_slopes), (right, *right_slopes) = (
        (total.detach(), *torch.autograd.grad(total, [losses, loss.weighting.log_scale]))
        for loss in (imtl, uncertainty)
        for losses in [leaf(row)]
        for total in [loss(losses)]
    )
    close(left, 2.0 * right)
    close(left_slopes[0], 2.0 * right_slopes[0])
    close(left_slopes[1], -2.0 * right_slopes[1])


@given(LOSSES)
def test_imtl_l_at_its_optimum(row):
    """Every scaled loss is 1."""
    loss = MultiTaskLoss(TASKS, IMTLL()).double()
    loss.weighting.log_scale.data = -double(row).log()
    losses = leaf(row)
    total = loss(losses)
    slope_s, slope = torch.autograd.grad(total, [loss.weighting.log_scale, losses])
    close(slope_s, [0.0] * 3)
    close(slope * losses.detach(), [1.0] * 3)
    close(total.detach(), 3.0 + called(ScaleInvariant(), row)[0])


@pytest.mark.parametrize("raw", [False, True])
@given(row=LOSSES)
def test_revised_uncertainty_at_its_optimum(raw, row):
    values = double(row)
    variance = (values + (values.square() + 8.0 * values).sqrt()) / 4.0
    loss = MultiTaskLoss(TASKS, RevisedUncertainty(raw=raw)).double()
    (learned,) = loss.parameters()
    learned.data = variance.sqrt() if raw else variance.log()
    total = loss(values)
    (slope,) = torch.autograd.grad(total, learned)
    close(slope, [0.0] * 3, atol=1e-10)
    close(total.detach(), (values / (2.0 * variance) + (1.0 + variance).log()).sum())
    assert total >= 0


def test_raw_sigma_may_be_negative():
    """Only its square counts, and its sign is kept at the bounds."""
    loss = MultiTaskLoss(TASKS, RevisedUncertainty(raw=True)).double()
    loss.weighting.sigma.data = double([-2.0, 2.0, -1e-9])
    losses = torch.ones(3, dtype=F64)
    (slope,) = torch.autograd.grad(loss(losses), loss.weighting.sigma)
    assert slope[0] == -slope[1]
    close([*loss.effective_weights(losses).values()], [0.125, 0.125, 0.5 * math.exp(10.0)])
    loss.update("step")
    close(loss.weighting.sigma.detach(), [-2.0, 2.0, -math.exp(-5.0)])


BOUNDED = [Uncertainty(), IMTLL(), RevisedUncertainty(), RevisedUncertainty(raw=True)]


@pytest.mark.parametrize("made", BOUNDED, ids=repr)
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("far", [0.0, 1e30])
def test_parameters_stay_in_bounds(made, decay, far):
    """A loss that is 0 for ever, a huge learning rate, weight decay: weights are finite at every step."""
    loss = MultiTaskLoss(TASKS, copy.deepcopy(made))
    (learned,) = loss.parameters()
    optimizer = torch.optim.SGD(loss.parameters(), lr=3.0, weight_decay=decay)
    for step in range(40):
        optimizer.zero_grad()
        losses = torch.tensor([0.0, 1.0, 1e4])
        loss(losses).backward()
        assert learned.grad.isfinite().all()
        optimizer.step()
        if step == 20:
            learned.data += far
        weights = torch.stack([*loss.effective_weights(losses).values()])
        assert weights.isfinite().all()
        assert (weights > 0).all()
        assert weights.max() <= math.exp(10.0) * (1 + 1e-5)
        loss.update("step")
        s = loss.weighting.scale()
        assert (s.abs() <= 10.0 + 1e-5).all()


def test_zero_loss_drifts_to_the_bound_and_comes_back():
    loss = MultiTaskLoss(["a", "b"], Uncertainty(bounds=(-2.0, 2.0)))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    for zero in (True, False):
        for _ in range(200):
            optimizer.zero_grad()
            loss(torch.tensor([0.0 if zero else 1.0, 1.0])).backward()
            optimizer.step()
            loss.update("step")
        close(loss.weighting.log_scale.detach().double(), [-2.0 if zero else 0.0, 0.0], atol=1e-3)


@pytest.mark.parametrize("made", [*BOUNDED, LearnedSoftmax(entropy=0.1)], ids=repr)
def test_an_absent_task_has_no_regulariser(made):
    loss = MultiTaskLoss(TASKS, copy.deepcopy(made)).double()
    (learned,) = loss.parameters()
    total = loss({"a": double(2.0), "c": double(3.0)})
    (slope,) = torch.autograd.grad(total, learned)
    assert slope[1] == 0
    assert slope[0] != 0
    alone = MultiTaskLoss(["a", "c"], copy.deepcopy(made)).double()
    close(total.detach(), alone(double([2.0, 3.0])).detach())


@pytest.mark.parametrize("made", [*BOUNDED, LearnedSoftmax()], ids=repr)
def test_learned_weights_have_a_group_without_decay(made):
    loss = MultiTaskLoss(TASKS, copy.deepcopy(made))
    (group,) = loss.parameter_groups(lr=0.1)
    assert group["weight_decay"] == 0.0
    assert [*loss.parameters()] == group["params"]


# learned softmax


def test_learned_softmax_starts_at_its_prior():
    loss = MultiTaskLoss(TASKS, LearnedSoftmax({"c": 5.0, "a": 1.0, "b": 2.0}))
    close(weights_of(loss).double(), [1 / 8, 2 / 8, 5 / 8], rtol=1e-6)


def test_learned_softmax_gives_everything_to_the_smallest_loss():
    """As in the paper: nothing holds it. With an entropy term it settles where the theory says."""
    for entropy, wanted in ((0.0, [0.0, 1.0, 0.0]), (0.5, torch.tensor([-4.0, -2.0, -3.0]).softmax(0))):
        loss = MultiTaskLoss(TASKS, LearnedSoftmax([1.0, 1.0, 8.0], entropy=entropy)).double()
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        for _ in range(1500):
            optimizer.zero_grad()
            loss(double([2.0, 1.0, 1.5])).backward()
            optimizer.step()
        close(weights_of(loss).double(), wanted, atol=1e-3)


def test_the_entropy_term_is_the_formulas():
    row, prior = [2.0, 1.0, 1.5], double([1.0, 2.0, 5.0])
    made = LearnedSoftmax(prior.tolist(), entropy=0.3)
    loss = MultiTaskLoss(TASKS, made).double()
    made.offset.data = double([0.4, -0.3, 0.1])
    a = made.offset.detach().clone().requires_grad_()
    w = (prior.log() + a).softmax(0)
    wanted = (w * double(row)).sum() + 0.3 * (w * w.log()).sum()
    total = loss(double(row))
    close(total.detach(), wanted.detach())
    close(torch.autograd.grad(total, made.offset)[0], torch.autograd.grad(wanted, a)[0])


# stages, ramps, temperatures


def test_stages_at_their_boundaries():
    stages = {5: [0.0, 0.0, 4.0], 0: 1.0, 2: {"c": 3.0, "a": 1.0, "b": 2.0}}
    loss = MultiTaskLoss(TASKS, Staged(stages))
    for step in range(7):
        wanted = [1.0, 1.0, 1.0] if step < 2 else [1.0, 2.0, 3.0] if step < 5 else [0.0, 0.0, 4.0]
        close(weights_of(loss).double(), wanted)
        again = MultiTaskLoss(TASKS, Staged(stages))
        again.load_state_dict(loss.state_dict())
        close(weights_of(again).double(), wanted)
        loss.update("epoch")  # not what it counts
        for part in (loss, again):
            part.update("step", index=step)
        close(weights_of(again), weights_of(loss), rtol=0.0, atol=0.0)


def test_stages_by_epoch():
    loss = MultiTaskLoss(TASKS, Staged({0: 0.5, 1: 2.0}, by="epoch"))
    for step in range(4):
        close(weights_of(loss).double(), [0.5 if step < 2 else 2.0] * 3)
        loss.update("step")
        if step == 1:
            loss.update("epoch")


def test_a_stage_gates_another_method():
    gated, free = (
        MultiTaskLoss(TASKS, Staged({0: [1.0, 0.0, 1.0], 3: 1.0}) * DWA(window=1)),
        MultiTaskLoss(TASKS, DWA(window=1)),
    )
    for step in range(5):
        losses = torch.tensor([1.0, 2.0, 3.0]) / torch.tensor([1.0, 1.0 + step, 2.0])
        gate = torch.tensor([1.0, float(step >= 3), 1.0])
        for loss in (gated, free):
            loss(losses)
        close(weights_of(gated).double(), (weights_of(free) * gate).double())
        for loss in (gated, free):
            loss.update("step")
    assert not torch.equal(weights_of(free), torch.ones(3))


def test_a_ramp_moves_one_task():
    loss = MultiTaskLoss(["main", "aux"], Ramp("aux", start=0.2, end=1.0, duration=4, delay=1) * DWA())
    for step, wanted in enumerate((0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0)):
        close(weights_of(loss).double(), [1.0, wanted], rtol=1e-6)
        loss.update("step", index=step)


def test_a_ramp_is_a_fixed_weight_with_a_schedule():
    for shape, by in (("linear", "epoch"), ("cosine", "step")):
        ramp = MultiTaskLoss(TASKS, Ramp(1, start=2.0, end=0.5, duration=3, shape=shape, by=by))
        kind = getattr(weighting, shape.capitalize())
        same = MultiTaskLoss(TASKS, Fixed([1.0, kind(2.0, 0.5, duration=3, by=by), 1.0]))
        for _ in range(5):
            assert torch.equal(weights_of(ramp), weights_of(same))
            for loss in (ramp, same):
                loss.update(by)


@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=6), st.floats(0.2, 50.0))
def test_temperature_mixing(counts, temperature):
    """q / p, so that its mean over what arrives is 1, and what arrives counts as if drawn at q."""
    n = double(counts)
    q = mixing_probabilities(counts, temperature)
    close(q, (n.log() / temperature).softmax(0), rtol=1e-9)
    names = [f"task{k}" for k in range(len(counts))]
    weights = TemperatureMixing(counts, temperature=temperature, num_tasks=len(names)).weigh(
        weighting.LossTerms(torch.ones(len(names), dtype=F64))
    )
    close(weights, q * n.sum() / n, rtol=1e-9)
    close((n / n.sum() * weights).sum(), 1.0, rtol=1e-9)
    evenly = TemperatureMixing(counts, temperature=temperature, drawn="evenly", num_tasks=len(names))
    close(evenly.weigh(weighting.LossTerms(torch.ones(len(names), dtype=F64))), len(names) * q, rtol=1e-9)


def test_temperature_limits():
    counts = {"a": 1000, "b": 10, "c": 100}
    close(mixing_probabilities(counts, 1.0), [1000 / 1110, 10 / 1110, 100 / 1110])
    close(mixing_probabilities(counts, 1e12), [1 / 3] * 3, rtol=1e-9)
    close(mixing_probabilities(counts, 1e-300), [1.0, 0.0, 0.0])
    close(weights_of(MultiTaskLoss(TASKS, TemperatureMixing(counts, temperature=1.0))).double(), [1.0] * 3)


def test_temperature_may_be_a_schedule():
    loss = MultiTaskLoss(TASKS, TemperatureMixing([9, 3, 1], temperature=Linear(1.0, 3.0, duration=2, by="epoch")))
    for temperature in (1.0, 2.0, 3.0):
        wanted = TemperatureMixing([9, 3, 1], temperature=temperature)
        close(weights_of(loss), weights_of(MultiTaskLoss(TASKS, wanted)))
        loss.update("epoch")


# across the family


def test_state_follows_names_into_other_tasks():
    old = log_stch([1.0, 2.0, 3.0])
    new = MultiTaskLoss(["c", "d", "a"], LogSTCH(nadir_epoch=0))
    with pytest.warns(UserWarning, match="matched by name"):
        new.load_state_dict(old.state_dict())
    close(new.weighting.get_buffer("nadir"), [3.0, 0.0, 1.0])
    learned = MultiTaskLoss(TASKS, LearnedSoftmax([1.0, 2.0, 3.0]))
    learned.weighting.offset.data = torch.tensor([0.1, 0.2, 0.3])
    other = MultiTaskLoss(["c", "d", "a"], LearnedSoftmax([3.0, 4.0, 1.0]))
    with pytest.warns(UserWarning, match="matched by name"):
        other.load_state_dict(learned.state_dict())
    close(other.weighting.offset.detach().double(), [0.3, 0.0, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GeometricMean(eps=0.0), "GeometricMean: eps must be finite and > 0"),
        (lambda: UWSO(0.0), "UWSO: temperature must be finite and > 0"),
        (lambda: UWSO(normalize="sum"), "UWSO: normalize must be one of 'sum_to_1', 'sum_to_k'"),
        (lambda: RLW(-1), "RLW: seed must be >= 0"),
        (lambda: STCH(-1.0), "STCH: mu must be finite and > 0"),
        (lambda: MultiTaskLoss(TASKS, STCH(preferences=[1.0])), "STCH: preferences must have one entry per task"),
        (lambda: MultiTaskLoss(TASKS, STCH(preferences=-1.0)), "STCH: preferences must be finite and >= 0"),
        (lambda: LogSTCH(nadir_epoch=-1), "LogSTCH: nadir_epoch must be >= 0"),
        (lambda: MultiTaskLoss(TASKS, RevisedUncertainty(11.0)), "RevisedUncertainty: init must be finite and"),
        (lambda: IMTLL(bounds=(1.0, 0.0)), "IMTLL: bounds must be"),
        (lambda: MultiTaskLoss(TASKS, LearnedSoftmax(0.0)), "LearnedSoftmax: prior must be finite and > 0"),
        (lambda: LearnedSoftmax(entropy=-1.0), "LearnedSoftmax: entropy must be finite and >= 0"),
        (lambda: Staged({1: 1.0}), "Staged: stages must include 0, got 1"),
        (lambda: Staged({}), "Staged: stages must include 0, got nothing"),
        (lambda: Staged({0: 1.0, -1: 2.0}), "Staged: stages must be >= 0"),
        (lambda: Staged({0: 1.0}, by="batch"), "Staged: by must be one of"),
        (lambda: MultiTaskLoss(TASKS, Staged({0: {"a": 1.0}})), "Staged: stages must name every task"),
        (lambda: MultiTaskLoss(TASKS, Staged({0: [1.0, -1.0, 1.0]})), "Staged: stages must be finite and >= 0"),
        (lambda: MultiTaskLoss(TASKS, Ramp("d", duration=1)), "Ramp: task must be one of a, b, c, got 'd'"),
        (lambda: MultiTaskLoss(TASKS, Ramp(3, duration=1)), "Ramp: task must be one of a, b, c, got 3"),
        (lambda: Ramp("a", start=-1.0, duration=1), "Ramp: start must be finite and >= 0"),
        (lambda: Ramp("a", duration=1, shape="square"), "Ramp: shape must be one of"),
        (lambda: MultiTaskLoss(TASKS, TemperatureMixing([1, 2])), "TemperatureMixing: counts must have one entry"),
        (lambda: MultiTaskLoss(TASKS, TemperatureMixing([1, 2, 0])), "TemperatureMixing: counts must be finite and"),
        (lambda: mixing_probabilities([]), "mixing_probabilities: counts must not be empty"),
        (lambda: mixing_probabilities([1, 0]), "mixing_probabilities: counts must be finite and > 0"),
    ],
)  # fmt: skip
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build()


@pytest.mark.parametrize(
    "build", [lambda: Staged([1.0]), lambda: Ramp(1.5, duration=1), lambda: TemperatureMixing(5.0)]
)
def test_wrong_kinds(build):
    with pytest.raises(TypeError):
        build()
