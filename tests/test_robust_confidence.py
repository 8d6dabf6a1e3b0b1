"""Losses of the target's probability alone: closed form and detached weight are one loss, at every confidence."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from confidence_kit import Torch, data, same, slope
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, l1_loss, one_hot

from reweigh import weighting
from reweigh.losses import (
    BinaryCrossEntropy,
    ClosedForm,
    CompSumLoss,
    CrossEntropy,
    EncouragingLoss,
    ExactCrossEntropy,
    FocalLoss,
    GCELoss,
    LogitAdjustment,
    MAELoss,
    Objective,
    PolyLoss,
    SCELoss,
    TaylorLoss,
)
from reweigh.losses.conformance import check_objective
from reweigh.weighting import (
    DFT,
    CompSum,
    Confidence,
    Encouraging,
    Focal,
    FocalSlope,
    GeneralizedCrossEntropy,
    Linear,
    Piecewise,
    Poly,
    SymmetricCrossEntropy,
    Taylor,
    confidence_curve,
)

NAMES = [name for name in weighting.available() if issubclass(weighting.registry.get(name), Confidence)]
PRESETS = [
    pytest.param(name, dict(example), id=f"{name}-{i}")
    for name in NAMES
    for i, example in enumerate(weighting.registry.record(name).examples)
]
LOG_PT = [0.0, -1e-300, -1e-16, -1e-8, -1e-3, -0.1, -0.5, -0.7, -1.0, -3.0, -20.0, -36.0, -300.0, -800.0, -1e4]
EPS = torch.finfo(torch.float64).eps


# closed form and weight


def test_every_preset_is_registered():
    found, pending = set(), [Confidence]
    while pending:
        children = pending.pop().__subclasses__()
        pending += children
        found |= {child for child in children if child.__module__.startswith("reweigh.")}
    assert {weighting.registry.get(name) for name in NAMES} == found


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0, 300.0])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(("name", "example"), PRESETS)
def test_the_weight_has_the_closed_form_s_gradient(name, example, classes, scale):
    """Beyond 1e-12 only by the rounding of cross-entropy's own gradient, p - 1, times the weight."""
    confidence = weighting.create(name, **example)
    logits, target = data(classes, scale=scale)
    weighted = Objective(CrossEntropy(), confidence, "none")
    closed = slope(Objective(ClosedForm(confidence), None, "none"), logits, target)
    found = slope(weighted, logits, target)
    bound = 1e-12 + 8.0 * EPS * weighted.weights(logits, target).unsqueeze(1)
    assert bool(((closed - found).abs() <= bound).all())
    assert bool((found != 0).any())


@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0, 300.0])
@pytest.mark.parametrize(("name", "example"), PRESETS)
def test_the_weight_has_the_closed_form_s_gradient_for_labels(name, example, scale):
    """A sigmoid criterion knows log(1 - p) exactly, so no weight is too large for the identity."""
    confidence = weighting.create(name, **example)
    logits, _ = data(3, scale=scale)
    target = torch.randint(2, logits.shape).double()
    closed = slope(Objective(ClosedForm(confidence, BinaryCrossEntropy()), None, "none"), logits, target)
    found = slope(Objective(BinaryCrossEntropy(), confidence, "none"), logits, target)
    torch.testing.assert_close(closed, found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 5.0, 30.0, 300.0])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(("name", "example"), PRESETS)
def test_the_weight_has_the_closed_form_s_gradient_to_the_last_digits(name, example, classes, scale):
    """Where the criterion has 1 - p exactly, so has its gradient."""
    confidence = weighting.create(name, **example)
    logits, target = data(classes, scale=scale)
    closed = slope(Objective(ClosedForm(confidence, ExactCrossEntropy()), None, "none"), logits, target)
    found = slope(Objective(ExactCrossEntropy(), confidence, "none"), logits, target)
    torch.testing.assert_close(closed, found, rtol=1e-11, atol=1e-12)


