"""Large batches in blocks: the same numbers as the plain way, one buffer of memory, the plain way where it must be."""

import copy
import gc

import pytest
import torch
from gradients import peak

from reweigh import losses, weighting
from reweigh.losses import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    CausalLM,
    CrossEntropy,
    FocalLoss,
    Objective,
    SigmoidFocalLoss,
    blocks,
)
from reweigh.losses.conformance import CRITERION_FOR, example_meta, ready
from reweigh.weighting import EffectiveNumber, Focal, InverseClassLoss, InverseFrequency, PowerLawDecay, Weighting
from reweigh.weighting.algebra import is_node

COUNTS = [50, 20, 6, 1]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a row or two for batches of any size; tells how often they were taken."""
    monkeypatch.setattr(blocks, "LEAST", {False: 1, True: 1})
    monkeypatch.setattr(blocks, "BLOCK", {False: 8, True: 8})
    monkeypatch.setattr(blocks, "_MANY_COLUMNS", 8)
    taken = []
    value = blocks._value

    def counted(*args):
        found = value(*args)
        taken.append(len(blocks._rows(args[1], 8)))
        return found

    monkeypatch.setattr(blocks, "_value", counted)
    return taken


def both(objective, inputs, **meta):
    """Value and gradient in blocks, and plainly."""
    found = []
    for run in (objective, lambda *a, **k: objective._plainly(a, k, k.pop("num_items", None))):
        first = inputs[0].detach().clone().requires_grad_()
        value = run(first, *inputs[1:], **dict(meta))
        found += [value.detach(), torch.autograd.grad(value, first)[0]]
    return found


EVERYTHING = [
    pytest.param(losses, name, dict(example), id=f"loss-{name}-{i}")
    for name in losses.available()
    for i, example in enumerate(losses.registry.record(name).examples)
] + [
    pytest.param(weighting, name, dict(example), id=f"weighting-{name}-{i}")
    for name in weighting.available()
    for i, example in enumerate(weighting.registry.record(name).examples)
]


@pytest.mark.parametrize(("room", "name", "example"), EVERYTHING)
def test_everything_gives_the_same_either_way(small_blocks, room, name, example):
    built = room.create(name, **example)
    if room is weighting:
        built = Objective(CRITERION_FOR[weighting.registry.record(name).acts_on](), built)
    objective = ready(built).eval()
    inputs = objective.example_inputs(8)
    a, slope_a, b, slope_b = both(objective, inputs, **example_meta(objective))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope_a, slope_b, rtol=1e-12, atol=1e-14)
    local = objective.weighting is None or objective.weighting.scope == "local"
    learned = any(p.requires_grad for p in objective.parameters())
    if objective.criterion.rowwise and local and not learned:
        apart = not objective._learns and (objective.reduction.name != "weighted_mean" or objective.weighting.detached)
        apart = apart and not any(
            isinstance(part, Weighting) and not is_node(part) and type(part).penalty is not Weighting.penalty
            for part in objective.modules()
        )
        assert bool(small_blocks) == apart


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "batch_mean", "sequence_mean"])
@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"mask": torch.arange(9) % 3 != 1},
        {"mask": torch.zeros(9, dtype=torch.bool)},
        {"sample_weight": torch.arange(9) / 4.0},
        {"num_items": 17.0},
    ],
    ids=["plain", "mask", "nothing", "weights", "num_items"],
)
@pytest.mark.parametrize(
    "objective",
    [
        Objective(CrossEntropy(weight=[1.0, 2.0, 0.5, 3.0], label_smoothing=0.1), InverseFrequency(COUNTS)),
        Objective(BinaryCrossEntropy(soft="sides", shift=0.1, ignore_index=-1), EffectiveNumber(COUNTS)),
        Objective(CausalLM(), PowerLawDecay(COUNTS)),
    ],
    ids=["softmax", "sigmoid", "tokens"],
)
def test_reductions_masks_and_weights(small_blocks, objective, meta, reduction):
    if reduction == "sum" and "num_items" in meta:
        with pytest.raises(ValueError, match="num_items replaces a denominator"):
            Objective(objective.criterion, objective.weighting, "sum")(*objective.example_inputs(9), **meta)
        return
    objective = Objective(objective.criterion, objective.weighting, reduction)
    a, slope_a, b, slope_b = both(objective, objective.example_inputs(9), **meta)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope_a, slope_b, rtol=1e-12, atol=1e-14)
    assert small_blocks


def test_gradients_beyond_the_first(small_blocks):
    """A second backward, a scaled one, a second derivative, and no gradient at all."""
    objective = FocalLoss(1.5)
    logits, target = objective.example_inputs(6)
    logits.requires_grad_()
    value = objective(logits, target)
    (first,) = torch.autograd.grad(value, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()  # what was handed out belongs to the caller
    (second,) = torch.autograd.grad(3.0 * value, logits)
    torch.testing.assert_close(second, 3.0 * kept, rtol=1e-12, atol=0)
    (scaled,) = torch.autograd.grad(0.5 * objective(logits, target), logits)  # as a sum of losses does
    torch.testing.assert_close(scaled, 0.5 * kept, rtol=1e-12, atol=0)
    assert torch.autograd.gradgradcheck(lambda x: objective(x, target), (logits,))
    assert not objective(logits.detach(), target).requires_grad
    with torch.no_grad():
        assert not objective(logits, target).requires_grad
    assert len(small_blocks) > 3


def test_the_plain_way_where_it_must_be(small_blocks):
    objective = Objective(CrossEntropy(), Focal())
    logits, target = objective.example_inputs(6)
    learned = Objective(CrossEntropy(), Focal())
    learned.criterion.scale = torch.nn.Parameter(torch.ones(()))
    watched = Objective(CrossEntropy(), Focal())
    watched.watch(lambda *seen: None)
    for plain in (
        Objective(CrossEntropy(), Focal().normalize()),
        Objective(CrossEntropy(), InverseClassLoss(4)),
        Objective(CrossEntropy(), Focal(), "weighted_mean"),
        Objective(CrossEntropy(), Focal(), "none"),
        Objective(CrossEntropy(), Focal(), "group_mean"),
        Objective(Objective(CrossEntropy(), Focal(), "none")),
        learned,
        watched,
    ):
        plain(logits, target, group=torch.zeros(6, dtype=torch.long))
    torch.func.grad(lambda x: objective(x, target))(logits)
    objective(logits.float().half(), target)
    objective(logits, logits.softmax(1).requires_grad_())
    objective(logits[0], target[0])
    assert not small_blocks
    objective(logits, target)
    assert small_blocks


def test_errors_speak_of_the_whole_batch(small_blocks):
    logits, target = CrossEntropy().example_inputs(6)
    with pytest.raises(ValueError, match=r"target must have shape \(6,\).*got \(6, 2\)"):
        FocalLoss()(logits, target[:, None].expand(6, 2))
    target[5] = 9
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\) or ignore_index=-100, got 9"):
        FocalLoss()(logits, target)


def test_a_batch_of_one_class_is_noticed_over_blocks(small_blocks):
    logits, target = CrossEntropy().example_inputs(6)
    loss = FocalLoss(weight=[1.0, 2.0, 0.5, 3.0])
    loss(logits, torch.tensor([1, 1, 1, 1, 1, 0]))
    with pytest.warns(UserWarning, match="all targets of a batch have the same class"):
        loss(logits, torch.ones_like(target))
    assert len(small_blocks) == 2


def peak_share(objective, logits, target):
    """Bytes held at once beyond the inputs, over the logits' size; counted, not sampled."""

    def once():
        x = logits.detach().requires_grad_()
        objective(x, target).backward()

    once()
    gc.collect()
    return peak(once) / (logits.numel() * logits.element_size())


@pytest.mark.parametrize(
    "loss", [SigmoidFocalLoss(), AsymmetricLoss(), FocalLoss(), FocalLoss(weight=[1.0] * 512).eval()], ids=repr
)
def test_memory_is_the_gradient_and_a_block(loss):
    """At 64 MiB of logits, with any number of rows: 1.4 times the logits, where the plain way takes 3 to 20 times."""
    logits = torch.randn(2**15, 512)
    sigmoid = isinstance(loss, (SigmoidFocalLoss, AsymmetricLoss))
    target = torch.randint(2, logits.shape) if sigmoid else torch.randint(512, (2**15,))
    lean = peak_share(loss, logits, target.to(torch.int8) if sigmoid else target)
    assert lean <= 1.4
    assert peak_share(copy.deepcopy(loss).train(), logits[: 2**14], target[: 2**14]) <= 1.4 + 0.4
