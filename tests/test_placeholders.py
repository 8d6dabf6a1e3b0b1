"""Models that are built without values, as large ones are: constants and first states are values all the same."""

import copy

import pytest
import torch
from torch import nn

from reweigh import (
    DWA,
    CircleClassificationLoss,
    CoBa,
    CrossEntropy,
    EffectiveNumber,
    FocalLoss,
    InverseClassLoss,
    MultiTaskLoss,
    Objective,
    PowerLawDecayLoss,
    Uncertainty,
    losses,
    weighting,
)

F64 = torch.float64
MAKERS = {
    "focal": lambda: FocalLoss(2.0, weight=[1.0, 2.0, 3.0, 4.0]),
    "class state": lambda: Objective(CrossEntropy(), InverseClassLoss(4) * EffectiveNumber([9, 4, 3, 1])),
    "tokens": lambda: PowerLawDecayLoss([100.0, 10.0, 3.0, 1.0]),
    "proxies": lambda: CircleClassificationLoss(4, 6),
}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("name", MAKERS)
def test_an_objective_built_on_the_meta_device_has_its_values(name):
    torch.manual_seed(0)
    plain = MAKERS[name]()
    torch.manual_seed(0)
    with torch.device("meta"):
        built = MAKERS[name]()
    assert not any(tensor.is_meta for tensor in [*built.buffers(), *built.parameters()])
    inputs = plain.example_inputs()
    assert torch.equal(built(*inputs), plain(*inputs))


EXAMPLES = [
    (registry, name, place)
    for registry in (weighting.registry, losses.registry)
    for name in registry.available()
    for place in range(len(registry.record(name).examples))
]


@pytest.mark.parametrize(
    ("registry", "name", "place"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_method_can_be_built_there(registry, name, place):
    example = copy.deepcopy(dict(registry.record(name).examples[place]))
    torch.manual_seed(0)
    plain = registry.create(name, **example)
    torch.manual_seed(0)
    with torch.device("meta"):
        built = registry.create(name, **copy.deepcopy(dict(registry.record(name).examples[place])))
    same(dict(built.named_buffers()), dict(plain.named_buffers()))
    same(dict(built.named_parameters()), dict(plain.named_parameters()))


def loaded_as_transformers_does(model, state):
    """What ``from_pretrained`` does to a model built on the meta device: files in, garbage elsewhere, then eval()."""
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        value = state[name].clone() if name in state else torch.full_like(tensor, 7, device="cpu")
        if last in owner._parameters:
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        if name in state:
            value._is_hf_initialized = True
        setattr(owner, last, value)
    for owner in model.modules():
        for last in owner._non_persistent_buffers_set:
            setattr(owner, last, torch.full_like(owner._buffers[last], 7, device="cpu"))
    model.eval()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2, dtype=F64)
        self.loss = MultiTaskLoss(["a", "b"], CoBa(warmup=3) * Uncertainty(init=0.5) * DWA(window=1), init="first")
        self.other = FocalLoss(weight=[1.0, 2.0, 3.0, 4.0])


def trained():
    model = Model()
    for step in range(6):
        values = torch.tensor([3.0 / (1 + step), 1.0 + step], dtype=F64)
        model.loss(values)
        model.loss.update("step")
        model.loss.observe_validation(values)
        model.loss.update("validation")
    return model


@pytest.mark.parametrize("whole", [True, False])
def test_a_loader_that_fills_in_garbage_leaves_constants_and_fresh_states(whole):
    source = trained() if whole else Model()
    state = {k: v for k, v in source.state_dict().items() if whole or k.startswith("net.")}
    with torch.device("meta"):
        model = Model()
    loaded_as_transformers_does(model, state)
    same(dict(model.loss.named_buffers()), dict(source.loss.named_buffers()))
    same(dict(model.other.named_buffers()), dict(source.other.named_buffers()))
    values = torch.tensor([1.0, 2.0], dtype=F64)
    assert torch.equal(model.loss(values), copy.deepcopy(source).eval().loss(values))
    assert model.loss.weighting.parts()[0].parts()[1].log_scale.requires_grad


@pytest.mark.parametrize("assign", [False, True])
def test_what_torch_itself_loads_arrives(assign):
    source = trained()
    with torch.device("meta"):
        model = Model()
    model.net.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    same(dict(model.state_dict()), dict(source.state_dict()))
    values = torch.tensor([1.0, 2.0], dtype=F64)
    assert torch.equal(model.loss(values), source.loss(values))


@pytest.mark.parametrize("end", [lambda loss: loss.eval(), lambda loss: loss.update("step")])
def test_afterwards_an_assignment_is_an_assignment(end):
    with torch.device("meta"):
        loss = MultiTaskLoss(["a", "b"], Uncertainty())
    end(loss)
    loss.weighting.log_scale = nn.Parameter(torch.ones(2))
    assert loss.weighting.log_scale.tolist() == [1.0, 1.0]


def test_to_empty_empties_the_network_only():
    with torch.device("meta"):
        model = Model()
    assert model.net.weight.is_meta
    model.to_empty(device="cpu")
    assert not model.net.weight.is_meta
    fresh = Model()
    same(dict(model.loss.named_buffers()), dict(fresh.loss.named_buffers()))
    same(dict(model.other.named_buffers()), dict(fresh.other.named_buffers()))


def test_moving_to_the_meta_device_and_back_keeps_constants():
    loss = FocalLoss(weight=[1.0, 2.0, 3.0, 4.0])
    inputs = loss.example_inputs()
    wanted = loss(*inputs)
    loss.to("meta").to_empty(device="cpu")
    assert torch.equal(loss(*inputs), wanted)


def test_learned_task_weights_are_at_least_float32():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = MultiTaskLoss(["a", "b"], Uncertainty())
    finally:
        torch.set_default_dtype(before)
    assert loss.weighting.log_scale.dtype == torch.float32
