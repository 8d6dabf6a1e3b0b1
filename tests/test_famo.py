"""FAMO: what its formula promises, and what its public implementations lose."""

import copy
import io

import pytest
import torch

from reweigh import FAMO, MultiTaskLoss
from reweigh.weighting.conformance import each, state_of, task_terms

NAMES = ["a", "b", "c"]


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def random(seed, size=3):
    return 0.1 + torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(**arguments):
    return MultiTaskLoss(NAMES, FAMO(**arguments))


def train(loss, start, stop):
    weights = []
    for step in range(start, stop):
        given = random(step).requires_grad_()
        weights.append(torch.autograd.grad(loss(given), given)[0])
        loss.update("step", index=step, losses=random(100 + step))
    return weights


def test_weights_sum_to_one_and_are_the_formula():
    loss = objective(min_losses=[0.0, 0.05, 0.1])
    train(loss, 0, 5)
    values = random(9).requires_grad_()
    z = loss.weighting.logits.softmax(0)
    gap = values - vector(0.0, 0.05, 0.1) + 1e-8
    c = 1 / (z / gap).sum().detach()
    wanted = c * (z * gap.log()).sum()
    (slope,) = torch.autograd.grad(wanted, values)
    total = loss(values)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(total, values)[0], slope, rtol=1e-12, atol=1e-14)
    assert slope.sum().item() == pytest.approx(1.0, abs=1e-12)
    loss.eval()
    held = loss.effective_weights({"a": values[0], "c": values[2]})
    assert held["b"] == 0
    assert sum(held.values()).item() == pytest.approx(1.0, abs=1e-12)
    assert loss({}).item() == 0.0


def test_logits_are_those_of_torch_adam_on_the_softmax():
    loss = objective(weight_decay=0.01, lr=0.1)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1, weight_decay=0.01)
    for step in range(20):
        before, after = random(step), random(100 + step)
        loss(before)
        loss.update("step", losses=after)
        delta = (before + 1e-8).log() - (after + 1e-8).log()
        adam.zero_grad()
        logits.softmax(0).backward(delta)
        adam.step()
        torch.testing.assert_close(loss.weighting.logits, logits.detach(), rtol=1e-12, atol=1e-14)


def test_the_first_step_moves_every_logit_by_the_learning_rate():
    loss = objective(lr=0.03)
    loss(vector(1.0, 2.0, 3.0))
    loss.update("step", losses=vector(0.5, 1.9, 2.99))
    torch.testing.assert_close(loss.weighting.logits, vector(-0.03, 0.03, 0.03), rtol=1e-5, atol=0)


def test_who_gained_less_gets_more():
    loss = objective()
    for _ in range(10):
        loss(vector(1.0, 1.0, 1.0))
        loss.update("step", losses=vector(0.5, 0.9, 0.99))
    z = loss.weighting.logits.softmax(0)
    assert z[0] < z[1] < z[2]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equal_gains_change_nothing_but_for_decay(decay):
    loss = objective(weight_decay=decay, eps=1e-30)
    alone = vector(0.5, -0.25, -0.125).requires_grad_()
    loss.weighting.logits.copy_(alone.detach())
    adam = torch.optim.Adam([alone], lr=0.025, weight_decay=decay)
    for step in range(3):
        loss(random(step))
        loss.update("step", losses=0.7 * random(step))
        alone.grad = torch.zeros_like(alone)
        adam.step()
    torch.testing.assert_close(loss.weighting.logits, alone.detach(), rtol=0, atol=1e-8)
    assert (alone[0].item() == 0.5) is (decay == 0.0)


