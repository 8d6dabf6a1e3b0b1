"""Criteria of pairs, circle loss on them, and the tiles they are computed in."""

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from gradients import peak
from ranks import run_ranks
from references import circle as reference
from references import metric_worker as worker
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reweigh import (
    CircleClassificationLoss,
    CircleLogits,
    CircleLoss,
    CirclePacing,
    Constant,
    CrossEntropy,
    Focal,
    InverseFrequency,
    Linear,
    LogitAdjustment,
    Objective,
    PairLogSumExp,
    PairSimilarity,
    ProxyCrossEntropy,
    Temperature,
)
from reweigh.losses import functional
from reweigh.losses.conformance import check_objective
from reweigh.losses.criteria import tiles
from reweigh.losses.criteria.pair import unit

F64 = torch.float64
SIZE = 11


def batch(seed=0, size=SIZE, dim=4, classes=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dim, generator=generator, dtype=F64)
    return x, torch.randint(classes, (size,), generator=generator)


def both(loss, x, *rest, **meta):
    """Value and gradient."""
    x = x.detach().clone().requires_grad_()
    value = loss(x, *rest, **meta)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def same(found, wanted, tol=1e-10):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tol, atol=tol * max(1.0, other.abs().max().item()))


def plain(loss):
    """The loss in plain operations over all pairs at once, as it runs under a transform."""

    def run(*inputs, **meta):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "watched", lambda: True)
            return loss(*inputs, **meta)

    return run


PACINGS = {
    "circle": lambda: CirclePacing(0.25),
    "none": lambda: None,
    "constant": lambda: Constant(2.0),
    "other margin": lambda: CirclePacing(0.1),
    "differentiated": lambda: CirclePacing(0.25, detach=False),
    "composed": lambda: (CirclePacing(0.25, detach=False) ** 2.0 + 0.5).clip(max=3.0),
    "learned": worker.Learned,
    "dropping": lambda: CirclePacing(0.25),
}


