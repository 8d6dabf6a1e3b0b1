"""State and events: what is saved, when it moves, and that nothing else moves it."""

import copy
import gc
import io
import math
import pickle
import re
import warnings

import pytest
import torch
from references import weights as naive
from torch import nn

from reweigh.losses import (
    BalancedSoftmax,
    BinaryCrossEntropy,
    CrossEntropy,
    FocalLoss,
    LogitAdjustment,
    Objective,
    SigmoidFocalLoss,
    Temperature,
)
from reweigh.weighting import (
    ClassWeight,
    Cosine,
    EffectiveNumber,
    Focal,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    Piecewise,
    PositiveBalance,
    drive,
    dynamics,
)

F64 = torch.float64


def learner(**keywords):
    return Objective(CrossEntropy(), InverseClassLoss(3, smoothing=0.3, **keywords) * Focal(1.0))


def rich(*, fit=True):
    """Every kind of state at once: learned from losses, running means, schedules by step and epoch, counts of fit."""
    weighting = (
        InverseClassLoss(3, smoothing=0.3)
        * Focal(Linear(0.0, 2.0, duration=7, by="step")).ema(0.8, 3)
        * InverseFrequency(power=Cosine(0.0, 1.0, duration=3, by="epoch")).warmup(5)
    )
    loss = Objective(
        CrossEntropy(logits=LogitAdjustment(tau=Piecewise([0.0, 1.0], [2])), label_smoothing=0.1), weighting
    )
    if fit:
        loss.update("fit", class_counts=[50, 20, 5])
    return loss


def batches(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=generator, dtype=F64), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# pending sums and state


def test_pending_sums_are_neither_saved_nor_buffers():
    loss = learner()
    before = state(loss)
    loss(*batches(1)[0])
    weighting = loss.weighting.base
    assert weighting._pending["loss_count"].sum().item() == 6
    assert same(before, loss.state_dict())  # forward moves no state
    names = {name.rpartition(".")[2] for name, _ in loss.named_buffers()} | {
        key.rpartition(".")[2] for key in loss.state_dict()
    }
    assert not names & {"loss_sum", "loss_count"}
    assert list(loss.parameters()) == []
    loss.update("step")
    assert weighting._pending["loss_count"].sum().item() == 0
    assert not same(before, loss.state_dict())