@given(
    st.sampled_from([(p.values[0], tuple(sorted(p.values[1].items()))) for p in PRESETS]),
    st.sampled_from(["mean", "sum", "batch_mean", "sequence_mean"]),
    st.integers(0, 1000),
)
def test_both_forms_agree_under_masks_weights_and_reductions(preset, reduction, seed):
    confidence = weighting.create(preset[0], **dict(preset[1]))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64) * 2
    target = torch.randint(4, (5, 3), generator=generator)
    target[torch.rand(5, 3, generator=generator) < 0.2] = -100
    meta = {
        "mask": torch.rand(5, 3, generator=generator) < 0.8,
        "sample_weight": torch.rand(5, generator=generator, dtype=torch.float64),
    }
    closed = slope(Objective(ClosedForm(confidence), None, reduction), logits, target, **meta)
    weighted = slope(Objective(CrossEntropy(), confidence, reduction), logits, target, **meta)
    torch.testing.assert_close(closed, weighted, rtol=1e-12, atol=1e-12)


# exact and finite


def decimal_pair(confidence, x):
    """Loss and weight in 400 digits, from the paper's formulas."""
    with localcontext() as context:
        context.prec = 400
        x = Decimal(x)
        p = x.exp()
        q = 1 - p
        match confidence:
            case GeneralizedCrossEntropy():
                k = Decimal(confidence.q)
                return (1 - (k * x).exp()) / k, (k * x).exp()
            case DFT():
                return q, p
            case CompSum():
                k, bound = Decimal(confidence.tau) - 1, Decimal(confidence.bound)
                weight = (k * x).exp()
                if weight <= bound:
                    return (1 - weight) / k, weight
                edge = bound.ln() / k
                return (1 - bound) / k + bound * (edge - x), bound
            case SymmetricCrossEntropy():
                a, b = Decimal(confidence.alpha), -Decimal(confidence.floor).ln() * Decimal(confidence.beta)
                return -a * x + b * q, a + b * p
            case Taylor():
                return sum(q**k / k for k in range(1, confidence.order + 1)), 1 - q**confidence.order
            case Poly() | FocalSlope():
                g = Decimal(confidence.gamma)
                e = Decimal(getattr(confidence, "epsilon", 0.0))
                if q == 0:
                    return Decimal(0), (1 + e if g == 0 else Decimal(0))
                weight = q**g - g * p * q ** (g - 1) * x + e * (g + 1) * p * q**g
                return q**g * (-x + e * q), weight
            case Encouraging():
                rest = 1 - Decimal(confidence.end)
                if q > rest:
                    return q.ln() - x, 1 / q
                return (rest.ln() + q / rest - 1 - x, 1 + p / rest) if rest else (None, None)
    raise AssertionError(f"no formula for {confidence!r}")


@pytest.mark.parametrize("exact", [False, True], ids=["log_pt only", "with log_qt"])
@pytest.mark.parametrize(("name", "example"), PRESETS)
def test_loss_and_weight_are_the_formula_s_to_the_last_digits(name, example, exact):
    confidence = weighting.create(name, **example)
    for x in LOG_PT:
        log_pt = torch.tensor([x], dtype=torch.float64)
        log_qt = None
        if exact and x < 0:
            with localcontext() as context:
                context.prec = 400
                log_qt = torch.tensor([float((1 - Decimal(x).exp()).ln())], dtype=torch.float64)
        value, weight = confidence.value(log_pt, log_qt).item(), confidence.slope(log_pt, log_qt).item()
        if isinstance(confidence, Encouraging) and confidence.end == 1.0 and x > (-1e-15 if log_qt is None else -1e-70):
            continue  # beyond what can be told from p = 1: its own test
        if x == 0.0 and getattr(confidence, "gamma", 0.0) == 0.5:  # 1 - p is held at the smallest normal number
            assert 0.0 <= weight < 1e-150
            assert abs(value) < 1e-150
            continue
        wanted, height = (float(v) for v in decimal_pair(confidence, x))
        # what cancels is cross-entropy against a bonus or a negative epsilon; log_qt has an error of its own
        parts = max(abs(wanted), -x, 3.0 if isinstance(confidence, Encouraging) else 0.0)
        loose = 1e-13 if log_qt is None else 1e-12
        assert abs(value - wanted) <= loose * (parts if not _positive_sum(confidence) else abs(wanted)) + 1e-300
        least = 1e-15 if isinstance(confidence, Poly) and confidence.epsilon == -1.0 else 1e-300
        assert abs(weight - height) <= loose * abs(height) + least


