"""Weightings that look at gradients: the norms they are given, over one process or several, and what they make of them.

As a script it is one rank: ``python test_task_gradient.py RANK WORLD INIT_FILE OUT``.
"""

import gc
import io
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from reweigh import Fixed, GradNorm, MultiTaskLoss, OutputGradientBalancer
from reweigh.losses import Objective, TaskLosses
from reweigh.weighting.terms import LossTerms

NAMES = ["a", "b", "c"]
UNITS = {"a": 1.0, "b": 40.0, "c": 0.01}


class Model(nn.Module):
    """A trunk of two layers and one head per task; the call gives the predictions and the trunk's output."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(5, 6, dtype=dtype), nn.Linear(6, 4, dtype=dtype)
        self.heads = nn.Linear(4, 3, dtype=dtype)

    def forward(self, x):
        hidden = self.high(self.low(x).tanh()).tanh()
        return self.heads(hidden), hidden


def data(step, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 5, generator=generator).to(dtype), torch.randn(size, 3, generator=generator).to(dtype)


def losses_of(found, y, names=NAMES):
    errors = (found - y).square().mean(0)
    return {name: UNITS[name] * errors[NAMES.index(name)] for name in names}


def seen(objective, *inputs, **meta):
    """The value, and the statistics that weightings were shown."""
    kept = []
    stop = objective.watch(lambda _, terms, weights: kept.append(terms.extras))
    value = objective(*inputs, **meta)
    stop()
    return value, kept[0]


def norms(objective, *inputs, **meta):
    return seen(objective, *inputs, **meta)[1]["gradient_norm"]


def by_hand(losses, shared, part=1.0):
    """``(K,)`` norms of the joined gradient, one task at a time."""
    found = []
    for name in NAMES:
        if name not in losses:
            found.append(0.0)
            continue
        grads = torch.autograd.grad(part * losses[name], shared, retain_graph=True, allow_unused=True)
        found.append(sum(g.square().sum().item() for g in grads if g is not None) ** 0.5)
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture
def partials(monkeypatch):
    """How many partial backwards were taken."""
    calls, real = [], torch.autograd.grad

    def grad(*args, **kwargs):
        calls.append(args[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return calls


# the norms


@pytest.mark.parametrize("init", [None, "first"])
@pytest.mark.parametrize(
    "where", ["parameter", "parameters", "activation", "activations", "both", "one of them unused"]
)
def test_norms_are_those_of_each_tasks_own_loss(where, init):
    model, objective = Model(), MultiTaskLoss(NAMES, GradNorm(), init=init)
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    first = None
    for step in range(3):
        x, y = data(step)
        low = model.low(x).tanh()
        hidden = model.high(low).tanh()
        losses = losses_of(model.heads(hidden), y)
        shared = {
            "parameter": [model.high.weight],
            "parameters": [*model.high.parameters(), *model.low.parameters()],
            "activation": [hidden],
            "activations": [low, hidden],
            "both": [hidden, model.high.weight],
            "one of them unused": [spare, model.high.bias],
        }[where]
        first = torch.stack([*losses.values()]).detach() if first is None else first
        wanted = by_hand(losses, shared) / (1.0 if init is None else first)
        value, extras = seen(objective, losses, shared=shared[0] if len(shared) == 1 else shared)
        torch.testing.assert_close(extras["gradient_norm"], wanted, rtol=1e-12, atol=0)
        moving = [part for part in shared if not part.is_leaf]
        assert ("sample_gradient_norm" in extras) == bool(moving)
        if moving:
            for place, loss in enumerate(losses.values()):
                grads = torch.autograd.grad(loss, moving, retain_graph=True)
                each = torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1).mean()
                each = each if init is None else each / first[place]
                torch.testing.assert_close(extras["sample_gradient_norm"][place], each, rtol=1e-12, atol=0)
        value.backward()
        objective.update("step")


def test_a_vector_of_losses_has_the_same_norms():
    model, objective = Model(), MultiTaskLoss(NAMES, GradNorm())
    x, y = data(0)
    losses = losses_of(model(x)[0], y)
    vector = torch.stack([*losses.values()])
    found = norms(objective, vector, shared=model.high.weight)
    torch.testing.assert_close(found, by_hand(losses, [model.high.weight]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_a_smaller_dtype(dtype):
    model, objective = Model(dtype), MultiTaskLoss(NAMES, GradNorm())
    x, y = data(0, dtype=dtype)
    losses = losses_of(model(x)[0], y)
    shared = [*model.high.parameters()]
    found = norms(objective, losses, shared=shared)
    torch.testing.assert_close(found, by_hand(losses, shared), rtol=1e-5 if dtype == torch.float32 else 0.02, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e6])
def test_half_precision_loses_no_small_gradient(scale):
    """Without a power of two on the loss, gradients of 1e-8 are 0 in float16 and those of 1e6 may be infinite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    x, y = torch.randn(2048, 64), torch.randn(2048, 3)
    objective = MultiTaskLoss(NAMES, GradNorm())
    found = []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            output = model(x)
        losses = {name: scale * loss for name, loss in losses_of(output.float(), y).items()}
        found.append(norms(objective, losses, shared=model[0].weight))
    torch.testing.assert_close(found[1], found[0], rtol=5e-3, atol=0)
    naive = torch.autograd.grad(losses["c"], model[0].weight)[0].norm()
    assert (naive.item() == 0.0) is (scale == 1e-8)


