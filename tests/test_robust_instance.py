"""Robust weights of instances: what they maximise, their limits, and numbers that would overflow."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from reweigh import (
    KLDRO,
    ChiSquareDRO,
    ChiSquareDROLoss,
    CompositionalDRO,
    CrossEntropy,
    CVaR,
    CVaRLoss,
    Focal,
    FromLoss,
    KLDROLoss,
    Linear,
    LogMeanExp,
    LossRange,
    LossTerms,
    Objective,
    Tilted,
    TiltedLoss,
)
from reweigh.losses.conformance import check_objective
from reweigh.weighting.algebra import Gathered

SHIFTED = {
    "kl": lambda: KLDRO(0.7),
    "chi": lambda: ChiSquareDRO(0.4),
    "cvar": lambda: CVaR(0.35),
    "tilted": lambda: Tilted(-1.3),
    "linupper": lambda: LossRange(burn_in=0),
    "upper": lambda: LossRange("upper", burn_in=0),
    "quadratic": lambda: LossRange("quadratic", temperature=0.3, burn_in=0),
    "extremes": lambda: LossRange("extremes", delta=2.0, burn_in=0),
}
NAMED = {"kl": KLDROLoss, "cvar": CVaRLoss, "chi": ChiSquareDROLoss, "tilted": TiltedLoss}
STRATEGIES = ["linupper", "upper", "quadratic", "extremes"]

vectors = st.lists(st.floats(0.0, 20.0), min_size=1, max_size=12)
quick = settings(max_examples=60, deadline=None)


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def weigh(weighting, losses, **fields):
    return weighting.weigh(LossTerms(losses, **fields))


def raw(weighting=None, reduction="mean"):
    """An objective on losses as they are."""
    return Objective(FromLoss(torch.nn.Identity()), weighting, reduction)


def same(found, wanted, tol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=tol, atol=tol)


# what they maximise


@given(vectors, st.floats(0.05, 50.0))
@quick
def test_log_mean_exp_has_the_weights_of_kl_dro_as_its_gradient(values, r):
    losses = vector(values).requires_grad_()
    robust, weighted = raw(None, LogMeanExp(r))(losses), raw(KLDRO(r))(losses)
    p = weigh(KLDRO(r), losses) / len(values)
    same(torch.autograd.grad(robust, losses)[0], p)
    same(torch.autograd.grad(weighted, losses)[0], p)
    divergence = torch.special.xlogy(p, p * len(values)).sum()
    same(robust, (p * losses).sum() - r * divergence)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-12)


@given(vectors, st.floats(0.1, 10.0), st.integers(0, 10**6))
@quick
def test_no_distribution_beats_that_of_kl_dro(values, r, seed):
    losses, n = vector(values), len(values)
    other = (3.0 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(0)
    robust = raw(None, LogMeanExp(r))(losses)
    assert robust >= (other * losses).sum() - r * torch.special.xlogy(other, other * n).sum() - 1e-10


def distance(weights):
    return 0.5 * (weights - 1.0).square().mean()


@given(vectors, st.floats(0.0, 8.0), st.integers(0, 10**6))
@quick
def test_no_distribution_in_the_ball_beats_that_of_chi_square_dro(values, rho, seed):
    losses, n = vector(values), len(values)
    weights = weigh(ChiSquareDRO(rho), losses)
    assert weights.min() >= 0
    same(weights.mean(), torch.tensor(1.0, dtype=torch.float64), 1e-9)
    assert distance(weights) <= rho * (1 + 1e-9) + 1e-12
    draw = torch.Generator().manual_seed(seed)
    for scale in (0.5, 3.0):
        other = n * (scale * torch.randn(n, generator=draw, dtype=torch.float64) + losses).softmax(0)
        other = 1.0 + (other - 1.0) * (rho / distance(other).clamp_min(1e-300)).clamp_max(1.0).sqrt()
        assert (weights * losses).mean() >= (other * losses).mean() - 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rho", [0.02, 0.3, 1.5])
def test_chi_square_dro_is_the_solution_that_scipy_finds(seed, rho):
    optimize = pytest.importorskip("scipy.optimize")
    losses = 3.0 * torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost = losses.numpy()
    solved = optimize.minimize(
        lambda w: -(w @ cost) / 7,
        [1.0] * 7,
        jac=lambda w: -cost / 7,
        bounds=[(0.0, 7.0)] * 7,
        constraints=[
            {"type": "eq", "fun": lambda w: w.mean() - 1.0},
            {"type": "ineq", "fun": lambda w: rho - ((w - 1.0) ** 2).mean() / 2},
        ],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    assert solved.success or solved.status == 8  # so near that no step descends any more
    weights = weigh(ChiSquareDRO(rho), losses)
    torch.testing.assert_close(weights, torch.from_numpy(solved.x), rtol=0, atol=2e-4)
    torch.testing.assert_close((weights * losses).mean().item(), -solved.fun, rtol=1e-7, atol=0)


def test_a_small_ball_adds_the_standard_deviation():
    losses, rho = vector([0.3, 1.0, 2.0, 2.2, 4.0]), 1e-3
    wanted = losses.mean() + (2 * rho * losses.var(correction=0)).sqrt()
    same((weigh(ChiSquareDRO(rho), losses) * losses).mean(), wanted, 1e-12)


@pytest.mark.parametrize(("losses", "rho", "wanted"), [
    ([1.0, 2.0, 3.0], 1.0, [0.0, 0.0, 3.0]),  # (N - 1) / 2
    ([1.0, 3.0, 3.0], 0.25, [0.0, 1.5, 1.5]),  # (N / 2 - 1) / 2
    ([1.0, 3.0, 3.0], 50.0, [0.0, 1.5, 1.5]),
    ([1.0, 3.0, 2.0], 0.0, [1.0, 1.0, 1.0]),
    ([7.0], 3.0, [1.0]),
])  # fmt: skip
def test_chi_square_dro_at_the_ends(losses, rho, wanted):
    same(weigh(ChiSquareDRO(rho), vector(losses)), vector(wanted), 1e-12)


@given(vectors, st.floats(0.01, 1.0))
@quick
def test_cvar_is_the_mean_of_the_sorted_tail(values, alpha):
    losses = vector(values)
    left, total = alpha * len(values), 0.0
    for value in sorted(values, reverse=True):
        total += min(left, 1.0) * value
        left = max(left - 1.0, 0.0)
    value = (weigh(CVaR(alpha), losses) * losses).mean()
    same(value.item(), total / (alpha * len(values)))
    # Rockafellar and Uryasev: the smallest of these over a threshold, which is one of the losses
    bound = losses + (losses - losses[:, None]).clamp_min(0.0).mean(1) / alpha
    same(value, bound.min())


# limits


@given(vectors)
@quick
def test_temperature_goes_from_the_largest_loss_to_the_mean(values):
    losses = vector(values)
    for made in (lambda r: raw(None, LogMeanExp(r)), lambda r: raw(KLDRO(r)), lambda r: raw(Tilted(1 / r))):
        torch.testing.assert_close(made(1e9)(losses), losses.mean(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(made(1e-6)(losses), losses.max(), rtol=0, atol=1e-4)
    torch.testing.assert_close(raw(Tilted(-1e6))(losses), losses.min(), rtol=0, atol=1e-4)
    same(weigh(Tilted(0.0), losses), torch.ones_like(losses), 1e-12)


@given(vectors, st.floats(0.1, 5.0))
@quick
def test_tilted_is_kl_dro_at_the_inverse(values, tilt):
    same(weigh(Tilted(tilt), vector(values)), weigh(KLDRO(1 / tilt), vector(values)))


@pytest.mark.parametrize("name", SHIFTED)
@given(
    # eighths, so that a sum with the constant is exact
    st.lists(st.integers(0, 160), min_size=2, max_size=9),
    st.integers(-100, 1000),
)
@settings(max_examples=30, deadline=None)
def test_a_constant_on_all_losses_changes_nothing(name, values, constant):
    losses = vector(values) / 8
    same(weigh(SHIFTED[name](), losses + constant), weigh(SHIFTED[name](), losses), 1e-9)


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("value", [0.0, 2.5, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_losses_have_equal_weights(name, value, dtype):
    losses = torch.full((7,), value, dtype=dtype)
    torch.testing.assert_close(weigh(SHIFTED[name](), losses), torch.ones_like(losses), rtol=1e-6, atol=0)


ROBUST = {
    "kl": lambda losses: raw(None, LogMeanExp(0.6))(losses),
    "chi": lambda losses: raw(ChiSquareDRO(0.5))(losses),
    "cvar": lambda losses: raw(CVaR(0.4))(losses),
}


@pytest.mark.parametrize("name", ROBUST)
@given(st.lists(st.floats(0.0, 20.0), min_size=2, max_size=9), st.integers(0, 8), st.floats(0.0, 10.0))
@settings(max_examples=40, deadline=None)
def test_a_robust_value_lies_between_mean_and_maximum_and_rises_with_each_loss(name, values, at, more):
    losses = vector(values)
    value, slack = ROBUST[name](losses), 1e-9
    assert losses.mean() - slack <= value <= losses.max() + slack
    raised = losses.clone()
    raised[at % len(values)] += more
    assert ROBUST[name](raised) >= value - slack


@pytest.mark.parametrize("name", ROBUST)
def test_weights_are_the_gradient_of_the_robust_value(name):
    losses = vector([0.2, 3.0, 1.0, 2.5, 0.7, 2.9]).requires_grad_()
    assert torch.autograd.gradcheck(ROBUST[name], losses)


# large numbers, and what does not count


@pytest.mark.parametrize("name", [*SHIFTED, "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_ten_thousand(name, dtype):
    weighting = CompositionalDRO() if name == "composed" else SHIFTED[name]()
    losses = torch.tensor([1e4, 1e4 - 1.0, 0.0, 3.0, 9e3], dtype=dtype)
    objective = raw(weighting)
    for step in range(3):
        weights = objective.weights(losses)
        assert weights.isfinite().all()
        torch.testing.assert_close(weights.mean().item(), 1.0, rtol=1e-6, atol=0)
        assert objective(losses).isfinite()
        objective.update("step", index=step)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_log_mean_exp_of_ten_thousand(temperature):
    """In float32, where the logarithm of a sum at 1e4 / temperature is too coarse for its own gradient."""
    losses = torch.tensor([1e4, 1e4, 0.0], requires_grad=True)
    value = raw(None, LogMeanExp(temperature))(losses)
    (grad,) = torch.autograd.grad(value, losses)
    exact = 1e4 + temperature * math.log((2 + math.exp(-1e4 / temperature)) / 3)
    torch.testing.assert_close(value.item(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.sum().item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SHIFTED)
def test_masked_terms_do_not_matter(name):
    losses, mask = vector([0.5, 2.0, 1.0, 3.0, 0.1]), torch.tensor([True, True, False, True, False])
    objective = raw(SHIFTED[name](), "none")
    hidden = losses.masked_fill(~mask, torch.nan)
    same(objective.weights(hidden, mask=mask)[mask], objective.weights(losses[mask]))
    same(objective(hidden, mask=mask)[mask], objective(losses[mask]))


@pytest.mark.parametrize("name", SHIFTED)
def test_an_integer_sample_weight_means_copies(name):
    losses, copies = vector([0.5, 2.0, 1.0, 3.0]), torch.tensor([2, 1, 3, 0])
    objective = raw(SHIFTED[name]())
    repeated = losses.repeat_interleave(copies)
    found = objective.weights(losses, sample_weight=copies.double()).repeat_interleave(copies)
    same(found, objective.weights(repeated))


# the reduction


@given(vectors, st.floats(0.1, 10.0))
@quick
def test_log_mean_exp_counts_copies_and_leaves_masked_terms_out(values, r):
    losses, reduction = vector(values), LogMeanExp(r)
    copies = torch.arange(len(values)) % 3
    objective = raw(None, reduction)
    if copies.sum():
        wanted = objective(losses.repeat_interleave(copies))
        same(objective(losses, sample_weight=copies.double()), wanted)
    mask = torch.arange(len(values)) % 2 == 0
    same(objective(losses.masked_fill(~mask, torch.nan), mask=mask), objective(losses[mask]))


def test_log_mean_exp_of_weighted_losses():
    losses, weights = vector([0.5, 2.0, 1.0]), vector([2.0, 0.5, 1.0])
    wanted = 0.7 * ((weights * losses / 0.7).exp().mean()).log()
    same(LogMeanExp(0.7)(weights * losses, weights, LossTerms(losses)), wanted)
    logits, target = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(),
        torch.tensor([0, 1, 2, 0, 1]),
    )
    focal = Objective(CrossEntropy(), Focal(2.0), "none")(logits, target)
    same(Objective(CrossEntropy(), Focal(2.0), LogMeanExp(0.7))(logits, target), raw(None, LogMeanExp(0.7))(focal))


@pytest.mark.parametrize("empty", ["zero", "nan"])
@pytest.mark.parametrize("size", [0, 3])
def test_log_mean_exp_of_nothing(empty, size):
    losses = torch.full((size,), torch.nan, requires_grad=True)
    value = raw(None, LogMeanExp(empty=empty))(losses, mask=torch.zeros(size, dtype=torch.bool))
    assert value.isnan() if empty == "nan" else value == 0
    if empty == "zero":
        (grad,) = torch.autograd.grad(value, losses)
        assert (grad == 0).all()


def test_log_mean_exp_is_no_ratio_of_sums():
    objective = raw(None, LogMeanExp())
    with pytest.raises(ValueError, match="num_items replaces a denominator, and reduction 'log_mean_exp' is no ratio"):
        objective(torch.ones(3), num_items=3)
    with pytest.raises(ValueError, match="'log_mean_exp' is no ratio of sums"):
        objective.parts(torch.ones(3))
    with pytest.raises(ValueError, match=r"LogMeanExp: temperature must be finite and > 0, got 0\.0"):
        LogMeanExp(0.0)


def test_log_mean_exp_between_levels():
    """Sequences by their mean, then the worst of them: one criterion inside the other."""
    losses = vector([1.0, 3.0, 0.5, 0.5]).reshape(2, 2)
    sequences = raw(None, "sequence_mean")
    same(Objective(sequences, None, LogMeanExp(0.5))(losses), raw(None, LogMeanExp(0.5))(vector([2.0, 0.5])))
    same(Objective(raw(None, LogMeanExp(0.5)), None, "sum")(losses), raw(None, LogMeanExp(0.5))(losses))


def test_log_mean_exp_passes_the_suite():
    check_objective(Objective(CrossEntropy(), None, LogMeanExp(0.5)))
    check_objective(Objective(CrossEntropy(), Focal(2.0), LogMeanExp(2.0)))


# the running normaliser


def test_compositional_dro_with_all_of_the_new_batch_is_kl_dro():
    weighting = CompositionalDRO(0.5, smoothing=1.0)
    for seed in range(3):
        losses = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        same(weigh(weighting, losses), weigh(KLDRO(0.5), losses))
        weighting.observe(LossTerms(losses))
        weighting.update("step")


@given(st.lists(st.lists(st.floats(0.0, 50.0), min_size=1, max_size=5), min_size=2, max_size=6), st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_compositional_weights_are_bounded_by_those_of_the_batch(batches, smoothing):
    weighting = CompositionalDRO(smoothing=smoothing)
    for step, values in enumerate(batches):
        losses = vector(values)
        weights = weigh(weighting, losses)
        assert (weights <= weigh(KLDRO(), losses) / smoothing * (1 + 1e-9)).all()
        if step == 0:
            same(weights, weigh(KLDRO(), losses))
        weighting.observe(LossTerms(losses))
        weighting.update("step", index=step)


def test_compositional_dro_approaches_the_weights_over_all_data():
    """Batches of four of two hundred samples: a softmax over the batch stays wrong, the running one does not."""
    draw = torch.Generator().manual_seed(0)
    losses = 2.0 * torch.randn(200, generator=draw, dtype=torch.float64).abs()
    whole = weigh(KLDRO(), losses)
    weighting = CompositionalDRO(smoothing=0.002)
    objective, found, alone = raw(weighting), torch.zeros_like(whole), torch.zeros_like(whole)
    step = 0
    for epoch in range(100):
        for at in torch.randperm(200, generator=draw).split(4):
            objective(losses[at].requires_grad_())
            objective.update("step", index=step)
            step += 1
            if epoch == 99:
                found[at] = objective.weights(losses[at])
                alone[at] = weigh(KLDRO(), losses[at])
    error = ((found - whole).abs() / whole).max()
    assert error < 0.1
    assert ((alone - whole).abs() / whole).max() > 5 * error


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_micro_batches_teach_what_their_batch_does(offset):
    losses = vector([0.5, 2.0, 1.0, 3.0, 0.1]) + offset
    whole, parts = CompositionalDRO(smoothing=0.3), CompositionalDRO(smoothing=0.3)
    for weighting, pieces in ((whole, [losses]), (parts, list(losses.split(2)))):
        for step in range(2):
            for piece in pieces:
                weighting.observe(LossTerms(piece + step))
            weighting.update("step", index=step)
            weighting.update("step", index=step)  # a second call of the same step changes nothing
    same(parts.summary()["log_u"], whole.summary()["log_u"], 1e-12)
    mean = losses.exp().mean() if not offset else None
    if mean is not None:
        same(whole.summary()["log_u"].exp(), 0.7 * mean + 0.3 * math.e * mean, 1e-12)


def test_what_is_not_finite_is_not_learned():
    weighting = CompositionalDRO(smoothing=0.5)
    weighting.observe(LossTerms(vector([1.0, 2.0])))
    weighting.update("step")
    before = copy.deepcopy(weighting.state_dict())
    for bad in ([torch.inf, 1.0], [torch.nan, 1.0]):
        weighting.observe(LossTerms(vector(bad)))
        weighting.update("step")
    assert weighting.summary()["log_u"] == before["log_u"]
    assert weigh(weighting, vector([1.0, 2.0])).isfinite().all()
    # such a batch is weighed by the u there is
    same(weigh(weighting, vector([torch.inf, 1.0]))[1], (1.0 - before["log_u"]).exp())


def test_looking_does_not_move_u():
    weighting = CompositionalDRO(smoothing=0.5)
    losses = vector([1.0, 2.0])
    same(weigh(weighting, losses), weigh(weighting, losses), 0.0)
    assert not weighting.get_buffer("seen")


def test_temperature_may_be_a_schedule():
    """ABSGD's: high for some epochs, then low."""
    weighting = CompositionalDRO(Linear(10.0, 1.0, duration=2, by="epoch"), smoothing=1.0)
    losses = vector([1.0, 3.0])
    same(weigh(weighting, losses), weigh(KLDRO(10.0), losses))
    weighting.update("epoch", index=0)
    same(weigh(weighting, losses), weigh(KLDRO(5.5), losses))


