"""Dice and its relatives: identities, masks, weights, empty sets, extreme logits, messages."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.nn.functional import one_hot

from reweigh import (
    BinaryCrossEntropy,
    ClassWeight,
    Constant,
    CrossEntropy,
    DiceLoss,
    Focal,
    FocalLoss,
    GeneralizedDiceLoss,
    HardNegatives,
    InverseClassLoss,
    Joint,
    Linear,
    LossPower,
    LossTerms,
    Objective,
    Overlap,
    SelfAdjustingDice,
    SelfAdjustingDiceLoss,
    SequenceMean,
    TverskyLoss,
    UnifiedFocalLoss,
    VolumeBalance,
    WeightedMean,
)
from reweigh.losses import functional
from reweigh.losses.conformance import check_criterion, check_objective
from reweigh.losses.criteria.probability import log_complement

F64 = torch.float64
ACTIVATIONS = ("softmax", "sigmoid", "none")


def batch(shape=(3, 4, 5, 2), seed=0, activation="softmax"):
    """Logits (or probabilities) and index targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=F64) * 2
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    return logits.softmax(1) if activation == "none" else logits, target


def dense(target, classes):
    return one_hot(target, classes).movedim(-1, 1).to(F64)


def both(loss, logits, *args, **meta):
    """Value and gradient."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, *args, **meta)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


def agree(first, second, tol=1e-12):
    for found, wanted in zip(first, second, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tol, atol=tol)


def by_hand(p, y, *, smooth=1e-5):
    """(N, C) dice losses of probabilities and dense targets."""
    common, size = (p * y).flatten(2).sum(-1), (p + y).flatten(2).sum(-1)
    return 1 - (2 * common + smooth) / (size + smooth)


# identities


@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("square", [False, True])
def test_no_focus_is_plain_dice(over, square):
    logits, target = batch()
    plain = Objective(Overlap(over=over, square=square))
    focused = Objective(Overlap(over=over, square=square, focus=Linear(0.0, 0.0, duration=1, by="step")))
    agree(both(focused, logits, target), both(plain, logits, target))


@pytest.mark.parametrize("smooth", [0.0, 1e-5, 1.0, 7.0])
@pytest.mark.parametrize("over", ["sample", "batch"])
def test_tversky_of_one_half_is_dice_with_half_the_smoothing(smooth, over):
    logits, target = batch()
    dice = DiceLoss(over=over, smooth_nr=smooth, smooth_dr=smooth, empty="keep")
    tversky = TverskyLoss(0.5, 0.5, over=over, smooth_nr=smooth / 2, smooth_dr=smooth / 2, empty="keep")
    agree(both(tversky, logits, target), both(dice, logits, target), tol=0.0)


def test_tversky_of_one_and_one_is_jaccard():
    logits, target = batch()
    p, y = logits.softmax(1), dense(target, 4)
    common = (p * y).flatten(2).sum(-1)
    wanted = 1 - common / ((p + y).flatten(2).sum(-1) - common)
    loss = TverskyLoss(1.0, 1.0, smooth_nr=0.0, smooth_dr=0.0, reduction="none")
    present = y.flatten(2).sum(-1) > 0
    torch.testing.assert_close(loss(logits, target), wanted * present, rtol=1e-12, atol=1e-12)


def test_hard_answers_have_one_minus_f1():
    """scikit-learn's F1 of each label over the batch."""
    generator = torch.Generator().manual_seed(0)
    answer, truth = torch.randint(2, (2, 50, 6), generator=generator)
    loss = DiceLoss(activation="none", over="batch", smooth_nr=0.0, smooth_dr=0.0, reduction="none")
    wanted = 1 - torch.from_numpy(f1_score(truth.numpy(), answer.numpy(), average=None))
    torch.testing.assert_close(loss(answer.to(F64), truth)[0], wanted, rtol=1e-12, atol=0)