def _positive_sum(confidence):
    """Whether no digits are lost by subtraction."""
    return confidence.positive and not (isinstance(confidence, Poly) and confidence.epsilon < 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exact", [False, True], ids=["log_pt only", "with log_qt"])
@pytest.mark.parametrize(("name", "example"), PRESETS)
def test_finite_from_certainty_to_its_opposite(name, example, exact, dtype):
    confidence = weighting.create(name, **example)
    log_pt = torch.tensor(LOG_PT, dtype=dtype, requires_grad=True)
    log_qt = torch.tensor(LOG_PT[::-1], dtype=dtype, requires_grad=True) if exact else None
    value, weight = confidence.value(log_pt, log_qt), confidence.slope(log_pt, log_qt)
    assert bool(value.isfinite().all())
    assert bool(weight.isfinite().all())
    assert bool((weight >= 0).all())
    assert value.dtype == weight.dtype == dtype
    grads = torch.autograd.grad(value.sum(), [log_pt] if log_qt is None else [log_pt, log_qt], allow_unused=True)
    assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)
    if confidence.positive:
        assert bool((value > -1e-6).all())


@pytest.mark.parametrize("q", [1e-1, 1e-3, 1e-7, 1e-12, 1e-18])
def test_small_q_loses_no_digits(q):
    for x in (-1e-6, -0.3, -5.0, -300.0):
        found = GeneralizedCrossEntropy(q).value(torch.tensor(x, dtype=torch.float64)).item()
        with localcontext() as context:
            context.prec = 60
            wanted = float((1 - (Decimal(q) * Decimal(x)).exp()) / Decimal(q))
        assert abs(found / wanted - 1.0) < 1e-9
        assert abs(found / wanted - 1.0) < 4 * EPS
        assert abs(found / -x - 1.0) <= 0.51 * q * -x + 4 * EPS  # cross-entropy, but for the next term of the series
    log_pt = torch.tensor(-0.3, dtype=torch.float64)
    assert CompSum(1.0 + 1e-7).value(log_pt).item() == pytest.approx(0.3, rel=1e-7)
    assert CompSum(1.0 - 1e-7).value(log_pt).item() == pytest.approx(0.3, rel=1e-7)


def test_comp_sum_is_held_at_its_bound_along_the_tangent():
    confidence = CompSum(0.5, bound=100.0)
    edge = -2.0 * math.log(100.0)
    log_pt = torch.tensor([edge + 1e-9, edge - 1e-9, edge - 5.0, -1e4], dtype=torch.float64, requires_grad=True)
    value, weight = confidence.value(log_pt), confidence.slope(log_pt)
    torch.testing.assert_close(weight, torch.full_like(weight, 100.0), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(-torch.autograd.grad(value.sum(), log_pt)[0], weight, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(value[0], value[1], rtol=1e-8, atol=0.0)
    assert value[2].item() == pytest.approx(2.0 * 99.0 + 500.0, rel=1e-12)


def test_encouraging_has_a_gradient_at_the_surest_terms():
    """The authors' clamp ends it at 1 - p = 1e-5."""
    logits = torch.tensor([[30.0, 0.0], [80.0, 0.0]], dtype=torch.float64)  # 1 - p = 1e-13 and 2e-35
    target = torch.tensor([0, 0])
    grad = slope(EncouragingLoss(1.0, reduction="none"), logits, target)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64), rtol=1e-9, atol=0.0)
    many = torch.tensor([[20.0, 0.0, 0.0], [1e4, 0.0, 0.0]], dtype=torch.float64)
    grad = slope(EncouragingLoss(1.0, reduction="none"), many, target)
    torch.testing.assert_close(grad[0], torch.tensor([-1.0, 0.5, 0.5], dtype=torch.float64), rtol=1e-12, atol=0.0)
    assert bool((grad.abs() <= 1.0 + 1e-12).all())
    assert EncouragingLoss(1.0)(many, target).isfinite()
    rough = slope(Objective(ClosedForm(Encouraging(1.0)), None, "none"), many, target)  # 1 - p from log p alone
    torch.testing.assert_close(rough[0], grad[0], rtol=1e-6, atol=0.0)
    assert bool((rough.abs() <= 1.0 + 1e-6).all())