@pytest.mark.parametrize("over", ["anchor", "batch"])
@pytest.mark.parametrize("kind", ["all", "weighted", "masked", "listed", "weighted list", "matrices"])
@pytest.mark.parametrize("pacing", PACINGS)
def test_tiles_are_the_whole(pacing, kind, over):
    x, y = batch()
    meta = {}
    if "weighted" in kind:
        meta["sample_weight"] = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 1.5, 2.0, 1.0, 1.0, 4.0], dtype=F64)
    if kind == "masked":
        meta["mask"] = torch.arange(SIZE) % 3 != 1
    if "list" in kind:
        generator = torch.Generator().manual_seed(1)
        meta["pairs"] = tuple(torch.randint(SIZE, (4, 20), generator=generator).unbind(0))
    if kind == "matrices":
        generator = torch.Generator().manual_seed(2)
        meta["pairs"] = tuple((torch.rand(2, SIZE, SIZE, generator=generator) < 0.3).unbind(0))
    drop = pacing == "dropping"
    made = Objective(PairLogSumExp(PACINGS[pacing](), m=0.25, gamma=5.0, over=over, drop_satisfied=drop), None, "none")
    wanted = both(plain(made), x, y, **meta)
    assert (wanted[1] != 0).any()
    learned = list(made.parameters())
    slopes = torch.autograd.grad(plain(made)(x, y, **meta).sum(), learned) if learned else ()
    for tile in (1, 3, 4, SIZE, 50, None):
        made.criterion.tile = tile
        same(both(made, x, y, **meta), wanted)
        if learned:
            same(torch.autograd.grad(made(x, y, **meta).sum(), learned), slopes)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("over", ["anchor", "batch"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(("m", "gamma"), [(0.3, 20.0), (0.0, 20.0), (1.0, 256.0), (0.3, 0.0)])
def test_the_closed_form_is_the_general_one(weighted, over, drop, m, gamma, monkeypatch):
    x, y = batch()
    meta = {"sample_weight": torch.rand(SIZE, dtype=F64) * 3} if weighted else {}
    meta["mask"] = torch.arange(SIZE) != 4
    loss = CircleLoss(m, gamma=gamma, tile=4, over=over, drop_satisfied=drop)
    assert loss.criterion.law().closed
    quick = both(loss, x, y, **meta)
    if drop and gamma:
        assert not torch.equal(quick[0], CircleLoss(m, gamma=gamma, over=over)(x, y, **meta)) or m == 1.0
    monkeypatch.setattr(PairLogSumExp, "law", lambda self: law(self)._replace(closed=False))
    assert not loss.criterion.law().closed
    same(both(loss, x, y, **meta), quick)


law = PairLogSumExp.law


def test_the_closed_form_needs_the_same_margin():
    assert not PairLogSumExp(CirclePacing(0.25), m=0.3).law().closed
    assert not PairLogSumExp(CirclePacing(0.25, detach=False), m=0.25).law().closed
    margin = Linear(0.0, 0.4, duration=3, by="step")
    assert CircleLoss(margin).criterion.law().closed
    assert not PairLogSumExp(CirclePacing(margin), m=0.0).law().closed


@pytest.mark.parametrize("over", ["anchor", "batch"])
@pytest.mark.parametrize("m", [0.0, 0.25, 0.4])
def test_reference(m, over):
    for seed in range(4):
        x, y = batch(seed)
        found = CircleLoss(m, gamma=3.0, over=over, tile=4)(x, y).item()
        assert found == pytest.approx(reference.loss(x.tolist(), y.tolist(), m=m, gamma=3.0, over=over), rel=1e-10)


def test_schedules_move_the_loss():
    x, y = batch()
    loss = CircleLoss(Linear(0.0, 0.4, duration=2, by="step"), gamma=Linear(1.0, 5.0, duration=2, by="step"))
    for m, gamma in ((0.0, 1.0), (0.2, 3.0), (0.4, 5.0)):
        same(both(loss, x, y), both(CircleLoss(m, gamma=gamma), x, y))
        loss.update("step")


# what is known of the formula


def test_gamma_zero_counts_pairs():
    x, y = batch()
    value, grad = both(CircleLoss(gamma=0.0, reduction="none"), x, y)
    for i, label in enumerate(y.tolist()):
        near, far = int((y == label).sum()) - 1, int((y != label).sum())
        assert value[i].item() == pytest.approx(math.log1p(near * far), rel=1e-12)
    assert (grad == 0).all()


def test_on_the_circle():
    """Similarities of 1 - m and m: every exponent is 0, whatever gamma."""
    positive, negative = torch.full((3,), 0.75, dtype=F64), torch.full((4,), 0.25, dtype=F64)
    for gamma in (0.0, 1.0, 256.0):
        found = functional.circle_similarity_loss(positive, negative, 0.25, gamma)
        assert found.item() == pytest.approx(math.log1p(12), rel=1e-12)


def test_constant_pacing_is_additive_margin_softmax():
    cosine = torch.rand(6, 5, dtype=F64) * 2 - 1
    y = torch.randint(5, (6,))
    found = both(Objective(CrossEntropy(logits=CircleLogits(0.3, 7.0, pacing=Constant(1.0)))), cosine, y)
    margin = 7.0 * (1 - 2 * 0.3) * nn.functional.one_hot(y, 5).double()
    same(found, both(lambda s, y: nn.functional.cross_entropy(7.0 * s - margin, y), cosine, y), 1e-12)


def test_the_class_level_form_is_a_softplus():
    cosine = torch.rand(6, 5, dtype=F64) * 2 - 1
    y = torch.randint(5, (6,))
    found = Objective(CrossEntropy(logits=CircleLogits(0.25, 9.0)), None, "none")(cosine, y)
    for row, label, value in zip(cosine, y.tolist(), found, strict=True):
        others = torch.cat([row[:label], row[label + 1 :]])
        wanted = functional.circle_similarity_loss(row[label : label + 1], others, 0.25, 9.0)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_scale_of_embeddings_does_not_matter():
    x, y = batch()
    loss = CircleLoss(0.25, gamma=8.0)
    value, grad = both(loss, x, y)
    for scale in (1e-150, 1e-4, 1e4, 1e150):
        other, slope = both(loss, x * scale, y)
        same((other, slope * scale), (value, grad))


def test_permutation():
    x, y = batch()
    order = torch.randperm(SIZE)
    loss = CircleLoss(0.25, gamma=8.0, tile=3)
    value, grad = both(loss, x, y)
    same(both(loss, x[order], y[order]), (value, grad[order]))


def test_names_of_labels_do_not_matter():
    x, y = batch()
    assert torch.equal(CircleLoss()(x, y), CircleLoss()(x, y * 1_000_003 - 7))


def test_an_anchor_without_a_positive_changes_only_sums():
    x, y = batch()
    y[0] = 99
    terms = PairLogSumExp(CirclePacing(), gamma=8.0).terms(x, y)
    assert not terms.mask[0]
    assert terms.loss[0] == 0
    assert terms.mask[1:].any()


def test_swapping_a_pair_listed_twice_counts_once():
    x, y = batch()
    once = tuple(torch.tensor(v) for v in ([0, 1], [2, 3], [0, 1], [4, 5]))
    twice = tuple(torch.cat([part, part]) for part in once)
    loss = CircleLoss(0.25, gamma=8.0)
    same(both(loss, x, y, once), both(loss, x, y, twice), 1e-15)


def test_anchors_that_have_underflowed_leave_the_mean():
    """Exponents 300 (s - 0.25) and 300 (0.75 - s): -150 for the first two anchors, which float32 cannot tell from 0."""
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    y = torch.tensor([0, 0, 1, 1])
    criterion = PairLogSumExp(Constant(1.0), m=0.25, gamma=300.0)
    assert criterion.terms(x, y).mask.tolist() == [False, False, True, True]
    assert criterion.terms(x.double(), y).mask.all()
    assert Objective(criterion)(x, y).item() == pytest.approx(150 + math.log(2), rel=1e-6)


def test_what_is_not_a_number_is_not_masked_away():
    x, y = batch()
    x[3, 0] = torch.nan
    assert CircleLoss()(x, y).isnan()


# pairs from elsewhere


def own_pairs(y):
    same_label = y[:, None] == y
    return same_label & ~torch.eye(len(y), dtype=torch.bool), ~same_label


@pytest.mark.parametrize("over", ["anchor", "batch"])
@pytest.mark.parametrize("form", ["matrices", "vectors"])
@pytest.mark.parametrize("weighted", [False, True])
def test_listing_all_pairs_is_listing_none(form, over, weighted):
    x, y = batch()
    positive, negative = own_pairs(y)
    if weighted:  # a diagonal pair stands for those among a sample's own copies
        positive = positive | torch.eye(SIZE, dtype=torch.bool)
    pairs = (positive, negative)
    if form == "vectors":
        pairs = (*positive.nonzero().unbind(1), *negative.nonzero().unbind(1))
    meta = {"sample_weight": torch.tensor([1.0, 2, 1, 3, 0, 1, 1, 2, 1, 1, 4], dtype=F64)} if weighted else {}
    for tile in (None, 4):
        loss = CircleLoss(0.25, gamma=8.0, over=over, tile=tile)
        wanted = both(loss, x, y, **meta)
        same(both(loss, x, y, pairs=pairs, **meta), wanted)
        same(both(loss, x, None, pairs, **meta), wanted)


def test_triplets():
    x, y = batch()
    anchor, near, far = torch.tensor([0, 0, 3]), torch.tensor([1, 2, 4]), torch.tensor([5, 6, 7])
    loss = CircleLoss(0.25, gamma=8.0, reduction="none")
    found = loss(x, None, (anchor, near, far))
    assert torch.equal(found, loss(x, y, pairs=(anchor, near, anchor, far)))
    score = unit(x) @ unit(x).T
    wanted = functional.circle_similarity_loss(score[0, [1, 2]], score[0, [5, 6]], 0.25, 8.0)
    torch.testing.assert_close(found[0], wanted, rtol=1e-12, atol=0)
    assert found.nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize("form", ["vectors", "matrices"])
def test_over_the_batch_pairs_have_no_direction(form):
    x, _ = batch()
    near, far = [(0, 1), (1, 0), (4, 2)], [(3, 0), (5, 6), (7, 5)]
    pairs = tuple(torch.tensor(side) for side in (*zip(*near, strict=True), *zip(*far, strict=True)))
    if form == "matrices":
        matrices = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
        matrices[0][pairs[:2]] = True
        matrices[1][pairs[2:]] = True
        pairs = tuple(matrices.unbind(0))
    score = unit(x) @ unit(x).T
    wanted = functional.circle_similarity_loss(score[[0, 4], [1, 2]], score[[3, 5, 7], [0, 6, 5]], 0.25, 8.0)
    found = CircleLoss(0.25, gamma=8.0, over="batch", tile=4)(x, None, pairs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_sample_never_pairs_with_itself():
    x, y = batch()
    positive, negative = own_pairs(y)
    eye = torch.eye(SIZE, dtype=torch.bool)
    loss = CircleLoss(0.25, gamma=8.0)
    same(both(loss, x, y, (positive | eye, negative | eye)), both(loss, x, y))


def test_no_pairs_at_all():
    x, y = batch()
    nothing = (torch.zeros(0, dtype=torch.long),) * 4
    for over in ("anchor", "batch"):
        value, grad = both(CircleLoss(over=over), x, y, nothing)
        assert value == 0
        assert (grad == 0).all()


# edges


@pytest.mark.parametrize("over", ["anchor", "batch"])
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [5], []])
def test_no_anchor_with_both_sides(labels, over):
    x = torch.randn(len(labels), 3, dtype=F64)
    for loss in (CircleLoss(over=over), CircleLoss(over=over, tile=2), Objective(PairLogSumExp(over=over, tile=1))):
        value, grad = both(loss, x, torch.tensor(labels, dtype=torch.long))
        assert value == 0
        assert (grad == 0).all()


def test_zero_embeddings_have_no_direction():
    x, y = batch()
    x[2] = 0.0
    value, grad = both(CircleLoss(0.25, gamma=8.0), x, y)
    assert value.isfinite()
    assert (grad[2] == 0).all()
    assert (grad[0] != 0).any()
    assert (unit(torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    x, y = batch(size=40, dim=16)
    loss = CircleLoss()
    value, grad = both(loss, x.to(dtype), y)
    exact, slope = both(loss, x.to(dtype).double(), y)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), slope, rtol=rounding, atol=rounding * slope.abs().max().item())


def test_autocast_changes_nothing():
    x, y = batch(size=40, dim=16)
    x = x.float()
    for loss in (CircleLoss(), CircleLoss(drop_satisfied=True, tile=8), Objective(PairSimilarity())):
        plain_value, plain_grad = both(loss, x, y)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(leaf, y)
        assert torch.equal(value, plain_value)
        assert torch.equal(torch.autograd.grad(value, leaf)[0], plain_grad)


def test_ignored_labels_are_removed():
    x, y = batch()
    kept = torch.arange(SIZE) % 4 != 1
    dirty = x.clone()
    dirty[~kept] = torch.nan
    marked = torch.where(kept, y, -100)
    for loss in (
        CircleLoss(0.25, gamma=8.0, tile=4),
        CircleLoss(0.25, gamma=8.0, over="batch"),
        Objective(PairSimilarity(), CirclePacing()),
        CircleClassificationLoss(4, 4, gamma=8.0),
    ):
        value, grad = both(loss, dirty, marked)
        wanted, slope = both(loss, x[kept], y[kept])
        same((value, grad[kept]), (wanted, slope))
        assert (grad[~kept] == 0).all()


@pytest.mark.parametrize("over", ["anchor", "batch"])
@pytest.mark.parametrize("tile", [None, 3])
def test_weights_are_copies_in_the_gradient_too(over, tile):
    x, y = batch()
    times = torch.tensor([1, 2, 0, 3, 1, 1, 2, 1, 0, 1, 4])
    rows = torch.arange(SIZE).repeat_interleave(times)
    loss = CircleLoss(0.25, gamma=8.0, over=over, tile=tile)
    value, grad = both(loss, x, y, sample_weight=times)
    wanted, slope = both(loss, x[rows], y[rows])
    folded = torch.zeros_like(x).index_add(0, rows, slope)
    same((value, grad), (wanted, folded))


def test_double_backward():
    x, y = batch(size=6)
    loss = Objective(PairLogSumExp(CirclePacing(0.25, detach=False), gamma=2.0, tile=2))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, y), (x.requires_grad_(),))

    def curvature(loss):
        leaf = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf, y), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)

    same(curvature(CircleLoss(gamma=3.0, tile=2)), curvature(plain(CircleLoss(gamma=3.0))))


