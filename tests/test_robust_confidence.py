"""Losses of the target's probability alone: closed form and detached weight are one loss, at every confidence."""

import json
import math
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, l1_loss, one_hot

from reweigh import losses, weighting
from reweigh.losses import (
    ActivePassive,
    ActivePassiveLoss,
    BinaryCrossEntropy,
    CausalLM,
    ClasswiseCrossEntropy,
    ClosedForm,
    CompSumLoss,
    CrossEntropy,
    EncouragingLoss,
    FocalLoss,
    FromLoss,
    GCELoss,
    LogitAdjustment,
    MAELoss,
    NoisyCrossEntropy,
    NormalizedClosedForm,
    NormalizedLoss,
    Objective,
    PolyLoss,
    SCELoss,
    TaylorLoss,
)
from reweigh.losses.conformance import check_criterion, check_objective
from reweigh.weighting import (
    DFT,
    CompSum,
    Confidence,
    Constant,
    Encouraging,
    Focal,
    FocalSlope,
    GeneralizedCrossEntropy,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    LossTerms,
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


def slope(objective, logits, target, **meta):
    first = logits.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(first, target, **meta).sum(), first)
    return grad


def data(classes=4, size=64, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randint(classes, (size,), generator=generator)


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
    assert grad[0, 0].item() == pytest.approx(-1.0, rel=1e-6)
    assert bool((grad.abs() <= 1.0 + 1e-6).all())
    assert EncouragingLoss(1.0)(many, target).isfinite()


# limits and identities


def same(first, second, classes=4, scale=3.0, value=True, plus=0.0, tol=1e-12):
    logits, target = data(classes, scale=scale)
    if value:
        torch.testing.assert_close(first(logits, target), second(logits, target) + plus, rtol=tol, atol=tol)
    grads = slope(first, logits, target), slope(second, logits, target)
    torch.testing.assert_close(*grads, rtol=tol, atol=tol)
    assert bool((grads[0] != 0).any())


class Torch:
    """Cross-entropy of torch."""

    def __call__(self, logits, target):
        return cross_entropy(logits, target)


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


# the sum over labels is what makes a loss robust


def over_labels(loss, classes=5):
    logits, _ = data(classes, size=16)
    every = torch.arange(classes)
    return torch.stack([loss(logits, torch.full((16,), c.item())) for c in every]).sum(0)


@pytest.mark.parametrize("base", ["ce", "focal", "gce", "mae", "rce"])
def test_normalized_losses_add_up_to_one(base):
    found = over_labels(NormalizedLoss(base, q=0.4, reduction="none"))
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-13, atol=0.0)


def test_passive_losses_add_up_to_a_constant():
    found = over_labels(MAELoss(reduction="none"))
    torch.testing.assert_close(found, torch.full_like(found, 4.0), rtol=1e-13, atol=0.0)
    found = over_labels(SCELoss(0.0, floor=0.01, reduction="none"))
    torch.testing.assert_close(found, torch.full_like(found, -4.0 * math.log(0.01)), rtol=1e-13, atol=0.0)
    found = over_labels(ActivePassiveLoss("ngce", passive="mae", alpha=2.0, beta=3.0, reduction="none"))
    torch.testing.assert_close(found, torch.full_like(found, 2.0 + 12.0), rtol=1e-13, atol=0.0)
    assert over_labels(GCELoss(0.7, reduction="none")).std() > 1e-3  # bounded, but no constant


def test_normalized_losses_that_the_definition_makes_equal():
    def absolute(logits, target):
        return MAELoss()(logits, target) / 3.0

    same(NormalizedLoss("mae"), absolute)
    same(NormalizedLoss("rce"), absolute)
    same(NormalizedLoss("focal", gamma=0.0), NormalizedLoss("ce"))
    same(NormalizedLoss("gce", q=0.0), NormalizedLoss("ce"))
    same(NormalizedLoss("gce", q=1.0), NormalizedLoss("mae"))
    same(ActivePassiveLoss("nce", beta=0.0), NormalizedLoss("ce"))
    same(ActivePassiveLoss("nce", alpha=0.0), SCELoss(0.0))
    same(
        ActivePassiveLoss("nfl", passive="mae", alpha=0.5, gamma=2.0),
        0.5 * NormalizedLoss("focal", gamma=2.0) + MAELoss(),
    )


