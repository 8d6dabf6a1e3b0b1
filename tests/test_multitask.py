"""MultiTaskLoss: named, masked, numerically safe, readable, and its state."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from reweigh import (
    DWA,
    Fixed,
    Focal,
    Linear,
    MultiTaskLoss,
    Objective,
    ScaleInvariant,
    TaskLosses,
    Uncertainty,
    learned_parameters,
    strip,
    weighting,
)
from reweigh.losses.conformance import check_objective
from reweigh.weighting.conformance import TASKS

F64 = torch.float64
NAMES = ["seg", "depth", "normal"]


def values(*numbers, names=NAMES, grad=True):
    made = torch.tensor(numbers, dtype=F64).unbind()
    return {name: v.clone().requires_grad_(grad) for name, v in zip(names, made, strict=False)}


def grads(losses):
    return [None if v.grad is None else v.grad.item() for v in losses.values()]


EXAMPLES = [
    (name, place)
    for name in weighting.available()
    if weighting.registry.record(name).acts_on == "task"
    for place in range(len(weighting.registry.record(name).examples))
]


@pytest.mark.parametrize("init", [None, "first"])
@pytest.mark.parametrize(("name", "place"), EXAMPLES)
def test_every_task_weighting_keeps_its_promises_inside(name, place, init):
    made = weighting.create(name, **weighting.registry.record(name).examples[place])
    if "gradient_norm" in made.needs:
        return  # it wants shared=, which a vector of numbers does not have
    check_objective(Objective(TaskLosses(TASKS), made, "sum"), compiled=False)
    loss = MultiTaskLoss([f"t{k}" for k in range(TASKS)], copy.deepcopy(made), init=init)
    for seed in range(4):
        losses = loss.criterion.example_inputs(seed=seed)[0].requires_grad_()
        value = loss(losses)
        value.backward()
        found = torch.stack([*loss.effective_weights(losses).values()])
        torch.testing.assert_close(losses.grad, found, rtol=1e-12, atol=0)
        for event in ("step", "epoch"):
            loss.update(event, index=seed)


# absent tasks


def test_names_and_order_decide_not_the_order_of_the_mapping():
    loss = MultiTaskLoss(NAMES, [1.0, 10.0, 100.0])
    assert loss({"normal": torch.tensor(3.0), "seg": torch.tensor(1.0), "depth": torch.tensor(2.0)}).item() == 321.0


@pytest.mark.parametrize("make", [lambda: None, Uncertainty, ScaleInvariant, lambda: DWA() * Fixed(2.0)])
def test_missing_masked_and_uncounted_are_the_same(make):
    results = []
    for how in ("missing", "bool", "tensor", "vector", "counts"):
        loss = MultiTaskLoss(NAMES, make())
        losses = values(2.0, 5.0, 0.5)
        if how == "missing":
            value = loss({k: v for k, v in losses.items() if k != "depth"})
        elif how == "bool":
            value = loss(losses, mask={"depth": False})
        elif how == "tensor":
            value = loss(losses, mask={"depth": torch.tensor(False)})
        elif how == "vector":
            value = loss(losses, mask=torch.tensor([True, False, True]))
        else:
            value = loss(losses, counts={"depth": 0, "seg": 1, "normal": 1.0})
        value.backward()
        loss.update("step")
        slopes = [0.0 if g is None else g for g in grads(losses)]
        results.append((value.item(), slopes, {k: v for k, v in loss.state_dict().items() if v.is_floating_point()}))
    for value, slopes, state in results[1:]:
        assert value == results[0][0]
        assert slopes == results[0][1]
        assert slopes[1] == 0.0
        for key, wanted in results[0][2].items():
            torch.testing.assert_close(state[key], wanted, msg=lambda m, k=key: f"{k}: {m}")


def test_what_is_masked_may_be_anything_and_leaves_the_graph():
    losses = values(2.0, 5.0, 0.5)
    trunk = torch.tensor(1.0, dtype=F64, requires_grad=True)
    broken = trunk.log() / (trunk - 1)  # nan, with a gradient that is nan
    loss = MultiTaskLoss(NAMES, Uncertainty())
    loss({**losses, "depth": broken, "seg": trunk * 2}, mask={"depth": False}).backward()
    assert trunk.grad.isfinite()


@pytest.mark.parametrize("make", [lambda: None, Uncertainty, ScaleInvariant, DWA])
def test_no_task_at_all_is_zero_with_a_gradient(make):
    loss = MultiTaskLoss(NAMES, make(), init="first")
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    value = loss({})
    value.backward()
    assert value.item() == 0.0
    for key, kept in before.items():
        assert torch.equal(loss.state_dict()[key], kept), key
    for parameter in loss.parameters():
        assert (parameter.grad == 0).all()
    masked = values(1.0, 2.0, 3.0)
    value = loss(masked, mask=dict.fromkeys(NAMES, False))
    value.backward()
    assert value.item() == 0.0


# what is not finite


def test_a_loss_that_is_not_finite_is_kept_but_not_learned():
    loss = MultiTaskLoss(NAMES, DWA(window=1), init="first")
    loss(values(1.0, 2.0, 3.0))
    loss.update("step")
    before = {k: v.clone() for k, v in loss.weighting.state_dict().items()}
    assert loss(values(1.0, torch.nan, 3.0)).isnan()
    loss.update("step")
    assert loss.criterion.nonfinite_count.tolist() == [0, 1, 0]
    assert loss.weighting.steps[:, 1].tolist() == before["steps"][:, 1].tolist()
    assert loss(values(1.0, 2.0, 3.0)).isfinite()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_skip_leaves_the_task_out_of_value_gradient_and_statistics(bad):
    trunk = torch.tensor(0.0, dtype=F64, requires_grad=True)
    loss = MultiTaskLoss(NAMES, ScaleInvariant(), nonfinite="skip")
    value = loss({"seg": trunk + 2.0, "depth": trunk.log() * 0 + bad, "normal": trunk * 3 + 4.0})
    value.backward()
    torch.testing.assert_close(trunk.grad, torch.tensor(1 / 2 + 3 / 4, dtype=F64))
    assert loss.criterion.nonfinite_count.tolist() == [0, 1, 0]
    vector = MultiTaskLoss(NAMES, ScaleInvariant(), nonfinite="skip")
    found = vector(torch.tensor([2.0, bad, 4.0], dtype=F64))
    torch.testing.assert_close(found, value.detach())


def test_raise_names_the_task():
    loss = MultiTaskLoss(NAMES, nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"loss of 'depth' is inf"):
        loss(values(1.0, torch.inf, 2.0))
    assert loss(values(1.0, torch.nan, 2.0), mask={"depth": False}).item() == 3.0


# first losses


def test_first_losses_divide_each_task():
    loss = MultiTaskLoss(NAMES, [1.0, 2.0, 1.0], init="first")
    assert loss(values(4.0, 100.0, 0.5)).item() == 4.0
    losses = values(2.0, 50.0, 0.5)
    value = loss(losses)
    value.backward()
    assert value.item() == 0.5 + 1.0 + 1.0
    assert grads(losses) == [1 / 4, 2 / 100, 1 / 0.5]
    assert loss.summary()["loss/depth"].item() == 50.0


def test_a_task_seen_later_has_its_first_loss_then_and_evaluation_sets_none():
    loss = MultiTaskLoss(NAMES, init="first")
    loss.eval()
    assert loss(values(4.0, 100.0, 0.5)).item() == 104.5
    loss.train()
    with torch.no_grad():
        loss(values(7.0, 7.0, 7.0))
    loss({"seg": torch.tensor(4.0)})
    loss(values(8.0, 10.0, 0.0))
    assert loss.criterion.first.tolist() == [4.0, 10.0, 0.0]
    loss(values(8.0, 10.0, -2.0))
    assert loss.criterion.first.tolist() == [4.0, 10.0, 2.0]


# reading


def test_weights_is_a_mapping_that_can_be_asked():
    loss = MultiTaskLoss(NAMES, ScaleInvariant())
    assert {k: v.item() for k, v in loss.weights.items()} == dict.fromkeys(NAMES, 1.0)
    loss(values(2.0, 4.0, 0.5))
    assert {k: v.item() for k, v in loss.weights.items()} == {"seg": 0.5, "depth": 0.25, "normal": 2.0}
    assert loss.weights(values(1.0, 2.0, 4.0)).tolist() == [1.0, 0.5, 0.25]
    assert loss.weights({"depth": torch.tensor(2.0)}).tolist() == [0.0, 0.5, 0.0]
    assert isinstance(copy.deepcopy(loss.weights), dict)


def test_summary_has_losses_weights_and_total_by_name():
    loss = MultiTaskLoss(NAMES, Uncertainty(init=0.5))
    assert loss.summary() == {}
    value = loss(values(2.0, 4.0, 0.5))
    found = loss.summary()
    assert set(found) == {"total", *(f"{kind}/{name}" for kind in ("loss", "weight") for name in NAMES)}
    assert found["total"].item() == value.item()
    assert found["loss/depth"].item() == 4.0
    assert not any(part.requires_grad for part in found.values())


def test_looking_changes_nothing():
    loss = MultiTaskLoss(NAMES, DWA(window=1), init="first")
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    _ = loss.weights, loss.effective_weights(values(1.0, 2.0, 3.0)), loss.components(values(1.0, 2.0, 3.0))
    loss.update("step")
    for key, kept in before.items():
        assert key.endswith("clock") or torch.equal(loss.state_dict()[key], kept), key


# composition


def test_weights_compose_clip_and_warm_up():
    loss = MultiTaskLoss(NAMES, ScaleInvariant().clip(max=1.0))
    losses = values(2.0, 4.0, 0.5)
    loss(losses).backward()
    assert grads(losses) == [0.5, 0.25, 1.0]
    loss = MultiTaskLoss(
        NAMES, 2.0 * Fixed({"seg": 1.0, "depth": Linear(0.0, 1.0, duration=2, by="step"), "normal": 0})
    )
    seen = []
    for step in range(3):
        losses = values(1.0, 1.0, 1.0)
        loss(losses).backward()
        seen.append(grads(losses))
        loss.update("step", index=step)
    assert seen == [[2.0, 0.0, 0.0], [2.0, 1.0, 0.0], [2.0, 2.0, 0.0]]


def test_a_learned_method_clipped_still_learns():
    loss = MultiTaskLoss(NAMES, Uncertainty().clip(max=10.0))
    loss(values(1.0, 2.0, 3.0)).backward()
    (parameter,) = learned_parameters(loss)
    assert (parameter.grad != 0).any()
    assert loss.parameter_groups(lr=0.1)[0]["weight_decay"] == 0.0


# freezing


def test_frozen_weights_neither_learn_nor_move_and_stay_so_after_loading():
    loss = MultiTaskLoss(NAMES, DWA(window=1) * Uncertainty())
    for step in range(3):
        loss(values(1.0 + step, 2.0, 3.0 / (1 + step))).backward()
        loss.update("step", index=step)
    loss.freeze()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    held = {k: v.item() for k, v in loss.weights.items()}
    other = MultiTaskLoss(NAMES, DWA(window=1) * Uncertainty())
    other.load_state_dict(loss.state_dict())
    for part in (loss, other):
        for step in range(3, 6):
            losses = values(9.0, 1.0, 4.0 + step)
            part(losses).backward()
            part.update("step", index=step)
            part.update("epoch", index=step)
        assert {k: v.item() for k, v in part.weights.items()} == held
        assert learned_parameters(part) == []
        for key, kept in before.items():
            assert torch.equal(part.state_dict()[key], kept), key
        part.unfreeze()
        assert len(learned_parameters(part)) == 1
        part(values(1.0, 5.0, 2.0)).backward()
        part.update("step")
        part(values(2.0, 5.0, 2.0)).backward()
        part.update("step")
        assert {k: v.item() for k, v in part.weights.items()} != held


def test_a_part_that_was_frozen_by_the_algebra_is_not_thawed():
    loss = MultiTaskLoss(NAMES, Uncertainty().frozen())
    loss.load_state_dict(loss.state_dict())
    loss.freeze()
    loss.unfreeze()
    assert learned_parameters(loss) == []


# state


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_another_task_set_is_matched_by_name():
    old = MultiTaskLoss(["seg", "depth", "edges"], DWA(window=1) * Uncertainty(init=[0.5, 1.0, 1.5]), init="first")
    for step in range(3):
        old(values(2.0 + step, 5.0, 7.0 - step, names=["seg", "depth", "edges"]))
        old.update("step", index=step)
    new = MultiTaskLoss(["normal", "edges", "seg"], DWA(window=1) * Uncertainty(), init="first")
    with pytest.warns(UserWarning, match="normal start fresh, depth are dropped"):
        new.load_state_dict(saved(old))
    assert new.criterion.first.tolist() == [0.0, 7.0, 2.0]
    dwa, learned = new.weighting.parts()
    assert dwa.steps.tolist() == [[0.0, 5 / 7, 2.0], [0.0, 6 / 7, 1.5]]
    assert learned.log_scale.tolist() == [0.0, 1.5, 0.5]
    assert saved(new)["criterion.task_names"].tolist() == new.criterion.task_names.tolist()


def test_another_order_of_the_same_tasks_is_matched_without_a_word():
    old = MultiTaskLoss(NAMES, Uncertainty(init=[0.5, 1.0, 1.5]))
    new = MultiTaskLoss(NAMES[::-1], Uncertainty())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict(saved(old))
    assert new.weighting.log_scale.tolist() == [1.5, 1.0, 0.5]


def test_a_checkpoint_without_the_objective_starts_fresh():
    model = nn.ModuleDict({"net": nn.Linear(1, 1), "loss": MultiTaskLoss(NAMES, Uncertainty() * DWA())})
    clean = strip(model)
    assert sorted(clean) == ["net.bias", "net.weight"]
    assert strip(model, saved(model)).keys() == clean.keys()
    with pytest.warns(UserWarning, match="starting fresh"):
        model.load_state_dict(clean)


def test_half_precision_leaves_learned_weights_and_statistics_alone():
    loss = MultiTaskLoss(NAMES, Uncertainty() * DWA()).bfloat16()
    assert loss.weighting.parts()[0].log_scale.dtype == torch.float32
    assert loss.weighting.parts()[1].means.dtype == F64
    losses = {name: torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True) for name in NAMES}
    value = loss(losses)
    assert value.dtype == torch.float32
    value.backward()
    assert losses["seg"].grad.dtype == torch.bfloat16


def test_a_float16_loss_of_zero_gets_a_finite_gradient():
    loss = MultiTaskLoss(NAMES, ScaleInvariant())
    losses = {name: torch.tensor(0.0, dtype=torch.float16, requires_grad=True) for name in NAMES}
    loss(losses).backward()
    assert all(v.grad.isfinite() for v in losses.values())


def test_no_value_is_read_back_in_training():
    from torch.profiler import ProfilerActivity, profile

    loss = MultiTaskLoss(NAMES, DWA(window=2) * Uncertainty(), init="first")
    losses = values(1.0, 2.0, 3.0)
    loss(losses)
    loss.update("step")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            loss(losses, mask={"depth": False}).backward()
            loss.update("step")
    reads = [event for event in seen.key_averages() if event.key == "aten::_local_scalar_dense"]
    assert not reads


@pytest.mark.parametrize("init", [None, "first"])
@pytest.mark.parametrize("make", [lambda: DWA(window=1), Uncertainty, lambda: ScaleInvariant().clip(max=3.0)])
def test_a_mapping_compiles_without_a_break(make, init):
    torch._dynamo.reset()
    loss = MultiTaskLoss(NAMES, make(), init=init)
    plain = copy.deepcopy(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(3):
        one, two = values(1.0 + step, 2.0, 3.0), values(1.0 + step, 2.0, 3.0)
        found, wanted = compiled(one, mask={"depth": False}), plain(two, mask={"depth": False})
        torch.testing.assert_close(found, wanted)
        found.backward()
        wanted.backward()
        assert [g or 0.0 for g in grads(one)] == pytest.approx([g or 0.0 for g in grads(two)])
        loss.update("step", index=step)
        plain.update("step", index=step)
    torch._dynamo.reset()


# validation blocks


class Listener(weighting.TaskWeighting):
    """Counts what it is shown."""

    update_on = "validation"
    feeds = frozenset({"validation", "after"})

    def prepare(self, num_tasks):
        self.add_pending("validation", 2, num_tasks)
        self.add_pending("after", 2, num_tasks)
        self.add_task_state("validated", torch.zeros(2, num_tasks, dtype=F64), dim=1)
        self.add_task_state("followed", torch.zeros(2, num_tasks, dtype=F64), dim=1)

    def weigh(self, terms):
        return torch.ones_like(terms.loss)

    def observe_validation(self, terms):
        self.accumulate("validation", self.tallies(terms))

    def observe_after(self, terms):
        self.accumulate("after", self.tallies(terms))

    def commit(self, sums):
        self.validated.add_(sums["validation"])
        self.followed.add_(sums["after"])


@pytest.mark.parametrize("compose", [lambda w: w, lambda w: 2.0 * w.clip(max=3.0)])
def test_a_validation_block_shows_evaluation_losses_and_sends_the_event(compose):
    heard = Listener()
    loss = MultiTaskLoss(NAMES, compose(heard))
    loss.eval()
    loss(values(9.0, 9.0, 9.0))
    with loss.validation():
        loss(values(1.0, 2.0, 3.0), counts=torch.tensor([1.0, 2.0, 1.0]))
        loss(values(1.0, 2.0, torch.nan))
    loss(values(9.0, 9.0, 9.0))
    assert heard.validated.tolist() == [[2.0, 6.0, 3.0], [2.0, 3.0, 1.0]]
    assert heard.completed("validation") == 1
    loss.update("validation", losses=values(1.0, 1.0, 1.0), index=1)
    loss.update("validation", losses=values(1.0, 1.0, 1.0), index=1)  # the same again counts once
    loss.update("validation", index=2)
    assert heard.validated[1].tolist() == [3.0, 4.0, 2.0]
    loss.train()
    loss(values(9.0, 9.0, 9.0)).backward()
    loss.update("step", losses=values(4.0, 5.0, 6.0))
    assert heard.followed.tolist() == [[4.0, 5.0, 6.0], [1.0, 1.0, 1.0]]


def test_validation_is_seen_in_the_losses_own_units():
    """The first one may come before the first training losses, which later losses are divided by."""
    heard = Listener()
    loss = MultiTaskLoss(NAMES, heard, init="first")
    loss.observe_validation(values(4.0, 100.0, 0.5))
    loss(values(8.0, 50.0, 2.0))
    loss.observe_validation(values(2.0, 50.0, 0.25))
    loss.eval()
    with loss.validation():
        loss(values(1.0, 1.0, 1.0))
    assert heard.validated[0].tolist() == [7.0, 151.0, 1.75]


def test_a_validation_that_fails_sends_nothing():
    heard = Listener()
    loss = MultiTaskLoss(NAMES, heard).eval()
    with pytest.raises(RuntimeError), loss.validation():
        raise RuntimeError
    assert heard.completed("validation") == 0
    assert not loss._validating


# errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MultiTaskLoss("seg"), TypeError, "tasks must be a sequence of names"),
        (lambda: MultiTaskLoss([]), ValueError, "one or more different names"),
        (lambda: MultiTaskLoss(["a", "a"]), ValueError, "one or more different names"),
        (lambda: MultiTaskLoss(["a", "b"], {"a": 1.0}), ValueError, r"weights must name every task \(a, b\), got a"),
        (lambda: MultiTaskLoss(["a", "b"], [1.0]), ValueError, "one entry per task"),
        (lambda: MultiTaskLoss(["a", "b"], [1.0, -1.0]), ValueError, "weights must be finite and >= 0, got -1"),
        (lambda: MultiTaskLoss(["a", "b"], Focal()), TypeError, "Focal needs 'log_pt'"),
        (lambda: MultiTaskLoss(["a", "b"], DWA(num_tasks=3)), ValueError, "bound to 3 tasks"),
        (lambda: MultiTaskLoss(["a"], init="last"), ValueError, "init must be one of 'first'"),
        (lambda: MultiTaskLoss(["a"], nonfinite="ignore"), ValueError, "nonfinite must be one of"),
        (lambda: MultiTaskLoss(NAMES)({"sag": torch.ones(())}), ValueError, "names 'sag'; the tasks are seg, depth"),
        (lambda: MultiTaskLoss(NAMES)({"seg": torch.ones(2)}), ValueError, r"'seg' must be a scalar, got shape \(2,\)"),
        (lambda: MultiTaskLoss(NAMES)({"seg": 1.0}), TypeError, "'seg' must be a tensor, got float"),
        (lambda: MultiTaskLoss(NAMES)([torch.ones(())]), TypeError, "must be a mapping by task name, got list"),
        (lambda: MultiTaskLoss(NAMES)(torch.ones(2)), ValueError, r"one number per task \(seg, depth, normal\)"),
        (lambda: MultiTaskLoss(NAMES)({}, mask={"x": True}), ValueError, "mask names 'x'"),
        (lambda: MultiTaskLoss(NAMES)({}, mask={"seg": 1}), TypeError, "mask of 'seg' must be a bool, got 1"),
        (lambda: MultiTaskLoss(NAMES)({}, mask=torch.ones(3)), TypeError, "mask must be a mapping or a bool tensor"),
        (lambda: MultiTaskLoss(NAMES)({}, counts={"seg": -1}), ValueError, "counts must be finite and >= 0"),
        (lambda: MultiTaskLoss(NAMES)({}, sample_weight=torch.ones(3)), ValueError, "sample_weight has no place here"),
        (lambda: MultiTaskLoss(NAMES).update("epoch", losses={}), ValueError, "losses= comes with"),
        (lambda: MultiTaskLoss(NAMES)(torch.ones(3, device="meta")), ValueError, "losses are on meta, .* state on cpu"),
        (lambda: DWA().weigh(TaskLosses(2).terms(torch.ones(2))), ValueError, "number of tasks is not known"),
        (lambda: DWA(num_tasks=3).weigh(TaskLosses(2).terms(torch.ones(2))), ValueError, "one loss per task"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
