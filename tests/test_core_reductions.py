"""Denominators: each against a loop, empty batches, exact accumulation, sample weights as counts, nesting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import reductions as naive
from torch import nn

from reweigh.losses import (
    BatchMean,
    BinaryCrossEntropy,
    CrossEntropy,
    FocalLoss,
    FromLoss,
    GroupMean,
    Mean,
    Objective,
    SequenceMean,
    SigmoidFocalLoss,
    Total,
    Unreduced,
    WeightedMean,
)
from reweigh.weighting import Between, ClassWeight, Focal, InverseClassLoss, InverseFrequency

F64 = torch.float64
MEANS = ["mean", "weighted_mean", "batch_mean", "sequence_mean", "group_mean"]
OBJECTS = {
    "mean": Mean,
    "weighted_mean": WeightedMean,
    "sum": Total,
    "none": Unreduced,
    "batch_mean": BatchMean,
    "sequence_mean": SequenceMean,
    "group_mean": GroupMean,
}
CLASS_WEIGHT = [0.5, 2.0, 0.25]


def batch(seed=0, size=6, length=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "logits": torch.randn(size, classes, length, generator=generator, dtype=F64),
        "target": torch.randint(classes, (size, length), generator=generator),
        "mask": torch.rand(size, length, generator=generator) < 0.7,
        "times": torch.rand(size, length, generator=generator, dtype=F64) * 2,
        "copies": torch.rand(size, generator=generator, dtype=F64) * 2,
        "group": torch.randint(-2, 2, (size,), generator=generator) * 1000,
    }


def listed(*tensors):
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("reduction", [*MEANS, "sum", "none"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("weighed", ["no", "terms", "samples"])
def test_against_loops(reduction, norm, masked, weighed):
    data = batch()
    x, y, group = data["logits"], data["target"], data["group"]
    mask = data["mask"] if masked else torch.ones_like(data["mask"])
    objective = Objective(CrossEntropy(weight=CLASS_WEIGHT if norm else None), Focal(1.0), reduction)
    given_weight = {"no": None, "terms": data["times"], "samples": data["copies"]}[weighed]
    found = objective(x, y, mask=mask if masked else None, sample_weight=given_weight, group=group)

    log_p = x.log_softmax(1).gather(1, y[:, None])[:, 0]
    v = torch.tensor(CLASS_WEIGHT, dtype=F64)[y] if norm else torch.ones_like(log_p)
    loss, weight = -v * log_p, 1 - log_p.exp()
    times = {"no": torch.ones_like(loss), "terms": data["times"], "samples": data["copies"][:, None].expand(6, 4)}[
        weighed
    ]
    lists = listed(loss, weight, mask.double(), times, v)
    if reduction == "none":
        torch.testing.assert_close(found, mask * times * weight * loss, rtol=1e-12, atol=0)
        return
    if reduction == "sum":
        expected = naive.total(*lists[:4])
    elif reduction == "group_mean":
        expected = naive.group_mean(*lists, group.tolist())
    elif reduction == "sequence_mean":
        copies = data["copies"].tolist() if weighed == "samples" else [1.0] * 6
        if weighed == "samples":
            lists[3] = torch.ones_like(times).tolist()
        expected = naive.sequence_mean(*lists, copies)
    else:
        expected = getattr(naive, reduction)(*lists)
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", ["sequence_mean", "batch_mean", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_term_per_sample(reduction, masked):
    """Where a sample is one term, these three are the same mean, sample weights included."""
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(3, (6,))
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None
    copies = torch.tensor([1.0, 2.0, 0.0, 3.0, 5.0, 0.5], dtype=F64)
    loss = nn.functional.cross_entropy(x, y, reduction="none")
    times = copies * (mask if masked else 1)
    expected = (times * loss).sum() / times.sum()
    found = Objective(CrossEntropy(), reduction=reduction)(x, y, mask=mask, sample_weight=copies)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", OBJECTS)
def test_names_are_objects(name):
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(3, (6,))
    group = torch.tensor([0, 0, 1, 1, 1, 5])
    by_name, by_object = (Objective(CrossEntropy(), Focal(), how) for how in (name, OBJECTS[name]()))
    assert torch.equal(by_name(x, y, group=group), by_object(x, y, group=group))
    assert type(by_name.reduction) is OBJECTS[name]
    assert repr(by_object.reduction) == f"{OBJECTS[name].__name__}()"


# nothing counts


EMPTY = {
    "no_samples": lambda: (torch.zeros(0, 3, dtype=F64), torch.zeros(0, dtype=torch.long), {}),
    "no_length": lambda: (torch.zeros(2, 3, 0, dtype=F64), torch.zeros(2, 0, dtype=torch.long), {}),
    "all_ignored": lambda: (torch.randn(4, 3, dtype=F64), torch.full((4,), -100), {}),
    "all_masked": lambda: (
        torch.full((4, 3), math.nan, dtype=F64),
        torch.zeros(4, dtype=torch.long),
        {"mask": torch.zeros(4, dtype=torch.bool)},
    ),
    "weight_zero": lambda: (
        torch.randn(4, 3, dtype=F64),
        torch.zeros(4, dtype=torch.long),
        {"sample_weight": torch.zeros(4, dtype=F64)},
    ),
}


@pytest.mark.parametrize("how", EMPTY)
@pytest.mark.parametrize("reduction", [*MEANS, "sum"])
@pytest.mark.parametrize(
    "weighting",
    [
        lambda: Focal(0.5),
        lambda: Focal(1.0).normalize(),
        lambda: Focal(1.0).normalize(to="max"),
        lambda: Focal(1.0).normalize(over="class"),
        lambda: Focal(1.0).normalize(over="sample", to="sum", detach=False),
        lambda: Focal(1.0).pooled("sequence"),
        lambda: Focal(1.0).pooled("group"),
        lambda: InverseClassLoss(3, cadence="forward"),
        lambda: Focal(1.0).ema(0.9, 3),
        lambda: None,
    ],
)
def test_nothing_gives_zero_with_a_zero_gradient(how, reduction, weighting):
    x, y, meta = EMPTY[how]()
    x.requires_grad_()
    objective = Objective(CrossEntropy(), weighting(), reduction)
    loss = objective(x, y, group=torch.zeros(len(x), dtype=torch.long), **meta)
    assert loss.item() == 0.0
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
    objective.update("step")
    assert all(value.isfinite().all() for value in objective.state_dict().values())


@pytest.mark.parametrize("how", ["no_samples", "all_ignored", "all_masked", "weight_zero"])
@pytest.mark.parametrize("reduction", [Mean, WeightedMean, BatchMean, SequenceMean, GroupMean])
def test_empty_nan_is_torchs_behaviour(how, reduction):
    x, y, meta = EMPTY[how]()
    group = torch.zeros(len(x), dtype=torch.long)
    assert Objective(CrossEntropy(), reduction=reduction(empty="nan"))(x, y, group=group, **meta).isnan()
    assert Objective(CrossEntropy(), reduction=reduction(empty="zero"))(x, y, group=group, **meta).item() == 0.0


@pytest.mark.parametrize("loss", [SigmoidFocalLoss(), Objective(FromLoss(nn.L1Loss(reduction="none")))])
def test_empty_batches_of_other_criteria(loss):
    x = torch.zeros(0, dtype=F64, requires_grad=True)
    loss(x, torch.zeros(0, dtype=F64)).backward()
    assert x.grad.shape == (0,)


# accumulation


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("table", [1.0, InverseFrequency([9, 5, 2])])
def test_num_items_makes_accumulation_exact(size, reduction, detach, table):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1: the value always, the gradient unless the denominator itself has one."""
    weighting = table * Focal(0.5, detach=detach)
    data = batch(size=8)
    x, y = data["logits"].requires_grad_(), data["target"]
    y[0] = y[3, 1] = -100
    objective = Objective(CrossEntropy(), weighting, reduction)
    whole = objective(x, y, sample_weight=data["times"])
    _, count = objective.parts(x, y, sample_weight=data["times"])
    (expected,) = torch.autograd.grad(whole, x)
    total, grad = torch.zeros((), dtype=F64), torch.zeros_like(x)
    for rows in torch.arange(8).split(size):
        part = objective(x[rows], y[rows], sample_weight=data["times"][rows], num_items=count)
        total = total + part.detach()
        grad = grad + torch.autograd.grad(part, x)[0]
    torch.testing.assert_close(total, whole.detach(), rtol=1e-12, atol=0)
    if detach or reduction == "mean":
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "batch_mean", "sequence_mean"])
@pytest.mark.parametrize("norm", [False, True])
def test_parts_add_up(reduction, norm):
    data = batch(size=8)
    x, y, mask = data["logits"].requires_grad_(), data["target"], data["mask"]
    objective = Objective(CrossEntropy(weight=CLASS_WEIGHT if norm else None), Focal(1.0), reduction)
    above = below = 0.0
    for rows in torch.arange(8).split(3):
        numerator, denominator = objective.parts(x[rows], y[rows], mask=mask[rows])
        assert numerator.requires_grad
        assert not denominator.requires_grad
        assert numerator.shape == denominator.shape == ()
        above, below = above + numerator, below + denominator
    whole = objective(x, y, mask=mask)
    torch.testing.assert_close(above / below, whole, rtol=1e-12, atol=0)
    if reduction != "weighted_mean":  # its denominator depends on the logits; parts hands it over as a constant
        found, expected = torch.autograd.grad(above / below, x)[0], torch.autograd.grad(whole, x)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)