def test_accumulated_forwards_are_one_step():
    """Two micro-batches before a step are one batch of both."""
    data = batches(2)
    split, joined = learner(), learner()
    for x, y in data:
        split(x, y)
    joined(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    for loss in (split, joined):
        loss.update("step")
    for one, other in zip(state(split).values(), state(joined).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-15, atol=0)


@pytest.mark.parametrize("event", ["step", "epoch", "validation"])
def test_updates_are_idempotent_by_index(event):
    loss = rich()
    loss(*batches(1)[0])
    loss.update(event, index=0)
    after = state(loss)
    loss(*batches(2)[1])
    loss.update(event, index=0)
    assert same(after, loss.state_dict())
    loss.update(event, index=1)
    assert not same(after, loss.state_dict())
    assert all(part.completed(event) == 2 for part in dynamics(loss) if part.tracks_events)


@pytest.mark.parametrize("event", ["epoch", "validation"])
def test_an_epoch_or_validation_in_mid_accumulation_is_no_step(event):
    """The state at a step does not depend on whether something else ended between two of its micro-batches."""
    plain, interrupted = learner(), learner()
    for loss in (plain, interrupted):
        first, second = batches(2)
        loss(*first)
        if loss is interrupted:
            loss.update(event)
        loss(*second)
        loss.update("step")
    key = "weighting.operands.0.class_loss"
    torch.testing.assert_close(interrupted.state_dict()[key], plain.state_dict()[key], rtol=1e-14, atol=0)


def test_an_index_that_was_skipped_moves_the_clock_there():
    schedule = Linear(0.0, 1.0, duration=10, by="step")
    schedule.update("step", index=4)
    assert schedule().item() == 0.5
    schedule.update("step", index=2)
    assert schedule().item() == 0.5
    schedule.update("step")
    assert schedule().item() == pytest.approx(0.6)


def test_clocks_count_each_event_on_its_own():
    loss = rich()
    for event, times in {"step": 3, "epoch": 2, "validation": 1}.items():
        for _ in range(times):
            loss.update(event)
    for part in dynamics(loss):
        if part.tracks_events:
            assert [part.completed(event) for event in ("step", "epoch", "validation", "forward")] == [3, 2, 1, 0]
            assert part.position("epoch").item() == 2


def test_static_parts_hear_nothing():
    for part in (Focal(), ClassWeight([1.0]), InverseFrequency([9, 1]), EffectiveNumber([9, 1]), PositiveBalance()):
        assert not any(inner.tracks_events for inner in dynamics(part))
        part.update("step")
        part.update("fit", class_counts=[1, 1])
        assert part.state_dict() == {}


@pytest.mark.parametrize(
    "static",
    [
        FocalLoss(2.0, weight=[1.0, 2.0, 3.0], alpha=[1.0, 1.0, 2.0]),
        FocalLoss(alpha=InverseFrequency([9, 5, 1])),
        SigmoidFocalLoss(),
        Objective(CrossEntropy(logits=BalancedSoftmax([9, 5, 1]))),
        Objective(CrossEntropy(logits=LogitAdjustment([9, 5, 1])), EffectiveNumber([9, 5, 1]).normalize()),
        Objective(BinaryCrossEntropy(pos_weight=[1.0, 2.0, 3.0])),
        Objective(CrossEntropy(logits=Temperature(2.0)), Focal().where(Focal()).clip(max=1)),
    ],
    ids=repr,
)
def test_static_tables_are_not_saved(static):
    """So a checkpoint from before the loss was there loads without a missing key, and the other way round."""
    assert static.state_dict() == {}
    model = nn.Module()
    model.loss = static
    model.load_state_dict({})


# schedules

POSITIONS = range(12)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (lambda by: Linear(1.0, 3.0, duration=5, by=by), lambda k: 1 + 2 * min(k / 5, 1)),
        (lambda by: Linear(3.0, 1.0, duration=4, delay=3, by=by), lambda k: 3 - 2 * min(max(k - 3, 0) / 4, 1)),
        (lambda by: Cosine(0.0, 2.0, duration=6, by=by), lambda k: 1 - math.cos(math.pi * min(k / 6, 1))),
        (
            lambda by: Cosine(2.0, 0.5, duration=4, delay=2, by=by),
            lambda k: 2 - 1.5 * 0.5 * (1 - math.cos(math.pi * min(max(k - 2, 0) / 4, 1))),
        ),
        (lambda by: Piecewise([0.1, 0.9, 0.4], [2, 7], by=by), lambda k: 0.1 if k < 2 else 0.9 if k < 7 else 0.4),
        (lambda by: Piecewise([0.3], [], by=by), lambda k: 0.3),
    ],
)
@pytest.mark.parametrize("by", ["step", "epoch"])
def test_schedules_follow_their_formula(schedule, formula, by):
    moving = schedule(by)
    low, high = moving.bounds()
    for k in POSITIONS:
        assert moving().item() == pytest.approx(formula(k), rel=1e-14, abs=1e-15)
        assert moving().dtype == F64
        assert moving().shape == ()
        assert low <= moving().item() <= high
        moving.update("epoch" if by == "step" else "step")
        moving.update(by)
    moving.reset()
    assert moving().item() == pytest.approx(formula(0), rel=1e-14)


@pytest.mark.parametrize(
    ("make", "fixed"),
    [
        (lambda s: Objective(CrossEntropy(), Focal(s)), lambda v: Objective(CrossEntropy(), Focal(v))),
        (lambda s: Objective(CrossEntropy(), Focal() ** s), lambda v: Objective(CrossEntropy(), Focal() ** v)),
        (lambda s: Objective(CrossEntropy(), Focal() * 1.0 + s), lambda v: Objective(CrossEntropy(), Focal() + v)),
        (
            lambda s: Objective(CrossEntropy(), Focal().clip(max=s)),
            lambda v: Objective(CrossEntropy(), Focal().clip(max=v)),
        ),
        (
            lambda s: Objective(CrossEntropy(), EffectiveNumber([9, 4, 1], beta=s)),
            lambda v: Objective(CrossEntropy(), EffectiveNumber([9, 4, 1], beta=v)),
        ),
        (
            lambda s: Objective(CrossEntropy(), InverseFrequency([9, 4, 1], power=s)),
            lambda v: Objective(CrossEntropy(), InverseFrequency([9, 4, 1], power=v)),
        ),
        (
            lambda s: Objective(CrossEntropy(logits=LogitAdjustment([9, 4, 1], tau=s))),
            lambda v: Objective(CrossEntropy(logits=LogitAdjustment([9, 4, 1], tau=v))),
        ),
        (lambda s: Objective(CrossEntropy(label_smoothing=s)), lambda v: Objective(CrossEntropy(label_smoothing=v))),
        (lambda s: FocalLoss(s), lambda v: FocalLoss(v)),
    ],
)
def test_any_hyper_parameter_may_be_a_schedule(make, fixed):
    """Including deferred re-weighting: a step in beta."""
    moving = make(Piecewise([0.0, 0.5, 0.9], [1, 2], by="step"))
    x, y = batches(1)[0]
    for value in (0.0, 0.5, 0.9, 0.9):
        torch.testing.assert_close(moving(x, y), fixed(value)(x, y), rtol=1e-13, atol=1e-15)
        assert moving(x.float(), y).dtype == torch.float32
        moving.update("step")