def test_exact_cross_entropy():
    same(Objective(ExactCrossEntropy()), Torch())
    sure = torch.tensor([[40.0, 0.0, 0.0], [1e4, 0.0, -1e4], [0.0, 1e4, 0.0]], dtype=torch.float64)
    terms = ExactCrossEntropy().terms(sure, torch.tensor([0, 0, 0]))
    wanted = torch.tensor([2.0 * math.exp(-40.0), 0.0, 1e4], dtype=torch.float64)
    torch.testing.assert_close(terms.loss, wanted, rtol=1e-13, atol=0.0)
    rest = torch.tensor([math.log(2.0) - 40.0, -1e4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(terms.log_qt, rest, rtol=1e-13, atol=0.0)
    grad = slope(Objective(ExactCrossEntropy(), None, "none"), sure, torch.tensor([0, 0, 0]))
    torch.testing.assert_close(grad[0, 0].item(), -2.0 * math.exp(-40.0), rtol=1e-13, atol=0.0)
    check_objective(Objective(ExactCrossEntropy(logits=LogitAdjustment([50, 20, 6, 1])), Focal(0.5)))


# limits and identities


@pytest.mark.parametrize("form", ["closed", "weighted"])
def test_what_reduces_to_cross_entropy(form):
    for neutral in (
        GCELoss(0.0, form=form),
        CompSumLoss(1.0, form=form),
        PolyLoss(0.0, form=form),
        SCELoss(1.0, beta=0.0, form=form),
    ):
        same(neutral, Torch())
    same(GCELoss(1e-13, form=form), Torch(), tol=1e-11)
    same(CompSumLoss(1.0 + 1e-13, form=form), Torch(), tol=1e-11)
    same(Objective(ClosedForm(FocalSlope(0.0))), Torch())


def test_a_long_taylor_series_is_cross_entropy():
    logits, target = data(scale=1.0)
    same(TaylorLoss(3000), Torch(), scale=1.0, tol=1e-10)
    previous = TaylorLoss(1)(logits, target)
    for order in (2, 4, 8, 16):
        value = TaylorLoss(order)(logits, target)
        assert previous < value < cross_entropy(logits, target)
        previous = value


@pytest.mark.parametrize("form", ["closed", "weighted"])
def test_what_is_the_mean_absolute_error(form):
    for other in (GCELoss(1.0, form=form), TaylorLoss(1, form=form), CompSumLoss(2.0, form=form)):
        same(MAELoss(form=form), other)
    same(MAELoss(), Objective(CrossEntropy(), DFT()), value=False)
    same(SCELoss(0.0, floor=math.exp(-1.0), form=form), MAELoss(form=form))


def test_mean_absolute_error_is_torch_s():
    def naive(logits, target):
        dense = one_hot(target, 4).double()
        return l1_loss(logits.softmax(1), dense, reduction="none").sum(1).mean() / 2

    same(MAELoss(), naive)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("form", ["closed", "weighted"])
def test_comp_sum_is_generalized_cross_entropy_above_one(q, form):
    same(CompSumLoss(1.0 + q, form=form), GCELoss(q, form=form))


def test_comp_sum_at_zero_is_the_sum_of_exponentials():
    def naive(logits, target):
        margins = logits - logits.gather(1, target[:, None])
        return (margins.exp().sum(1) - 1.0).mean()

    same(CompSumLoss(0.0, bound=1e30), naive)


def test_symmetric_cross_entropy_is_the_paper_s_sum_over_classes():
    def naive(logits, target):
        dense = one_hot(target, 4).double().clamp_min(1e-4)
        return 0.3 * cross_entropy(logits, target) - 2.0 * (logits.softmax(1) * dense.log()).sum(1).mean()

    same(SCELoss(0.3, beta=2.0), naive)


def test_poly():
    logits, target = data()
    p = logits.softmax(1).gather(1, target[:, None]).squeeze(1)

    def focal(exponent):
        return Objective(CrossEntropy(), Focal(exponent, detach=True))

    same(PolyLoss(-1.0), focal(1.0), value=False)
    same(PolyLoss(-1.0, form="weighted"), focal(1.0))
    same(PolyLoss(0.0, gamma=2.0), FocalLoss(2.0))
    same(PolyLoss(0.0, gamma=2.0, weight=[1.0, 2.0, 0.5, 3.0]), FocalLoss(2.0, weight=[1.0, 2.0, 0.5, 3.0]))
    wanted = FocalLoss(2.0)(logits, target) + 1.5 * ((1.0 - p) ** 3).mean()
    torch.testing.assert_close(PolyLoss(1.5, gamma=2.0)(logits, target), wanted, rtol=1e-12, atol=1e-12)
    same(PolyLoss(0.5, gamma=2.0), PolyLoss(0.5, gamma=2.0, form="weighted"), value=False)


def test_encouraging_without_a_logarithm_is_poly_one():
    same(EncouragingLoss(0.0), PolyLoss(1.0), plus=-1.0)
    same(EncouragingLoss(0.0, form="weighted"), PolyLoss(1.0, form="weighted"))


def test_encouraging_is_the_mirror_image_of_focal():
    p = torch.linspace(0.0, 0.99, 100)
    mirrored = confidence_curve(Encouraging(1.0), p) * confidence_curve(Focal(1.0, detach=True), p)
    torch.testing.assert_close(mirrored, torch.ones(100, dtype=torch.float64), rtol=1e-12, atol=0.0)
    early = p < 0.75
    torch.testing.assert_close(confidence_curve(Encouraging(0.75), p)[early], 1.0 / (1.0 - p[early].double()))


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_focal_slope_is_focal_loss_s_gradient(gamma, scale, classes):
    same(Objective(CrossEntropy(), FocalSlope(gamma)), FocalLoss(gamma), classes, scale, value=False)
    same(Objective(ClosedForm(FocalSlope(gamma))), FocalLoss(gamma), classes, scale)


def test_focal_slope_is_not_the_modulator():
    logits, target = data()
    held = slope(Objective(CrossEntropy(), Focal(2.0, detach=True)), logits, target)
    assert (held - slope(FocalLoss(2.0), logits, target)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (lambda: Linear(0.0, 0.7, duration=2, by="step"), GeneralizedCrossEntropy),
        (lambda: Linear(0.5, 1.5, duration=2, by="step"), CompSum),
        (lambda: Linear(0.0, 1.0, duration=2, by="step"), Encouraging),
        (lambda: Piecewise([0.0, 2.0, 0.5], [1, 2], by="step"), FocalSlope),
        (lambda: Linear(-1.0, 1.0, duration=2, by="step"), Poly),
        (lambda: Linear(0.0, 1.0, duration=2, by="step"), SymmetricCrossEntropy),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_schedules_pass_through_every_limit(schedule, make):
    moving = schedule()
    confidence = make(moving)
    for step in range(3):
        here = make(moving().item())
        for objective in (lambda c: Objective(ClosedForm(c)), lambda c: Objective(CrossEntropy(), c)):
            same(objective(confidence), objective(here))
            logits, target = data()
            found = slope(objective(confidence), logits.float(), target)
            torch.testing.assert_close(found.double(), slope(objective(here), logits, target), rtol=1e-4, atol=1e-5)
        moving.update("step", index=step)


def test_a_schedule_inside_a_closed_form_is_driven_by_the_objective():
    loss = GCELoss(Linear(0.0, 1.0, duration=1, by="step"))
    logits, target = data()
    torch.testing.assert_close(loss(logits, target), cross_entropy(logits, target))
    loss.update("step")
    torch.testing.assert_close(loss(logits, target), MAELoss()(logits, target))
