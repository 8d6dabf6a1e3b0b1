"""The neutral settings are torch's own losses, and different ways to one method agree."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import focal as reference
from references import weights as naive
from torch import nn

from reweigh.losses import (
    BalancedSoftmax,
    BinaryCrossEntropy,
    BinaryLogitAdjustment,
    CrossEntropy,
    FocalLoss,
    FromLoss,
    LogitAdjustment,
    Objective,
    SigmoidFocalLoss,
    Temperature,
    functional,
    posthoc_logit_adjustment,
)
from reweigh.weighting import ClassWeight, EffectiveNumber, Focal, InverseFrequency

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*all targets of a batch have the same class")
SHAPES = {"C": (5,), "NC": (7, 5), "NCL": (3, 5, 4), "NCHW": (2, 5, 3, 2)}
WEIGHT = [0.5, 2.0, 0.0, 1.5, 3.0]


def both(loss, other, logits, *args):
    """Value and gradient of two losses on the same logits."""
    out = []
    for fn in (loss, other):
        x = logits.detach().clone().requires_grad_()
        value = fn(x, *args)
        (grad,) = torch.autograd.grad(value.sum(), x)
        out.append((value.detach(), grad))
    return out


def agree(loss, other, logits, *args, tol=1e-12):
    (value, grad), (expected, expected_grad) = both(loss, other, logits, *args)
    torch.testing.assert_close(value, expected, rtol=tol, atol=tol)
    torch.testing.assert_close(grad, expected_grad, rtol=tol, atol=tol)


def index_batch(shape, ignore=None):
    """Logits and labels; some labels ignored."""
    logits = torch.randn(shape, dtype=F64) * 3
    places = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(5, places)
    if ignore is not None and target.ndim:
        target.reshape(-1)[::3] = ignore
    return logits, target


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore", [-100, 2, 255])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weight"])
def test_focal_with_gamma_zero_is_torchs_cross_entropy(shape, reduction, ignore, smoothing, weight):
    logits, target = index_batch(shape, ignore)
    torchs = nn.CrossEntropyLoss(
        weight=None if weight is None else torch.tensor(weight, dtype=F64),
        ignore_index=ignore,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    ours = FocalLoss(0.0, weight=weight, ignore_index=ignore, label_smoothing=smoothing, reduction=reduction)
    if len(shape) == 1 and weight is not None:
        target = torch.tensor(1)
    agree(ours, torchs, logits, target)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weight"])
def test_probability_targets_are_torchs(shape, reduction, smoothing, weight):
    logits = torch.randn(shape, dtype=F64) * 3
    target = torch.randn(shape, dtype=F64).softmax(1 if len(shape) > 1 else 0)
    torchs = nn.CrossEntropyLoss(
        weight=None if weight is None else torch.tensor(weight, dtype=F64),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    agree(FocalLoss(0.0, weight=weight, label_smoothing=smoothing, reduction=reduction), torchs, logits, target)


@pytest.mark.parametrize("shape", [(7, 2), (3, 2, 4)])
@pytest.mark.parametrize("weight", [None, [0.5, 2.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_two_classes_are_torchs_too(shape, weight, smoothing):
    """Two classes take another path inside (the exact log(1 - p))."""
    logits = torch.randn(shape, dtype=F64) * 4
    target = torch.randint(2, shape[:1] + shape[2:])
    torchs = nn.CrossEntropyLoss(
        weight=None if weight is None else torch.tensor(weight, dtype=F64), label_smoothing=smoothing
    )
    agree(FocalLoss(0.0, weight=weight, label_smoothing=smoothing), torchs, logits, target)


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4), (2, 5, 3, 2)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weight"])
def test_mask_means_torch_on_what_is_left(shape, soft, weight):
    logits, target = index_batch(shape)
    if soft:
        target = torch.randn(shape, dtype=F64).softmax(1)
    mask = torch.rand(shape[:1] + shape[2:]) < 0.6
    torchs = nn.CrossEntropyLoss(weight=None if weight is None else torch.tensor(weight, dtype=F64))

    def on_the_rest(x, y):
        rows = x.movedim(1, -1)[mask]
        return torchs(rows, y.movedim(1, -1)[mask] if soft else y[mask])

    ours = FocalLoss(0.0, weight=weight)
    agree(lambda x, y: ours(x, y, mask=mask), on_the_rest, logits, target)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (3, 4, 2), (2, 4, 3, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_sigmoid_focal_with_gamma_zero_is_torchs_bce(shape, reduction, soft):
    logits = torch.randn(shape, dtype=F64) * 3
    target = torch.rand(shape, dtype=F64) if soft else torch.randint(2, shape).to(F64)
    agree(
        SigmoidFocalLoss(0.0, alpha=None, reduction=reduction),
        nn.BCEWithLogitsLoss(reduction=reduction),
        logits,
        target,
    )


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 2), (2, 4, 3, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("pos_weight", [None, 3.0, [0.5, 1.0, 2.0, 0.0]])
@pytest.mark.parametrize("weight", [None, [2.0, 0.0, 1.0, 0.3]])
def test_binary_cross_entropy_has_torchs_weights(shape, reduction, pos_weight, weight):
    logits = torch.randn(shape, dtype=F64) * 3
    target = torch.rand(shape, dtype=F64)
    column = (4,) + (1,) * (len(shape) - 2)

    def tensor(value):
        if value is None:
            return None
        value = torch.tensor(value, dtype=F64)
        return value.reshape(column) if value.ndim else value

    torchs = nn.BCEWithLogitsLoss(weight=tensor(weight), pos_weight=tensor(pos_weight), reduction=reduction)
    ours = Objective(BinaryCrossEntropy(weight=weight, pos_weight=pos_weight), reduction=reduction)
    agree(ours, torchs, logits, target)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_binary_targets_of_any_dtype(dtype):
    logits, target = torch.randn(5, 3, dtype=F64), torch.randint(2, (5, 3))
    ours = SigmoidFocalLoss()
    assert torch.equal(ours(logits, target.to(dtype)), ours(logits, target.to(F64)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("classes", [1, 2, 3, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_equals_its_index(gamma, classes, smoothing):
    logits = torch.randn(9, classes, dtype=F64) * 4
    target = torch.randint(classes, (9,))
    loss = FocalLoss(gamma, label_smoothing=smoothing, reduction="none")
    one_hot = nn.functional.one_hot(target, classes).to(F64)
    (hard, hard_grad), (soft, soft_grad) = both(loss, lambda x, y: loss(x, one_hot), logits, target)
    torch.testing.assert_close(soft, hard, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(soft_grad, hard_grad, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
def test_two_class_softmax_is_sigmoid(gamma):
    x = torch.linspace(-30, 30, 61, dtype=F64)
    target = torch.arange(61) % 2
    softmax, sigmoid = FocalLoss(gamma, reduction="none"), SigmoidFocalLoss(gamma, alpha=None, reduction="none")
    two = lambda z, y: softmax(torch.stack([torch.zeros_like(z), z], 1), y)  # noqa: E731
    agree(two, lambda z, y: sigmoid(z, y.to(F64)), x, target)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_alpha_half_halves(gamma):
    x, y = torch.randn(4, 3, dtype=F64), torch.rand(4, 3, dtype=F64)
    off, half = SigmoidFocalLoss(gamma, alpha=None), SigmoidFocalLoss(gamma, alpha=0.5)
    agree(half, lambda a, b: off(a, b) / 2, x, y, tol=1e-15)


def test_alpha_mirrors():
    x = torch.randn(50, dtype=F64) * 5
    for alpha in (0.0, 0.25, 1.0):
        first = SigmoidFocalLoss(2.0, alpha=alpha, reduction="none")(x, torch.ones_like(x))
        second = SigmoidFocalLoss(2.0, alpha=1 - alpha, reduction="none")(-x, torch.zeros_like(x))
        torch.testing.assert_close(first, second, rtol=1e-15, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_class_is_nothing(gamma, smoothing):
    x = torch.randn(4, 1, dtype=F64, requires_grad=True)
    loss = FocalLoss(gamma, label_smoothing=smoothing)(x, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_zero_logits():
    """alpha_t 2^-gamma ln 2 for sigmoid, (1 - 1/C)^gamma ln C for softmax."""
    sigmoid = SigmoidFocalLoss(2.0, alpha=0.25, reduction="none")(torch.zeros(2, dtype=F64), torch.tensor([0.0, 1.0]))
    ln2 = torch.tensor(2.0, dtype=F64).log()
    torch.testing.assert_close(sigmoid, torch.tensor([0.75, 0.25], dtype=F64) * ln2 / 4, rtol=1e-15, atol=0)
    softmax = FocalLoss(3.0)(torch.zeros(1, 5, dtype=F64), torch.tensor([2]))
    torch.testing.assert_close(
        softmax, torch.tensor(0.8**3, dtype=F64) * torch.tensor(5.0, dtype=F64).log(), rtol=1e-14, atol=0
    )


def test_star_with_gamma_one_is_bce():
    x, y = torch.randn(20, dtype=F64) * 5, torch.randint(2, (20,)).to(F64)
    agree(functional.sigmoid_focal_loss_star, nn.BCEWithLogitsLoss(reduction="none"), x, y)


def test_sum_is_n_times_mean():
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(3, (6,))
    agree(FocalLoss(reduction="sum"), lambda a, b: 6 * FocalLoss()(a, b), x, y, tol=1e-14)


def test_softmax_losses_do_not_see_a_shift():
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(3, (6,))
    for loss in (FocalLoss(), FocalLoss(0.5, label_smoothing=0.1)):
        torch.testing.assert_close(loss(x + 7.0, y), loss(x, y), rtol=1e-13, atol=0)


@given(
    gamma=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 3.7, 5.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    classes=st.integers(1, 6),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    extras=st.booleans(),
)
def test_softmax_focal_against_loops(gamma, smoothing, classes, rows, seed, extras):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=F64) * 4
    target = torch.randint(classes, (rows,), generator=generator)
    alpha = torch.rand(classes, generator=generator, dtype=F64) if extras else None
    weight = torch.rand(classes, generator=generator, dtype=F64) if extras else None
    ours = FocalLoss(gamma, alpha=alpha, weight=weight, label_smoothing=smoothing, reduction="none")(logits, target)
    side = [None if value is None else value.tolist() for value in (alpha, weight)]
    loops = [
        reference.softmax_focal(x, y, gamma, *side, smoothing)
        for x, y in zip(logits.tolist(), target.tolist(), strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(loops, dtype=F64), rtol=1e-10, atol=1e-13)


@given(
    gamma=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 5.0]),
    alpha=st.sampled_from([None, 0.0, 0.25, 1.0]),
    x=st.lists(st.floats(-700, 700), min_size=1, max_size=6),
    y=st.sampled_from([0.0, 1.0, 0.3, 0.999]),
)
def test_sigmoid_focal_against_loops(gamma, alpha, x, y):
    ours = SigmoidFocalLoss(gamma, alpha=alpha, reduction="none")(
        torch.tensor(x, dtype=F64), torch.full((len(x),), y, dtype=F64)
    )
    loops = torch.tensor([reference.sigmoid_focal(z, y, gamma, alpha) for z in x], dtype=F64)
    torch.testing.assert_close(ours, loops, rtol=1e-10, atol=1e-300)


# priors and class tables


def test_logit_adjustment_with_tau_one_is_balanced_softmax():
    counts = [500, 40, 3]
    x, y = torch.randn(8, 3, dtype=F64), torch.randint(3, (8,))
    agree(
        Objective(CrossEntropy(logits=LogitAdjustment(counts, tau=1.0))),
        Objective(CrossEntropy(logits=BalancedSoftmax(counts))),
        x,
        y,
    )
    by_hand = lambda a, b: nn.functional.cross_entropy(a + torch.tensor(counts, dtype=F64).log(), b)  # noqa: E731
    agree(Objective(CrossEntropy(logits=BalancedSoftmax(counts))), by_hand, x, y)


def test_adjusted_labels_are_two_class_adjustments():
    """Each label against its absence; counts at the ends stay finite."""
    counts, samples = [0, 30, 100, 400, 500], 500
    x, y = torch.randn(8, 5, dtype=F64), torch.randint(2, (8, 5)).to(F64)
    ours = Objective(BinaryCrossEntropy(logits=BinaryLogitAdjustment(counts, samples=samples, tau=0.7)))
    present = torch.tensor(counts, dtype=F64).clamp(0.5, samples - 0.5)
    two = torch.stack([present, samples - present], 1)

    def by_hand(a, b):
        pairs = [
            nn.functional.cross_entropy(
                torch.stack([a[:, c], torch.zeros(8, dtype=F64)], 1) + 0.7 * (two[c] / samples).log(),
                (1 - b[:, c]).long(),
            )
            for c in range(5)
        ]
        return sum(pairs) / 5

    agree(ours, by_hand, x, y)
    with pytest.raises(ValueError, match=r"counts must be <= samples = 10, got 30"):
        BinaryLogitAdjustment(counts[:2], samples=10)
    with pytest.raises(ValueError, match="has counts of 2 classes, but the logits have 3"):
        BinaryLogitAdjustment([1, 2], samples=10)(torch.zeros(2, 3))


@pytest.mark.parametrize(
    "neutral",
    [
        lambda: CrossEntropy(logits=BalancedSoftmax([7, 7, 7])),
        lambda: CrossEntropy(logits=LogitAdjustment([7, 7, 7], tau=1.5)),
        lambda: CrossEntropy(logits=LogitAdjustment([9, 4, 1], tau=0.0)),
        lambda: CrossEntropy(logits=Temperature(1.0)),
        lambda: CrossEntropy(weight=InverseFrequency([7, 7, 7])),
        lambda: CrossEntropy(weight=EffectiveNumber([7, 7, 7])),
        lambda: CrossEntropy(weight=EffectiveNumber([9, 4, 1], beta=0.0)),
        lambda: CrossEntropy(weight=InverseFrequency([9, 4, 1], power=0.0)),
    ],
)
def test_neutral_settings_are_cross_entropy(neutral):
    x, y = torch.randn(8, 3, dtype=F64), torch.randint(3, (8,))
    agree(Objective(neutral()), nn.CrossEntropyLoss(), x, y)


def test_logit_adjustment_works_on_the_class_dimension_of_any_layout():
    counts = [50, 20, 6, 1, 3]
    loss = Objective(CrossEntropy(logits=LogitAdjustment(counts)), reduction="none")
    for shape in [(3, 5, 4), (2, 5, 3, 2)]:
        x, y = torch.randn(shape, dtype=F64), torch.randint(5, shape[:1] + shape[2:])
        flat = loss(x.movedim(1, -1).reshape(-1, 5), y.reshape(-1))
        torch.testing.assert_close(loss(x, y).reshape(-1), flat, rtol=1e-14, atol=0)
    x = torch.randn(5, dtype=F64)
    torch.testing.assert_close(loss(x, torch.tensor(1)), loss(x[None], torch.tensor([1]))[0], rtol=1e-14, atol=0)


def test_posthoc_is_the_opposite_shift():
    x, counts = torch.randn(4, 3, dtype=F64), [90, 9, 1]
    prior = torch.tensor(counts, dtype=F64) / 100
    torch.testing.assert_close(posthoc_logit_adjustment(x, counts, tau=0.7), x - 0.7 * prior.log(), rtol=1e-14, atol=0)
    adjustment = LogitAdjustment(counts, tau=0.7)
    torch.testing.assert_close(adjustment.posthoc(adjustment(x)), x, rtol=1e-14, atol=1e-14)
    image = torch.randn(2, 3, 4, 4, dtype=F64)
    assert torch.equal(
        posthoc_logit_adjustment(image, counts, dim=1),
        posthoc_logit_adjustment(image.movedim(1, -1), counts).movedim(-1, 1),
    )


def test_effective_number_limits():
    counts = [500, 40, 3]
    assert torch.equal(EffectiveNumber(counts, beta=0.0).table(), torch.ones(3, dtype=F64))
    torch.testing.assert_close(
        EffectiveNumber(counts, beta=1 - 1e-13).table(), InverseFrequency(counts).table(), rtol=1e-9, atol=0
    )
    for beta in (0.9, 0.999, 0.9999):
        expected = torch.tensor(naive.effective_number(counts, beta), dtype=F64)
        torch.testing.assert_close(EffectiveNumber(counts, beta=beta).table(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_inverse_frequency_table(power):
    counts = [500, 40, 3]
    expected = torch.tensor(naive.inverse_frequency(counts, power), dtype=F64)
    torch.testing.assert_close(InverseFrequency(counts, power=power).table(), expected, rtol=1e-14, atol=0)


def test_inverse_frequency_by_samples_is_sklearns_balanced():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2, 3], [50, 20, 6, 1])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    found = InverseFrequency(np.bincount(labels), normalize="samples").table()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)
    assert (found.numpy()[labels]).mean() == pytest.approx(1.0, rel=1e-14)


def test_a_class_without_samples():
    """It weighs as much as the rarest class seen, and does not enter the normalisation."""
    for make in (InverseFrequency, EffectiveNumber):
        with_zero, without = make([50, 0, 5]).table(), make([50, 5]).table()
        torch.testing.assert_close(with_zero[[0, 2]], without, rtol=1e-14, atol=0)
        assert with_zero[1] == with_zero[2]


def test_alpha_names_follow_the_counts_of_fit():
    x, y = torch.randn(8, 3, dtype=F64), torch.randint(3, (8,))
    counts = [70, 20, 10]
    for name, table in {
        "balanced": InverseFrequency(counts),
        "sqrt": InverseFrequency(counts, power=0.5),
        "effective": EffectiveNumber(counts),
    }.items():
        named = FocalLoss(1.0, alpha=name, weight=name)
        named.update("fit", class_counts=counts)
        agree(named, FocalLoss(1.0, alpha=table.table(), weight=table.table()), x, y, tol=1e-14)


def test_class_weight_and_weighted_mean_are_torchs_weighted_mean():
    x, y = torch.randn(8, 5, dtype=F64), torch.randint(5, (8,))
    y[3] = -100
    ours = Objective(CrossEntropy(), ClassWeight(WEIGHT), "weighted_mean")
    agree(ours, nn.CrossEntropyLoss(weight=torch.tensor(WEIGHT, dtype=F64)), x, y)


def test_focal_is_the_composition_bit_for_bit():
    x, y = torch.randn(8, 5, dtype=F64), torch.randint(5, (8,))
    composed = Objective(CrossEntropy(), Focal(2.0))
    (value, grad), (other, other_grad) = both(FocalLoss(2.0), composed, x, y)
    assert torch.equal(value, other)
    assert torch.equal(grad, other_grad)


@pytest.mark.parametrize(
    ("torchs", "functional"),
    [
        (nn.L1Loss, nn.functional.l1_loss),
        (nn.MSELoss, nn.functional.mse_loss),
        (nn.SmoothL1Loss, nn.functional.smooth_l1_loss),
        (nn.HuberLoss, nn.functional.huber_loss),
        (nn.PoissonNLLLoss, nn.functional.poisson_nll_loss),
    ],
)
@pytest.mark.parametrize("shape", [(6,), (6, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_torch_loss_through_from_loss(torchs, functional, shape, reduction):
    x, y = torch.randn(shape, dtype=F64), torch.rand(shape, dtype=F64) + 0.1
    ours = Objective(FromLoss(torchs(reduction="none")), reduction=reduction)
    agree(ours, torchs(reduction=reduction), x, y, tol=1e-15)
    closure = Objective(FromLoss(lambda a, b: functional(a, b, reduction="none")), reduction=reduction)
    agree(closure, ours, x, y, tol=0.0)


def test_from_loss_with_labels_and_a_mask():
    x, y = torch.randn(4, 5, 3, dtype=F64), torch.randint(5, (4, 3))
    mask = torch.rand(4, 3) < 0.6
    ours = Objective(FromLoss(nn.CrossEntropyLoss(reduction="none")))
    agree(
        lambda a, b: ours(a, b, mask=mask),
        lambda a, b: nn.functional.cross_entropy(a.movedim(1, -1)[mask], b[mask]),
        x,
        y,
    )


def test_functional_focal_equals_the_class():
    x, y = torch.randn(8, 5, dtype=F64), torch.randint(5, (8,))
    for gamma, smoothing, reduction in itertools.product([0.0, 0.5, 2.0], [0.0, 0.1], ["mean", "none"]):
        keywords = {"weight": WEIGHT, "label_smoothing": smoothing, "reduction": reduction, "ignore_index": 3}
        assert torch.equal(functional.focal_loss(x, y, gamma, **keywords), FocalLoss(gamma, **keywords)(x, y))
