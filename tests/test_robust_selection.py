"""Weights that select: shares of the batch against sorting, the others against what they minimise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reweigh import CrossEntropy, CVaR, FromLoss, Linear, LossTerms, Objective, SelfPaced, SmallLoss, SuperLoss
from reweigh.weighting.functional import lambert_w

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


# shares of the batch


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 10**6))
@quick
def test_a_whole_number_of_terms_is_top_k(size, kept, seed):
    """Online hard example mining: the mean over the k largest losses; co-teaching: over the k smallest."""
    kept = min(kept, size)
    losses = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    same(raw(CVaR(kept / size))(losses), losses.topk(kept).values.mean())
    same(raw(SmallLoss(kept / size))(losses), losses.topk(kept, largest=False).values.mean())


@given(vectors, st.floats(0.05, 0.95))
@quick
def test_the_two_ends_make_up_the_whole(values, keep):
    losses = vector(values)
    both = keep * weigh(SmallLoss(keep), losses) + (1 - keep) * weigh(CVaR(1 - keep), losses)
    same(both, torch.ones_like(losses), 1e-9)


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=10), st.floats(0.05, 1.0))
@quick
def test_equal_losses_share_and_order_does_not_matter(values, share):
    losses = vector(values)
    for weighting in (CVaR(share), SmallLoss(share)):
        weights = weigh(weighting, losses)
        same(weigh(weighting, losses.flip(0)).flip(0), weights, 1e-12)
        for value in losses.unique():
            assert weights[losses == value].std(correction=0) < 1e-12
        same(weights.mean().item(), 1.0)


@pytest.mark.parametrize("weighting", [CVaR(0.4), SmallLoss(0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_of_ten_thousand_and_of_nothing(weighting, dtype):
    losses = torch.tensor([1e4, 1e4, 0.0, 9e3, 1.0], dtype=dtype)
    weights = weigh(weighting, losses)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.mean().item(), 1.0, rtol=1e-6, atol=0)
    assert raw(weighting)(losses, mask=torch.zeros(5, dtype=torch.bool)) == 0


def test_copies_fill_the_share():
    """Three copies of the smallest are all of 0.6 * 5."""
    losses, copies = vector([1.0, 2.0, 3.0]), vector([3.0, 1.0, 1.0])
    same(raw(SmallLoss(0.6)).weights(losses, sample_weight=copies), vector([5 / 3, 0.0, 0.0]))
    same(raw(CVaR(0.6)).weights(losses, sample_weight=copies), vector([5 / 9, 5 / 3, 5 / 3]))


def test_co_teaching_schedule():
    """R(t) = 1 - noise min(t / 10, 1)."""
    weighting, losses = SmallLoss(Linear(1.0, 0.6, duration=10)), torch.arange(10, dtype=torch.float64)
    for epoch in range(12):
        kept = 1 - 0.4 * min(epoch / 10, 1)
        same(weigh(weighting, losses), weigh(SmallLoss(kept), losses), 1e-9)
        weighting.update("epoch", index=epoch)


# Lambert's W and SuperLoss


def test_lambert_w_is_scipys():
    special = pytest.importorskip("scipy.special")
    z = np.concatenate([-np.logspace(-300, math.log10(0.36), 500), [0.0], np.logspace(-300, 308, 2000)])
    found, wanted = lambert_w(torch.from_numpy(z)), torch.from_numpy(special.lambertw(z).real)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_lambert_w_at_its_branch_point():
    """SciPy itself is off by 5e-9 there."""
    mpmath = pytest.importorskip("mpmath")
    z = -math.exp(-1.0) + np.logspace(-16, -1, 60)
    with mpmath.workdps(50):
        wanted = [float(mpmath.lambertw(mpmath.mpf(float(value))).real) for value in z]
    same(lambert_w(torch.from_numpy(z)), vector(wanted), 1e-12)
    assert lambert_w(vector([-math.exp(-1.0), -5.0])).tolist() == pytest.approx([-1.0, -1.0], abs=1e-7)


def test_lambert_w_in_float32():
    special = pytest.importorskip("scipy.special")
    z = torch.cat([torch.linspace(-0.36, 5.0, 200), torch.logspace(1, 38, 50)])
    wanted = torch.from_numpy(special.lambertw(z.double().numpy()).real).float()
    torch.testing.assert_close(lambert_w(z), wanted, rtol=1e-6, atol=1e-7)


@given(vectors, st.floats(0.1, 5.0), st.floats(0.0, 5.0))
@quick
def test_super_loss_is_the_minimum_over_its_confidence(values, lam, tau):
    losses = vector(values).requires_grad_()
    weighting = SuperLoss(lam, tau=tau)
    sigma = weigh(weighting, losses)
    value = raw(weighting, "none")(losses)
    log_sigma = torch.linspace(-8.0, 1.0, 2001, dtype=torch.float64)[:, None]  # up to e, where the formula holds it
    others = (losses - tau) * log_sigma.exp() + lam * log_sigma.square()
    assert (value <= others.min(0).values + 1e-9).all()
    same(value, (losses - tau) * sigma + lam * sigma.log().square(), 1e-9)
    same(torch.autograd.grad(value.sum(), losses)[0], sigma)
    assert ((sigma > 0) & (sigma <= math.e * (1 + 1e-7))).all()
    order = losses.argsort()
    assert (sigma[order].diff() <= 1e-12).all()


@pytest.mark.parametrize("lam", [0.01, 1.0, 100.0])
def test_super_loss_at_its_level_and_in_its_limits(lam):
    same(weigh(SuperLoss(lam, tau=1.5), vector([1.5])), vector([1.0]), 1e-12)
    low = 1.5 - 2.0 * lam / math.e
    same(weigh(SuperLoss(lam, tau=1.5), vector([low, low - 1.0])), vector([math.e, math.e]), 1e-6)
    same(weigh(SuperLoss(1e9, tau=1.5), vector([0.0, 1.5, 9.0])), torch.ones(3, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_super_loss_of_ten_thousand(dtype):
    losses = torch.tensor([1e4, 0.0, 3.0], dtype=dtype, requires_grad=True)
    value = raw(SuperLoss(0.25, tau=1.0))(losses)
    assert value.isfinite()
    assert torch.autograd.grad(value, losses)[0].isfinite().all()


def test_super_loss_has_no_level_at_first_and_then_the_running_mean():
    weighting = SuperLoss(smoothing=0.25)
    objective = raw(weighting)
    first, second, third = vector([1.0, 3.0]), vector([4.0, 8.0]), vector([2.0, 2.5])
    same(objective.weights(first), torch.ones_like(first), 0.0)
    same(objective(first.requires_grad_()), first.mean())
    objective.update("step", index=0)
    same(objective.weights(second), weigh(SuperLoss(tau=2.0), second))
    for piece in second.split(1):  # micro-batches, one of them weighed as two
        objective(piece.requires_grad_(), sample_weight=vector([2.0]) if piece > 5 else None)
    objective.update("step", index=1)
    objective.update("step", index=1)
    tau = 0.75 * 2.0 + 0.25 * (4.0 + 2 * 8.0) / 3
    same(weighting.summary()["tau"], torch.tensor(tau, dtype=torch.float64), 1e-12)
    same(objective.weights(third), weigh(SuperLoss(tau=tau), third))
    resumed = SuperLoss(smoothing=0.25)
    resumed.load_state_dict(weighting.state_dict())
    same(weigh(resumed, third), weigh(weighting, third), 0.0)
    weighting.reset()
    same(weigh(weighting, third), torch.ones_like(third), 0.0)


def test_super_loss_does_not_learn_what_is_not_finite():
    weighting = SuperLoss()
    for losses in ([1.0, 2.0], [torch.inf, 1.0], [torch.nan, 1.0]):
        weighting.observe(LossTerms(vector(losses)))
        weighting.update("step")
    assert weighting.summary()["tau"] == 1.5


def test_super_loss_leaves_masked_terms_out_of_its_mean_and_its_value():
    losses, mask = vector([1.0, torch.nan, 3.0]), torch.tensor([True, False, True])
    objective = raw(SuperLoss())
    same(objective(losses, mask=mask), objective(losses[mask]))
    objective(losses.requires_grad_(), mask=mask)
    objective.update("step")
    assert objective.weighting.summary()["tau"] == 2.0


# self-paced


REGULARISERS = {  # Kumar et al. 2010; Jiang et al. 2014
    "hard": lambda v, level: -level * v,
    "linear": lambda v, level: level * (0.5 * v * v - v),
    "log": lambda v, level: (1 - level) * v - (1 - level) ** v / math.log(1 - level),
}


@pytest.mark.parametrize("kind", REGULARISERS)
@given(st.lists(st.floats(0.0, 3.0), min_size=1, max_size=6), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_self_paced_weights_minimise_the_self_paced_objective(kind, values, level):
    losses = vector(values)
    v = weigh(SelfPaced(level, kind=kind), losses)
    assert ((v >= 0) & (v <= 1)).all()
    others = torch.linspace(0.0, 1.0, 501, dtype=torch.float64)[:, None]
    best = (others * losses + REGULARISERS[kind](others, level)).min(0).values
    assert (v * losses + REGULARISERS[kind](v, level) <= best + 1e-9).all()


@pytest.mark.parametrize("kind", REGULARISERS)
def test_self_paced_weights_at_the_ends(kind):
    losses = vector([0.0, 0.5, 1e4])
    weights = weigh(SelfPaced(0.5, kind=kind), losses)
    same(weights, vector([1.0, 0.0, 0.0]), 1e-12)


def test_a_threshold_above_all_losses_is_the_mean():
    losses = vector([0.0, 3.0, 1e4])
    for threshold in (1e5, 1e300):
        same(weigh(SelfPaced(threshold, growth=1e9), losses), torch.ones_like(losses), 0.0)
    same(weigh(SelfPaced(1e300, kind="linear"), losses), torch.ones_like(losses), 1e-12)


@pytest.mark.parametrize("kind", REGULARISERS)
def test_a_threshold_that_outgrows_float64(kind):
    weighting, losses = SelfPaced(1e300, kind=kind, growth=1e10), vector([0.0, 0.3, 1e4])
    for epoch in range(3):
        weighting.update("epoch", index=epoch)
    weights = weigh(weighting, losses)
    assert weights.isfinite().all()
    assert weights[0] == 1.0


def test_the_threshold_grows_by_epochs_that_have_ended():
    weighting = SelfPaced(0.5, growth=1.5)
    for epoch in range(4):
        same(weighting.summary()["threshold"], torch.tensor(0.5 * 1.5**epoch, dtype=torch.float64), 1e-12)
        weighting.update("step")
        weighting.update("epoch", index=epoch)
        weighting.update("epoch", index=epoch)
    resumed = SelfPaced(0.5, growth=1.5)
    resumed.load_state_dict(weighting.state_dict())
    same(resumed.summary()["threshold"], torch.tensor(0.5 * 1.5**4, dtype=torch.float64), 1e-12)


def test_dropped_terms_have_no_gradient():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(Objective(CrossEntropy(), SelfPaced(1.0))(logits, torch.tensor([0, 0])), logits)
    assert (grad[0] != 0).all()
    assert (grad[1] == 0).all()


@pytest.mark.parametrize(("make", "error", "text"), [
    (lambda: SmallLoss(0.0), ValueError, "SmallLoss: keep must be finite and > 0 and <= 1, got 0.0"),
    (lambda: SmallLoss(Linear(1.0, 0.0, duration=2)), ValueError, "SmallLoss: keep must be finite and > 0"),
    (lambda: SuperLoss(0.0), ValueError, "SuperLoss: lam must be finite and > 0, got 0.0"),
    (lambda: SuperLoss(tau="median"), ValueError, "SuperLoss: tau must be one of 'mean', got 'median'"),
    (lambda: SuperLoss(tau=math.nan), ValueError, "SuperLoss: tau must be finite, got nan"),
    (lambda: SuperLoss(smoothing=2.0), ValueError, "SuperLoss: smoothing must be finite and > 0 and <= 1, got 2.0"),
    (lambda: SelfPaced(0.0), ValueError, "SelfPaced: threshold must be finite and > 0, got 0.0"),
    (lambda: SelfPaced(1.0, kind="soft"), ValueError, "SelfPaced: kind must be one of 'hard', 'linear', 'log', got"),
    (lambda: SelfPaced(1.0, growth=0.9), ValueError, "SelfPaced: growth must be finite and >= 1, got 0.9"),
])  # fmt: skip
def test_errors_name_argument_rule_and_value(make, error, text):
    with pytest.raises(error, match=text):
        make()