def test_a_composed_pacing_is_differentiated():
    x, y = batch(size=6)
    loss = Objective(PairLogSumExp(CirclePacing(0.25, detach=False) ** 2.0, gamma=2.0, tile=2))
    assert torch.autograd.gradcheck(lambda x: loss(x, y), (x.requires_grad_(),))


@pytest.mark.parametrize("over", ["anchor", "batch"])
def test_detached_weights_are_constants(over):
    """The gradient is that of the same weights written down as numbers."""
    x, y = batch(size=6)
    fixed = CirclePacing().weigh(tiles.pair_terms(unit(x) @ unit(x).T, y[:, None] == y, 0.25))

    class Fixed(CirclePacing.__mro__[1]):
        needs, scope = frozenset(), "local"

        def weigh(self, terms):
            return fixed

    found = both(CircleLoss(0.25, gamma=5.0, over=over), x, y)
    same(found, both(Objective(PairLogSumExp(Fixed(), m=0.25, gamma=5.0, over=over)), x, y), 1e-12)


# composition


def test_anchors_are_weighed_like_any_terms():
    x, y = batch()
    group, index = torch.arange(SIZE) % 3, torch.arange(SIZE)
    criterion = PairLogSumExp(CirclePacing(), gamma=4.0)
    terms = criterion.terms(x, y)
    weighting = InverseFrequency([50, 20, 6, 1]) * Focal(1.0)
    found = Objective(criterion, weighting)(x, y, group=group, index=index)
    table = InverseFrequency([50, 20, 6, 1]).table()[y]
    weights = table * (1 - (-terms.loss).exp())
    wanted = (weights * terms.loss)[terms.mask].mean()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    by_group = Objective(criterion, None, "group_mean")(x, y, group=group)
    means = [terms.loss[terms.mask & (group == g)].mean() for g in range(3) if (terms.mask & (group == g)).any()]
    torch.testing.assert_close(by_group, torch.stack(means).mean(), rtol=1e-12, atol=0)


