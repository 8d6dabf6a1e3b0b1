"""torch.compile without graph breaks, torch.func transforms, numerical derivatives, and YAML by jsonargparse."""

import copy

import pytest
import torch
from torch import nn

import reweigh
from reweigh import losses, weighting
from reweigh.losses import (
    BalancedSoftmax,
    BinaryCrossEntropy,
    Chain,
    CrossEntropy,
    FocalLoss,
    FromLoss,
    LogitAdjustment,
    Objective,
    SigmoidFocalLoss,
    Temperature,
)
from reweigh.losses.conformance import example_meta
from reweigh.weighting import (
    Between,
    ClassWeight,
    EffectiveNumber,
    Focal,
    InClasses,
    InverseClassLoss,
    InverseFrequency,
    Linear,
    Piecewise,
    PositiveBalance,
    Weighting,
    dynamics,
)

F64 = torch.float64


def softmax_inputs(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (size,), generator=generator)
    y[0] = -100
    return torch.randn(size, 4, generator=generator, dtype=F64), y


def soft_inputs(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, size, 4, generator=generator, dtype=F64)
    return x, y.softmax(1)


def sigmoid_inputs(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=F64)
    return x, torch.randint(2, x.shape, generator=generator).to(F64)


COUNTS = [9, 5, 3, 1]
COMPILED = {
    "focal": (lambda: FocalLoss(2.0), softmax_inputs),
    "focal_half": (
        lambda: FocalLoss(0.5, weight=[1.0, 2.0, 3.0, 0.0], label_smoothing=0.1, alpha=[1.0] * 4),
        softmax_inputs,
    ),
    "focal_zero": (lambda: FocalLoss(0.0), softmax_inputs),
    "soft": (lambda: FocalLoss(2.0, label_smoothing=0.1), soft_inputs),
    "sigmoid": (lambda: SigmoidFocalLoss(), sigmoid_inputs),
    "sigmoid_soft": (lambda: SigmoidFocalLoss(0.5, alpha=None), soft_inputs),
    "normalized": (
        lambda: Objective(CrossEntropy(), (Focal() * InverseFrequency(COUNTS)).normalize().clip(max=3.0)),
        softmax_inputs,
    ),
    "by_class": (
        lambda: Objective(CrossEntropy(), Focal().normalize(over="class") + 0.1, "weighted_mean"),
        softmax_inputs,
    ),
    "balanced_softmax": (
        lambda: Objective(
            CrossEntropy(logits=Chain(BalancedSoftmax(COUNTS), Temperature(2.0))), EffectiveNumber(COUNTS)
        ),
        softmax_inputs,
    ),
    "schedules": (
        lambda: Objective(
            CrossEntropy(logits=LogitAdjustment(COUNTS, tau=Linear(0.0, 1.0, duration=3, by="step"))),
            Focal(Linear(0.0, 2.0, duration=3, by="step"))
            * EffectiveNumber(COUNTS, beta=Piecewise([0.0, 0.9], [2], by="step")).warmup(2),
        ),
        softmax_inputs,
    ),
    "learning": (
        lambda: Objective(CrossEntropy(), InverseClassLoss(4, smoothing=0.5) * Focal(1.0).ema(0.5, 4), "sequence_mean"),
        softmax_inputs,
    ),
    "learning_labels": (lambda: Objective(BinaryCrossEntropy(pos_weight=2.0), InverseClassLoss(4)), sigmoid_inputs),
    "conditions": (
        lambda: Objective(CrossEntropy(), Focal().where(InClasses([0, 2]), 0.5) * Between("loss", low=0.1) ** 2, "sum"),
        softmax_inputs,
    ),
    "nested": (lambda: Objective(FocalLoss(reduction="sequence_mean"), Between("loss", high=9.0)), softmax_inputs),
    "from_loss": (
        lambda: Objective(FromLoss(nn.MSELoss(reduction="none")), Between("loss", low=0.2).pooled("batch")),
        soft_inputs,
    ),
}