def test_weights_do_not_jump_with_the_temperature():
    """From 10 to 1, as in ABSGD's script, whose weights are tenfold then: its u is near e^(l / 10), not e^l."""
    weighting = CompositionalDRO(Linear(10.0, 1.0, duration=1, by="epoch"), smoothing=0.1)
    losses = 5.0 + torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in range(3):
        weighting.observe(LossTerms(losses))
        weighting.update("step", index=step)
    value = 10.0 * weighting.summary()["log_u"]
    same(value, raw(None, LogMeanExp(10.0))(losses))
    weighting.update("epoch", index=0)
    u = 0.9 * value.exp() + 0.1 * losses.exp().mean()
    same(weigh(weighting, losses), losses.exp() / u)
    assert 0.9 < weigh(weighting, losses).mean() < 1.1
    weighting.observe(LossTerms(losses))
    weighting.update("step", index=3)
    same(weighting.summary()["log_u"], u.log())


def test_two_hundred_steps_leave_nothing_behind():
    """What the script keeps is the graph of every step before, and with it every batch of losses."""
    weighting = CompositionalDRO(0.5, smoothing=0.05)
    objective, batches, sizes = raw(weighting), [], []
    for step in range(200):
        losses = torch.rand(8, requires_grad=True)
        batches.append(weakref.ref(losses))
        objective(losses).backward()
        objective.update("step", index=step)
        sizes.append(len(pickle.dumps(objective)))
        for name, value in weighting.named_buffers():
            assert value.grad_fn is None, name
    del losses
    gc.collect()
    assert all(batch() is None for batch in batches)
    assert sizes[-1] == sizes[5]


