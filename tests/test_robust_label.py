"""LDR and ALDR: what they are at the ends of their arguments, and what ALDR remembers."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, multi_margin_loss

from reweigh import (
    AdaptiveLabelDRO,
    ALDRLoss,
    Focal,
    LabelDRO,
    LDRLoss,
    Linear,
    Objective,
)
from reweigh.losses import functional
from reweigh.losses.conformance import check_criterion, check_objective
from reweigh.losses.criteria.label_dro import label_dro

SCORES = ["raw", "softplus", "abs"]


def batch(seed=0, size=6, classes=5, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(classes, (size,), generator=generator)


def slope(value, logits):
    return torch.autograd.grad(value.sum(), logits)[0]


def same(found, wanted, tol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=tol, atol=tol)


@given(st.integers(0, 10**6), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_ldr_is_cross_entropy_less_the_logarithm_of_the_number_of_classes(seed, classes):
    logits, target = batch(seed, classes=classes)
    found, wanted = LDRLoss()(logits, target), cross_entropy(logits, target) - math.log(classes)
    same(found, wanted)
    same(slope(found, logits), slope(wanted, logits))


@given(st.integers(0, 10**6), st.floats(0.05, 50.0), st.floats(0.0, 3.0))
@settings(max_examples=30, deadline=None)
def test_ldr_is_a_maximum_over_label_distributions(seed, temperature, margin):
    """sum p d - temperature KL(p || u) at the softmax of d / temperature, and below it at any other p."""
    logits, target = batch(seed)
    found = LDRLoss(temperature, margin=margin, reduction="none")(logits, target)
    ahead = logits - logits.gather(1, target[:, None])
    ahead = ahead + margin * (torch.arange(5) != target[:, None]).double()

    def dual(log_p):
        p = log_p.exp()
        return (p * ahead).sum(1) - temperature * (p * (log_p + math.log(5))).sum(1)

    same(found, dual((ahead / temperature).log_softmax(1)), 1e-9)
    for other in range(5):
        assert (
            dual(torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(other)).log_softmax(1))
            <= found + 1e-9
        ).all()


@given(st.integers(0, 10**6), st.floats(0.0, 3.0))
@settings(max_examples=20, deadline=None)
def test_low_temperature_is_the_hinge_of_crammer_and_singer(seed, margin):
    logits, target = batch(seed)
    ahead = logits - logits.gather(1, target[:, None]) + margin * (torch.arange(5) != target[:, None]).double()
    found = LDRLoss(1e-6, margin=margin, reduction="none")(logits, target)
    torch.testing.assert_close(found, ahead.amax(1), rtol=0, atol=1e-5)
    two, label = logits[:, :2], target % 2  # torch's hinge is the mean over classes, of which one is 0
    hinge = 2.0 * multi_margin_loss(two, label, margin=margin, reduction="none")
    torch.testing.assert_close(LDRLoss(1e-6, margin=margin, reduction="none")(two, label), hinge, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [1e3, 1e6, 1e12])
def test_high_temperature_is_the_mean_over_labels(temperature, dtype):
    """In float32 too, where a logarithm of a mean near 1 would have lost every digit."""
    logits, target = batch(3, dtype=dtype)
    ahead = logits - logits.gather(1, target[:, None]) + 0.5 * (torch.arange(5) != target[:, None]).double()
    found = LDRLoss(temperature, margin=0.5, reduction="none")(logits, target)
    exact = LDRLoss(temperature, margin=0.5, reduction="none")(logits.double(), target)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.double(), ahead.mean(1), rtol=0, atol=60.0 / temperature + 1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 1.0, 7.0, 40.0, 1e3])
@pytest.mark.parametrize("scores", SCORES)
def test_float32_agrees_with_float64(scores, temperature):
    logits, target = batch(5, dtype=torch.float32)
    loss = LDRLoss(temperature, margin=1.0, scores=scores, reduction="none")
    found, exact = loss(logits, target), loss(logits.double(), target)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10**6), st.floats(-100.0, 100.0), st.floats(0.05, 20.0))
@settings(max_examples=20, deadline=None)
def test_a_shift_of_the_logits_changes_nothing(seed, shift, temperature):
    logits, target = batch(seed)
    same(
        LDRLoss(temperature, margin=1.0)(logits + shift, target), LDRLoss(temperature, margin=1.0)(logits, target), 1e-9
    )
    index = torch.arange(6)
    loss = ALDRLoss(6, temperature=temperature, alpha=2.0, margin=1.0)
    same(loss(logits + shift, target, index=index), loss(logits, target, index=index), 1e-9)


@pytest.mark.parametrize("scores", ["softplus", "abs"])
def test_a_scale_of_the_scores_changes_nothing(scores):
    logits, target = batch()
    loss = LDRLoss(0.7, margin=1.0, scores=scores)
    if scores == "abs":
        same(loss(3.0 * logits, target), loss(logits, target))
        return
    scaled = (3.0 * torch.nn.functional.softplus(logits)).expm1().log()  # whose softplus is three times as large
    same(loss(scaled, target), loss(logits, target), 1e-9)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_gradient_is_exact(scores, temperature):
    logits, target = batch(1, size=4)
    loss = LDRLoss(temperature, margin=0.5, scores=scores)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, target), (logits,))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row", [[0.0] * 4, [-800.0] * 4, [-1e4] * 4, [1e4, -1e4, 0.0, 1e4], [-1e4, -90.0, -1e4, -1e4]])
def test_extremes_are_finite(row, dtype, scores):
    logits = torch.tensor([row], dtype=dtype, requires_grad=True)
    target = torch.tensor([1])
    for loss in (LDRLoss(1e-3, scores=scores), LDRLoss(1e6, margin=1.0, scores=scores), ALDRLoss(1, scores=scores)):
        value = loss(logits, target, index=torch.tensor([0]))
        assert value.isfinite()
        assert slope(value, logits).isfinite().all()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_row_of_zeros_trains_at_the_usual_scale():
    """A last layer that starts at 0 must neither stand still nor explode."""
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([2])
    for scores in ("raw", "abs"):
        same(slope(LDRLoss(scores=scores)(logits, target), logits)[0], torch.tensor([0.25, 0.25, -0.75, 0.25]).double())


def test_softplus_has_no_seam():
    """The two branches of the logarithm of softplus meet."""
    x = torch.linspace(-20.001, -19.999, 9, dtype=torch.float64)
    logits = torch.stack([x, torch.full_like(x, -19.0)], 1).requires_grad_()
    f = torch.nn.functional.softplus(logits)
    wanted = label_dro(f / f.mean(1, keepdim=True), torch.zeros(9, dtype=torch.long), 1.0, 0.5, 1)
    found = LDRLoss(margin=0.5, scores="softplus", reduction="none")(logits, torch.zeros(9, dtype=torch.long))
    same(found, wanted, 1e-12)
    same(slope(found, logits), slope(wanted, logits), 1e-12)


def test_dense_and_unbatched_logits():
    logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, 1, 2], [3, -100, 1]])
    loss = LDRLoss(0.5, margin=1.0, scores="abs", reduction="none")
    dense = loss(logits, target)
    assert dense[1, 1] == 0
    rows = logits.movedim(1, 2).reshape(-1, 4)
    same(loss(rows, target.reshape(-1)), dense.reshape(-1))
    same(loss(rows[0], target[0, 0]), dense[0, 0])


def test_temperature_and_margin_may_be_schedules():
    logits, target = batch()
    loss = LDRLoss(Linear(2.0, 1.0, duration=2, by="step"), margin=Linear(0.0, 1.0, duration=2, by="step"))
    for at in range(3):
        same(loss(logits, target), LDRLoss(2.0 - 0.5 * at, margin=0.5 * at)(logits, target))
        loss.update("step", index=at)


# ALDR


@given(st.integers(0, 10**6), st.floats(0.1, 20.0), st.floats(0.0, 2.0))
@settings(max_examples=20, deadline=None)
def test_aldr_with_a_large_alpha_is_ldr(seed, temperature, margin):
    logits, target = batch(seed)
    loss = ALDRLoss(6, temperature=temperature, alpha=1e12, margin=margin)
    for step in range(2):
        found, wanted = loss(logits, target, index=torch.arange(6)), LDRLoss(temperature, margin=margin)(logits, target)
        same(found, wanted, 1e-7)  # what the table keeps of a number
        same(slope(found, logits), slope(wanted, logits), 1e-7)
        loss.update("step", index=step)


@pytest.mark.parametrize("scores", SCORES)
def test_aldr_gradient_is_that_at_fixed_temperatures(scores):
    logits, target = batch(2)
    loss = ALDRLoss(6, temperature=2.0, alpha=1.5, margin=0.5, scores=scores)
    value = loss(logits, target, index=torch.arange(6))
    now = functional.adaptive_temperatures(
        logits, torch.full((6,), 2.0, dtype=torch.float64), temperature=2.0, alpha=1.5, scores=scores
    )
    assert not now.requires_grad
    rows = [LDRLoss(now[i].item(), margin=0.5, scores=scores)(logits[i : i + 1], target[i : i + 1]) for i in range(6)]
    constant = 1.5 * math.log(5) / 4.0 * (now - 2.0).square()
    same(value, torch.stack(rows).mean() - constant.mean())
    same(slope(value, logits), slope(torch.stack(rows).mean(), logits))


def test_aldr_margin_has_no_part_in_the_temperatures():
    logits, target = batch()
    found = [
        AdaptiveLabelDRO(6, margin=margin).terms(logits, target, index=torch.arange(6)).find("temperature")
        for margin in (0.0, 5.0)
    ]
    assert torch.equal(*found)


@given(st.integers(0, 10**6), st.floats(1.0, 4.0), st.floats(0.1, 10.0), st.floats(0.0, 100.0))
@settings(max_examples=30, deadline=None)
def test_temperatures_stay_between_their_bounds(seed, alpha, temperature, scale):
    """At most the common one, at least it times 1 - 1 / alpha, and positive."""
    logits, target = batch(seed, scale=scale)
    loss = ALDRLoss(6, temperature=temperature, alpha=alpha)
    for step in range(4):
        held = loss.criterion.terms(logits, target, index=torch.arange(6)).find("temperature")
        loss.update("step", index=step)
        assert (held <= temperature * (1 + 1e-12)).all()
        assert (held >= temperature * max(1.0 - 1.0 / alpha, 1e-4) * (1 - 1e-6)).all()


def test_alpha_below_one_stops_at_the_floor():
    logits = torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = ALDRLoss(1, temperature=2.0, alpha=0.5)
    for step in range(3):
        value = loss(logits, torch.tensor([1]), index=torch.tensor([0]))
        assert value.isfinite()
        assert slope(value, logits).isfinite().all()
        loss.update("step", index=step)
    same(loss.criterion.table.rows.double(), torch.tensor([[1e-4]]).double(), 1e-10)


def reference_visits(visits, temperature, alpha):
    """Temperatures after steps of visits (sample, logits), each step averaged over its visits."""
    held = {}
    for step in visits:
        found = {}
        for sample, row in step:
            before = held.get(sample, temperature)
            p = [math.exp(value / before) for value in row]
            p = [value / sum(p) + 1e-5 for value in p]
            p = [value / sum(p) for value in p]
            kl = sum(value * math.log(len(p) * value) for value in p)
            found.setdefault(sample, []).append(temperature * (1 - kl / (alpha * math.log(len(p)))))
        held |= {sample: sum(values) / len(values) for sample, values in found.items()}
    return held


def test_the_table_holds_what_all_visits_of_a_step_say():
    """Copies in a batch, in micro-batches, counted copies; masked, ignored and evaluated samples teach nothing."""
    loss = ALDRLoss(10, temperature=3.0, alpha=2.0, margin=0.3)
    visits = []
    for step in range(4):
        step_visits = []
        for micro in range(2):
            logits, target = batch(10 * step + micro)
            index = torch.tensor([1, 4, 4, 7, 9, -5])
            mask = torch.tensor([True, True, True, True, True, False])
            target[4] = -100
            times = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 1.0])
            loss(logits, target, index=index, mask=mask, sample_weight=times)
            loss.eval()(logits, target, index=index.clamp_min(0))
            loss.train().weights(logits, target, index=index.clamp_min(0))
            with torch.no_grad():
                loss(logits, target, index=index.clamp_min(0))
            rows = logits.tolist()
            step_visits += [(1, rows[0]), (4, rows[1]), (4, rows[1]), (4, rows[2])]
        before = loss.criterion.table.rows.clone()
        loss.update("epoch", index=step)  # in mid-accumulation an epoch is no step
        assert torch.equal(before, loss.criterion.table.rows)
        loss.update("step", index=step)
        visits.append(step_visits)
    wanted = reference_visits(visits, 3.0, 2.0)
    table = loss.criterion.table.rows.squeeze(1).double() * 3.0
    for sample in range(10):
        torch.testing.assert_close(table[sample].item(), wanted.get(sample, 3.0), rtol=1e-6, atol=0)


def test_what_is_not_finite_is_not_learned():
    loss = ALDRLoss(2)
    logits = torch.tensor([[torch.nan, 0.0], [2.0, 0.0]], requires_grad=True)
    loss(logits, torch.tensor([0, 0]), index=torch.tensor([0, 1]))
    loss.update("step")
    assert loss.criterion.table.rows[0] == 1.0
    assert loss.criterion.table.rows[1] < 1.0


def test_aldr_needs_its_index_in_training_only():
    logits, target = batch()
    loss = ALDRLoss(6, alpha=2.0)
    with pytest.raises(ValueError, match="AdaptiveLabelDRO: 'index' is missing; pass index="):
        loss(logits, target)
    first = loss.eval()(logits, target, index=torch.arange(6))
    assert torch.equal(loss(logits, target), first)  # samples that are new
    with torch.no_grad():
        assert torch.equal(loss.train()(logits, target), first)


def test_aldr_uses_the_temperature_of_this_visit():
    """In training and evaluation: the same loss before the step, the next visit's after it."""
    logits, target = batch()
    loss, index = ALDRLoss(6, alpha=2.0), torch.arange(6)
    first = loss(logits, target, index=index)
    assert torch.equal(loss.eval()(logits, target, index=index), first)
    loss.update("step")
    second = loss(logits, target, index=index)
    assert not torch.equal(second, first)
    assert torch.equal(loss.eval()(logits, target), first)