# resuming


def run(loss, data, start=0):
    """A bare loop with events; the losses it meets."""
    values = []
    for i, (x, y) in enumerate(data, start):
        x = x.clone().requires_grad_()
        value = loss(x, y)
        value.backward()
        values += [value.detach(), x.grad]
        loss.update("step", index=i)
        if i % 4 == 3:
            loss.update("epoch", index=i // 4)
    return values


@pytest.mark.parametrize("at", range(1, 20, 2))
def test_resume_is_bit_equal(at):
    """Saved and restored through a file with ``weights_only=True`` into a fresh objective, at any step of 20."""
    data = batches(20)
    whole = run(rich(), data)
    first = rich()
    head = run(first, data[:at])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    fresh = rich(fit=False)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    tail = run(fresh, data[at:], start=at)
    assert all(torch.equal(one, other) for one, other in zip(whole, head + tail, strict=True))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["deepcopy", "pickle"]
)
def test_copies_in_mid_training_go_on_alike(copied):
    """Even between a forward and its step: pending sums travel with the object."""
    data = batches(8)
    loss = rich()
    run(loss, data[:3])
    loss(*data[3])
    again = copied(loss)
    for twin in (loss, again):
        twin.update("step", index=3)
    assert same(loss.state_dict(), again.state_dict())
    one, other = run(loss, data[4:], 4), run(again, data[4:], 4)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert same(loss.state_dict(), again.state_dict())


def test_copies_share_nothing():
    loss = rich()
    again = copy.deepcopy(loss)
    before = state(loss)
    run(again, batches(4))
    assert same(before, loss.state_dict())
    assert all(not pending.any() for part in dynamics(loss) for pending in part._pending.values())


def test_an_old_checkpoint_warns_and_works():
    model = nn.Sequential(nn.Linear(2, 3))
    old = state(model)
    model.loss = rich()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(old)
    texts = [str(warning.message) for warning in caught]
    assert any(
        re.search(r"InverseClassLoss: the checkpoint has no loss\..*class_loss.*; starting fresh", text)
        for text in texts
    )
    assert all("the checkpoint has no" in text for text in texts)
    assert model.loss(*batches(1)[0]).isfinite()