def test_losses_in_float16_keep_their_scale_in_range():
    weight = nn.Parameter(torch.tensor([0.5, 1.5], dtype=torch.float16))
    objective = MultiTaskLoss(NAMES, GradNorm())
    found = norms(objective, {"a": weight.sum() * 0.01, "b": weight.sum(), "c": 1e4 * weight.sum()}, shared=weight)
    torch.testing.assert_close(found / 2**0.5, torch.tensor([0.01, 1.0, 1e4]).double(), rtol=2e-3, atol=0)


# when they are taken


def test_one_partial_backward_per_present_task(partials):
    model = Model()
    objective = MultiTaskLoss(NAMES, GradNorm(), nonfinite="skip")
    x, y = data(0)
    losses = losses_of(model(x)[0], y)
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    cases = [
        (losses, {}, 3),
        ({"b": losses["b"]}, {}, 1),
        ({}, {}, 0),
        (losses, {"mask": {"a": False}}, 2),
        (losses, {"mask": torch.tensor([True, False, False])}, 1),
        (losses, {"counts": {"a": 0, "b": 2.0}}, 2),
        (losses, {"counts": torch.tensor([0.0, 0.0, 3.0])}, 1),
        ({**losses, "a": losses["a"] * nan}, {}, 2),
        ({**losses, "a": torch.tensor(1.0)}, {}, 2),  # a constant
    ]
    for given, meta, wanted in cases:
        partials.clear()
        found = norms(objective, given, shared=[model.high.weight], **meta)
        assert len(partials) == wanted
        assert int((found > 0).sum()) == wanted
        assert not found.requires_grad
        assert found.dtype == torch.float64


def test_no_partial_backward_where_nobody_needs_one(partials):
    model = Model()
    x, y = data(0)
    shared = model.high.weight
    plain, frozen, objective = (MultiTaskLoss(NAMES, w) for w in (Fixed(1.0), GradNorm(), GradNorm()))
    frozen.freeze()
    for loss in (plain, frozen, objective.eval()):
        loss(losses_of(model(x)[0], y), shared=shared)
        loss(losses_of(model(x)[0], y))
    objective.train()
    with torch.no_grad():
        objective(losses_of(model(x)[0], y), shared=shared)
        objective(losses_of(model(x)[0], y))
    assert not partials


def test_nothing_but_the_norms_is_different():
    """No ``grad`` is touched, and the backward pass that follows is that of the weights."""
    model = Model()
    x, y = data(0)
    objective = MultiTaskLoss(NAMES, GradNorm())
    value = objective(losses_of(model(x)[0], y), shared=model.high.weight)
    assert all(p.grad is None for p in model.parameters())
    value.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(losses_of(model(x)[0], y).values()).backward()
    for grad, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weighting", [GradNorm(), OutputGradientBalancer(), GradNorm() * 2.0], ids=repr)
def test_training_without_shared_is_an_error(weighting):
    model = Model()
    x, y = data(0)
    objective = MultiTaskLoss(NAMES, weighting)
    name = "OutputGradientBalancer" if isinstance(weighting, OutputGradientBalancer) else "GradNorm"
    with pytest.raises(ValueError, match=f"MultiTaskLoss: {name} looks at gradients; give shared="):
        objective(losses_of(model(x)[0], y))
    assert objective.eval()(losses_of(model(x)[0], y)).isfinite()
    given = torch.ones(3, dtype=torch.float64)  # norms from elsewhere will do
    assert objective.train()(losses_of(model(x)[0], y), gradient_norm=given).isfinite()