def test_parts_of_a_sum():
    x, y = torch.randn(4, 3, dtype=F64), torch.randint(3, (4,))
    with pytest.raises(ValueError, match="reduction 'sum' has no denominator"):
        FocalLoss(reduction="sum").parts(x, y)


def test_num_items_divides():
    x, y = torch.randn(4, 3, dtype=F64), torch.randint(3, (4,))
    total = Objective(CrossEntropy(), reduction="sum")(x, y)
    for items in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        torch.testing.assert_close(Objective(CrossEntropy())(x, y, num_items=items), total / 7, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_num_items_needs_a_denominator(reduction):
    with pytest.raises(ValueError, match=f"num_items replaces a denominator, and reduction '{reduction}' has none"):
        FocalLoss(reduction=reduction)(torch.zeros(2, 3), torch.tensor([0, 1]), num_items=2)


def test_unknown_reduction():
    with pytest.raises(ValueError, match=r"FocalLoss: reduction must be one of 'mean', .*'group_mean', got 'average'"):
        FocalLoss(reduction="average")
    with pytest.raises(ValueError, match=r"Mean: empty must be one of 'zero', 'nan', got 'one'"):
        Mean(empty="one")


def test_none_has_no_parts():
    with pytest.raises(ValueError, match="reduction 'none' has no denominator"):
        FocalLoss(reduction="none").parts(torch.zeros(2, 3), torch.tensor([0, 1]))


# sample weights are counts


COMPOSITIONS = {
    "plain": lambda: None,
    "focal": lambda: Focal(2.0),
    "table": lambda: ClassWeight([1.0, 2.0, 3.0]) * Focal(1.0),
    "mean": lambda: Focal(1.0).normalize(),
    "differentiated": lambda: Focal(1.0).normalize(detach=False),
    "sum": lambda: Focal(1.0).normalize(to="sum"),
    "max": lambda: Focal(1.0).normalize(to="max"),
    "by_class": lambda: Focal(1.0).normalize(over="class"),
    "by_class_sum": lambda: Focal(1.0).normalize(over="class", to="sum"),
    "by_group": lambda: Focal(1.0).normalize(over="group"),
    "by_sample": lambda: Focal(1.0).normalize(over="sample"),
    "pooled_batch": lambda: Focal(1.0).pooled("batch"),
    "pooled_class": lambda: Focal(1.0).pooled("class"),
    "pooled_group": lambda: Focal(1.0).pooled("group"),
    "pooled_sequence": lambda: Focal(1.0).pooled("sequence"),
    "mixed": lambda: ((Focal(1.0) + 0.2).normalize() * ClassWeight([1.0, 2.0, 3.0])).clip(max=2.0).pooled("class"),
    "learning": lambda: InverseClassLoss(3, smoothing=0.5, cadence="forward"),
}


@pytest.mark.filterwarnings("ignore:.*all targets of a batch have the same class")
@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("reduction", [*MEANS, "sum"])
@given(
    times=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    length=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 999),
)
def test_integer_sample_weight_is_duplication(name, reduction, times, length, seed):
    """Weight 2 is the sample twice, weight 0 is the sample removed: value, gradient and what is learned."""
    size = len(times)
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 3) if length is None else (size, 3, length)
    x = torch.randn(shape, generator=generator, dtype=F64, requires_grad=True)
    y = torch.randint(3, shape[:1] + shape[2:], generator=generator)
    group = torch.randint(2, (size,), generator=generator)
    times = torch.tensor(times)
    rows = torch.arange(size).repeat_interleave(times)
    first, second = (Objective(CrossEntropy(weight=CLASS_WEIGHT), COMPOSITIONS[name](), reduction) for _ in range(2))
    counted = first(x, y, sample_weight=times.to(F64), group=group)
    repeated = second(x[rows], y[rows], group=group[rows])
    torch.testing.assert_close(counted, repeated, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(counted, x)[0], torch.autograd.grad(repeated, x)[0], rtol=1e-11, atol=1e-14
    )
    for found, expected in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@given(
    times=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum"])
@pytest.mark.parametrize("name", ["focal", "mean", "max", "by_class", "by_sample", "pooled_batch", "pooled_sequence"])
def test_zero_weight_terms_are_masked_terms(name, reduction, times, seed):
    """Per-term weights: 0 and a mask are the same."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.tensor(times, dtype=F64)
    x = torch.randn(len(times), 3, 3, generator=generator, dtype=F64, requires_grad=True)
    y = torch.randint(3, times.shape, generator=generator)
    objective = Objective(CrossEntropy(), COMPOSITIONS[name](), reduction)
    weighed = objective(x, y, sample_weight=times)
    masked = objective(x, y, sample_weight=times.clamp_min(1.0), mask=times > 0)
    torch.testing.assert_close(weighed, masked, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("layout", ["flat", "column"])
def test_sample_weight_layouts(size, layout):
    """``(B,)`` and ``(B, 1)`` are one weight per sample, whatever the terms' shape and the batch size."""
    weight = torch.rand(size, dtype=F64)
    passed = weight if layout == "flat" else weight[:, None]
    x, y = torch.randn(size, 3, dtype=F64), torch.randint(3, (size,))
    loss = nn.functional.cross_entropy(x, y, reduction="none")
    found = Objective(CrossEntropy())(x, y, sample_weight=passed)
    torch.testing.assert_close(found, (weight * loss).sum() / weight.sum(), rtol=1e-13, atol=0)
    x, y = torch.randn(size, 3, 4, dtype=F64), torch.randint(3, (size, 4))
    loss = nn.functional.cross_entropy(x, y, reduction="none")
    found = Objective(CrossEntropy())(x, y, sample_weight=passed)
    torch.testing.assert_close(found, (weight * loss.mean(1)).sum() / weight.sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.float16])