def test_a_complete_checkpoint_does_not_warn():
    loss = rich()
    run(loss, batches(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rich().load_state_dict(loss.state_dict())


def test_loading_drops_what_was_pending():
    """Sums of steps that are being left belong to no state that is saved."""
    loss, data = learner(), batches(2)
    saved = copy.deepcopy(loss.state_dict())
    loss(*data[0])
    loss.load_state_dict(saved)
    loss(*data[1])
    loss.update("step")
    fresh = learner()
    fresh(*data[1])
    fresh.update("step")
    assert same(loss.state_dict(), fresh.state_dict())


def test_a_checkpoint_is_not_changed_by_loading():
    saved = learner().state_dict()
    partial = {key: value for key, value in saved.items() if not key.endswith("class_loss")}
    keys = set(partial)
    with pytest.warns(UserWarning, match="the checkpoint has no"):
        learner().load_state_dict(partial)
    assert set(partial) == keys


def test_reset_starts_over():
    loss = rich()
    data = batches(6)
    first = run(loss, data)
    for part in dynamics(loss):
        part.reset()
    loss.update("fit", class_counts=[50, 20, 5])
    again = run(loss, data)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_reset_forgets_pending_sums():
    loss = learner()
    loss(*batches(1)[0])
    before = state(learner())
    for part in dynamics(loss):
        part.reset()
    loss.update("step")
    after = {key: value for key, value in state(loss).items() if not key.endswith("clock")}
    assert all(torch.equal(value, before[key]) for key, value in after.items())


# dtype and device


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.double()]
)
def test_state_keeps_its_dtype_and_its_numbers(cast):
    loss = rich()
    run(loss, batches(3))
    loss(*batches(4)[3])
    before = state(loss)
    tables = {name: value.clone() for name, value in loss.named_buffers()}
    assert cast(loss) is loss
    assert same(before, loss.state_dict())
    for name, value in loss.named_buffers():
        assert value.dtype == tables[name].dtype
        assert torch.equal(value, tables[name])
    sums = [value for part in dynamics(loss) for value in part._pending.values()]
    assert all(value.dtype == F64 for value in sums)
    assert any(value.any() for value in sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_half_precision_model_learns_in_float64(dtype):
    loss, exact = rich().to(dtype), rich()
    for i, (x, y) in enumerate(batches(4)):
        low = x.to(dtype)
        assert loss(low, y).dtype == torch.float32
        exact(low.double(), y)
        for twin in (loss, exact):
            twin.update("step", index=i)
    for key, value in exact.state_dict().items():
        torch.testing.assert_close(loss.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_moving_to_another_device_moves_everything():
    """The meta device stands for any other: buffers, tables and pending sums follow, dtypes stay."""
    loss = rich()
    loss(*batches(1)[0])
    dtypes = {name: value.dtype for name, value in loss.named_buffers()}
    loss.to("meta")
    for name, value in loss.named_buffers():
        assert value.is_meta
        assert value.dtype == dtypes[name]
    assert all(value.is_meta and value.dtype == F64 for part in dynamics(loss) for value in part._pending.values())
    x, y = batches(1)[0]
    assert loss(x.to("meta"), y.to("meta")).is_meta


def test_device_and_dtype_at_once():
    loss = rich().to("meta", torch.float16)
    assert all(value.is_meta and value.dtype in (F64, torch.int64) for value in loss.state_dict().values())


# what does not learn


@pytest.mark.parametrize("cadence", ["step", "forward"])
def test_evaluation_never_learns(cadence):
    loss = learner(cadence=cadence)
    loss(*batches(1)[0])
    loss.update("step")
    loss.eval()
    before = state(loss)
    first, second = loss(*batches(2)[1]), loss(*batches(2)[1])
    assert torch.equal(first, second)
    loss.update("step", index=0)
    assert same(before, loss.state_dict())
    assert all(not value.any() for value in loss.weighting.base._pending.values())


@pytest.mark.parametrize("cadence", ["step", "forward"])
def test_no_grad_and_looking_never_learn(cadence):
    loss = learner(cadence=cadence)
    before = state(loss)
    x, y = batches(1)[0]
    with torch.no_grad():
        loss(x, y)
    with torch.inference_mode():
        loss(x, y)
    loss.weights(x, y)
    loss.components(x, y)
    nested = Objective(Objective(CrossEntropy(), loss.weighting, "none"), Focal())
    nested.weights(x, y)
    nested.components(x, y)
    assert same(before, loss.state_dict())
    assert all(not value.any() for value in loss.weighting.base._pending.values())


def test_evaluation_between_forward_and_step_changes_nothing():
    plain, interrupted = learner(), learner()
    for loss in (plain, interrupted):
        loss(*batches(1)[0])
        if loss is interrupted:
            loss.eval()
            loss(*batches(3)[2])
            loss.train()
        loss(*batches(2)[1])
        loss.update("step")
    assert same(plain.state_dict(), interrupted.state_dict())


def test_a_nested_level_learns_once_per_call():
    inner = Objective(CrossEntropy(), InverseClassLoss(3), "none")
    outer = Objective(inner, Focal(1.0))
    outer(*batches(1)[0])
    assert inner.weighting._pending["loss_count"].sum().item() == 6
    outer.update("step")
    assert inner.weighting.completed("step") == 1


def test_parts_learn_as_the_call_does():
    one, other = learner(), learner()
    one(*batches(1)[0])
    other.parts(*batches(1)[0])
    for loss in (one, other):
        loss.update("step")
    assert same(one.state_dict(), other.state_dict())


# graphs and memory


def test_state_keeps_no_graph():
    loss = rich()
    for i, (x, y) in enumerate(batches(3)):
        loss(x.requires_grad_(), y).backward()
        tensors = [*loss.state_dict().values(), *(value for part in dynamics(loss) for value in part._pending.values())]
        assert all(value.grad_fn is None and not value.requires_grad for value in tensors)
        loss.update("step", index=i)


@pytest.mark.parametrize("cadence", ["step", "forward"])
def test_memory_is_flat(cadence):
    loss = Objective(
        CrossEntropy(),
        InverseClassLoss(3, cadence=cadence) * Focal(Linear(0.0, 2.0, duration=9, by="step")).ema(0.5, 3),
    )
    x, y = batches(1)[0]

    def live():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def steps(count):
        for _ in range(count):
            z = x.clone().requires_grad_()
            loss(z, y).backward()
            loss.update("step")
        del z

    steps(3)
    before = live()
    steps(50)
    assert live() <= before  # what an earlier test left may be collected meanwhile


# communication


def test_one_packed_all_reduce_per_update(monkeypatch):
    """All pending sums of all parts travel together, once, and are committed on the joined sums."""
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: sent.append(flat.clone()) or flat.mul_(2))
    inner = Objective(CrossEntropy(), InverseClassLoss(3) * Focal().ema(0.5, 3), "none")
    loss = Objective(inner, InverseClassLoss(3, smoothing=0.5))
    alone = copy.deepcopy(loss)
    x, y = batches(1)[0]
    for twin in (loss, alone):
        twin(x, y)
    assert sent == []  # nothing travels in forward
    loss.update("step", index=0)
    assert len(sent) == 1
    assert sent[0].numel() == 3 * (2 + 2 + 2)
    loss.update("step", index=0)
    loss.update("fit", class_counts=[1, 1, 1])
    assert len(sent) == 1
    monkeypatch.undo()
    alone.update("step")
    for key, value in alone.state_dict().items():  # twice the same sums give the same means
        torch.testing.assert_close(loss.state_dict()[key], value, rtol=1e-14, atol=0)
    assert all(not value.any() for part in dynamics(loss) for value in part._pending.values())


def test_sync_can_be_switched_off_or_replaced(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def forbidden(flat):
        raise AssertionError("communicated")

    monkeypatch.setattr(torch.distributed, "all_reduce", forbidden)
    calls = []
    for sync in (None, lambda flat: calls.append(flat.numel()) or flat):
        loss, plain = learner(), learner()
        loss.weighting.base.sync = sync
        loss(*batches(1)[0])
        loss.update("step")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
        plain(*batches(1)[0])
        plain.update("step")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert same(loss.state_dict(), plain.state_dict())
    assert calls == [6]


# a learner against its reference


@pytest.mark.parametrize("cadence", ["step", "forward"])
@pytest.mark.parametrize("to", ["sum", "mean"])
def test_inverse_class_loss_against_loops(cadence, to):
    """20 steps; classes come and go."""
    generator = torch.Generator().manual_seed(3)
    loss = Objective(CrossEntropy(), InverseClassLoss(4, smoothing=0.3, eps=1e-4, to=to, cadence=cadence), "none")
    weighting, plain, met = loss.weighting, [], []
    data = []
    for i in range(20):
        x = torch.randn(5, 4, generator=generator, dtype=F64) * 2
        y = torch.randint(0 if i % 3 else 2, 4 if i % 4 else 3, (5,), generator=generator)
        data.append((x, y))
        plain.append(list(zip(y.tolist(), nn.functional.cross_entropy(x, y, reduction="none").tolist(), strict=True)))
    tables, states = naive.inverse_class_loss(plain, 4, 0.3, 1e-4, to, cadence)
    assert any(len({c for c, _ in batch}) < 4 for batch in plain)
    for (x, y), batch, table, running in zip(data, plain, tables, states, strict=True):
        met = loss(x, y)
        expected = torch.tensor([table[c] * value for c, value in batch], dtype=F64)
        torch.testing.assert_close(met, expected, rtol=1e-12, atol=0)
        loss.update("step")
        torch.testing.assert_close(
            weighting.get_buffer("class_loss"), torch.tensor(running, dtype=F64), rtol=1e-12, atol=0
        )
    assert weighting.completed("step") == 20
    assert weighting.completed("forward") == (20 if cadence == "forward" else 0)


def test_inverse_class_loss_on_labels():
    """For sigmoid criteria the category is the column."""
    loss = Objective(BinaryCrossEntropy(), InverseClassLoss(3, smoothing=1.0, eps=1e-5))
    x, y = torch.randn(5, 3, dtype=F64), torch.randint(2, (5, 3)).to(F64)
    loss(x, y)
    loss.update("step")
    means = nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none").mean(0)
    torch.testing.assert_close(loss.weighting.get_buffer("class_loss"), means, rtol=1e-13, atol=0)
    weights = 1 / (1e-5 + means)
    torch.testing.assert_close(loss.weights(x, y), (weights / weights.sum()).expand(5, 3), rtol=1e-13, atol=0)


def test_summaries_are_copies():
    loss = learner()
    summary = loss.weighting.base.summary()
    assert set(summary) == {"class_weight", "class_loss"}
    for value in summary.values():
        value.zero_()
    assert (loss.weighting.base.get_buffer("class_loss") > 0).all()


@pytest.mark.parametrize(
    "table", [ClassWeight([1.0, 2.0]), InverseFrequency([9, 1]), EffectiveNumber([9, 1], beta=0.0)]
)
def test_class_table_summaries_are_copies(table):
    before = table.table().clone()
    table.summary()["class_weight"].zero_()
    assert torch.equal(table.table(), before)


# the fit event


@pytest.mark.parametrize(
    "waiting",
    [
        lambda: FocalLoss(alpha="balanced"),
        lambda: FocalLoss(weight="sqrt"),
        lambda: Objective(CrossEntropy(), EffectiveNumber()),
        lambda: Objective(CrossEntropy(logits=LogitAdjustment())),
        lambda: Objective(CrossEntropy(logits=BalancedSoftmax(num_classes=3)), InverseFrequency() * Focal()),
    ],
)
def test_counts_of_fit(waiting):
    loss, data = waiting(), batches(1)[0]
    with pytest.raises(ValueError, match="counts are not known yet"):
        loss(*data)
    loss.update("fit", class_counts=torch.tensor([7, 2, 1]))
    value = loss(*data)
    fresh = waiting()
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh(*data), value)
    loss.update("fit", class_counts=[1, 1, 1])  # the data changed
    assert not torch.equal(loss(*data), value)
    assert torch.equal(fresh(*data), value)
    for part in dynamics(fresh):
        part.reset()
    with pytest.raises(ValueError, match="counts are not known yet"):
        fresh(*data)


def test_given_counts_are_not_replaced_by_fit():
    loss = FocalLoss(alpha=InverseFrequency([9, 3, 1]), weight="balanced")
    loss.update("fit", class_counts=[1, 1, 1])
    assert loss.weighting.parts()[0].counts().tolist() == [9.0, 3.0, 1.0]
    assert loss.criterion.weight.counts().tolist() == [1.0, 1.0, 1.0]


def test_unknown_counts_survive_a_checkpoint_as_unknown():
    loss = FocalLoss(alpha="balanced")
    known = FocalLoss(alpha="balanced")
    known.update("fit", class_counts=[1, 2, 3])
    known.load_state_dict(loss.state_dict())
    with pytest.raises(ValueError, match="counts are not known yet"):
        known(*batches(1)[0])


def test_the_callers_counts_are_copied():
    counts = torch.tensor([9.0, 3.0, 1.0], dtype=F64)
    tables = [ClassWeight(counts), InverseFrequency(counts), EffectiveNumber(counts)]
    before = [table.table().clone() for table in tables]
    waiting = InverseFrequency()
    waiting.update("fit", class_counts=counts)
    known = waiting.table().clone()
    counts.zero_()
    assert all(torch.equal(table.table(), value) for table, value in zip(tables, before, strict=True))
    assert torch.equal(waiting.table(), known)


def test_drive_takes_any_modules_in_one_go():
    parts = [Linear(0.0, 1.0, duration=2, by="step"), Cosine(0.0, 1.0, duration=2, by="step")]
    drive(parts, "step", index=0)
    assert [part.completed("step") for part in parts] == [1, 1]


def test_watchers_see_training_forwards_only():
    loss, seen = learner(), []
    stop = loss.watch(lambda objective, terms, weights: seen.append((objective, terms.loss, weights)))
    x, y = batches(1)[0]
    loss(x.requires_grad_(), y)
    assert len(seen) == 1
    assert seen[0][0] is loss
    assert not seen[0][1].requires_grad
    assert not seen[0][2].requires_grad
    loss.eval()(x, y)
    with torch.no_grad():
        loss.train()(x, y)
    assert len(seen) == 1
    assert pickle.loads(pickle.dumps(loss))._watchers == []
    stop()
    stop()
    loss(x, y)
    assert len(seen) == 1