def test_wrong_shared():
    model = Model()
    x, y = data(0)
    objective = MultiTaskLoss(NAMES, GradNorm())
    output, hidden = model(x)
    losses = losses_of(output, y)
    for shared, kind, text in [
        (hidden.detach(), ValueError, "shared must require gradient"),
        ([], TypeError, "shared must be a tensor or some of them"),
        (["high.weight"], TypeError, "shared must be a tensor or some of them"),
        ([hidden, hidden[:3] * 1], ValueError, "one dimension 0"),
    ]:
        with pytest.raises(kind, match=f"TaskLosses: .*{text}"):
            objective(losses, shared=shared)


def test_a_plain_objective_takes_shared_too():
    model = Model()
    x, y = data(0)
    objective = Objective(TaskLosses(NAMES), GradNorm(num_tasks=3), "sum")
    found = norms(objective, losses_of(model(x)[0], y), shared=model.high.weight)
    assert (found > 0).all()


def test_checkpointed_heads_do_where_they_are_not_reentrant():
    model = Model()
    x, y = data(0)
    hidden = model.high(model.low(x).tanh()).tanh()
    output = checkpoint(model.heads, hidden, use_reentrant=False)
    objective = MultiTaskLoss(NAMES, GradNorm())
    losses = losses_of(output, y)
    wanted = by_hand(losses, [model.high.weight])
    torch.testing.assert_close(norms(objective, losses, shared=model.high.weight), wanted, rtol=1e-12, atol=0)


def test_a_compiled_model_has_the_same_norms():
    model, objective = Model(), MultiTaskLoss(NAMES, GradNorm())
    x, y = data(0)
    wanted = by_hand(losses_of(model(x)[0], y), [model.high.weight])
    torch._dynamo.reset()
    net = torch.compile(model, backend="aot_eager")
    value, extras = seen(objective, losses_of(net(x)[0], y), shared=model.high.weight)
    torch.testing.assert_close(extras["gradient_norm"], wanted, rtol=1e-12, atol=0)
    value.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()


def test_what_is_retained_is_left_alone():
    """torch.autograd.grad writes into tensors that retain their gradient."""
    model, objective = Model(), MultiTaskLoss(NAMES, GradNorm())
    x, y = data(0)
    output, hidden = model(x)
    hidden.retain_grad()
    objective(losses_of(output, y), shared=hidden)
    assert hidden.grad is None


@pytest.mark.parametrize("where", ["parameters", "activation"])
@pytest.mark.parametrize(
    "weighting",
    [GradNorm(), GradNorm(form="softmax"), GradNorm(optimizer="adam"), OutputGradientBalancer()],
    ids=repr,
)
def test_training_reads_nothing_back(weighting, where):
    """A whole training on tensors that have no values."""
    model = Model().to("meta")
    objective = MultiTaskLoss(NAMES, weighting, init="first").to("meta")
    for _ in range(2):
        x, y = (part.to("meta") for part in data(0))
        output, hidden = model(x)
        shared = [*model.high.parameters()] if where == "parameters" else hidden
        objective(losses_of(output, y), shared=shared).backward()
        for part in (objective.weighting, objective.criterion):
            part.commit({name: value.clone() for name, value in part._pending.items()})
            part.refresh("step")
            part.refresh("epoch")
    assert model.low.weight.grad.is_meta


# GradNorm


def terms(loss, norm, mask=None, count=None):
    extras = {"gradient_norm": torch.as_tensor(norm, dtype=torch.float64)}
    if count is not None:
        extras["count"] = torch.as_tensor(count, dtype=torch.float64)
    mask = None if mask is None else torch.tensor(mask)
    return LossTerms(torch.as_tensor(loss, dtype=torch.float64), mask=mask, extras=extras)


def step(weighting, *args, **kwargs):
    weighting.observe(terms(*args, **kwargs))
    weighting.update("step")
    return weighting.weigh(terms(*args, **kwargs))


FORMS = [
    {},
    {"form": "softmax"},
    {"optimizer": "adam"},
    {"form": "softmax", "optimizer": "adam"},
]


def begun(losses, **arguments):
    """A weighting that knows its first losses, and has weights 1."""
    weighting = GradNorm(num_tasks=len(losses), **arguments)
    weighting.first.copy_(torch.tensor(losses, dtype=torch.float64))
    return weighting