def test_hard_answers_have_one_minus_torchmetrics_f1():
    from torchmetrics.functional.classification import multiclass_f1_score

    generator = torch.Generator().manual_seed(1)
    answer, truth = torch.randint(3, (2, 200), generator=generator)
    loss = DiceLoss(activation="none", over="batch", smooth_nr=0.0, smooth_dr=0.0, reduction="none")
    wanted = 1 - multiclass_f1_score(answer, truth, 3, average="none").to(F64)
    torch.testing.assert_close(loss(dense(answer, 3), truth)[0], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("smooth", [0.0, 0.5])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_generalised_dice_is_the_weighted_mean_and_the_formula(over, smooth, power):
    logits, target = batch()
    target[0] = target[0].clamp_max(2)  # a class that one sample lacks
    loss = GeneralizedDiceLoss(power=power, over=over, smooth_nr=smooth, smooth_dr=smooth)
    criterion = Overlap(over=over, smooth_nr=smooth / 2, smooth_dr=smooth / 2, empty="keep")
    reduction = WeightedMean() if over == "batch" else SequenceMean(weighted=True)
    composed = Objective(criterion, VolumeBalance(power, smooth=smooth), reduction)

    def formula(logits, target):
        p, y = logits.softmax(1), dense(target, 4)
        axes = (0, 2, 3) if over == "batch" else (2, 3)
        common, predicted, present = ((part).sum(axes).reshape(-1, 4) for part in (p * y, p, y))
        factor = torch.where(present > 0, present**-power, 0.0)
        factor = torch.where(present > 0, factor, factor.amax(1, keepdim=True))
        above = (factor * (2 * common + smooth)).sum(1)
        return (1 - above / (factor * (predicted + present + smooth)).sum(1)).mean()

    wanted = both(formula, logits, target)
    agree(both(loss, logits, target), wanted)
    agree(both(composed, logits, target), wanted)
    held = Objective(criterion, VolumeBalance(power, smooth=smooth, detach=True), reduction)
    value, grad = both(held, logits, target)
    agree([value], wanted[:1])
    assert (grad - wanted[1]).abs().max() > 1e-4  # the gradient through the predicted volume is missing


def test_generalised_dice_per_sample():
    logits, target = batch()
    each = GeneralizedDiceLoss(reduction="none")(logits, target)
    alone = [GeneralizedDiceLoss()(logits[n : n + 1], target[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(each, torch.stack(alone), rtol=1e-12, atol=0)
    weight = torch.tensor([1.0, 0.0, 3.0], dtype=F64)
    torch.testing.assert_close(
        GeneralizedDiceLoss()(logits, target, sample_weight=weight), (weight * each).sum() / 4, rtol=1e-12, atol=0
    )
    assert torch.autograd.gradcheck(lambda x: GeneralizedDiceLoss()(x, target), (logits.requires_grad_(),))


def test_a_set_without_any_target_still_costs_something():
    logits = torch.zeros(1, 2, 4, dtype=F64)
    nothing = torch.zeros(1, 2, 4, dtype=F64)
    value, grad = both(GeneralizedDiceLoss(activation="sigmoid"), logits, nothing)
    assert value.item() == pytest.approx(1.0, abs=1e-4)
    assert (grad > 0).all()
    spare = VolumeBalance(absent="zero").weigh(Overlap(activation="sigmoid", empty="keep").terms(logits, nothing))
    assert (spare == 0).all()


def test_focal_tversky():
    logits, target = batch()
    plain = TverskyLoss(reduction="none")(logits, target)
    agree(both(TverskyLoss(gamma=1.0), logits, target), both(TverskyLoss(), logits, target), tol=0.0)
    valid = plain > 0
    for gamma in (0.5, 0.75, 2.0):
        found = TverskyLoss(gamma=gamma, reduction="none")(logits, target)
        torch.testing.assert_close(found[valid], plain[valid] ** gamma, rtol=1e-12, atol=0)
        _, slope = both(TverskyLoss(gamma=gamma), logits, target)
        _, wanted = both(lambda x, y, g=gamma: (TverskyLoss(reduction="none")(x, y)[valid] ** g).mean(), logits, target)
        torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-12)


def test_a_perfect_answer_has_a_finite_slope():
    logits = torch.tensor([[[40.0, -40.0], [-40.0, 40.0]]], dtype=F64)
    value, grad = both(TverskyLoss(gamma=0.5, smooth_nr=0.0, smooth_dr=0.0), logits, torch.tensor([[0, 1]]))
    assert 0 <= value < 1e-6
    assert grad.isfinite().all()


# the same thing said differently


@given(seed=st.integers(0, 10**6), over=st.sampled_from(["sample", "batch"]), square=st.booleans())
def test_permutations_change_nothing(seed, over, square):
    logits, target = batch(seed=seed)
    loss = DiceLoss(over=over, square=square, reduction="none")
    wanted = loss(logits, target)
    places = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    moved = loss(logits.flatten(2)[..., places], target.flatten(1)[:, places])
    torch.testing.assert_close(moved, wanted, rtol=1e-10, atol=1e-12)
    samples = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    moved = loss(logits[samples], target[samples])
    torch.testing.assert_close(moved, wanted[samples] if over == "sample" else wanted, rtol=1e-10, atol=1e-12)
    classes = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = loss(logits[:, classes], classes.argsort()[target])
    torch.testing.assert_close(moved, wanted[:, classes], rtol=1e-10, atol=1e-12)


@given(
    seed=st.integers(0, 10**6),
    over=st.sampled_from(["sample", "batch"]),
    alpha=st.floats(0.0, 2.0),
    beta=st.floats(0.1, 2.0),
    focus=st.sampled_from([0.0, 0.01, 1.0]),
    smooth=st.sampled_from([0.0, 1e-5, 1.0]),
)
def test_losses_are_in_the_unit_interval_and_classes_on_their_own(seed, over, alpha, beta, focus, smooth):
    logits, target = batch((2, 3, 6), seed=seed)
    criterion = Overlap(
        over=over, alpha=alpha, beta=beta, focus=focus, smooth_nr=smooth, smooth_dr=smooth, empty="keep"
    )
    terms = criterion.terms(logits, target)
    assert (terms.loss >= -1e-12).all()
    assert (terms.loss <= 1 + 1e-12).all()
    assert terms.loss.shape == ((2, 3) if over == "sample" else (1, 3))
    counts = dense(target, 3).sum(-1)
    volume = terms.extras["target_volume"]
    assert torch.equal(volume, counts if over == "sample" else counts.sum(0, keepdim=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("options", [{}, {"square": True}, {"focus": 0.3}, {"include_background": False}], ids=str)
def test_an_index_is_its_one_hot(activation, over, options):
    logits, target = batch(activation=activation)
    loss = Objective(Overlap(activation=activation, over=over, **options))
    agree(both(loss, logits, target), both(loss, logits, dense(target, 4)))
    per_example = Objective(SelfAdjustingDice(0.05, activation=activation))
    agree(both(per_example, logits, target), both(per_example, logits, dense(target, 4)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dimensions_after_the_class_are_one_set(activation):
    logits, target = batch((2, 3, 24), activation=activation)
    loss = DiceLoss(activation=activation)
    flat = loss(logits, target)
    for shape in ((4, 6), (2, 3, 4), (24, 1, 1)):
        found = loss(logits.reshape(2, 3, *shape), target.reshape(2, *shape))
        torch.testing.assert_close(found, flat, rtol=1e-12, atol=0)
    rows = DiceLoss(activation=activation, over="batch")
    many = logits.movedim(1, 2).reshape(48, 3)
    torch.testing.assert_close(
        rows(many, target.reshape(-1)), rows(many.T[None], target.reshape(1, -1)), rtol=1e-12, atol=0
    )


def test_other_layouts_and_dtypes():
    logits, target = batch((2, 3, 8, 8))
    loss = DiceLoss()
    wanted = both(loss, logits, target)
    agree(both(loss, logits.contiguous(memory_format=torch.channels_last), target), wanted)
    agree(both(loss, logits, target.to(torch.uint8)), wanted)
    agree(both(loss, logits, dense(target, 3).bool()), wanted)
    value, grad = both(loss, logits.float(), target)
    assert (value.dtype, grad.dtype) == (torch.float32, torch.float32)
    agree((value.double(), grad.double()), wanted, tol=1e-6)
    assert loss(logits.half(), target).dtype == torch.float32


def test_one_column_says_yes_or_no():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(3, 1, 7, generator=generator, dtype=F64), torch.randint(2, (3, 7), generator=generator)
    loss = DiceLoss(activation="sigmoid", over="batch")
    wanted = loss(logits, target.unsqueeze(1))
    torch.testing.assert_close(loss(logits, target), wanted, rtol=0, atol=0)
    torch.testing.assert_close(loss(logits.reshape(-1), target.reshape(-1)), wanted, rtol=1e-12, atol=0)
    alone, grad = both(Objective(Overlap(focus=0.5, smooth_nr=0.0, smooth_dr=0.0)), logits, torch.zeros_like(target))
    assert alone.item() == 1.0  # a softmax over one class is sure, and its factor 0
    assert grad.isfinite().all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_soft_targets(activation):
    logits, _ = batch((2, 3, 6))
    soft = torch.randn(2, 3, 6, dtype=F64).softmax(1)
    p = logits.softmax(1) if activation == "softmax" else logits.sigmoid()
    loss = DiceLoss(activation=activation, reduction="none")
    torch.testing.assert_close(loss(logits, soft), by_hand(p, soft), rtol=1e-10, atol=1e-12)


# masks and weights


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("focus", [0.0, 0.01])
def test_masked_is_removed(activation, over, focus):
    logits, target = batch((3, 4, 9), activation=activation)
    keep = torch.rand(9) < 0.6
    loss = Objective(Overlap(activation=activation, over=over, focus=focus))
    value, grad = both(loss, logits[..., keep], target[:, keep])
    for garbage in (math.nan, math.inf, -1e30):
        dirty, labels = logits.clone(), target.clone()
        dirty[..., ~keep] = garbage
        labels[:, ~keep] = 77
        found, slope = both(loss, dirty, labels, mask=keep.expand(3, 9))
        agree((found, slope[..., keep]), (value, grad))
        assert (slope[..., ~keep] == 0).all()
        labels[:, ~keep] = -100
        agree(both(loss, dirty, labels), (found, slope))
        weighted = both(loss, dirty, labels.clamp_min(0), sample_weight=keep.expand(3, 9).to(F64))
        agree(weighted, (found, slope))


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_single_logits_can_be_masked_where_they_stand_alone(over):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=F64)
    target = torch.randint(2, (2, 3, 5), generator=generator).to(F64)
    keep = torch.rand(2, 3, 5, generator=generator) < 0.7
    loss = DiceLoss(activation="sigmoid", over=over, empty="keep")
    p = logits.sigmoid() * keep
    if over == "batch":
        p, y = p.movedim(0, 1).reshape(1, 3, 10), (target * keep).movedim(0, 1).reshape(1, 3, 10)
    else:
        y = target * keep
    wanted = by_hand(p, y).mean()
    dirty = torch.where(keep, logits, math.nan)
    torch.testing.assert_close(loss(dirty, target, mask=keep), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss(dirty, torch.where(keep, target, -100.0)), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss(dirty, target, sample_weight=keep.to(F64)), wanted, rtol=1e-10, atol=1e-12)
    both_ways = loss(dirty, target, mask=torch.ones(2, 5, dtype=torch.bool), sample_weight=keep.to(F64))
    torch.testing.assert_close(both_ways, wanted, rtol=1e-10, atol=1e-12)


def test_a_softmax_place_with_an_unknown_entry_is_removed():
    logits, target = batch((2, 3, 5))
    soft = dense(target, 3)
    soft[0, 1, 2] = -100.0
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    agree(both(DiceLoss(), logits, soft), both(DiceLoss(), logits, target, mask=mask))


@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("shape", ["samples", "elements"])
@pytest.mark.parametrize("elements", [None, HardNegatives(1.0), Focal(1.0)], ids=repr)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_weight_of_two_is_a_second_copy(over, shape, elements, activation):
    logits, target = batch((3, 4, 6))
    loss = Objective(Overlap(activation=activation, over=over, elements=elements))
    if shape == "samples":
        times = torch.tensor([2, 0, 3])
        rows = torch.arange(3).repeat_interleave(times)
        wanted = loss(logits[rows], target[rows])
    else:
        times = torch.tensor([1, 2, 0, 3, 1, 2])
        places = torch.arange(6).repeat_interleave(times)
        wanted = loss(logits[..., places], target[:, places])
        times = times.expand(3, 6)
    torch.testing.assert_close(loss(logits, target, sample_weight=times), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("over", ["sample", "batch"])
@pytest.mark.parametrize("make", [DiceLoss, TverskyLoss, GeneralizedDiceLoss])
def test_nothing_that_counts_is_zero(activation, over, make):
    logits, target = batch((2, 4, 3))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for empty in ("skip", "keep", "zero", "one"):
        loss = make(activation=activation, over=over, empty=empty)
        for inputs, meta in (
            ((logits, target), {"mask": nothing}),
            ((logits, torch.full_like(target, -100)), {}),
            ((logits, target), {"sample_weight": torch.zeros(2)}),
            ((logits[:0], target[:0]), {}),
            ((logits[..., :0], target[..., :0]), {}),
        ):
            value, grad = both(loss, *inputs, **meta)
            assert value.item() == 0.0
            assert (grad == 0).all()


def test_element_weights_stand_inside_the_sums():
    logits, target = batch((2, 3, 8))
    weighting = HardNegatives(0.2)
    weights = Objective(CrossEntropy(), weighting).weights(logits, target)
    assert 0 < int((weights == 0).sum()) < 16
    found = both(Objective(Overlap(elements=weighting)), logits, target)
    agree(found, both(Objective(Overlap()), logits, target, sample_weight=weights))
    soft = Objective(CrossEntropy(), Focal(1.0)).weights(logits, target)
    value, _ = both(Objective(Overlap(elements=Focal(1.0).detach())), logits, target)
    torch.testing.assert_close(value, Objective(Overlap())(logits, target, sample_weight=soft), rtol=1e-12, atol=0)
    binary = Objective(BinaryCrossEntropy(), weighting).weights(logits, dense(target, 3))
    plain = Objective(Overlap(activation="sigmoid"))
    found = both(Objective(Overlap(activation="sigmoid", elements=weighting)), logits, target)
    agree(found, both(plain, logits, dense(target, 3), sample_weight=binary))


def test_element_weights_that_learn():
    logits, target = batch((4, 4, 6))
    criterion = Overlap(elements=InverseClassLoss(4, to="mean", smoothing=1.0))
    objective = Objective(criterion)
    before = objective(logits, target)
    objective.weights(logits, target)
    objective.update("step", index=0)
    mean = [CrossEntropy().terms(logits, target).loss[target == c].mean().item() for c in range(4)]
    found = objective.criterion.elements.weighting.summary()["class_loss"]
    torch.testing.assert_close(found, torch.tensor(mean, dtype=F64), rtol=1e-12, atol=0)
    assert abs(objective(logits, target).item() - before.item()) > 1e-6


def test_class_weights_and_background():
    logits, target = batch()
    each = DiceLoss(reduction="none")(logits, target)
    valid = each != 0
    table = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=F64)
    found = DiceLoss(class_weight=table)(logits, target)
    torch.testing.assert_close(found, (each * table).sum() / valid.sum(), rtol=1e-12, atol=0)
    front = DiceLoss(include_background=False, class_weight=table, reduction="none")(logits, target)
    torch.testing.assert_close(front, (each * table)[:, 1:], rtol=1e-12, atol=0)
    balanced = DiceLoss(class_weight="balanced")
    balanced.update("fit", class_counts=[40, 30, 20, 10])
    assert balanced(logits, target) > 0
    with pytest.raises(ValueError, match="has 3 class weights, but the criterion has 4 classes"):
        DiceLoss(class_weight=[1, 2, 3])(logits, target)


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_what_a_missing_class_does(over):
    logits, target = batch((2, 4, 6))
    target = target.clamp_max(2)
    target[0, 0] = 0
    keep = DiceLoss(over=over, empty="keep", reduction="none")(logits, target)
    p = logits.softmax(1) if over == "sample" else logits.softmax(1).movedim(1, 0).reshape(1, 4, 12)
    y = dense(target, 4) if over == "sample" else dense(target, 4).movedim(1, 0).reshape(1, 4, 12)
    torch.testing.assert_close(keep, by_hand(p, y), rtol=1e-10, atol=1e-12)
    absent = y.sum(-1) == 0
    assert absent[:, 3].all()
    assert (keep[absent] > 0.99).all()
    skip = DiceLoss(over=over)
    torch.testing.assert_close(skip(logits, target), keep[~absent].mean(), rtol=1e-12, atol=0)
    for name, constant in (("zero", 0.0), ("one", 1.0)):
        value, grad = both(DiceLoss(over=over, empty=name), logits, target)
        torch.testing.assert_close(value, keep.masked_fill(absent, constant).mean(), rtol=1e-12, atol=0)
        _, slope = both(skip, logits, target)
        torch.testing.assert_close(grad * absent.numel(), slope * (~absent).sum(), rtol=1e-10, atol=1e-12)


# sets


def test_one_image_is_its_own_batch_and_two_are_not():
    """The mean of two dices is not the dice of two images (Simpson's bias)."""
    logits, target = batch((1, 3, 8))
    agree(both(DiceLoss(over="batch"), logits, target), both(DiceLoss(), logits, target), tol=0.0)
    target = torch.zeros(2, 1, 100)
    target[0, :, :50] = 1.0
    target[1, :, :2] = 1.0
    p = torch.zeros(2, 1, 100)
    p[0, :, :45] = 1.0
    p[1, :, 2:4] = 1.0
    options = {"activation": "none", "smooth_nr": 0.0, "smooth_dr": 0.0}
    assert DiceLoss(**options)(p, target).item() == pytest.approx((1 - 90 / 95 + 1.0) / 2, rel=1e-6)
    assert DiceLoss(over="batch", **options)(p, target).item() == pytest.approx(1 - 90 / 99, rel=1e-6)


def test_terms_say_what_they_are():
    logits, target = batch((3, 4, 6))
    terms = Overlap(include_background=False, empty="keep").terms(logits, target, sample_weight=torch.ones(3) * 2)
    assert terms.num_classes == 4
    assert terms.category.tolist() == [[1, 2, 3]] * 3
    assert terms.multiplicity.tolist() == [2.0] * 3
    assert (terms.mask, terms.share) == (None, None)
    torch.testing.assert_close(terms.extras["predicted_volume"], logits.softmax(1).sum(-1)[:, 1:], rtol=1e-12, atol=0)
    whole = Overlap(over="batch")
    assert (whole.pools, whole.independent) == (True, False)
    assert not Overlap(elements=HardNegatives()).independent
    assert Overlap(elements=Focal()).independent
    with pytest.raises(ValueError, match="Overlap: group has no place here"):
        whole.terms(logits, target, group=torch.zeros(3, dtype=torch.long))


# numbers


@pytest.mark.parametrize("focus", [0.0, 0.01, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_are_finite(focus, activation, dtype):
    for scale, over in itertools.product((0.0, 1.0, 17.0, 40.0, 100.0, 800.0, 1e4), ("sample", "batch")):
        logits, target = batch((2, 3, 6))
        logits = (logits.sign() * scale).to(dtype)
        for square, smooth in ((False, 0.0), (True, 1.0)):
            criterion = Overlap(
                activation=activation, over=over, focus=focus, square=square, smooth_nr=smooth, smooth_dr=smooth
            )
            value, grad = both(Objective(criterion), logits, target)
            assert value.isfinite()
            assert grad.isfinite().all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            criterion = SelfAdjustingDice(focus, smooth=smooth, activation=activation)
        value, grad = both(Objective(criterion, Focal(0.5) * HardNegatives(1.0)), logits, target)
        assert value.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("classes", [1, 2, 3, 50])
def test_the_complement_of_a_softmax_is_exact(classes):
    generator = torch.Generator().manual_seed(classes)
    for scale in (0.0, 1.0, 20.0, 300.0):
        logits = torch.randn(40, classes, generator=generator, dtype=F64) * scale
        found = log_complement(logits.float().log_softmax(1))
        assert found.isfinite().all()
        wide = logits.float().double()
        others = [torch.cat([wide[:, :c], wide[:, c + 1 :]], 1).logsumexp(1) for c in range(classes)]
        wanted = torch.stack(others, 1) - wide.logsumexp(1, keepdim=True)
        if classes > 1:
            torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-6)
    x = torch.randn(6, classes, generator=generator, dtype=F64, requires_grad=True)
    if classes > 1:
        assert torch.autograd.gradcheck(lambda x: log_complement(x.log_softmax(1)), (x,))


def test_probabilities_of_zero_and_one_have_a_slope():
    p = torch.tensor([[[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]], dtype=F64)
    target = torch.tensor([[0, 1, 1]])
    for criterion in (Overlap(activation="none", focus=0.01), SelfAdjustingDice(0.01, activation="none")):
        value, grad = both(Objective(criterion), p, target)
        assert value.isfinite()
        assert grad.isfinite().all()
        assert grad[0, 0, 0] < 0


def test_the_overlap_of_a_large_image_stays_below_one():
    """Float32 bins would drift; a million places of one class."""
    logits = torch.zeros(1, 2, 1000, 1000)
    logits[:, 0] = 30.0
    value = DiceLoss(smooth_nr=0.0, smooth_dr=0.0)(logits, torch.zeros(1, 1000, 1000, dtype=torch.long))
    assert abs(value.item()) < 1e-6


@pytest.mark.parametrize("meta", ["none", "mask", "weight"])
def test_the_hand_written_derivative_is_the_plain_one(meta):
    """It steps aside under ``torch.func``, so that is the comparison; and it can be differentiated and used twice."""
    logits, target = batch((2, 5, 7))
    given_ = {"none": {}, "mask": {"mask": target > 1}, "weight": {"sample_weight": torch.rand(2, 7, dtype=F64)}}[meta]
    loss = TverskyLoss(gamma=0.75)
    plain = torch.func.grad(lambda x: loss(x, target, **given_))(logits)
    x = logits.clone().requires_grad_()
    value = loss(x, target, **given_)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (second,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(first, plain, rtol=1e-12, atol=1e-14)
    assert torch.equal(first, second)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, **given_), (x,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target, **given_), (x,))


def test_autocast_changes_nothing():
    logits, target = batch((2, 5, 64))
    wanted = both(DiceLoss(), logits.float(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(both(DiceLoss(), logits.float(), target), wanted)


# single examples


def test_self_adjusting_dice_composes():
    logits, target = batch((6, 4))
    plain = SelfAdjustingDice().terms(logits, target)
    cross = CrossEntropy().terms(logits, target)
    torch.testing.assert_close(plain.log_pt, cross.log_pt, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain.log_qt.exp() + plain.log_pt.exp(), torch.ones(6, dtype=F64), rtol=1e-12, atol=0)
    weighting = ClassWeight([1, 2, 3, 4]) * Focal(2.0) * HardNegatives(1.0)
    weights = Objective(CrossEntropy(), ClassWeight([1, 2, 3, 4]) * Focal(2.0)).weights(logits, target)
    hard = HardNegatives(1.0).weigh(plain)
    found = Objective(SelfAdjustingDice(), weighting)(logits, target)
    torch.testing.assert_close(found, (weights * hard * plain.loss).mean(), rtol=1e-10, atol=0)
    soft = torch.randn(6, 4, dtype=F64).softmax(1)
    torch.testing.assert_close(
        SelfAdjustingDice().terms(logits, soft).log_pt, CrossEntropy().terms(logits, soft).log_pt, rtol=1e-10, atol=0
    )


def test_self_adjusting_dice_of_any_shape_and_mask():
    logits, target = batch((3, 4, 5))
    target[0, :2] = -100
    keep = target >= 0
    loss = SelfAdjustingDiceLoss()
    value, grad = both(loss, logits.masked_fill(~keep.unsqueeze(1), math.nan), target)
    rows, slope = both(loss, logits.movedim(1, -1)[keep], target[keep])
    agree((value, grad.movedim(1, -1)[keep]), (rows, slope))
    assert (grad.movedim(1, -1)[~keep] == 0).all()
    agree(both(loss, logits.nan_to_num(), target.clamp_min(0), mask=keep), (value, grad))


@pytest.mark.parametrize("square", [True, False])
def test_self_adjusting_dice_of_single_logits(square):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=F64)
    target = torch.randint(2, (5, 3), generator=generator)
    target[0, 0] = -100
    terms = SelfAdjustingDice(0.1, square=square, activation="sigmoid").terms(logits, target)
    p, y = logits.sigmoid(), target.to(F64)
    q = (1 - p) ** 0.1 * p
    size = q**2 + y**2 if square else q + y
    wanted = (1 - (2 * q * y + 1) / (size + 1)).masked_fill(target < 0, 0.0)
    torch.testing.assert_close(terms.loss, wanted, rtol=1e-10, atol=1e-12)
    cross = BinaryCrossEntropy().terms(logits, target)
    for name in ("mask", "log_pt", "log_qt", "target", "category"):
        torch.testing.assert_close(terms.find(name), cross.find(name), rtol=1e-12, atol=0)


def test_a_large_alpha_warns_and_says_where_the_loss_is_least():
    with pytest.warns(UserWarning, match=r"SelfAdjustingDice: with alpha=1 the loss is least at p = 0.5"):
        criterion = SelfAdjustingDice(1.0, activation="none")
    p = torch.linspace(0.01, 0.99, 99, dtype=F64)
    loss = criterion.terms(torch.stack((p, torch.zeros_like(p)), 1), torch.zeros(99, dtype=torch.long)).loss
    assert p[loss.argmin()].item() == pytest.approx(0.5)
    with pytest.warns(UserWarning, match="alpha=0.5"):
        SelfAdjustingDice(Linear(0.0, 0.5, duration=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SelfAdjustingDice(0.1)


# weightings


@given(
    losses=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    data=st.data(),
    ratio=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    minimum=st.integers(0, 4),
)
def test_hard_negatives_share_ties(losses, data, ratio, minimum):
    size = len(losses)
    target = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    times = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    loss = torch.tensor(losses, dtype=F64)
    weighting = HardNegatives(ratio, minimum=minimum)
    weights = weighting.weigh(LossTerms(loss, target=target, multiplicity=times.to(F64)))
    assert (weights[target == 1] == 1).all()
    assert ((weights >= 0) & (weights <= 1)).all()
    positives, negatives = int(times[target == 1].sum()), int(times[target == 0].sum())
    wanted = min(max(minimum, math.floor(ratio * positives + 1e-9)), negatives)
    assert (weights * times)[target == 0].sum().item() == pytest.approx(wanted)
    kept = [(loss[i], weights[i]) for i in range(size) if target[i] == 0 and times[i] > 0]
    for a, b in itertools.product(kept, kept):
        assert a[0] != b[0] or a[1] == b[1]  # equal losses, equal weights
        assert a[0] <= b[0] or a[1] >= b[1]  # harder, not less
        assert a[0] <= b[0] or b[1] == 0 or a[1] == 1  # nothing before what is harder is full


def test_hard_negatives_of_floats_and_indices():
    loss = torch.tensor([3.0, 2.0, 1.0, 0.5])
    by_float = HardNegatives(1.0).weigh(LossTerms(loss, target=torch.tensor([1.0, 0.0, 0.0, 0.0])))
    by_index = HardNegatives(1.0, background=7).weigh(LossTerms(loss, target=torch.tensor([2, 7, 7, 7])))
    assert by_float.tolist() == by_index.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert HardNegatives(0.29).weigh(LossTerms(torch.rand(200), target=torch.arange(200) % 2)).sum() == 129


@pytest.mark.parametrize("gamma", [0.0, 0.75, 1.0, 3.0])
def test_loss_power(gamma):
    loss = torch.tensor([0.0, 1e-30, 0.3, 1.0], dtype=F64, requires_grad=True)
    weights = LossPower(gamma).weigh(LossTerms(loss))
    assert weights.isfinite().all()
    torch.testing.assert_close((weights * loss)[2:], loss[2:] ** gamma, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad((weights * loss).sum(), loss)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[2:], gamma * loss.detach()[2:] ** (gamma - 1), rtol=1e-12, atol=1e-12)


# sums of objectives


def test_objectives_add_up():
    logits, target = batch((3, 4, 6))
    dice, cross = DiceLoss(), FocalLoss(0.0)
    wanted = both(lambda x, y: 0.25 * dice(x, y) + 3 * cross(x, y) + cross(x, y), logits, target)
    total = 0.25 * dice + cross * 3 + cross
    agree(both(total, logits, target), wanted)
    assert len(total.criterion.parts) == 3
    assert total.weights(logits, target).tolist() == [0.25, 3.0, 1.0]
    twice = 2 * total
    assert len(twice.criterion.parts) == 3
    torch.testing.assert_close(twice(logits, target), 2 * wanted[0], rtol=1e-12, atol=0)
    meta = {"mask": torch.rand(3, 6) < 0.5, "sample_weight": torch.tensor([1.0, 2.0, 3.0])}
    parts = 0.25 * dice(logits, target, **meta) + 4 * cross(logits, target, **meta)
    torch.testing.assert_close(total(logits, target, **meta), parts, rtol=1e-12, atol=0)
    listed = Objective(Joint(objectives=[dice, cross]), ClassWeight([0.25, 4.0]), "sum")
    torch.testing.assert_close(listed(logits, target), wanted[0], rtol=1e-12, atol=0)
    mean = Objective(Joint(dice, cross))(logits, target)
    torch.testing.assert_close(mean, (dice(logits, target) + cross(logits, target)) / 2, rtol=1e-12, atol=0)


def test_parts_of_a_sum_learn_as_they_would_alone():
    logits, target = batch((6, 4, 3))
    alone, inside = InverseClassLoss(4), InverseClassLoss(4)
    first, both_of_them = Objective(CrossEntropy(), alone), Objective(CrossEntropy(), inside) + DiceLoss()
    for step, objective in itertools.product(range(3), (first, both_of_them)):
        objective(logits, target)
        objective.update("step", index=step)
    assert torch.equal(alone.get_buffer("class_loss"), inside.get_buffer("class_loss"))
    assert not torch.equal(alone.get_buffer("class_loss"), torch.full((4,), 0.25, dtype=F64))
    groups = torch.arange(6) % 2
    grouped = Objective(CrossEntropy(), None, "group_mean")
    torch.testing.assert_close(
        (grouped + grouped)(logits, target, group=groups), 2 * grouped(logits, target, group=groups), rtol=1e-12, atol=0
    )


def test_sums_pass_the_suite():
    check_objective(0.5 * DiceLoss() + 2.0 * SelfAdjustingDiceLoss())
    check_objective(Objective(Joint(DiceLoss(over="batch"), Objective(CrossEntropy(), Focal(1.0))), None, "mean"))


@pytest.mark.parametrize("wrong", [1.0, "a", None])
def test_objectives_add_to_objectives_only(wrong):
    with pytest.raises(TypeError):
        DiceLoss() + wrong
    with pytest.raises(TypeError):
        DiceLoss() * (wrong if wrong != 1.0 else [1.0])


# everything passes the suite


CRITERIA = [
    Overlap(),
    Overlap(over="batch", alpha=0.3, beta=0.7, smooth_nr=0.0, smooth_dr=0.0),
    pytest.param(Overlap(activation="sigmoid", square=True, focus=0.01, empty="one"), marks=pytest.mark.slow),
    Overlap(elements=Focal(1.0)),
    pytest.param(Overlap(activation="sigmoid", elements=HardNegatives(1.0), empty="zero"), marks=pytest.mark.slow),
    SelfAdjustingDice(),
    pytest.param(SelfAdjustingDice(0.05, square=False, activation="sigmoid"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_criteria_pass_the_suite(criterion):
    check_criterion(criterion)
    for reduction in ("mean", "sum", "none", "sequence_mean"):
        check_objective(Objective(criterion, None, reduction), compiled=reduction == "mean")


@pytest.mark.parametrize("weighting", [Focal(1.0), ClassWeight([1, 2, 3, 4]) * HardNegatives(1.0)], ids=repr)
def test_self_adjusting_dice_passes_the_suite_with_weightings(weighting):
    check_objective(Objective(SelfAdjustingDice(), weighting))


def test_weighted_sequence_mean():
    loss, weights = torch.rand(2, 3, dtype=F64), torch.rand(2, 3, dtype=F64)
    terms = LossTerms(loss, mask=torch.tensor([[True, True, False], [True, True, True]]))
    weights, loss = weights * terms.mask, loss * terms.mask
    found = SequenceMean(weighted=True)(loss * weights, weights, terms)
    wanted = ((loss * weights).sum(1) / weights.sum(1)).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    plain = SequenceMean()(loss, None, terms)
    torch.testing.assert_close(SequenceMean(weighted=True)(loss, None, terms), plain, rtol=0, atol=0)
    assert repr(SequenceMean(weighted=True)) == "SequenceMean(weighted=True)"
    with pytest.raises(TypeError, match="SequenceMean: weighted must be True or False, got 1"):
        SequenceMean(weighted=1)


def test_functional_twins():
    logits, target = batch((2, 4, 6))
    mask = torch.rand(2, 6) < 0.7
    pairs = [
        (functional.dice_loss(logits, target, over="batch", mask=mask), DiceLoss(over="batch")),
        (functional.tversky_loss(logits, target, 0.2, 0.8, gamma=0.75, mask=mask), TverskyLoss(0.2, 0.8, gamma=0.75)),
        (functional.generalized_dice_loss(logits, target, power=1.0, mask=mask), GeneralizedDiceLoss(power=1.0)),
        (functional.self_adjusting_dice_loss(logits, target, 0.05, mask=mask), SelfAdjustingDiceLoss(0.05)),
        (functional.unified_focal_loss(logits, target, symmetric=True, mask=mask), UnifiedFocalLoss(symmetric=True)),
    ]
    for found, loss in pairs:
        assert torch.equal(found, loss(logits, target, mask=mask))


def test_unified_focal_takes_schedules_and_reduces_to_its_parts():
    logits, target = batch((2, 4, 6))
    fixed, moving = UnifiedFocalLoss(gamma=0.3), UnifiedFocalLoss(gamma=Linear(0.3, 0.3, duration=1))
    agree(both(fixed, logits, target), both(moving, logits, target))
    tversky = TverskyLoss(0.4, 0.6, gamma=0.5, smooth_nr=1e-6, smooth_dr=1e-6, empty="keep")
    agree(both(UnifiedFocalLoss(lam=1.0, symmetric=True), logits, target), both(tversky, logits, target), tol=1e-10)
    even = Objective(CrossEntropy(), Constant(0.5) * Focal(0.25))
    found = UnifiedFocalLoss(lam=0.0, delta=0.5, gamma=0.25, symmetric=True)
    agree(both(found, logits, target), both(even, logits, target), tol=1e-10)


# messages


LOGITS, LABELS = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Overlap(activation="relu"), ValueError, "Overlap: activation must be one of 'softmax', .* got 'relu'"),
        (lambda: Overlap(over="image"), ValueError, "Overlap: over must be one of 'sample', 'batch', got 'image'"),
        (lambda: Overlap(empty=None), ValueError, "Overlap: empty must be one of .*, got None"),
        (lambda: Overlap(alpha=-1), ValueError, "Overlap: alpha must be finite and >= 0, got -1"),
        (lambda: Overlap(alpha=0, beta=0), ValueError, r"Overlap: alpha \+ beta must be > 0, got 0"),
        (lambda: Overlap(alpha=0.7, beta=0.3, square=True), ValueError, "alpha must be <= beta with square=True, got"),
        (lambda: Overlap(square=1), TypeError, "Overlap: square must be True or False, got 1"),
        (lambda: Overlap(focus=-0.1), ValueError, "Overlap: focus must be finite and >= 0, got -0.1"),
        (lambda: Overlap(smooth_nr=1.0), ValueError, r"smooth_nr must be <= smooth_dr \(1e-05\), got 1"),
        (lambda: DiceLoss(smooth_nr=1.0), ValueError, r"DiceLoss: smooth_nr must be <= smooth_dr \(1e-05\), got 1"),
        (lambda: Overlap(ignore_index=0.5), TypeError, "Overlap: ignore_index must be an integer, got 0.5"),
        (lambda: Overlap(elements=2.0), TypeError, "Overlap: elements must be a Weighting or None, got float"),
        (lambda: Overlap(elements=VolumeBalance()).terms(LOGITS, LABELS), ValueError, "'target_volume' is missing"),
        (lambda: Overlap(activation="none", elements=Focal()), ValueError, "elements must be None with activation='no"),
        (lambda: SelfAdjustingDice(-1), ValueError, "SelfAdjustingDice: alpha must be finite and >= 0, got -1"),
        (lambda: SelfAdjustingDice(smooth=-1), ValueError, "SelfAdjustingDice: smooth must be finite and >= 0, got -1"),
        (lambda: HardNegatives(-1), ValueError, "HardNegatives: ratio must be finite and >= 0, got -1"),
        (lambda: HardNegatives(minimum=0.5), TypeError, "HardNegatives: minimum must be an integer, got 0.5"),
        (lambda: LossPower(-1), ValueError, "LossPower: gamma must be finite and >= 0, got -1"),
        (lambda: VolumeBalance(absent="min"), ValueError, "VolumeBalance: absent must be one of 'max', 'zero', got"),
        (lambda: UnifiedFocalLoss(gamma=1.0), ValueError, "UnifiedFocalLoss: gamma must be finite and >= 0 and < 1"),
        (lambda: UnifiedFocalLoss(lam=2), ValueError, "UnifiedFocalLoss: lam must be finite and >= 0 and <= 1, got 2"),
        (lambda: Joint(), ValueError, "Joint: needs at least one objective, got none"),
        (lambda: Joint(CrossEntropy()), TypeError, "Joint: every part must be an Objective, got CrossEntropy"),
        (lambda: Joint(DiceLoss(reduction="none")), ValueError, "Joint: every part must have a scalar reduction"),
        (lambda: -1.0 * DiceLoss(), ValueError, "Objective: factor must be finite and >= 0, got -1"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("inputs", "meta", "error", "message"),
    [
        ((LOGITS,), {}, TypeError, r"takes \(logits, target\), got 1 inputs"),
        ((LOGITS.long(), LABELS), {}, TypeError, "logits must be a floating-point tensor, got torch.int64"),
        ((LOGITS[0, 0], LABELS[0]), {}, ValueError, r"logits must be \(N, C, ...\) with C >= 1, got shape \(4,\)"),
        ((LOGITS, LABELS[:, :3]), {}, ValueError, r"target must have shape \(2, 4\) or \(2, 3, 4\) for logits \(2, 3"),
        ((LOGITS, LABELS.float()), {}, TypeError, r"shape \(2, 4\) must hold class indices, got torch.float32"),
        ((LOGITS, LABELS + 3), {}, ValueError, r"target must be in \[0, 3\) or ignore_index=-100, got 3"),
        ((LOGITS, LABELS - 1), {}, ValueError, r"target must be in \[0, 3\) or ignore_index=-100, got -1"),
        ((LOGITS, LOGITS + 1.5), {}, ValueError, r"target must be in \[0, 1\] or ignore_index=-100, got 1.5"),
        ((LOGITS, LOGITS + math.nan), {}, ValueError, r"target must be in \[0, 1\] or ignore_index=-100, got nan"),
        ((LOGITS, [1]), {}, TypeError, "target must be a real tensor, got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("criterion", [Overlap(), SelfAdjustingDice()], ids=lambda c: type(c).__name__)
def test_bad_input(criterion, inputs, meta, error, message):
    with pytest.raises(
        error, match=f"{type(criterion).__name__}: {message}" if "must hold" not in message else message
    ):
        criterion.terms(*inputs, **meta)


@pytest.mark.parametrize(
    ("criterion", "meta", "message"),
    [
        (Overlap(), {"mask": torch.ones(2, 3, 4).bool()}, r"mask must have shape \(2,\) or \(2, 4\), got \(2, 3, 4\)"),
        (Overlap(), {"sample_weight": torch.ones(3)}, r"sample_weight must have shape \(2,\) or \(2, 4\), got \(3,\)"),
        (
            Overlap(activation="sigmoid"),
            {"mask": torch.ones(2, 3).bool()},
            r"mask must have shape \(2,\) or \(2, 4\) or \(2, 3, 4\), got \(2, 3\)",
        ),
        (Overlap(), {"sample_weight": torch.tensor([1.0, -1.0])}, "sample_weight must be finite and >= 0, got -1"),
        (SelfAdjustingDice(), {"mask": torch.ones(2, 3).bool()}, r"mask must have the terms' shape \(2, 4\)"),
    ],
)
def test_bad_masks(criterion, meta, message):
    with pytest.raises(ValueError, match=f"{type(criterion).__name__}: {message}"):
        criterion.terms(LOGITS, LABELS, **meta)


def test_other_bad_calls():
    with pytest.raises(ValueError, match=r"Overlap: probabilities must be in \[0, 1\] with activation='none', got -2"):
        Overlap(activation="none").terms(LOGITS - 2, LABELS)
    with pytest.raises(ValueError, match="include_background=False needs at least two classes, got 1"):
        Overlap(include_background=False, activation="sigmoid").terms(LOGITS[:, :1], LABELS)
    assert Overlap(validate=False, activation="none").terms(LOGITS - 2, LABELS).loss.shape == (2, 3)


def test_python_sums_objectives():
    x, y = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    parts = [DiceLoss(), FocalLoss(), TverskyLoss()]
    torch.testing.assert_close(sum(parts)(x, y), sum(part(x, y) for part in parts))
    with pytest.raises(TypeError):
        1 + DiceLoss()
