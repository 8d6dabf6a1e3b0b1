"""Logits of many classes: one array of their size, and the numbers and gradients of the plain formula."""

import math

import pytest
import torch
from gradients import agree, peak, slopes
from torch.nn import functional

from reweigh.losses import CausalLM, CrossEntropy, Objective
from reweigh.losses.kernels import dense
from reweigh.weighting import KLDRO, TLDR, CVaR, Focal, InverseClassLoss, PowerLawDecay

F64 = torch.float64
CLASSES = 300
BY = [
    None,
    Focal(2.0),
    PowerLawDecay([1000.0 / (v + 1) for v in range(CLASSES)], alpha=0.5) * TLDR(),
    KLDRO(1.0),
    CVaR(0.4),
    Focal(1.0).normalize(),
    InverseClassLoss(CLASSES),
]


@pytest.fixture
def small(monkeypatch):
    """Small batches go the lean way too, a few rows at a time."""
    monkeypatch.setattr(dense, "SMALL", 0)
    monkeypatch.setattr(dense, "_BLOCK", 7 * CLASSES)


def case(dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3.0 * torch.randn(4, 9, CLASSES, generator=generator, dtype=F64)).to(dtype)
    labels = torch.randint(CLASSES, (4, 9), generator=generator)
    return logits.requires_grad_(), labels.masked_fill(torch.rand(4, 9, generator=generator) < 0.25, -100)


def plainly(objective, logits, *rest, **meta):
    """The same without the kernel."""
    before, dense.SMALL = dense.SMALL, 2**60
    try:
        return slopes(objective, (logits, *rest), **meta)
    finally:
        dense.SMALL = before


@pytest.mark.parametrize("by", BY, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "weight": torch.linspace(0.5, 2.0, CLASSES).tolist()}]
)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_equals_the_plain_formula(small, by, options, dtype):
    logits, labels = case(dtype)
    meta = {"sample_weight": torch.tensor([1.0, 2.0, 0.0, 0.5])}
    for objective, inputs in (
        (Objective(CausalLM(**options), by), (logits, labels)),
        (Objective(CausalLM(shift=False, **options), by), (logits, labels)),
        (Objective(CrossEntropy(**options), by), (logits.detach().flatten(0, 1).requires_grad_(), labels.flatten())),
    ):
        given = meta if inputs[0].ndim == 3 else {"sample_weight": meta["sample_weight"].repeat_interleave(9)}
        assert objective.criterion.lean(*inputs)
        found = slopes(objective.eval(), inputs, **given)
        agree(plainly(objective, *inputs, **given), found, 1e-11 if dtype == F64 else 1e-5)


def test_what_torch_says(small):
    logits, labels = case()
    wanted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = wanted, torch.autograd.grad(wanted, logits)
    agree(expected, slopes(Objective(CausalLM()), (logits, labels)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(small, dtype):
    logits, labels = case(dtype)
    objective = Objective(CausalLM(), Focal(2.0))
    found = slopes(objective, (logits, labels))
    exact = logits.detach().float().requires_grad_()
    wanted = plainly(objective, exact, labels)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    assert found[1][0].dtype == dtype
    torch.testing.assert_close(found[1][0].float(), wanted[1][0].to(dtype).float(), rtol=0, atol=1e-7)


def test_masked_rows_may_hold_anything(small):
    logits, labels = case()
    clean = slopes(Objective(CausalLM(), Focal(1.0)), (logits, labels))
    dirty = logits.detach().clone()
    away = functional.pad(labels[:, 1:] == -100, (0, 1), value=True)
    for garbage in (math.nan, math.inf, -math.inf):
        dirty[away] = garbage
        value, (slope,) = slopes(Objective(CausalLM(), Focal(1.0)), (dirty.requires_grad_(), labels))
        torch.testing.assert_close(value, clean[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(slope, clean[1][0], rtol=1e-13, atol=1e-16)
        assert not slope[away].any()
        dirty = dirty.detach().clone()


def test_taken_twice_and_differentiated_twice(small):
    logits, labels = case()
    objective = Objective(CausalLM(), Focal(2.0))
    value = objective(logits, labels)
    first = torch.autograd.grad(value, logits, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(value, logits, retain_graph=True)[0], first, rtol=1e-12, atol=1e-16)
    toward = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=F64)

    def along(loss):
        (slope,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad((slope * toward).sum(), logits)[0]

    found = along(objective(logits, labels))
    before, dense.SMALL = dense.SMALL, 2**60
    wanted = along(objective(logits, labels))
    dense.SMALL = before
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_a_changed_input_is_noticed(small):
    logits, labels = case()
    scaled = logits * 1.0
    value = Objective(CausalLM())(scaled, labels)
    scaled.data_ptr()
    with torch.no_grad():
        scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("by", [None, Focal(2.0) * TLDR(), KLDRO(1.0), CVaR(0.3)], ids=str)
def test_memory_is_one_array_of_the_logits_size(by):
    """For local weights and for those that compare terms; plain cross-entropy takes three."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 64, 4000, generator=generator, requires_grad=True)
    labels = torch.randint(4000, (4, 64), generator=generator)
    size = logits.numel() * 4
    objective = Objective(CausalLM(), by)
    assert peak(lambda: objective(logits, labels).backward()) < 1.05 * size
    assert peak(lambda: functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()) > 1.9 * size


def test_evaluation_holds_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 256, 4000, generator=generator), torch.randint(4000, (4, 256), generator=generator)
    with torch.no_grad():
        assert peak(lambda: Objective(CausalLM(), Focal(1.0))(logits, labels)) < 0.2 * logits.numel() * 4


def test_who_goes_the_plain_way():
    logits = torch.randn(64, 4000)
    assert dense.lean(logits)
    assert not dense.lean(logits[:8])
    assert not dense.lean(torch.randn(4000, 64))
    assert not dense.lean(logits.to("meta"))
    labels = torch.zeros(64, dtype=torch.long)
    assert not CrossEntropy().lean(logits, torch.rand(64, 4000))
    seen = []
    torch.func.grad(lambda x: (seen.append(dense.lean(x)), functional.cross_entropy(x, labels))[1])(logits)
    assert seen == [False]