@pytest.mark.parametrize("arguments", FORMS, ids=str)
@pytest.mark.parametrize("size", [3, 7])
def test_equal_norms_and_rates_move_nothing(arguments, size):
    weighting = begun([0.3] * size, lr=0.5, **arguments)
    for _ in range(3):
        weights = step(weighting, [0.1] * size, [0.7] * size)
    torch.testing.assert_close(weights, torch.ones(size, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("arguments", FORMS, ids=str)
def test_the_slope_is_that_of_the_balancing_loss(arguments):
    """With second derivatives, as in the paper, on a model."""
    model = Model()
    objective = MultiTaskLoss(NAMES, GradNorm(1.2, lr=0.01, **arguments))
    first = torch.tensor([1.0, 30.0, 0.02], dtype=torch.float64)
    objective.weighting.first.copy_(first)
    level = objective.weighting.level.copy_(torch.tensor([0.5, 0.7, 1.8])).clone().requires_grad_()
    optimizer = (torch.optim.Adam if "optimizer" in arguments else torch.optim.SGD)([level], lr=0.01)
    for number in range(4):
        x, y = data(number)
        losses = losses_of(model(x)[0], y)
        weights = 3 * level.softmax(0) if "form" in arguments else level * 1.0
        size = torch.stack(
            [
                torch.autograd.grad(w * loss, model.high.weight, create_graph=True)[0].norm()
                for w, loss in zip(weights, losses.values(), strict=True)
            ]
        )
        ratio = torch.stack([*losses.values()]).detach() / first
        target = (size.mean() * (ratio / ratio.mean()) ** 1.2).detach()
        optimizer.zero_grad()
        level.grad = torch.autograd.grad((size - target).abs().sum(), level)[0]
        optimizer.step()
        if "form" not in arguments:
            with torch.no_grad():
                level.clamp_(1e-6)
                level *= 3 / level.sum()
        objective(losses_of(model(x)[0], y), shared=model.high.weight)
        objective.update("step")
        torch.testing.assert_close(objective.weighting.level, level.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arguments", FORMS, ids=str)
def test_weights_settle_where_the_paper_says(arguments):
    """w ~ r^alpha / norm, with sum K: a point of rest where the targets add up to the gradients, as for alpha = 1."""
    loss, norm = torch.tensor([0.5, 1.0, 0.8]).double(), torch.tensor([0.4, 1.0, 2.0]).double()
    ratio = loss / loss.mean()
    wanted = ratio / norm
    wanted = 3 * wanted / wanted.sum()
    weighting = begun([1.0, 1.0, 1.0], alpha=1.0, lr=0.004, **arguments)
    for _ in range(800):
        weights = step(weighting, loss, norm)
    torch.testing.assert_close(weights, wanted, rtol=0.03, atol=0)
    assert weights.sum().item() == pytest.approx(3.0, abs=1e-12)


@pytest.mark.parametrize("arguments", FORMS, ids=str)
def test_absent_tasks_keep_their_weight_and_the_sum_is_k(arguments):
    weighting = begun([1.0, 2.0, 3.0, 4.0], lr=0.2, **arguments)
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(4, dtype=torch.float64)
    for mask in ([True] * 4, [True, False, True, True], [False, True, True, False], [False] * 4, [True] + [False] * 3):
        loss, norm = torch.rand(2, 4, generator=generator, dtype=torch.float64) + 0.1
        before = {name: value.clone() for name, value in weighting.named_buffers() if name in weighting._by_task}
        now = step(weighting, loss, norm, mask)
        assert now.sum().item() == pytest.approx(4.0, abs=1e-12)
        assert (now > 0).all()
        away = ~torch.tensor(mask)
        torch.testing.assert_close(now[away], weights[away], rtol=1e-12, atol=0)
        assert sum(mask) < 2 or not torch.equal(now[~away], weights[~away])
        for name, value in before.items():
            assert torch.equal(weighting.get_buffer(name)[..., away], value[..., away]), name
        weights = now


@pytest.mark.parametrize("arguments", FORMS, ids=str)
def test_absent_is_as_if_there_were_only_the_others(arguments):
    """Up to the mass that is theirs."""
    many, few = begun([1.0, 2.0, 3.0], **arguments), begun([1.0, 3.0], **arguments)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        loss, norm = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
        found = step(many, loss, norm, [True, False, True])
        wanted = step(few, loss[[0, 2]], norm[[0, 2]])
        torch.testing.assert_close(found[[0, 2]], wanted, rtol=1e-10, atol=0)
    assert found[1].item() == pytest.approx(1.0, abs=1e-12)


def test_a_gradient_that_is_not_finite_teaches_nothing():
    for arguments in FORMS:
        found, wanted = begun([1.0, 1.0, 1.0], **arguments), begun([1.0, 1.0, 1.0], **arguments)
        for bad in (torch.inf, torch.nan):
            one = step(found, [0.5, 1.0, 2.0], [1.0, bad, 3.0])
            two = step(wanted, [0.5, 1.0, 2.0], [1.0, 1.0, 3.0], [True, False, True])
            assert torch.equal(one, two)


@pytest.mark.parametrize("form", ["paper", "softmax"])
def test_a_common_scale_of_the_losses(form):
    """With Adam none at all; plain descent goes with the product of rate and scale."""
    unit = 512.0
    plain, adam = begun([1.0, 2.0, 3.0], form=form, lr=0.02), begun([1.0, 2.0, 3.0], form=form, optimizer="adam")
    slow = begun([unit, 2 * unit, 3 * unit], form=form, lr=0.02 / unit)
    same = begun([unit, 2 * unit, 3 * unit], form=form, optimizer="adam")
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        loss, norm = torch.rand(2, 3, generator=generator, dtype=torch.float64) + 0.1
        for one, other in ((plain, slow), (adam, same)):
            found, wanted = step(other, unit * loss, unit * norm), step(one, loss, norm)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("arguments", FORMS, ids=str)
def test_micro_batches_are_averaged(arguments):
    many, one = begun([1.0, 2.0, 3.0], **arguments), begun([1.0, 2.0, 3.0], **arguments)
    many.observe(terms([1.0, 2.0, 3.0], [0.1, 0.2, 0.5], count=[1.0, 2.0, 3.0]))
    many.observe(terms([2.0, 9.9, 1.0], [0.4, 9.9, 0.1], mask=[True, False, True], count=[3.0, 9.0, 3.0]))
    many.update("step")
    found = many.weigh(terms([1.0] * 3, [1.0] * 3))
    wanted = step(one, [1.75, 2.0, 2.0], [0.325, 0.2, 0.3])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_first_losses():
    """The paper's are those of each task's first step; the softmax form's the mean of its first epoch."""
    weighting = GradNorm(num_tasks=3)
    step(weighting, [1.0, 2.0, 0.0], [1.0] * 3, [True, False, True])
    assert weighting.first.tolist() == [1.0, 0.0, 0.0]  # a loss of 0 is nothing to compare with
    step(weighting, [4.0, 3.0, 5.0], [1.0] * 3)
    assert weighting.first.tolist() == [1.0, 3.0, 5.0]
    epochs = GradNorm(num_tasks=3, form="softmax")
    for loss in ([1.0, 2.0, 9.0], [3.0, 2.0, 9.0]):
        assert torch.equal(step(epochs, loss, [1.0, 2.0, 3.0], [True, True, False]), torch.ones(3).double())
    epochs.update("epoch")
    assert epochs.first.tolist() == [2.0, 2.0, 0.0]
    moved = step(epochs, [1.0, 2.0, 7.0], [1.0, 2.0, 3.0])
    assert moved[2] == 1.0
    assert moved[0] != 1.0
    epochs.update("epoch")
    assert epochs.first.tolist() == [2.0, 2.0, 7.0]


@pytest.mark.parametrize("arguments", FORMS, ids=str)
def test_weights_stay_finite(arguments):
    for norm in (0.0, 1e-30, 1e30):
        for loss in (0.0, -1.0, 1e-30, 1e30):
            weighting = GradNorm(10.0, lr=1.0, num_tasks=3, **arguments)
            for _ in range(3):
                weights = step(weighting, [loss, 1.0, 2.0], [norm, 1.0, 3.0])
                weighting.update("epoch")
                assert weights.isfinite().all()
                assert (weights >= 0).all()
                assert weights.sum().item() == pytest.approx(3.0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"alpha": -1.0}, "GradNorm: alpha must be finite and >= 0"),
        ({"lr": -1.0}, "GradNorm: lr must be finite and >= 0"),
        ({"form": "log"}, "GradNorm: form must be one of 'paper', 'softmax'"),
        ({"optimizer": "lion"}, "GradNorm: optimizer must be one of 'sgd', 'adam'"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        GradNorm(num_tasks=3, **arguments)


def test_the_weights_belong_to_no_optimizer():
    objective = MultiTaskLoss(NAMES, GradNorm(optimizer="adam"))
    assert not [*objective.parameters()]
    assert {"weighting.level", "weighting.first", "weighting.moments"} <= objective.state_dict().keys()


# the balancer


def test_balanced_gradients_have_their_shares():
    model = Model()
    objective = MultiTaskLoss(NAMES, OutputGradientBalancer([1.0, 2.0, 5.0], total_norm=4.0))
    x, y = data(0)
    output, _ = model(x)
    losses = losses_of(output, y)
    kept = []
    objective.watch(lambda _, terms, weights: kept.append(weights))
    objective(losses, shared=output)
    grads = [
        torch.autograd.grad(w * losses[name], output, retain_graph=True)[0]
        for name, w in zip(NAMES, kept[0], strict=True)
    ]
    found = torch.stack([grad.norm(dim=1).mean() for grad in grads])
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 2.5]).double(), rtol=1e-9, atol=0)
    objective(({"a": losses["a"], "c": losses["c"]}), shared=output)
    assert kept[1][1] == 0
    torch.testing.assert_close(kept[1][[0, 2]], kept[0][[0, 2]] * 8 / 6, rtol=1e-9, atol=0)