def test_units_do_not_matter():
    plain, scaled = objective(eps=1e-30), objective(eps=1e-30)
    unit = vector(1e-3, 1.0, 1e4)
    for step in range(10):
        plain(random(step))
        scaled(unit * random(step))
        plain.update("step", losses=random(50 + step))
        scaled.update("step", losses=unit * random(50 + step))
        torch.testing.assert_close(scaled.weighting.logits, plain.weighting.logits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("next_batch", [False, True])
def test_resume_is_uninterrupted_to_the_bit(next_batch):
    """Adam's moments too: peers save the logits at most."""
    whole = objective(next_batch=next_batch)
    wanted = train(whole, 0, 12)
    for stop in range(1, 12):
        first, second = (objective(next_batch=next_batch) for _ in range(2))
        train(first, 0, stop)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for found, right in zip(train(second, stop, 12), wanted[stop:], strict=True):
            assert torch.equal(found, right)
        for name, value in second.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


def test_state_is_no_parameter_and_keeps_its_dtype():
    loss = objective()
    train(loss, 0, 3)
    assert not [*loss.parameters()]
    assert not loss.parameter_groups()
    before = state_of(loss.weighting)
    loss.half()
    for name, value in state_of(loss.weighting).items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert {"weighting.logits", "weighting.moments", "weighting.moves"} <= loss.state_dict().keys()


def test_a_step_without_losses_after_it_is_skipped():
    """As the optimizer's was under a gradient scaler."""
    loss = objective()
    train(loss, 0, 3)
    before = state_of(loss.weighting)
    loss(random(7))
    loss.update("step")
    for name, value in state_of(loss.weighting).items():
        assert torch.equal(value, before[name]) or name == "clock"
    assert loss.weighting.completed("step") == 4


@pytest.mark.parametrize("missing", ["before", "after", "infinite before", "infinite after"])
def test_a_task_that_is_missing_on_one_side_is_left_alone(missing):
    loss = objective()
    train(loss, 0, 3)
    pair = MultiTaskLoss(["a", "c"], FAMO())
    for name in ("logits", "moments", "moves"):
        pair.weighting.get_buffer(name).copy_(loss.weighting.get_buffer(name)[..., [0, 2]])
    kept = {name: loss.weighting.get_buffer(name)[..., 1].clone() for name in ("logits", "moments", "moves")}
    before, after = dict(zip(NAMES, random(7), strict=True)), dict(zip(NAMES, random(8), strict=True))
    pair({"a": before["a"], "c": before["c"]})
    pair.update("step", losses={"a": after["a"], "c": after["c"]})
    side = before if "before" in missing else after
    if "infinite" in missing:
        side["b"] = vector(torch.inf)[0]
    else:
        del side["b"]
    loss(before)
    loss.update("step", losses=after)
    for name, value in kept.items():
        assert torch.equal(loss.weighting.get_buffer(name)[..., 1], value), name
        others = loss.weighting.get_buffer(name)[..., [0, 2]]
        torch.testing.assert_close(others, pair.weighting.get_buffer(name), rtol=1e-12, atol=1e-15)


def test_micro_batches_are_the_joined_batch():
    one, many = objective(), objective()
    for step in range(4):
        parts, after = [random(10 * step + k) for k in range(3)], [random(200 + 10 * step + k) for k in range(3)]
        counts = [torch.tensor([1.0, 4.0, float(k)]) for k in range(3)]
        total = sum(counts)
        mean = sum(p * c for p, c in zip(parts, counts, strict=True)) / total
        one(mean, counts=total)
        one.observe_after(sum(p * c for p, c in zip(after, counts, strict=True)) / total, counts=total)
        for values, number in zip(parts, counts, strict=True):
            many(values, counts=number)
        for values, number in zip(after, counts, strict=True):
            many.observe_after(values, counts=number)
        for loss in (one, many):
            loss.update("step")
        torch.testing.assert_close(many.weighting.logits, one.weighting.logits, rtol=1e-10, atol=1e-14)


def test_an_update_sent_twice_counts_once():
    once, twice = objective(), objective()
    for step in range(3):
        for loss in (once, twice):
            loss(random(step))
        once.update("step", index=step, losses=random(50 + step))
        for _ in range(2):
            twice.update("step", index=step, losses=random(50 + step))
    for name, value in twice.state_dict().items():
        assert torch.equal(value, once.state_dict()[name]), name


def test_the_next_batch_stands_for_the_losses_after():
    """The same moves, one step late, and nothing else is asked for."""
    assert FAMO().feeds == {"after"}
    assert FAMO(next_batch=True).feeds == frozenset()
    exact, late = objective(), objective(next_batch=True)
    for step in range(6):
        late(random(step))
        late.observe_after(random(77))  # not listened to
        late.update("step")
        if step:
            exact(random(step - 1))
            exact.update("step", losses=random(step))
        torch.testing.assert_close(late.weighting.logits, exact.weighting.logits, rtol=1e-12, atol=1e-15)


def test_the_next_batch_compares_with_the_last_that_had_the_task():
    loss = objective(next_batch=True)
    loss({"a": vector(1.0)[0], "b": vector(2.0)[0]})
    loss.update("step")
    loss({"a": vector(0.5)[0], "c": vector(1.0)[0]})
    loss.update("step")
    assert loss.weighting.moves.tolist() == [1, 0, 0]
    loss({"b": vector(1.0)[0], "c": vector(0.9)[0]})
    loss.update("step")
    assert loss.weighting.moves.tolist() == [1, 1, 1]


@pytest.mark.parametrize("low", [0.0, -3.0, 0.05])
def test_losses_at_or_below_their_minimum_stay_finite(low):
    loss = objective(min_losses=0.1)
    for _ in range(3):
        values = vector(low, 1.0, 2.0).requires_grad_()
        total = loss(values)
        total.backward()
        assert total.isfinite()
        assert values.grad.isfinite().all()
        loss.update("step", losses=vector(1.0, low, 2.0))
        assert loss.weighting.logits.isfinite().all()


def test_a_checkpoint_of_other_tasks_is_matched_by_name():
    old = objective()
    train(old, 0, 4)
    new = MultiTaskLoss(["c", "new", "a"], FAMO())
    with pytest.warns(UserWarning, match="new start fresh"):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert new.weighting.logits.tolist() == [old.weighting.logits[2], 0.0, old.weighting.logits[0]]
    assert new.weighting.moments[:, [0, 2]].equal(old.weighting.moments[:, [2, 0]])
    assert new.weighting.moves.tolist() == [4, 0, 4]


@pytest.mark.parametrize("next_batch", [False, True])
def test_learning_reads_nothing_back(next_batch):
    """A step on tensors that have no values."""
    weighting = FAMO(num_tasks=8, next_batch=next_batch).to("meta")
    terms = each(task_terms(0), lambda value: value.to("meta"))
    for _ in range(2):
        weighting.observe(terms)
        weighting.observe_after(terms)
        weighting.commit({name: value.clone() for name, value in weighting._pending.items()})
        assert weighting.weigh(terms).is_meta


def test_reset_forgets_everything():
    for next_batch in (False, True):
        weighting = FAMO(num_tasks=8, next_batch=next_batch)
        fresh = state_of(weighting)
        for seed in range(3):
            weighting.observe(task_terms(seed))
            weighting.observe_after(task_terms(seed + 1))
            weighting.update("step")
        assert weighting.logits.any()
        weighting.reset()
        for name, value in state_of(weighting).items():
            assert torch.equal(value, fresh[name]), name


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"lr": -1.0}, ValueError, "FAMO: lr must be finite and >= 0"),
        ({"weight_decay": "no"}, TypeError, "FAMO: weight_decay must be a number"),
        ({"eps": 0.0}, ValueError, "FAMO: eps must be finite and > 0"),
        ({"next_batch": 1}, TypeError, "FAMO: next_batch must be a bool"),
        ({"min_losses": [1.0]}, ValueError, "FAMO: min_losses must have one entry per task"),
    ],
)
def test_wrong_arguments(arguments, kind, text):
    with pytest.raises(kind, match=text):
        FAMO(num_tasks=3, **arguments)