def test_sample_weight_of_any_real_dtype(dtype):
    x, y = torch.randn(4, 3, dtype=F64), torch.randint(3, (4,))
    weight = torch.tensor([1, 0, 1, 1])
    loss = FocalLoss()
    assert torch.equal(loss(x, y, sample_weight=weight.to(dtype)), loss(x, y, sample_weight=weight.to(F64)))


# levels


def test_sequence_mean_nests():
    """Token weights inside, one focal-like weight per sequence outside."""
    data = batch()
    x, y, mask = data["logits"], data["target"], data["mask"]
    mask[2] = False
    inner = Objective(CrossEntropy(), Focal(1.0), "sequence_mean")
    hard = Between("loss", low=0.5)
    outer = Objective(inner, hard, "mean")
    log_p = x.log_softmax(1).gather(1, y[:, None])[:, 0]
    terms = mask * (1 - log_p.exp()) * -log_p
    per_sequence = terms.sum(1) / mask.sum(1).clamp_min(1)
    alive = mask.any(1)
    chosen = alive & (per_sequence >= 0.5)
    expected = (per_sequence * chosen).sum() / alive.sum()
    torch.testing.assert_close(outer(x, y, mask=mask), expected, rtol=1e-13, atol=0)
    assert torch.equal(outer.weights(x, y, mask=mask), chosen.to(F64))
    level = outer.criterion.terms(x, y, mask=mask)
    torch.testing.assert_close(level.loss, per_sequence, rtol=1e-13, atol=0)
    assert torch.equal(level.mask, alive)