def test_the_output_gets_the_gradient_of_the_published_balancer():
    """Over a training: its running mean starts with a correction, and has the batch in it."""
    torch.manual_seed(0)
    model, shares, decay = Model(), [1.0, 3.0, 0.5], 0.9
    objective = MultiTaskLoss(NAMES, OutputGradientBalancer(shares, total_norm=2.0, decay=decay))
    total, fix = [0.0] * 3, 0.0
    for number in range(6):
        x, y = data(number)
        output, _ = model(x)
        output.retain_grad()
        losses = losses_of(output, y)
        grads = [torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses.values()]
        fix = fix * decay + 1
        total = [t * decay + g.norm(dim=1).mean().item() for t, g in zip(total, grads, strict=True)]
        wanted = sum(2.0 * c / 4.5 / (1e-12 + t / fix) * g for c, t, g in zip(shares, total, grads, strict=True))
        output.grad = None  # torch.autograd.grad above writes into what is retained
        objective(losses, shared=output).backward()
        torch.testing.assert_close(output.grad, wanted, rtol=1e-10, atol=1e-14)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
        objective.update("step", index=number)


def test_evaluation_uses_the_running_mean():
    weighting = OutputGradientBalancer(num_tasks=2, decay=0.5)
    assert weighting.weigh(LossTerms(torch.ones(2))).tolist() == pytest.approx([0.5, 0.5], rel=1e-11)
    step(weighting, [1.0, 1.0], [2.0, 4.0])
    step(weighting, [1.0, 1.0], [4.0, torch.nan])
    wanted = torch.tensor([0.5 / (5.0 / 1.5), 0.5 / 4.0], dtype=torch.float64)
    torch.testing.assert_close(weighting.weigh(LossTerms(torch.ones(2))), wanted, rtol=1e-9, atol=0)