# the range of losses


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(st.lists(st.floats(0.0, 20.0), min_size=2, max_size=9), st.floats(0.2, 5.0), st.floats(0.2, 3.0))
@settings(max_examples=30, deadline=None)
def test_weights_of_a_range_stay_within_a_factor(strategy, values, temperature, delta):
    weights = weigh(LossRange(strategy, temperature=temperature, delta=delta, burn_in=0), vector(values))
    reach = 1.0 if strategy == "quadratic" else delta
    assert weights.max() / weights.min() <= math.exp(reach / temperature) * (1 + 1e-9)
    same(weights.mean().item(), 1.0, 1e-12)


def test_what_each_strategy_prefers():
    losses = vector([0.0, 1.0, 2.0, 3.0, 4.0])
    order = {name: weigh(LossRange(name, burn_in=0), losses) for name in STRATEGIES}
    assert order["linupper"][0] < order["linupper"][1] < order["linupper"][2]
    same(order["linupper"][2:], order["linupper"][2].expand(3))
    assert (order["upper"].diff() > 0).all()
    assert order["quadratic"].argmax() == 2
    same(order["quadratic"], order["quadratic"].flip(0))
    assert order["extremes"].argmin() == 2
    same(order["extremes"], order["extremes"].flip(0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_range_below_the_guard_has_its_middle_at_zero(strategy):
    """h is 2 (l - middle) / 1e-6 there, as in the authors' code: noise stays noise."""
    f = {
        "linupper": lambda h: min(h + 1, 1),
        "upper": lambda h: 0.5 * h + 0.5,
        "quadratic": lambda h: 1 - h * h,
        "extremes": abs,
    }[strategy]
    losses = 0.25 + vector([0.0, 1.0, 2.0, 4.0]) * 1e-7
    raised = [math.exp(f(h)) for h in (-0.4, -0.2, 0.0, 0.4)]
    wanted = 4 * vector(raised) / sum(raised)
    same(weigh(LossRange(strategy, burn_in=0), losses), wanted, 1e-8)


def test_burn_in_counts_steps_once():
    weighting, losses = LossRange(burn_in=2), vector([1.0, 2.0, 4.0])
    for step in range(2):
        same(weigh(weighting, losses), torch.ones_like(losses), 0.0)
        for _ in range(3):
            weighting.update("step", index=step)
        weighting.update("epoch", index=step)
    same(weigh(weighting, losses), weigh(LossRange(burn_in=0), losses))
    resumed = LossRange(burn_in=2)
    resumed.load_state_dict(weighting.state_dict())
    same(weigh(resumed, losses), weigh(weighting, losses), 0.0)


# the named losses


@pytest.mark.parametrize("name", NAMED)
def test_named_losses_compare_terms_of_all_ranks_unless_told_otherwise(name):
    assert isinstance(NAMED[name]().weighting, Gathered)
    assert not isinstance(NAMED[name](gather=False).weighting, Gathered)
    with pytest.raises(TypeError, match=f"{NAMED[name].__name__}: gather must be True or False, got 1"):
        NAMED[name](gather=1)


@pytest.mark.parametrize("name", NAMED)
def test_named_losses_on_pixels_with_ignored_ones(name):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64)
    target = torch.randint(3, (2, 4, 4), generator=draw)
    target[0, :2] = 255
    loss = NAMED[name](ignore_index=255)
    kept = target != 255
    flat = NAMED[name]()(logits.movedim(1, -1)[kept], target[kept])
    same(loss(logits, target), flat)


@pytest.mark.parametrize(("loss", "wanted"), [
    (CVaRLoss(1.0, weight=[1, 2, 3], label_smoothing=0.1), {"weight": vector([1, 2, 3]), "label_smoothing": 0.1}),
    (TiltedLoss(0.0, label_smoothing=0.2), {"label_smoothing": 0.2}),
    (ChiSquareDROLoss(0.0, weight=[1, 2, 3]), {"weight": vector([1, 2, 3])}),
])  # fmt: skip
def test_neutral_arguments_are_torch_cross_entropy(loss, wanted):
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 2, 1, 0])
    same(loss(logits, target), cross_entropy(logits, target, **wanted))


