"""Robust weights of instances: what they maximise, their limits, and numbers that would overflow."""

import copy
import math

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
    assert solved.success
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