def test_a_nested_level_keeps_copies_groups_and_statistics():
    data = batch()
    inner = Objective(CrossEntropy(), None, "sequence_mean")
    per_sample = torch.rand(6, dtype=F64)
    level = inner.terms(
        data["logits"],
        data["target"],
        sample_weight=data["copies"],
        group=data["group"],
        index=torch.arange(6),
        urgency=per_sample,
        noise=torch.rand(6, 4, dtype=F64),
    )
    assert torch.equal(level.multiplicity, data["copies"])
    assert torch.equal(level.group, data["group"])
    assert torch.equal(level.index, torch.arange(6))
    assert set(level.extras) == {"urgency"}
    outer = Objective(inner, None, "group_mean")
    found = outer(data["logits"], data["target"], sample_weight=data["copies"], group=data["group"])
    loss = nn.functional.cross_entropy(data["logits"], data["target"], reduction="none").mean(1)
    expected = naive.group_mean(
        *[
            [[v] for v in column]
            for column in (loss.tolist(), [1.0] * 6, [1.0] * 6, data["copies"].tolist(), [1.0] * 6)
        ],
        data["group"].tolist(),
    )
    assert found.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("reduction", [*MEANS, "sum", "none"])
def test_a_bare_outer_level_changes_nothing(reduction):
    data = batch()
    args, meta = (
        (data["logits"], data["target"]),
        {"mask": data["mask"], "group": data["group"], "sample_weight": data["times"]},
    )
    inner = Objective(CrossEntropy(weight=CLASS_WEIGHT), Focal(1.0), reduction)
    outer = Objective(inner, None, "none" if reduction == "none" else "mean")
    torch.testing.assert_close(outer(*args, **meta), inner(*args, **meta), rtol=1e-13, atol=0)