def test_the_table_may_stay_in_a_file(tmp_path):
    logits, target = batch()
    apart, usual = ALDRLoss(6, storage=str(tmp_path)), ALDRLoss(6)
    for step in range(3):
        assert torch.equal(apart(logits, target, index=torch.arange(6)), usual(logits, target, index=torch.arange(6)))
        for loss in (apart, usual):
            loss.update("step", index=step)
    clone = ALDRLoss(6)
    clone.load_state_dict(apart.state_dict())
    assert torch.equal(clone.criterion.table.rows, usual.criterion.table.rows)


def test_temperatures_given_replace_the_table():
    logits, target = batch()
    loss = ALDRLoss(6, alpha=2.0)
    held = torch.linspace(0.3, 1.0, 6, dtype=torch.float64)
    found = loss(logits, target, temperatures=held)
    same(found, functional.aldr_loss(logits, target, held, alpha=2.0))
    loss.update("step")
    assert (loss.criterion.table.rows == 1.0).all()  # whose samples they were was not said


def test_weightings_compose_with_label_dro():
    """Both say what log_pt is, so that whatever reads it may be put on top."""
    for criterion in (LabelDRO(2.0, margin=1.0, scores="softplus"), AdaptiveLabelDRO(8, temperature=2.0)):
        check_criterion(criterion)
        check_objective(Objective(copy.deepcopy(criterion), Focal(1.0).detach()), compiled=False)
    logits, target = batch()
    terms = LabelDRO(0.1, scores="abs").terms(logits, target)
    same(terms.log_pt, -cross_entropy(logits, target, reduction="none"))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LDRLoss(0.0), "LabelDRO: temperature must be finite and > 0"),
        (lambda: LDRLoss(Linear(1.0, 0.0, duration=3)), "LabelDRO: temperature must be finite and > 0"),
        (lambda: LDRLoss(margin=-1.0), "LabelDRO: margin must be finite and >= 0"),
        (lambda: LDRLoss(scores="soft"), "LabelDRO: scores must be one of 'raw', 'softplus', 'abs'"),
        (lambda: ALDRLoss(0), "num_samples must be >= 1"),
        (lambda: ALDRLoss(3, alpha=0.0), "AdaptiveLabelDRO: alpha must be finite and > 0"),
        (lambda: LDRLoss()(torch.zeros(2, 3), torch.tensor([0, 3])), r"LabelDRO: target must be in \[0, 3\)"),
        (lambda: LDRLoss()(torch.zeros(2, 3), torch.tensor([0])), r"LabelDRO: target must have shape \(2,\)"),
        (lambda: ALDRLoss(3)(torch.zeros(2, 1), torch.tensor([0, 0])), "at least two classes"),
        (
            lambda: ALDRLoss(3)(
                torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 0]), index=torch.tensor([0, 3])
            ),
            r"AdaptiveLabelDRO: index must be in \[0, 3\)",
        ),
        (
            lambda: ALDRLoss(3)(torch.zeros(2, 3), torch.tensor([0, 0]), index=torch.tensor([0])),
            r"AdaptiveLabelDRO: index must hold one integer per sample, shape \(2,\)",
        ),
        (
            lambda: functional.aldr_loss(torch.zeros(2, 3), torch.tensor([0, 0]), torch.tensor([1.0, 0.0])),
            "temperatures must be finite and > 0",
        ),
        (
            lambda: functional.aldr_loss(torch.zeros(2, 3), torch.tensor([0, 0]), torch.ones(3)),
            r"AdaptiveLabelDRO: temperatures must have shape \(2,\)",
        ),
        (lambda: functional.adaptive_temperatures(torch.zeros(2, 3), torch.ones(3)), r"logits must be \(N, C\)"),
    ],
)
def test_values_that_do_not_fit(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LDRLoss()(torch.zeros(2, 3), torch.zeros(2)), "LabelDRO: target must be class indices"),
        (lambda: LDRLoss()(torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 0])), "logits must be a floating"),
        (lambda: LDRLoss("warm"), "LabelDRO: temperature must be a number"),
        (
            lambda: ALDRLoss(3)(torch.zeros(2, 3), torch.tensor([0, 0]), index=torch.tensor([0.0, 1.0])),
            "AdaptiveLabelDRO: index must be an integer tensor",
        ),
        (lambda: ALDRLoss(3)(torch.zeros(2, 3)), r"AdaptiveLabelDRO: takes \(logits, target\), got 1 inputs"),
    ],
)
def test_kinds_that_do_not_fit(make, match):
    with pytest.raises(TypeError, match=match):
        make()