def test_weights_compose():
    losses = vector([0.5, 2.0, 1.0, 3.0])
    same(weigh(KLDRO(1.0).clip(max=1.0), losses), weigh(KLDRO(1.0), losses).clamp_max(1.0))
    product = KLDRO(2.0) * KLDRO(2.0)
    same(weigh(product.normalize(), losses), weigh(KLDRO(1.0), losses))
    same(weigh((KLDRO(1.0) ** 0.5).normalize(), losses), weigh(KLDRO(2.0), losses))
    mixed = weigh(0.5 * CVaR(0.5) + 0.5, losses)
    same(mixed, 0.5 + 0.5 * weigh(CVaR(0.5), losses))
    warm = CVaR(Linear(1.0, 0.5, duration=2, by="step"))
    same(weigh(warm, losses), torch.ones_like(losses))
    warm.update("step")
    same(weigh(warm, losses), weigh(CVaR(0.75), losses))


@pytest.mark.parametrize(("make", "error", "text"), [
    (lambda: KLDRO(0.0), ValueError, "KLDRO: temperature must be finite and > 0, got 0.0"),
    (lambda: KLDRO("hot"), TypeError, "KLDRO: temperature must be a number, got 'hot'"),
    (lambda: CVaR(0.0), ValueError, "CVaR: alpha must be finite and > 0 and <= 1, got 0.0"),
    (lambda: CVaR(1.1), ValueError, "CVaR: alpha must be finite and > 0 and <= 1, got 1.1"),
    (lambda: ChiSquareDRO(-0.1), ValueError, "ChiSquareDRO: rho must be finite and >= 0, got -0.1"),
    (lambda: Tilted(math.inf), ValueError, "Tilted: tilt must be finite, got inf"),
    (lambda: CompositionalDRO(smoothing=0.0), ValueError, "CompositionalDRO: smoothing must be finite and > 0 and"),
    (lambda: LossRange("mid"), ValueError, "LossRange: strategy must be one of 'linupper', 'upper', 'quadratic', "),
    (lambda: LossRange(delta=0.0), ValueError, "LossRange: delta must be finite and > 0, got 0.0"),
    (lambda: LossRange(burn_in=-1), ValueError, "LossRange: burn_in must be >= 0, got -1"),
    (lambda: LossRange(burn_in=1.5), TypeError, "LossRange: burn_in must be an integer, got 1.5"),
    (lambda: CVaR(Linear(1.0, 0.0, duration=3)), ValueError, "CVaR: alpha must be finite and > 0 and <= 1, got 0.0"),
])  # fmt: skip
def test_errors_name_argument_rule_and_value(make, error, text):
    with pytest.raises(error, match=text):
        make()
