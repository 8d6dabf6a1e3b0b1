"""Losses of the target's probability: sums over labels, what the authors print, composition, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from confidence_kit import data, same, slope
from torch.nn.functional import cross_entropy

from reweigh import losses
from reweigh.losses import (
    ActivePassive,
    ActivePassiveLoss,
    BinaryCrossEntropy,
    CausalLM,
    ClasswiseCrossEntropy,
    ClosedForm,
    CrossEntropy,
    EncouragingLoss,
    ExactCrossEntropy,
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
)
from reweigh.losses.conformance import check_criterion, check_objective
from reweigh.weighting import (
    DFT,
    CompSum,
    Constant,
    Encouraging,
    Focal,
    FocalSlope,
    GeneralizedCrossEntropy,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    LossTerms,
    Poly,
    SymmetricCrossEntropy,
    Taylor,
    confidence_curve,
)

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
    for criterion in (
        ExactCrossEntropy(),
        ClosedForm(Poly()),
        NormalizedClosedForm(FocalSlope()),
        ActivePassive(DFT(), DFT()),
    ):
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
    for loss in (GCELoss(), NormalizedLoss(), ActivePassiveLoss(), EncouragingLoss(form="weighted")):
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
