"""What a loss has held goes with its last reference: kernels leave no cycle for Python's collector to find.

A cycle through a tensor keeps logits alive until the collector happens to run, which counts objects and not bytes.
"""

import gc

import pytest
import torch

from reweigh.losses import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    CausalLM,
    CircleLoss,
    CrossEntropy,
    DiceLoss,
    FocalLoss,
    GCELoss,
    LDRLoss,
    LinearCausalLM,
    LinearCrossEntropy,
    MultiTaskLoss,
    Objective,
    SCELoss,
    SigmoidFocalLoss,
    TverskyLoss,
    create,
)
from reweigh.losses.kernels import dense
from reweigh.losses.registry import registry
from reweigh.weighting import KLDRO, TLDR, CoBa, CVaR, Focal, PowerLawDecay, Uncertainty

CLASSES = 300
BY = {
    "none": None,
    "decay x TLDR": PowerLawDecay([1000.0 / (v + 1) for v in range(CLASSES)], alpha=0.25) * TLDR(),
    "focal": Focal(1.5),
    "mean 1": TLDR().normalize(),
    "top": CVaR(0.4),
    "softmax": KLDRO(1.0),
}


def _given():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def whole(most, *shape):
        return torch.randint(most, shape, generator=generator)

    tokens, hidden, words = (normal(2, 32, CLASSES), whole(CLASSES, 2, 32)), normal(2, 32, 16), normal(CLASSES, 16)
    labels, pixels, pairs = (
        (normal(512, 80), whole(2, 512, 80).float()),
        (normal(2, 5, 32, 32), whole(5, 2, 32, 32)),
        (
            normal(32, 8),
            torch.arange(32) // 4,
        ),
    )
    flat = tokens[0].flatten(0, 1), tokens[1].flatten()
    for name, by in BY.items():
        yield f"CausalLM, {name}", Objective(CausalLM(), by), tokens
        yield f"CrossEntropy, {name}", Objective(CrossEntropy(), by), flat
        for impl in ("chunked", "dense"):
            linear = LinearCausalLM(impl=impl, **({"chunk_rows": 16} if impl == "chunked" else {}))
            yield f"LinearCausalLM {impl}, {name}", Objective(linear, by), (hidden, words, tokens[1])
    yield "LinearCrossEntropy", Objective(LinearCrossEntropy(), Focal()), (hidden.flatten(0, 1), words, flat[1])
    for loss in (Objective(BinaryCrossEntropy()), AsymmetricLoss(), SigmoidFocalLoss()):
        yield repr(loss), loss, labels
    for loss in (FocalLoss(), DiceLoss(), DiceLoss(over="batch"), TverskyLoss()):
        yield f"{loss!r} of pixels", loss, pixels
    for loss in (CircleLoss(), CircleLoss(tile=16), CircleLoss(over="batch")):
        yield repr(loss), loss, pairs
    for loss in (GCELoss(), LDRLoss(), SCELoss()):
        yield repr(loss), loss, flat


CASES = list(_given())


@pytest.mark.parametrize(("objective", "inputs"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_nothing_is_left_for_the_collector(objective, inputs, monkeypatch):
    monkeypatch.setattr(dense, "SMALL", 0)  # the lean way, whatever the size

    def once():
        taken = [value.clone().requires_grad_() if value.is_floating_point() else value for value in inputs[:-1]]
        objective(*taken, inputs[-1]).backward()

    assert _garbage(once) == []


def test_nor_by_task_losses():
    for weighting in (Uncertainty({"a": "gaussian", "b": "gaussian"}), CoBa(warmup=2, history=8)):
        loss = MultiTaskLoss(["a", "b"], weighting)
        shared = torch.nn.Parameter(torch.ones(3))

        def once(loss=loss, shared=shared):
            loss({"a": (shared**2).sum(), "b": (shared - 2.0).abs().sum()}).backward()
            loss.update("step")

        assert _garbage(once) == []


def test_every_registered_objective_is_tried_by_name():
    """Those that take logits and classes, as they are made without arguments."""
    tried = 0
    x, y = torch.randn(16, 4), torch.arange(16) % 4
    for name in registry.available():
        try:
            objective = create(name)
            objective(x.clone().requires_grad_(), y)
        except (TypeError, ValueError):
            continue  # asks for more

        def once(objective=objective):
            objective(x.clone().requires_grad_(), y).backward()

        assert _garbage(once) == [], name
        tried += 1
    assert tried > 12


def _garbage(once):
    """Tensors that only the collector frees after a call."""
    once()  # what is made once and for all
    gc.disable()
    gc.freeze()  # all that is there already, so that only the call is looked through
    before = gc.get_debug()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        once()
        gc.collect()
        return [type(found) for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(before)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