def test_none_inside_keeps_every_statistic():
    """Objective(Objective(c, a, "none"), b) is Objective(c, a * b), for weights that do not read the loss."""
    data = batch()
    args, meta = (data["logits"], data["target"]), {"mask": data["mask"], "sample_weight": data["times"]}
    for reduction in ("mean", "weighted_mean", "sum"):
        nested = Objective(Objective(CrossEntropy(), ClassWeight([1.0, 2.0, 3.0]), "none"), Focal(1.0), reduction)
        flat = Objective(CrossEntropy(), ClassWeight([1.0, 2.0, 3.0]) * Focal(1.0), reduction)
        if reduction == "weighted_mean":
            continue  # the outer level divides by its own weights only
        torch.testing.assert_close(nested(*args, **meta), flat(*args, **meta), rtol=1e-13, atol=0)


def test_mask_of_whole_samples():
    data = batch()
    mask = torch.tensor([True, False, True, True, False, True])
    full = mask[:, None].expand(6, 4)
    loss = FocalLoss()
    assert torch.equal(loss(data["logits"], data["target"], mask=mask), loss(data["logits"], data["target"], mask=full))
    binary = SigmoidFocalLoss()
    x = torch.randn(6, 3, dtype=F64)
    assert torch.equal(
        binary(x, torch.ones_like(x), mask=mask), binary(x, torch.ones_like(x), mask=mask[:, None].expand(6, 3))
    )