def test_normalized_losses_are_exact_at_saturated_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [40.0, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([0, 1, 0])
    found = NormalizedLoss("ce", reduction="none")(logits, target)
    wanted = torch.tensor([0.0, 2.0 / 3.0, 2.0 * math.exp(-40.0) / 80.0], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    found = NormalizedLoss("mae", reduction="none")(logits, target)
    wanted = torch.tensor([0.0, 0.5, math.exp(-40.0)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)


# what the authors' codes print

GOLDEN = json.loads((Path(__file__).parent / "golden" / "robust_confidence.json").read_text())
CASES = {case["id"]: case for case in GOLDEN["cases"]}
OURS = {
    "gce_0.7": GCELoss(0.7),
    "gce_0.1": GCELoss(0.1),
    "sce_c10": SCELoss(0.1, beta=1.0),
    "sce_c100": SCELoss(6.0, beta=0.1),
    "mae": MAELoss(),
    "rce": SCELoss(0.0),
    "nce": NormalizedLoss("ce"),
    "ngce": NormalizedLoss("gce", q=0.7),
    "nfl": NormalizedLoss("focal", gamma=0.5),
    "nmae": 0.5 * NormalizedLoss("mae"),  # the code has half the definition
    "nrce": (9.0 / 4.0 * math.log(1e4)) * NormalizedLoss("rce"),  # and 1 / 4 * (C - 1) for 1 / (A (C - 1))
    "nce_rce": ActivePassiveLoss(),
    "nce_mae": ActivePassiveLoss("nce", passive="mae", alpha=10.0, beta=0.1),
    "ngce_mae": ActivePassiveLoss("ngce", passive="mae", q=0.1),
    "ngce_rce": ActivePassiveLoss("ngce", passive="rce", alpha=2.0, beta=0.5),
    "nfl_rce": ActivePassiveLoss("nfl"),
    **{f"encouraging_{end}": EncouragingLoss(end) for end in (0.0, 0.5, 0.75, 1.0)},
}


def test_no_case_is_left_out():
    assert set(OURS) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    logits, target = torch.tensor(GOLDEN["logits"], dtype=torch.float64), torch.tensor(GOLDEN["labels"])
    torch.testing.assert_close(OURS[name](logits, target).item(), CASES[name]["loss"], rtol=1e-12, atol=0.0)
    grad, wanted = slope(OURS[name], logits, target), torch.tensor(CASES[name]["grad"], dtype=torch.float64)
    if name.startswith("nfl"):
        assert (grad - wanted).abs().max() > 1e-3  # the code holds the modulators constant
        grad = slope(_held_focal(float(name == "nfl_rce")), logits, target)
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


def _held_focal(beta):
    """Normalised focal loss with modulators as constants, in plain torch, plus reverse cross-entropy."""

    def loss(logits, target):
        log_p = logits.log_softmax(1)
        each = -((1.0 - log_p.detach().exp()) ** 0.5) * log_p
        at = target[:, None]
        return (each.gather(1, at) / each.sum(1, keepdim=True)).mean() + beta * SCELoss(0.0)(logits, target)

    return loss


# composition


def test_composition_with_class_weights():
    counts = [50, 20, 6, 1]
    composed = (GeneralizedCrossEntropy(0.5) * InverseFrequency(counts)).normalize()
    objective = Objective(CrossEntropy(), composed)
    logits, target = data()
    p = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
    raw = p.sqrt() / torch.tensor(counts, dtype=torch.float64)[target]
    torch.testing.assert_close(objective.weights(logits, target), raw / raw.mean())
    torch.testing.assert_close(objective.weights(logits, target).mean().item(), 1.0)
    wanted = (raw / raw.mean() * cross_entropy(logits, target, reduction="none")).mean()
    torch.testing.assert_close(objective(logits, target), wanted)
    check_objective(objective)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(ClosedForm(GeneralizedCrossEntropy(), CrossEntropy(weight=[1.0, 2.0, 0.5, 3.0]))),
        Objective(ClosedForm(Poly(1.0, gamma=0.5), CausalLM()), None, "sequence_mean"),
        Objective(ClosedForm(Encouraging(1.0), BinaryCrossEntropy(soft="sides"))),
        Objective(ClosedForm(Taylor(3), BinaryCrossEntropy(shift=0.05)), InverseFrequency([50, 20, 6, 1])),
        Objective(ClosedForm(DFT(), CrossEntropy(logits=LogitAdjustment([50, 20, 6, 1]))), InverseClassLoss(4)),
        Objective(
            ClosedForm(FocalSlope(), NoisyCrossEntropy((torch.eye(4) * 0.6 + 0.1).tolist(), corrected=True)),
            None,
            "none",
        ),
        Objective(
            ClosedForm(GeneralizedCrossEntropy(Linear(0.0, 0.7, duration=3, by="step")), ClasswiseCrossEntropy()),
            Focal(1.0),
        ),
        Objective(NormalizedClosedForm(Taylor(4), logits=LogitAdjustment([50, 20, 6, 1])), Focal(1.0).normalize()),
        Objective(NormalizedClosedForm(CompSum(0.5)), None, "none"),
        Objective(
            ActivePassive(
                GeneralizedCrossEntropy(Linear(0.0, 0.5, duration=2, by="step")),
                DFT(),
                alpha=Linear(1.0, 0.1, duration=2, by="step"),
            ),
            GeneralizedCrossEntropy().normalize(),
            "weighted_mean",
        ),
    ],
    ids=repr,
)
def test_closed_forms_compose(objective):
    check_objective(objective)


def test_criteria():
    for criterion in (ClosedForm(Poly()), NormalizedClosedForm(FocalSlope()), ActivePassive(DFT(), DFT())):
        check_criterion(criterion)


def test_class_weights_have_torch_s_meaning():
    logits, target = data()
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    found = PolyLoss(0.0, weight=weight)(logits, target)
    torch.testing.assert_close(found, cross_entropy(logits, target, weight=weight))
    each = MAELoss(reduction="none")(logits, target)
    closed = Objective(ClosedForm(DFT(), CrossEntropy(weight=weight)))(logits, target)
    torch.testing.assert_close(closed, (weight[target] * each).sum() / weight[target].sum())


def test_both_sides_of_a_soft_label_have_their_share():
    logits, target = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    p = logits.sigmoid().item()
    loss = Objective(ClosedForm(DFT(), BinaryCrossEntropy(soft="sides")))
    assert loss(logits, target).item() == pytest.approx(0.3 * (1 - p) + 0.7 * p, rel=1e-12)


# the curve


def test_curves_tell_trust_from_mining():
    p = torch.linspace(0.01, 0.99, 99)
    rising = [
        GeneralizedCrossEntropy(),
        DFT(),
        Taylor(3),
        CompSum(1.5),
        SymmetricCrossEntropy(),
        Poly(1.0),
        Encouraging(),
    ]
    falling = [Focal(2.0), FocalSlope(1.0), CompSum(0.5), Poly(-1.0), Focal(1.0) * Focal(1.0)]
    for group, sign in ((rising, 1.0), (falling, -1.0)):
        for each in group:
            curve = confidence_curve(each, p)
            assert curve.dtype == torch.float64
            assert not curve.requires_grad
            steps = sign * curve.diff()
            assert bool((steps > 0).all()) or isinstance(each, FocalSlope), each
    assert bool((confidence_curve(Constant(2.0), p) == 2.0).all())
    hump = confidence_curve(FocalSlope(2.0), p)
    assert p[hump.argmax()].item() == pytest.approx(0.10, abs=0.006)
    assert hump.max().item() == pytest.approx(1.2246, abs=1e-3)


def test_the_curve_s_ends_and_shape():
    assert confidence_curve(GeneralizedCrossEntropy(0.5), [[0.25, 1.0]]).tolist() == [[0.5, 1.0]]
    assert bool(confidence_curve(Encouraging(1.0), [0.0, 1.0]).isfinite().all())
    assert confidence_curve(Focal(1.0).normalize(), [0.0, 1.0]).tolist() == [2.0, 0.0]
    with pytest.raises(TypeError, match=r"must read log_pt only, got InverseFrequency, which needs 'category'"):
        confidence_curve(InverseFrequency([1, 2]), [0.5])
    with pytest.raises(TypeError, match="weighting must be a Weighting, got float"):
        confidence_curve(2.0, [0.5])
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
            confidence_curve(DFT(), [0.5, wrong])


# what is refused


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: GeneralizedCrossEntropy(1.1), ValueError, r"q must be finite and >= 0 and <= 1, got 1.1"),
        (lambda: GeneralizedCrossEntropy(Linear(0.0, 2.0, duration=2)), ValueError, "q must be"),
        (lambda: CompSum(2.5), ValueError, "tau must be"),
        (lambda: CompSum(0.5, bound=0.5), ValueError, "bound must be"),
        (lambda: Poly(-1.5), ValueError, r"epsilon must be finite and >= -1, got -1.5"),
        (lambda: Poly(1.0, gamma=-1.0), ValueError, "gamma must be"),
        (lambda: Taylor(0), ValueError, "order must be >= 1"),
        (lambda: Taylor(2.0), TypeError, "order must be an integer"),
        (lambda: Encouraging(1.5), ValueError, "end must be"),
        (lambda: SymmetricCrossEntropy(floor=0.0), ValueError, "floor must be"),
        (lambda: SymmetricCrossEntropy("a"), TypeError, "alpha must be a number"),
        (lambda: GCELoss(form="open"), ValueError, "form must be one of 'closed', 'weighted', got 'open'"),
        (lambda: NormalizedLoss("bce"), ValueError, "base must be one of"),
        (lambda: ActivePassiveLoss("ce"), ValueError, "active must be one of"),
        (lambda: ActivePassiveLoss(passive="nce"), ValueError, "passive must be one of"),
        (lambda: ClosedForm(Focal(2.0)), TypeError, "confidence must be a Confidence weighting .*, got Focal"),
        (lambda: ClosedForm(DFT(), Objective(CrossEntropy())), TypeError, "criterion must be a plain Criterion"),
        (lambda: ClosedForm(DFT(), cross_entropy), TypeError, "criterion must be a plain Criterion, got function"),
        (lambda: ClosedForm(DFT(), FromLoss(cross_entropy)), TypeError, "needs 'log_pt', which FromLoss does not"),
        (lambda: ClosedForm(DFT(), CrossEntropy(label_smoothing=0.1)), ValueError, "label_smoothing=0, got 0.1"),
        (lambda: ClosedForm(DFT(), BinaryCrossEntropy(pos_weight=2.0)), ValueError, "pos_weight of BinaryCrossEntropy"),
        (lambda: ClosedForm(DFT(), BinaryCrossEntropy(weight=[1.0])), ValueError, "weight of BinaryCrossEntropy"),
        (lambda: NormalizedClosedForm(Encouraging()), ValueError, "confidence must have a positive loss"),
        (lambda: ActivePassive(Encouraging(), DFT()), ValueError, "active must have a positive loss"),
        (lambda: ActivePassive(DFT(), Focal()), TypeError, "passive must be a Confidence weighting"),
    ],
)
def test_wrong_arguments(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_wrong_inputs():
    logits, target = data()
    soft = logits.softmax(1)
    for loss in (GCELoss(), NormalizedLoss(), ActivePassiveLoss()):
        with pytest.raises(TypeError, match="target must be class indices"):
            loss(logits, soft)
        with pytest.raises(ValueError, match="target must"):
            loss(logits, target[:3])
        with pytest.raises(ValueError, match=r"target must be in \[0, 4\)"):
            loss(logits, target + 4)
    with pytest.raises(ValueError, match="at least two classes"):
        NormalizedLoss()(logits[:, :1], target * 0)
    with pytest.raises(TypeError, match=r"takes \(logits, target\), got 1 inputs"):
        NormalizedLoss()(logits)
    with pytest.raises(ValueError, match="soft='sides'"):
        Objective(ClosedForm(DFT(), BinaryCrossEntropy()))(logits, soft)
    with pytest.raises(ValueError, match="the loss terms carry no 'log_pt'"):
        DFT().weigh(LossTerms(torch.ones(2)))
    assert GCELoss(form="weighted")(logits, soft).isfinite()


def test_ignored_and_masked_terms_are_removed():
    logits, target = data(size=8)
    keep = torch.tensor([True, False] * 4)
    for name in losses.available():
        if not isinstance(losses.create(name, **losses.registry.record(name).examples[0]).criterion, ClosedForm):
            continue
        loss = losses.create(name, **losses.registry.record(name).examples[0], ignore_index=7)
        wanted = loss(logits[keep], target[keep])
        dirty = torch.where(keep[:, None], logits, torch.nan)
        torch.testing.assert_close(loss(dirty, torch.where(keep, target, 7)), wanted, rtol=1e-13, atol=0.0)
        torch.testing.assert_close(loss(dirty, target, mask=keep), wanted, rtol=1e-13, atol=0.0)
        torch.testing.assert_close(loss(logits, target, sample_weight=keep.double()), wanted, rtol=1e-13, atol=0.0)