def test_labels_beyond_a_class_table_are_a_clear_error():
    x, y = batch()
    with pytest.raises(ValueError, match=r"InverseFrequency: 'category' must be in \[0, 2\), got 0..3"):
        Objective(PairLogSumExp(), InverseFrequency([3, 1]))(x, y)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none", "group_mean"])
@pytest.mark.parametrize("weighting", [None, CirclePacing(0.2)], ids=repr)
def test_pairs_conform(reduction, weighting):
    check_objective(Objective(PairSimilarity(0.2), weighting, reduction), compiled=reduction == "mean")


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none", "batch_mean", "sequence_mean"])
@pytest.mark.parametrize(
    "criterion",
    [
        PairLogSumExp(gamma=2.0, tile=3),
        PairLogSumExp(CirclePacing(detach=False), gamma=2.0, drop_satisfied=True),
        pytest.param(PairLogSumExp(CirclePacing(0.1), gamma=2.0, over="batch"), marks=pytest.mark.slow),
        ProxyCrossEntropy(
            4,
            3,
            proxies=[[1.0, 0.25, -0.5], [-0.5, 1.0, 0.125], [0.25, -1.0, 0.75], [-0.25, 0.5, -1.0]],
            logits=CircleLogits(gamma=2.0, pacing=CirclePacing(0.1, detach=False)),
            weight=[1.0, 2.0, 3.0, 4.0],
        ),
    ],
    ids=lambda criterion: f"{type(criterion).__name__}-{getattr(criterion, 'over', '')}",
)
def test_criteria_conform(criterion, reduction):
    check_objective(Objective(criterion, None, reduction), compiled=reduction == "mean")