def step(call, x, y):
    x = x.clone().requires_grad_()
    value = call(x, y)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_graph_break_or_a_second_time(name):
    """Training steps with updates in between: equal values, gradients and state; only the first call compiles."""
    build, make = COMPILED[name]
    eager = build()
    objective = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager", dynamic=False)
    for i in range(4):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            found = step(compiled, *make(i))
        expected = step(eager, *make(i))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
        for twin in (eager, objective):
            twin.update("step", index=i)
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(objective.state_dict()[key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["focal", "normalized", "learning"])
def test_another_batch_size_compiles_at_most_once_more(name):
    build, make = COMPILED[name]
    eager = build()
    objective = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiles = []

    def backend(graph, inputs):
        compiles.append(len(inputs))
        return graph.forward

    compiled = torch.compile(objective, fullgraph=True, backend=backend, dynamic=True)
    for i, size in enumerate((6, 9, 5, 12)):
        for one, other in zip(step(compiled, *make(i, size)), step(eager, *make(i, size)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
        for twin in (eager, objective):
            twin.update("step", index=i)
    assert 1 <= len(compiles) <= 2


def test_meta_arguments_compile():
    objective = Objective(CrossEntropy(), Focal().normalize(over="group"), "group_mean")
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    x, y = softmax_inputs()
    meta = {"mask": torch.arange(6) != 3, "sample_weight": torch.rand(6, dtype=F64), "group": torch.arange(6) % 2}
    torch.testing.assert_close(compiled(x, y, **meta), objective(x, y, **meta), rtol=1e-12, atol=0)


# torch.func


STATELESS = {
    name: COMPILED[name]
    for name in ("focal", "focal_half", "soft", "sigmoid", "normalized", "by_class", "balanced_softmax", "conditions")
}


@pytest.mark.parametrize("name", STATELESS)
def test_vmap_over_a_further_dimension(name):
    build, make = STATELESS[name]
    objective = build()
    pairs = [make(seed) for seed in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]
    found = torch.func.vmap(objective)(*stacked)
    expected = torch.stack([objective(*pair) for pair in pairs])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", STATELESS)
def test_func_grad_and_per_sample_gradients(name):
    build, make = STATELESS[name]
    objective = build()
    x, y = make()
    torch.testing.assert_close(torch.func.grad(objective)(x, y), step(objective, x, y)[1], rtol=1e-12, atol=1e-15)
    pairs = [make(seed) for seed in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]
    found = torch.func.vmap(torch.func.grad(objective))(*stacked)
    expected = torch.stack([step(objective, *pair)[1] for pair in pairs])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_functional_call_with_other_tables():
    objective = FocalLoss(1.0, alpha=[1.0, 1.0, 1.0, 1.0])
    x, y = softmax_inputs()
    (name,) = [name for name, _ in objective.named_buffers()]
    other = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    found = torch.func.functional_call(objective, {name: other}, (x, y))
    torch.testing.assert_close(found, FocalLoss(1.0, alpha=other)(x, y), rtol=1e-14, atol=0)


# derivatives


SMOOTH = {
    "focal_1": (lambda: FocalLoss(1.0, weight=[1.0, 2.0, 3.0, 0.5], label_smoothing=0.1), softmax_inputs),
    "focal_2": (lambda: FocalLoss(2.0), softmax_inputs),
    "focal_half": (lambda: FocalLoss(0.5), softmax_inputs),
    "cross_entropy": (lambda: FocalLoss(0.0), softmax_inputs),
    "sigmoid": (lambda: SigmoidFocalLoss(2.0), sigmoid_inputs),
    "sigmoid_half": (lambda: SigmoidFocalLoss(0.5, alpha=None), sigmoid_inputs),
    "attached": (
        lambda: Objective(CrossEntropy(), (Focal() + 0.1).normalize(detach=False) ** 0.5, "weighted_mean"),
        softmax_inputs,
    ),
    "pooled": (lambda: Objective(CrossEntropy(), Focal().pooled("class"), "batch_mean"), softmax_inputs),
    "adjusted": (lambda: Objective(CrossEntropy(logits=LogitAdjustment(COUNTS)), Focal(1.5)), softmax_inputs),
    "mse": (lambda: Objective(FromLoss(nn.MSELoss(reduction="none")), ClassFree()), soft_inputs),
}


class ClassFree(Weighting):
    """A differentiated weight of the loss itself."""

    needs = frozenset({"loss"})
    detached = False

    def weigh(self, terms):
        return terms.loss.sigmoid()


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives(name):
    build, make = SMOOTH[name]
    objective = build().eval()
    x, y = make()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z, y), x, eps=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(lambda z: objective(z, y), x, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_derivatives_in_soft_targets(gamma):
    """With respect to probabilities, for mixup and distillation with a trained teacher."""
    x, y = soft_inputs()
    for objective in (FocalLoss(gamma, label_smoothing=0.1), SigmoidFocalLoss(gamma)):
        raw = y.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda t, o=objective: o(x, t), raw, eps=1e-6, atol=1e-8)
        assert torch.autograd.gradgradcheck(lambda t, o=objective: o(x, t), raw, eps=1e-6, atol=1e-8)


def test_derivatives_in_sample_weights():
    x, y = softmax_inputs()
    objective = FocalLoss(2.0)
    weight = torch.rand(6, dtype=F64).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: objective(x, y, sample_weight=w), weight)


@pytest.mark.parametrize(
    "weighting",
    [
        Focal(2.0, detach=True),
        Focal(2.0).detach(),
        Focal(2.0).normalize(),
        ClassWeight([1.0, 2.0, 3.0, 4.0]),
        InverseFrequency(COUNTS),
        InverseClassLoss(4),
        Focal(1.0).ema(0.5, 4),
    ],
    ids=repr,
)
def test_detached_weights_have_the_gradient_of_frozen_numbers(weighting):
    """The exempt ones have the gradient of constant weights times the loss; a detached normaliser is a constant too."""
    x, y = softmax_inputs()
    objective = Objective(CrossEntropy(), weighting)
    weights = objective.weights(x, y)
    if weighting.detached:
        by_hand = lambda a, b: (weights * nn.functional.cross_entropy(a, b, reduction="none")).sum() / 5  # noqa: E731
    else:
        total = Objective(CrossEntropy(), Focal(2.0)).weights(x, y).sum() / 5
        by_hand = lambda a, b: Objective(CrossEntropy(), Focal(2.0))(a, b) / total  # noqa: E731
    for one, other in zip(step(objective, x, y), step(by_hand, x, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


# YAML


class Bed:
    """Something that takes an objective and a weighting, as a user's model would."""

    def __init__(self, loss: Objective, weights: Weighting | None = None):
        self.loss, self.weights = loss, weights


def from_yaml(text):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Bed, "bed")
    config = parser.parse_string(text)
    recent = tuple(map(int, jsonargparse.__version__.split(".")[:2])) >= (4, 49)
    everything = {"skip_unset" if recent else "skip_none": False}
    written = parser.dump(config, **everything)  # as LightningCLI saves it; what it writes it can read
    assert parser.dump(parser.parse_string(written), **everything) == written
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return instantiate(config).bed


def yaml_of(cls, example):
    """``class_path`` and ``init_args``, indented below a key."""
    lines = [f"    class_path: {cls.__module__}.{cls.__name__}"]
    if example:
        lines.append("    init_args:")
        lines += [f"      {key}: {value!r}".replace("None", "null").replace("'", '"') for key, value in example.items()]
    return (
        "\n".join(lines)
        .replace("True", "true")
        .replace("False", "false")
        .replace("(", "[")
        .replace(",)", "]")
        .replace(")", "]")
    )


def examples(registry):
    return [
        pytest.param(registry.get(name), example, id=f"{name}-{i}")
        for name in registry.available()
        for i, example in enumerate(registry.record(name).examples)
    ]


@pytest.mark.parametrize(("cls", "example"), examples(losses.registry))
def test_every_objective_from_yaml(cls, example):
    bed = from_yaml(f"bed:\n  loss:\n{yaml_of(cls, example)}")
    assert type(bed.loss) is cls
    expected = cls(**example)
    for (name, one), (_, other) in zip(expected.named_buffers(), bed.loss.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    bed.loss(*bed.loss.example_inputs(), **example_meta(bed.loss))


@pytest.mark.parametrize(("cls", "example"), examples(weighting.registry))
def test_every_weighting_from_yaml(cls, example):
    bed = from_yaml(f"bed:\n  loss:\n    class_path: reweigh.FocalLoss\n  weights:\n{yaml_of(cls, example)}")
    assert type(bed.weights) is cls
    expected = cls(**example)
    for (name, one), (_, other) in zip(expected.named_buffers(), bed.weights.named_buffers(), strict=True):
        assert torch.equal(one, other), name


NESTED = """
bed:
  loss:
    class_path: reweigh.Objective
    init_args:
      criterion:
        class_path: reweigh.CrossEntropy
        init_args:
          weight: balanced
          label_smoothing: 0.1
          logits:
            class_path: reweigh.LogitAdjustment
            init_args:
              counts: [9, 5, 3, 1]
              tau: {class_path: reweigh.Linear, init_args: {start: 0.0, end: 1.0, duration: 5}}
      weighting:
        class_path: reweigh.Normalize
        init_args:
          base:
            class_path: reweigh.Power
            init_args:
              base: {class_path: reweigh.Focal, init_args: {gamma: 1.0}}
              exponent: 2.0
          over: class
          to: sum
      reduction: weighted_mean
"""


def test_a_nested_objective_from_yaml():
    loss = from_yaml(NESTED).loss
    expected = Objective(
        CrossEntropy(
            weight="balanced", label_smoothing=0.1, logits=LogitAdjustment(COUNTS, tau=Linear(0.0, 1.0, duration=5))
        ),
        (Focal(1.0) ** 2.0).normalize(over="class", to="sum"),
        "weighted_mean",
    )
    x, y = softmax_inputs()
    for objective in (loss, expected):
        objective.update("fit", class_counts=COUNTS)
        objective.update("epoch")
    assert torch.equal(loss(x, y), expected(x, y))
    assert len(list(dynamics(loss))) == len(list(dynamics(expected)))


@pytest.mark.parametrize(
    ("node", "init_args", "expected"),
    [
        ("Clip", "{base: {class_path: reweigh.Focal}, max: 0.5}", lambda: Focal().clip(max=0.5)),
        ("Warmup", "{base: {class_path: reweigh.Focal}, duration: 3}", lambda: Focal().warmup(3)),
        ("Pooled", "{base: {class_path: reweigh.Focal}, over: class}", lambda: Focal().pooled("class")),
        ("EMA", "{base: {class_path: reweigh.Focal}, beta: 0.9, num_slots: 4}", lambda: Focal().ema(0.9, 4)),
        ("Detach", "{base: {class_path: reweigh.Focal}}", lambda: Focal().detach()),
        ("Frozen", "{base: {class_path: reweigh.Focal}}", lambda: Focal().frozen()),
        (
            "Where",
            "{base: {class_path: reweigh.Focal}, otherwise: 0.5, "
            "condition: {class_path: reweigh.InClasses, init_args: {classes: [1, 2]}}}",
            lambda: Focal().where(InClasses([1, 2]), 0.5),
        ),
        ("Between", "{statistic: loss, low: 0.5}", lambda: Between("loss", low=0.5)),
        (
            "EffectiveNumber",
            "{counts: [9, 5, 3, 1], "
            "beta: {class_path: reweigh.Piecewise, init_args: {values: [0.0, 0.9], milestones: [2]}}}",
            lambda: EffectiveNumber(COUNTS, beta=Piecewise([0.0, 0.9], [2])),
        ),
        ("PositiveBalance", "{alpha: 0.3}", lambda: PositiveBalance(0.3)),
    ],
)
def test_every_node_from_yaml(node, init_args, expected):
    weights = f"{{class_path: reweigh.{node}, init_args: {init_args}}}"
    found = from_yaml(f"bed:\n  loss: {{class_path: reweigh.FocalLoss}}\n  weights: {weights}").weights
    expected = expected()
    assert type(found) is type(expected)
    criterion = BinaryCrossEntropy() if node == "PositiveBalance" else CrossEntropy()
    inputs = sigmoid_inputs() if node == "PositiveBalance" else softmax_inputs()
    assert torch.equal(Objective(criterion, found)(*inputs), Objective(copy.deepcopy(criterion), expected)(*inputs))


SEVERAL = """
bed:
  loss:
    class_path: reweigh.Objective
    init_args:
      criterion:
        class_path: reweigh.CrossEntropy
        init_args:
          logits:
            class_path: reweigh.Chain
            init_args:
              steps:
              - {class_path: reweigh.BalancedSoftmax, init_args: {counts: [9, 5, 3, 1]}}
              - {class_path: reweigh.Temperature, init_args: {temperature: 2.0}}
      weighting:
        class_path: reweigh.Sum
        init_args:
          operands:
          - class_path: reweigh.Product
            init_args:
              operands:
              - {class_path: reweigh.Focal, init_args: {gamma: 1.0}}
              - {class_path: reweigh.InverseFrequency, init_args: {counts: [9, 5, 3, 1]}}
              - 2.0
          - 0.1
"""


def test_nodes_of_several_operands_from_yaml():
    """``a * b + c`` and chains of transforms: YAML names the operands, where Python lists them."""
    loss = from_yaml(SEVERAL).loss
    expected = Objective(
        CrossEntropy(logits=Chain(BalancedSoftmax(COUNTS), Temperature(2.0))),
        Focal(1.0) * InverseFrequency(COUNTS) * 2.0 + 0.1,
    )
    torch.testing.assert_close(loss(*softmax_inputs()), expected(*softmax_inputs()), rtol=1e-14, atol=0)
    again = eval(repr(loss), {name: getattr(reweigh, name) for name in reweigh.__all__})
    assert torch.equal(again(*softmax_inputs()), loss(*softmax_inputs()))


@pytest.mark.parametrize(
    "fn", ["{class_path: torch.nn.L1Loss, init_args: {reduction: none}}", "torch.nn.functional.logsigmoid"]
)
def test_any_torch_loss_from_yaml(fn):
    criterion = f"{{class_path: reweigh.FromLoss, init_args: {{fn: {fn}}}}}"
    loss = from_yaml(f"bed: {{loss: {{class_path: reweigh.Objective, init_args: {{criterion: {criterion}}}}}}}").loss
    assert isinstance(loss.criterion, FromLoss)
    x = torch.tensor([1.0, 3.0])
    assert loss(*([x, torch.zeros(2)] if "L1" in fn else [x])).isfinite()


def test_unknown_keys_in_yaml_are_refused():
    with pytest.raises(Exception, match="gama"):
        from_yaml("bed:\n  loss:\n    class_path: reweigh.FocalLoss\n    init_args:\n      gama: 2.0")
