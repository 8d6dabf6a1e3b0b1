"""Extremes, non-finite values, low precision: nothing overflows, nothing is hidden, nothing leaks."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from reweigh.losses import (
    BalancedSoftmax,
    BinaryCrossEntropy,
    CrossEntropy,
    FocalLoss,
    FromLoss,
    Objective,
    SigmoidFocalLoss,
    functional,
)
from reweigh.weighting import ClassWeight, Focal, InverseClassLoss, InverseFrequency, Linear

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*all targets of a batch have the same class")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GAMMAS = [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]
EDGES = [0.0, 1e-3, 1.0, 6.0, 8.0, 17.0, 30.0, 37.0, 88.0, 104.0, 745.0, 1e3, 1e4]
NAN, INF = math.nan, math.inf


def value_and_grad(loss, x, *args, **kwargs):
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **kwargs)
    value.sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad


def finite(loss, x, *args, **kwargs):
    value, grad = value_and_grad(loss, x, *args, **kwargs)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    return value, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("soft", [0.0, 0.1, 0.5, 1.0])
def test_sigmoid_focal_is_finite(dtype, gamma, soft):
    x = torch.tensor([sign * edge for edge in EDGES for sign in (1, -1)]).to(dtype)
    y = torch.full_like(x, soft)
    for alpha in (None, 0.25):
        value, grad = finite(SigmoidFocalLoss(gamma, alpha=alpha, reduction="none"), x, y)
        assert (value >= 0).all()
        if soft == 1.0:
            assert (grad <= 0).all()  # a larger logit never hurts a positive
        if soft == 0.0:
            assert (grad >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("classes", [1, 2, 3, 7])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_focal_is_finite(dtype, gamma, classes, soft):
    rows = []
    for edge, at in itertools.product(EDGES, range(min(classes, 3))):
        for sign in (1, -1):
            row = [0.0] * classes
            row[at] = sign * edge  # saturated, right or wrong
            rows.append(row)
        rows.append([edge] * classes)  # constants
        rows.append([edge, edge, *[-edge] * classes][:classes])  # ties at the top
    x = torch.tensor(rows).to(dtype)
    y = torch.arange(len(rows)) % classes
    if soft:
        y = 0.7 * nn.functional.one_hot(y, classes).to(F64) + 0.3 * nn.functional.one_hot((y + 1) % classes, classes)
    for keywords in (
        {},
        {"label_smoothing": 0.1},
        {"weight": [1.0 + c for c in range(classes)], "alpha": [0.5] * classes},
    ):
        value, _ = finite(FocalLoss(gamma, reduction="none", **keywords), x, y)
        assert (value >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_largest_finite_logit(dtype, gamma, classes):
    """Against 0 the loss is the logit itself, still finite; right or wrong, the gradient is finite."""
    top = torch.finfo(dtype).max
    x = torch.zeros(4, classes, dtype=dtype)
    x[0, 0] = x[1, 1] = top
    x[2, 0] = x[3, 1] = -top
    y = torch.zeros(4, dtype=torch.long)
    value, _ = finite(FocalLoss(gamma, reduction="none"), x, y)
    assert value[1].item() == pytest.approx(top)
    assert value[0].item() == 0.0
    for target in (0.0, 1.0):
        z = torch.tensor([top, -top], dtype=dtype)
        finite(SigmoidFocalLoss(gamma, reduction="none"), z, torch.full_like(z, target))


@pytest.mark.parametrize("classes", [2, 4])
def test_a_gamma_that_starts_at_zero(classes):
    """A schedule at gamma 0 is cross-entropy, also where 1 - p_t is 0 or its logarithm is minus infinity."""
    gamma = Linear(0.0, 2.0, duration=2, by="step")
    x = torch.zeros(4, classes)
    x[0, 0], x[1, 0], x[2, 0] = torch.finfo(torch.float32).max, 50.0, -INF
    x[3, 1] = -INF
    y = torch.tensor([0, 0, 1, 0])
    scheduled = Objective(CrossEntropy(), Focal(gamma), "none")
    value, grad = finite(scheduled, x, y)
    expected, expected_grad = value_and_grad(nn.CrossEntropyLoss(reduction="none"), x, y)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert torch.equal(scheduled.weights(x, y), torch.ones(4))


def test_a_sigmoid_gamma_that_starts_at_zero():
    x = torch.tensor([INF, -INF, 1e4, -1e4])
    y = torch.tensor([1.0, 0.0, 1.0, 0.0])
    scheduled = Objective(BinaryCrossEntropy(), Focal(Linear(0.0, 2.0, duration=2, by="step")), "none")
    value, _ = finite(scheduled, x, y)
    assert torch.equal(value, torch.zeros(4))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_vocabulary_masks_of_minus_infinity(gamma):
    """Forbidden classes cost nothing and get no gradient."""
    x = torch.randn(6, 5, dtype=F64)
    x[:, 3] = -INF
    x[0, 1] = x[2, 0] = -INF
    y = torch.tensor([0, 1, 2, 0, 4, 4])
    loss = FocalLoss(gamma, reduction="none")
    value, grad = finite(loss, x, y)
    assert torch.equal(grad[:, 3], torch.zeros(6, dtype=F64))
    keep = [0, 1, 2, 4]
    relabel = torch.tensor([0, 1, 2, -1, 3])
    smaller, smaller_grad = finite(loss, x[:, keep], relabel[y])
    torch.testing.assert_close(value, smaller, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad[:, keep], smaller_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_minus_infinity_with_two_classes_and_soft_targets(gamma, classes):
    x = torch.randn(3, classes, dtype=F64)
    x[:, -1] = -INF
    y = torch.zeros(3, dtype=torch.long)
    value, _ = finite(FocalLoss(gamma, reduction="none"), x, y)
    soft, grad = finite(FocalLoss(gamma, reduction="none"), x, nn.functional.one_hot(y, classes).to(F64))
    torch.testing.assert_close(soft, value, rtol=1e-13, atol=1e-15)
    assert torch.equal(grad[:, -1], torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("keywords", [{}, {"label_smoothing": 0.1}])
def test_minus_infinity_at_a_class_of_weight_zero(keywords):
    """A class of weight 0 leaves the smoothing too, for index targets as for probabilities."""
    x = torch.randn(4, 3, dtype=F64)
    x[:, 2] = -INF
    y = torch.tensor([0, 1, 1, 0])
    loss = Objective(CrossEntropy(weight=[1.0, 2.0, 0.0], **keywords), reduction="none")
    value, _ = finite(loss, x, y)
    soft, _ = finite(loss, x, nn.functional.one_hot(y, 3).to(F64))
    torch.testing.assert_close(soft, value, rtol=1e-13, atol=0)


def test_minus_infinity_at_the_target_is_an_infinite_loss():
    """Never hidden."""
    x = torch.tensor([[-INF, 0.0, 1.0]])
    assert FocalLoss(2.0)(x, torch.tensor([0])).item() == INF
    assert SigmoidFocalLoss(2.0, alpha=None)(torch.tensor([-INF]), torch.ones(1)).item() == INF


@pytest.mark.parametrize(
    ("loss", "make"),
    [
        (FocalLoss(2.0), lambda: (torch.randn(4, 3), torch.randint(3, (4,)))),
        (FocalLoss(0.5, weight=[1.0, 2.0, 3.0]), lambda: (torch.randn(4, 3), torch.randint(3, (4,)))),
        (FocalLoss(2.0), lambda: (torch.randn(4, 2), torch.randint(2, (4,)))),
        (FocalLoss(2.0), lambda: (torch.randn(4, 3), torch.rand(4, 3))),
        (SigmoidFocalLoss(), lambda: (torch.randn(4, 3), torch.rand(4, 3))),
        (Objective(CrossEntropy(), Focal(2.0).normalize()), lambda: (torch.randn(4, 3), torch.randint(3, (4,)))),
        (
            Objective(CrossEntropy(), Focal(2.0) ** 2, "weighted_mean"),
            lambda: (torch.randn(4, 3), torch.zeros(4).long()),
        ),
        (
            Objective(CrossEntropy(), Focal(2.0).clip(max=0.5), "sequence_mean"),
            lambda: (torch.randn(4, 3), torch.zeros(4).long()),
        ),
        (Objective(FromLoss(nn.MSELoss(reduction="none"))), lambda: (torch.randn(4), torch.randn(4))),
    ],
)
def test_nan_at_a_valid_place_is_not_hidden(loss, make):
    x, y = make()
    x[1] = NAN
    value, grad = value_and_grad(loss, x, y)
    assert value.isnan()
    assert grad[1].isnan().any()


def poisoned(x, y, mask, how, soft):
    """The same batch with rubbish wherever the mask is False."""
    x, y = x.clone(), y.clone()
    away = ~mask
    x.movedim(1, -1)[away] = how
    if soft:
        y.movedim(1, -1)[away] = how
    else:
        y[away] = 10**6
    return x, y


WEIGHTED = {
    "focal": lambda: Focal(2.0),
    "gamma_half": lambda: Focal(0.5, detach=True),
    "tables": lambda: InverseFrequency([9, 3, 2]) * Focal(1.0),
    "normalized": lambda: Focal(1.0).normalize(),
    "class_normalized": lambda: (Focal(1.0) + 0.1).normalize(over="class"),
    "group_normalized": lambda: (Focal(1.0) + 0.1).normalize(over="group"),
    "max_normalized": lambda: Focal(1.0).normalize(to="max"),
    "pooled": lambda: Focal(1.0).pooled(),
    "learning": lambda: InverseClassLoss(3, smoothing=0.5),
    "learning_in_forward": lambda: InverseClassLoss(3, smoothing=0.5, cadence="forward"),
    "running_mean": lambda: Focal(1.0).ema(0.5, 3),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize(
    "reduction", ["mean", "weighted_mean", "sum", "none", "batch_mean", "sequence_mean", "group_mean"]
)
@pytest.mark.parametrize("how", [NAN, INF, -INF, 1e30])
def test_rubbish_at_masked_places_changes_nothing(name, reduction, how):
    x, y = torch.randn(5, 3, 4, dtype=F64), torch.randint(3, (5, 4))
    mask = torch.rand(5, 4) < 0.6
    mask[2] = False
    group = torch.tensor([4, 4, 7, 7, 7])
    out = []
    for inputs in ((x, y), poisoned(x, y, mask, how, soft=False)):
        loss = Objective(CrossEntropy(), WEIGHTED[name](), reduction)
        value, grad = value_and_grad(loss, *inputs, mask=mask, group=group)
        weights = loss.weights(*inputs, mask=mask, group=group)
        loss.update("step")
        out.append([value, grad, weights, *loss.state_dict().values()])
        assert value.isfinite().all()
        assert (grad.movedim(1, -1)[~mask] == 0).all()
        assert (weights[~mask] == 0).all()
    for clean, dirty in zip(*out, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("how", [NAN, INF, 1e30])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("loss", ["index", "soft", "two", "sigmoid", "from_loss", "smoothing"])
def test_rubbish_at_masked_places_of_every_criterion(how, gamma, loss):
    mask = torch.tensor([True, False, True, True, False])
    soft = loss in ("soft", "sigmoid", "from_loss")
    x = torch.randn(5, 2 if loss == "two" else 3, dtype=F64)
    y = torch.rand_like(x).softmax(1) if soft else torch.randint(2, (5,))
    objective = {
        "sigmoid": SigmoidFocalLoss(gamma),
        "from_loss": Objective(FromLoss(nn.MSELoss(reduction="none"))),
        "smoothing": FocalLoss(gamma, label_smoothing=0.1, weight=[1.0, 2.0, 3.0]),
    }.get(loss, FocalLoss(gamma))
    clean = value_and_grad(objective, x, y, mask=mask)
    dirty = value_and_grad(objective, *poisoned(x, y, mask, how, soft), mask=mask)
    assert clean[0].isfinite()
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    kept = value_and_grad(objective, x[mask], y[mask])
    torch.testing.assert_close(clean[0], kept[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(clean[1][mask], kept[1], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("ignore", [-100, 255, 1])
def test_rubbish_logits_at_ignored_labels(ignore):
    x, y = torch.randn(6, 3, dtype=F64), torch.tensor([0, ignore, 2, 0, ignore, 2])
    loss = FocalLoss(0.5, ignore_index=ignore)
    dirty = x.clone()
    dirty[[1, 4]] = NAN
    clean = value_and_grad(loss, x, y)
    found = value_and_grad(loss, dirty, y)
    assert torch.equal(clean[0], found[0])
    assert torch.equal(clean[1], found[1])
    assert (found[1][[1, 4]] == 0).all()


def test_rubbish_logits_at_ignored_binary_targets():
    x, y = torch.randn(4, 3, dtype=F64), torch.randint(2, (4, 3))
    y[0, 1] = y[2] = -100
    loss = Objective(BinaryCrossEntropy(), Focal(0.5))
    dirty = torch.where(y == -100, torch.full_like(x, NAN), x)
    clean, found = value_and_grad(loss, x, y), value_and_grad(loss, dirty, y)
    assert torch.equal(clean[0], found[0])
    assert torch.equal(clean[1], found[1])


@pytest.mark.parametrize("how", [NAN, INF, -5.0])
def test_rubbish_sample_weights_and_statistics_at_masked_places(how):
    """What the call brings along is removed with the terms it belongs to: sample weights, groups, statistics."""
    x, y = torch.randn(4, 3, 2, dtype=F64), torch.randint(3, (4, 2))
    mask = torch.tensor([[True, True], [False, False], [True, False], [True, True]])
    full, per_sample = torch.rand(4, 2, dtype=F64) + 0.5, torch.rand(4, dtype=F64) + 0.5
    loss = FocalLoss(1.0)
    for weight in (full, per_sample):
        dirty = weight.clone()
        dirty[1] = how
        if weight is full:
            dirty[2, 1] = how
        clean = value_and_grad(loss, x, y, mask=mask, sample_weight=weight)
        found = value_and_grad(loss, x, y, mask=mask, sample_weight=dirty)
        assert clean[0].isfinite()
        assert torch.equal(clean[0], found[0])
        assert torch.equal(clean[1], found[1])
    running = Objective(CrossEntropy(), Focal(1.0).ema(0.5, 3, by="group"))
    group = torch.tensor([0, -1, 2, 1])  # the padding sample has no group
    value, _ = value_and_grad(running, x, y, mask=mask, group=group)
    assert value.isfinite()


def test_an_infinite_sample_weight_is_refused():
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    for bad in (INF, NAN):
        with pytest.raises(ValueError, match=r"FocalLoss|CrossEntropy: sample_weight must be finite and >= 0, got"):
            FocalLoss()(x, y, sample_weight=torch.tensor([1.0, bad]))


# precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """The output is float32, the gradient has the logits' dtype, and both equal float32 on the same rounded input."""
    x, y = (torch.randn(16, 5) * 3).to(dtype), torch.randint(5, (16,))
    for loss in (
        FocalLoss(0.5),
        FocalLoss(2.0, label_smoothing=0.1, weight=[1.0, 2.0, 3.0, 0.5, 1.0]),
        Objective(CrossEntropy(logits=BalancedSoftmax([5, 4, 3, 2, 1])), Focal(1.0).normalize()),
    ):
        value, grad = value_and_grad(loss, x, y)
        assert value.dtype == torch.float32
        assert grad.dtype == dtype
        exact, exact_grad = value_and_grad(loss, x.float(), y)
        assert torch.equal(value, exact)
        assert torch.equal(grad, exact_grad.to(dtype))
    value, grad = value_and_grad(SigmoidFocalLoss(), x, torch.rand(16, 5).to(dtype))
    assert value.dtype == torch.float32
    assert grad.dtype == dtype


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_error_table_under_autocast(dtype, bound):
    """A linear head under autocast: the objective adds nothing to the error of the rounded logits (bound 1e-5), and
    against float64 all the way the whole is within 1e-3 (float16) or 1e-2 (bfloat16)."""
    features, head = torch.randn(64, 16), torch.randn(16, 5) * 0.3
    y, binary = torch.randint(5, (64,)), torch.randint(2, (64, 5)).float()
    for loss, target in ((FocalLoss(2.0), y), (FocalLoss(0.5), y), (SigmoidFocalLoss(), binary), (FocalLoss(0.0), y)):
        with torch.autocast("cpu", dtype=dtype):
            logits = features @ head
            assert logits.dtype == dtype
            value = loss(logits, target)
        assert value.dtype == torch.float32
        rounded = loss(logits.double(), target)
        exact = loss(features.double() @ head.double(), target)
        assert abs(value.item() / rounded.item() - 1) <= 1e-5
        assert abs(value.item() / exact.item() - 1) <= bound


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_float32_rule(gamma):
    """Confident right answers keep 1e-5 of relative accuracy in float32 where log(1 - p_t) is exact: sigmoid, and the
    weight of two classes."""
    x = torch.linspace(-40, 40, 161)
    for y in (torch.ones_like(x), torch.zeros_like(x)):
        loss = SigmoidFocalLoss(gamma, reduction="none")
        value, grad = value_and_grad(loss, x, y)
        exact, exact_grad = value_and_grad(loss, x.double(), y.double())
        normal = exact > 1e-36
        assert normal.sum() > 100
        torch.testing.assert_close(value[normal].double(), exact[normal], rtol=1e-5, atol=0)
        torch.testing.assert_close(grad[normal].double(), exact_grad[normal], rtol=1e-5, atol=1e-37)
    two = Objective(CrossEntropy(), Focal(gamma))
    logits, target = torch.stack([torch.zeros_like(x), x], 1), torch.ones(161, dtype=torch.long)
    found, exact = two.weights(logits, target).double(), two.weights(logits.double(), target)
    normal = exact > 1e-36
    torch.testing.assert_close(found[normal], exact[normal], rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_float32_softmax_is_absolutely_exact(classes):
    """Against float64: 1e-5 of the largest entry everywhere; saturated right terms (loss under 1e-7), which need not
    be relatively exact, to 1e-6 as an absolute number."""
    x = torch.zeros(60, classes)
    x[:, 0] = torch.linspace(-40, 40, 60)
    y = torch.zeros(60, dtype=torch.long)
    saturated = nn.functional.cross_entropy(x.double(), y, reduction="none") < 1e-7
    assert saturated.sum() >= 10
    for gamma in (0.0, 0.5, 2.0):
        loss = FocalLoss(gamma, reduction="none")
        for found, exact in zip(value_and_grad(loss, x, y), value_and_grad(loss, x.double(), y), strict=True):
            error = (found.double() - exact).abs()
            assert (error <= 1e-5 * exact.abs().max()).all()
            assert (error[saturated] <= 1e-6).all()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_loss_falls_with_the_margin(gamma):
    """Monotone in p, right up to saturation."""
    x = torch.linspace(-60, 60, 4001, dtype=F64)
    sigmoid = SigmoidFocalLoss(gamma, alpha=0.25, reduction="none")(x, torch.ones_like(x))
    assert (sigmoid.diff() < 0).all()
    logits = torch.stack([x, torch.zeros_like(x), torch.full_like(x, 0.5)], 1)
    softmax = FocalLoss(gamma, reduction="none")(logits, torch.zeros(4001, dtype=torch.long))
    assert (softmax.diff() <= 0).all()
    resolved = softmax[1:] > 1e-10  # beyond that, log-softmax itself has no digits left
    assert (softmax.diff()[resolved] < 0).all()


def test_star_keeps_its_digits():
    x = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])
    value, grad = finite(lambda a, b: functional.sigmoid_focal_loss_star(a, b, 2.0), x, torch.ones(5))
    assert value[-2].item() > 0
    assert grad[0].item() == -1.0