# resume


@pytest.mark.parametrize(
    "make",
    [*(lambda a=a: GradNorm(lr=0.05, **a) for a in FORMS), lambda: OutputGradientBalancer(decay=0.7)],
    ids=["paper", "softmax", "adam", "softmax-adam", "balancer"],
)
def test_resume_is_uninterrupted_to_the_bit(make):
    def run(start, stop, states=None):
        model, objective = Model(), MultiTaskLoss(NAMES, make(), init="first")
        if states is not None:
            for part, state in zip((model, objective), states, strict=True):
                part.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        for number in range(start, stop):
            x, y = data(number)
            model.zero_grad()
            objective(losses_of(model(x)[0], y), shared=model.high.weight).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            objective.update("step", index=number)
            if number % 2:
                objective.update("epoch", index=number // 2)
        files = [io.BytesIO(), io.BytesIO()]
        for part, file in zip((model, objective), files, strict=True):
            torch.save(part.state_dict(), file)
        return [file.getvalue() for file in files], {**model.state_dict(), **objective.state_dict()}

    _, whole = run(0, 8)
    for stop in range(1, 8):
        states, _ = run(0, stop)
        _, again = run(stop, 8, states)
        for name, value in whole.items():
            assert torch.equal(again[name], value), name


# several processes

SHARES = {1: [8], 2: [5, 3]}
RUNS = [
    (weighting, where, wrap)
    for weighting in ("paper", "softmax", "balancer")
    for where, wrap in [("parameters", False), ("activation", False), ("both", False), ("parameters", True)]
]


def training(weighting, where, wrap, rank=0, world=1):
    """Five steps; a rank without one task, without any, and without a sample."""
    made = {
        "paper": GradNorm(lr=0.1),
        "softmax": GradNorm(lr=0.1, form="softmax"),
        "balancer": OutputGradientBalancer(),
    }
    objective = MultiTaskLoss(NAMES, made[weighting], init="first" if where == "both" else None)
    model = Model()
    net = nn.parallel.DistributedDataParallel(model) if wrap and world > 1 else model
    kept = []
    objective.watch(lambda _, terms, weights: kept.append([terms.extras["gradient_norm"], weights]))
    for number in range(5):
        sizes = [8, 0][:world] if number == 3 and not wrap else SHARES[world]
        x, y = (part[sum(sizes[:rank]) : sum(sizes[: rank + 1])] for part in data(number))
        output, hidden = net(x)
        losses, counts = losses_of(output, y), dict.fromkeys(NAMES, len(x))
        if not len(x):
            losses, counts = {}, {}
        if number == 1:  # the last samples have no task b
            mine = output[:5] if world == 1 else output if rank == 0 else output[:0]
            counts["b"] = len(mine)
            del losses["b"]
            if len(mine):
                losses["b"] = losses_of(mine, y[: len(mine)])["b"]
        if number == 2:
            del losses["c"]
        high = [*model.high.parameters()]
        shared = {"parameters": high, "activation": hidden, "both": [model.high.weight, hidden]}[where]
        model.zero_grad(set_to_none=True)
        value = objective(losses, counts=counts, shared=shared)
        assert all(p.grad is None for p in model.parameters())
        value.backward()
        if world > 1 and not wrap:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad /= world
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
        objective.update("step", index=number)
        if number % 2:
            objective.update("epoch", index=number // 2)
    seen = {
        f"{name} {i}": value
        for i, pair in enumerate(kept)
        for name, value in zip(("norm", "weight"), pair, strict=True)
    }
    return {**seen, **model.state_dict(), **objective.state_dict()}


def refused():
    """What a model with a static graph is told."""
    net = nn.parallel.DistributedDataParallel(Model(), static_graph=True)
    x, y = data(0)
    try:
        MultiTaskLoss(NAMES, GradNorm())(losses_of(net(x)[0], y), shared=net.module.high.weight)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def communicated():
    """Numbers in each all-reduce of one training call."""
    objective, real, calls = MultiTaskLoss(NAMES, GradNorm()), dist.all_reduce, []
    model = Model()
    x, y = data(0)
    dist.all_reduce = lambda *args, **kwargs: calls.append(args[0].numel()) or real(*args, **kwargs)
    try:
        output, hidden = model(x)
        objective(losses_of(output, y), shared=model.high.weight)
        objective(losses_of(output, y), shared=hidden)
    finally:
        dist.all_reduce = real
    return calls


def main(rank, world, init, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=50)
    )
    results = {str(run): training(*run, rank, world) for run in RUNS}
    torch.save({"runs": results, "refused": refused(), "calls": communicated()}, out)
    dist.barrier()
    gc.collect()  # what DDP holds in cycles must not outlive its group
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(__file__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_two_ranks_are_one_process(ranks, run):
    """Norms, weights, model and state; the ranks agree to the last bit."""
    alone = training(*run)
    one, other = (rank["runs"][str(run)] for rank in ranks)
    for name, value in alone.items():
        for found in (one[name], other[name]):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
        assert torch.equal(one[name], other[name]) or name in Model().state_dict(), name


def test_a_static_graph_is_refused(ranks):
    for rank in ranks:
        assert "DistributedDataParallel(static_graph=True)" in rank["refused"]


def test_what_is_communicated(ranks):
    """Losses (3 K + 1), then K gradients at a parameter, or 2 K + 1 numbers at an activation."""
    for rank in ranks:
        assert rank["calls"] == [10, 3 * 24, 10, 7]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