def test_a_batch_of_one_class_says_once_that_its_weight_cancels():
    x, y = torch.randn(4, 3, dtype=F64), torch.ones(4, dtype=torch.long)
    loss = FocalLoss(weight=CLASS_WEIGHT)
    with pytest.warns(UserWarning, match=r"FocalLoss: all targets of a batch have the same class.*num_items="):
        loss(x, y)
    loss(x, y)
    FocalLoss(alpha=CLASS_WEIGHT)(x, y)
    FocalLoss(weight=CLASS_WEIGHT).eval()(x, y)
    FocalLoss(weight=CLASS_WEIGHT)(x, y, num_items=4)


# looking


@pytest.mark.parametrize("reduction", [*MEANS, "sum", "none"])
@pytest.mark.parametrize("weighting", [lambda: None, lambda: Focal(1.0), lambda: InverseClassLoss(3)])
def test_components_are_what_the_call_does(reduction, weighting):
    data = batch()
    args = (data["logits"], data["target"])
    meta = {"mask": data["mask"], "sample_weight": data["times"], "group": data["group"]}
    objective = Objective(CrossEntropy(), weighting(), reduction)
    seen = objective.components(*args, **meta)
    loss = objective.eval()(*args, **meta)
    torch.testing.assert_close(seen.weighted, loss.sum(), rtol=1e-13, atol=0)
    times = data["times"] * data["mask"]
    raw = nn.functional.cross_entropy(*args, reduction="none")
    weights = objective.weights(*args, **meta)
    torch.testing.assert_close(seen.raw, (times * raw).sum() / times.sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(seen.mean_weight, (times * weights).sum() / times.sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(seen.num_terms, times.sum(), rtol=1e-13, atol=0)
    total, squares = (times * weights).sum(), (times * weights**2).sum()
    torch.testing.assert_close(seen.effective_sample_size, total**2 / squares, rtol=1e-13, atol=0)
    assert not any(value.requires_grad for value in seen)


def test_weights_without_a_weighting_are_ones():
    data = batch()
    objective = Objective(CrossEntropy())
    weights = objective.weights(data["logits"], data["target"], mask=data["mask"], sample_weight=data["times"])
    assert torch.equal(weights, data["mask"].to(F64))


def test_label_smoothing_and_class_weights_share_torchs_denominator():
    data = batch()
    for name in ("mean", "weighted_mean"):
        ours = Objective(CrossEntropy(weight=CLASS_WEIGHT, label_smoothing=0.1), None, name)
        torchs = nn.CrossEntropyLoss(weight=torch.tensor(CLASS_WEIGHT, dtype=F64), label_smoothing=0.1)
        torch.testing.assert_close(
            ours(data["logits"], data["target"]), torchs(data["logits"], data["target"]), rtol=1e-13, atol=0
        )


def test_binary_sequence_mean_counts_rows():
    x, y = torch.randn(3, 4, dtype=F64), torch.randint(2, (3, 4)).to(F64)
    y[0, :3] = -100
    y[1] = -100
    loss = nn.functional.binary_cross_entropy_with_logits(x, y.clamp_min(0), reduction="none")
    found = Objective(BinaryCrossEntropy(), None, "sequence_mean")(x, y)
    torch.testing.assert_close(found, (loss[0, 3] + loss[2].mean()) / 2, rtol=1e-13, atol=0)