def test_deterministic_and_independent_of_the_thread_count():
    x, y = torch.randn(4000, 20), torch.randint(20, (4000,))
    loss = FocalLoss(2.0, weight=[1.0 + c for c in range(20)])
    first, second = value_and_grad(loss, x, y), value_and_grad(loss, x, y)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        third = value_and_grad(loss, x, y)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(third[0], first[0], rtol=1e-6, atol=0)


def test_a_stateless_loss_from_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    loss = FocalLoss(2.0, weight=[1.0, 2.0, 3.0])
    batches = [(torch.randn(6, 3, dtype=F64), torch.randint(3, (6,))) for _ in range(50)]
    alone = [value_and_grad(loss, *batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda batch: value_and_grad(loss, *batch), batches * 4))
    for i, (value, grad) in enumerate(together):
        assert torch.equal(value, alone[i % 50][0])
        assert torch.equal(grad, alone[i % 50][1])


def test_non_contiguous_inputs():
    x, y = torch.randn(4, 6, 5, dtype=F64), torch.randint(5, (4, 6))
    loss = FocalLoss(1.0)
    view = x.movedim(-1, 1)
    assert not view.is_contiguous()
    assert torch.equal(loss(view, y), loss(view.contiguous(), y))


def test_inputs_are_not_changed():
    x, y = torch.randn(4, 3, 2), torch.randint(3, (4, 2))
    y[0, 0] = -100
    mask, weight = torch.rand(4, 2) < 0.5, torch.rand(4, 2)
    before = copy.deepcopy((x, y, mask, weight))
    loss = Objective(CrossEntropy(weight=[1.0, 2.0, 0.5]), Focal(2.0) * ClassWeight([1.0, 2.0, 3.0]))
    loss(x.requires_grad_(), y, mask=mask, sample_weight=weight).backward()
    for now, then in zip((x, y, mask, weight), before, strict=True):
        assert torch.equal(now, then)