def test_an_anchor_weighting_conforms():
    check_objective(Objective(PairLogSumExp(CirclePacing(), gamma=2.0), Focal(1.0)))


def test_masks_and_weights_of_single_pairs():
    x, y = batch()
    criterion = PairSimilarity(0.25)
    terms, chosen = criterion.terms(x, y), torch.rand(SIZE, SIZE) < 0.5
    weight = torch.rand(SIZE, SIZE, dtype=F64)
    found = Objective(criterion)(x, y, mask=chosen, sample_weight=weight)
    kept = terms.mask & chosen
    wanted = (weight * terms.loss)[kept].sum() / weight[kept].sum()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_class_level_losses_compose():
    x, y = batch()
    proxies = torch.randn(4, 4, dtype=F64)
    cosine = unit(x) @ unit(proxies).T
    criterion = ProxyCrossEntropy(4, 4, logits=CircleLogits(gamma=4.0), proxies=proxies)
    found = Objective(criterion, Focal(2.0) * InverseFrequency([9, 5, 3, 1]))(x, y)
    wanted = Objective(CrossEntropy(logits=CircleLogits(gamma=4.0)), Focal(2.0) * InverseFrequency([9, 5, 3, 1]))(
        cosine, y
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    scaled = ProxyCrossEntropy(4, 4, logits=Temperature(0.1), weight=[1.0, 2, 3, 4], proxies=proxies)
    wanted = nn.functional.cross_entropy(cosine / 0.1, y, torch.tensor([1.0, 2, 3, 4], dtype=F64))
    torch.testing.assert_close(Objective(scaled)(x, y), wanted, rtol=1e-12, atol=0)
    adjusted = ProxyCrossEntropy(4, 4, logits=LogitAdjustment([9, 5, 3, 1]), proxies=proxies)
    prior = (torch.tensor([9.0, 5, 3, 1], dtype=F64) / 18).log()
    torch.testing.assert_close(
        Objective(adjusted)(x, y), nn.functional.cross_entropy(cosine + prior, y), rtol=1e-12, atol=0
    )


def test_proxies_are_parameters_of_the_model():
    x, y = batch(size=40)
    loss = CircleClassificationLoss(4, 4, gamma=16.0)
    assert loss.parameter_groups() == []
    assert [tuple(p.shape) for p in loss.parameters()] == [(4, 4)]
    assert "criterion.proxies" in loss.state_dict()
    x = x.float().requires_grad_()
    optimizer = torch.optim.Adam([x, *loss.parameters()], lr=0.05)
    first = loss(x, y).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    assert loss(x, y).item() < 0.1 * first


def test_binary_targets_of_the_logit_transform():
    score, y = torch.rand(5, 3, dtype=F64) * 2 - 1, torch.tensor([0, 1, 2, 1, 0])
    transform = CircleLogits(0.25, 4.0)
    assert torch.equal(transform(score, y), transform(score, nn.functional.one_hot(y, 3).double()))
    assert torch.equal(transform(score.T, y, dim=0), transform(score, y).T)


def test_functional_twins():
    x, y = batch()
    pairs = own_pairs(y)
    assert torch.equal(functional.circle_loss(x, y, 0.25, 8.0), CircleLoss(0.25, gamma=8.0)(x, y))
    pooled = CircleLoss(0.25, gamma=8.0, over="batch", tile=3)
    assert torch.equal(functional.circle_loss(x, y, 0.25, 8.0, over="batch", tile=3), pooled(x, y))
    torch.testing.assert_close(functional.circle_loss(x, None, pairs=pairs), CircleLoss()(x, y), rtol=1e-12, atol=0)
    proxies, weight = torch.randn(4, 4, dtype=F64), torch.rand(SIZE, dtype=F64)
    weight[3] = 0
    dirty = x.clone()
    dirty[3] = torch.nan
    loss = CircleClassificationLoss(4, 4, gamma=8.0, proxies=proxies, label_smoothing=0.1)
    found = functional.circle_classification_loss(
        dirty, y, proxies, gamma=8.0, label_smoothing=0.1, sample_weight=weight
    )
    assert torch.equal(found, loss(dirty, y, sample_weight=weight))


def test_copies_know_their_margin():
    loss = copy.deepcopy(CircleLoss(Linear(0.0, 0.4, duration=2, by="step")))
    assert loss.criterion.law().closed
    loss.update("step")
    assert loss.criterion.pacing.m is loss.criterion.m


# what is refused, and how


class Costly(worker.Learned):
    def penalty(self, terms, weights):
        return self.steepness.square()


X, Y = torch.randn(4, 3), torch.arange(4) // 2
INTS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CircleLoss(m=1.5), ValueError, "m must be finite and >= 0 and <= 1, got 1.5"),
        (lambda: CircleLoss(gamma=-1.0), ValueError, "PairLogSumExp: gamma must be finite and >= 0, got -1.0"),
        (lambda: CircleLoss(over="row"), ValueError, "over must be one of 'anchor', 'batch', got 'row'"),
        (lambda: CircleLoss(tile=0), ValueError, "tile must be >= 1, got 0"),
        (lambda: CircleLoss(pacing=Focal()), TypeError, "pacing Focal needs 'log_pt', which pairs do not have"),
        (lambda: CircleLoss(pacing=2.0), TypeError, "pacing must be a Weighting or None, got float"),
        (lambda: CircleLoss(pacing=CirclePacing().normalize()), ValueError, "must have scope 'local', got 'scaled'"),
        (
            lambda: PairLogSumExp(worker.Learned().ema(0.5, 4, by="position")),
            ValueError,
            "pacing must not learn from what it sees",
        ),
        (lambda: CircleLoss(pacing=2.0 * Costly()), ValueError, "pacing must not have a penalty"),
        (lambda: CircleLoss(ignore_index=1.5), TypeError, "ignore_index must be an integer, got 1.5"),
        (lambda: CircleLoss()(X), TypeError, "needs labels or pairs, got neither"),
        (lambda: CircleLoss()(X, Y.float()), TypeError, "labels must be an integer tensor, got torch.float32"),
        (lambda: CircleLoss()(X.long(), Y), TypeError, "embeddings must be a floating-point tensor, got torch.int64"),
        (lambda: CircleLoss()(X[0], Y), ValueError, r"embeddings must be \(N, D\), got \(3,\)"),
        (lambda: CircleLoss()(X, Y[:3]), ValueError, r"labels must have shape \(4,\), got \(3,\)"),
        (lambda: CircleLoss()(X, Y, None, None), TypeError, r"takes \(embeddings, labels\) and pairs, got 4 inputs"),
        (lambda: CircleLoss()(X, Y, mask=torch.ones(3).bool()), ValueError, r"mask must have shape \(4,\), got \(3,\)"),
        (
            lambda: CircleLoss()(X, Y, sample_weight=torch.ones(4, 4)),
            ValueError,
            r"sample_weight must have shape \(4,\), got \(4, 4\)",
        ),
        (lambda: CircleLoss()(X, Y, sample_weight=-torch.ones(4)), ValueError, "sample_weight must be finite and >= 0"),
        (
            lambda: Objective(PairSimilarity())(X, Y, sample_weight=torch.ones(4, 3)),
            ValueError,
            r"sample_weight must have shape \(4,\) or \(4, 4\), got \(4, 3\)",
        ),
        (lambda: CircleLoss()(X, Y, INTS), TypeError, "pairs must be a tuple of tensors, got Tensor"),
        (lambda: CircleLoss()(X, Y, (INTS,) * 5), ValueError, "got 5 tensors"),
        (lambda: CircleLoss()(X, Y, (INTS, INTS)), TypeError, "two pairs tensors must be bool matrices, got torch.int"),
        (lambda: CircleLoss()(X, Y, (INTS.bool(),) * 2), ValueError, r"must be \(4, 4\), got \(2,\)"),
        (lambda: CircleLoss()(X, Y, (INTS.float(),) * 3), TypeError, "pairs must hold integers, got torch.float32"),
        (lambda: CircleLoss()(X, Y, (INTS, INTS[:1], INTS)), ValueError, r"one length per side, got \(2,\) and \(1,\)"),
        (lambda: CircleLoss()(X, Y, (INTS, INTS + 3, INTS)), ValueError, r"pairs must be in \[0, 4\), got 4"),
        (lambda: CircleLoss()(X, Y, (INTS, INTS - 1, INTS)), ValueError, r"pairs must be in \[0, 4\), got -1"),
        (
            lambda: CircleLoss(over="batch")(X, Y, group=Y),
            ValueError,
            "group has no place here, because its terms stand for the whole batch",
        ),
        (lambda: ProxyCrossEntropy(2, 3, proxies=[[1.0, 2.0]]), ValueError, r"must have shape \(2, 3\), got \(1, 2\)"),
        (lambda: CircleClassificationLoss(2, 4)(X, Y), ValueError, r"embeddings must be \(N, 4\) and labels"),
        (lambda: CircleClassificationLoss(1, 3)(X, Y), ValueError, r"labels must be in \[0, 1\) or .*, got 1"),
        (lambda: CircleClassificationLoss(2, 3)(X, Y.float()), TypeError, "labels must be an integer tensor"),
        (lambda: CircleClassificationLoss(2, 3)(X), TypeError, r"takes \(embeddings, labels\), got 1 inputs"),
        (
            lambda: CircleClassificationLoss(2, 3)(X, Y, mask=torch.ones(2).bool()),
            ValueError,
            r"mask must have shape \(4,\), got \(2,\)",
        ),
        (lambda: CircleLogits()(X), ValueError, "the logits depend on the target, got none"),
        (lambda: CircleLogits(pacing=Focal()), TypeError, "CircleLogits: pacing Focal needs 'log_pt'"),
        (lambda: functional.circle_similarity_loss(X, X[0]), ValueError, r"positive must be a vector .*\(4, 3\)"),
        (
            lambda: functional.circle_classification_loss(X, Y, X.T),
            ValueError,
            r"must be \(N, D\) and proxies \(C, D\), got \(4, 3\) and \(3, 4\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_lengths_far_from_one_are_named_once():
    loss = CircleLoss(normalize=False)
    with pytest.warns(UserWarning, match=r"normalize=False expects embeddings of length 1, got lengths 2..2"):
        loss(2 * unit(X), Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(2 * unit(X), Y)
        CircleLoss(normalize=False)(unit(X) * 1.05, Y)
    torch.testing.assert_close(CircleLoss(normalize=False)(unit(X), Y), CircleLoss()(X, Y), rtol=1e-6, atol=0)


# memory


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // 4)
        return out


LARGE = {
    "circle": lambda: CircleLoss(),
    "dropping": lambda: CircleLoss(drop_satisfied=True),
    "general": lambda: CircleLoss(pacing=CirclePacing(0.1)),
    "batch": lambda: CircleLoss(over="batch"),
}


def run(loss, size, **meta):
    x = torch.randn(size, 8).requires_grad_()
    loss(x, torch.arange(size) // 4, **meta).backward()


@pytest.mark.parametrize("kind", LARGE)
def test_no_tensor_is_as_large_as_all_pairs(kind):
    size, loss = 1024, LARGE[kind]()
    numbers = []
    for tile in (None, 32, 16):
        loss.criterion.tile = tile
        with Largest() as seen:
            run(loss, size)
        numbers.append(seen.numbers)
    assert numbers[0] <= 128 * size
    assert numbers[1:] == [32 * size, 16 * size]
    listed = tuple(torch.randint(size, (500,)) for _ in range(4))
    with Largest() as seen:
        run(loss, size, pairs=listed)
    assert seen.numbers <= 16 * size + 1


def peak_of(loss, size):
    return peak(lambda: run(loss, size))


@pytest.mark.parametrize("kind", LARGE)
def test_memory_grows_with_the_batch_and_not_with_its_square(kind):
    loss = LARGE[kind]()
    loss.criterion.tile = 16
    small, large = peak_of(loss, 512), peak_of(loss, 2048)
    assert math.log(large / small) / math.log(4) <= 1.1
    loss.criterion.tile = 2048
    assert peak_of(loss, 2048) > 8 * large  # the comparison can fail


@pytest.mark.slow
def test_sixteen_thousand_samples_fit():
    """Forward and backward of (16384, 128) in float32, within 150 MiB of what the process held before."""
    script = """
import resource, torch
from reweigh import CircleLoss
torch.set_num_threads(1)
loss, x, y = CircleLoss(), torch.randn(16384, 128), torch.arange(16384) // 4
loss(x[:256].clone().requires_grad_(), y[:256]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(x.requires_grad_(), y).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 150


# several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks reports; they must end within a minute."""
    return run_ranks(worker.__file__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", worker.LOSSES)
@pytest.mark.parametrize("shards", worker.SHARDS)
def test_two_ranks_are_one_process(ranks, shards, name):
    """Value on every rank, and the gradients that DistributedDataParallel averages; uneven and empty shards."""
    alone = worker.train(shards, name)
    assert (alone["grad"] != 0).any()
    for rank in ranks:
        found = rank[f"{shards} {name}"]
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)


def test_ranks_that_do_not_fit_together_are_told(ranks):
    for rank, found in enumerate(ranks):
        pairs, width, mask, square, word = found["refusals"]
        assert pairs == "PairLogSumExp: pairs are numbers within one rank's batch; use gather=False with them"
        for message in (width, mask):
            assert f"rank {rank} gives width" in message
            assert message.endswith(f"other than rank {1 - rank}")
        assert square == "PairLogSumExp: sample_weight must have shape (3,) to be gathered, got (3, 3)"
        assert word == "PairLogSumExp: sample_weight must be a real tensor, got str"


def test_one_process_gathers_nothing():
    x, y = batch()
    loss = CircleLoss(gather=True)
    same(both(loss, x, y), both(CircleLoss(), x, y), 1e-15)
    assert torch.equal(loss(x, y, pairs=own_pairs(y)), CircleLoss()(x, y, own_pairs(y)))
