"""The long sweep by loops: every combination of dtype, reduction, shape, weights, ignored places, target, smoothing."""

import itertools

import pytest
import torch
from references import focal as reference
from references import reductions as naive
from torch import nn

from reweigh.losses import FocalLoss, SigmoidFocalLoss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*all targets of a batch have the same class"),
]

F64 = torch.float64
# against loops in float64 on the same rounded input: what float32 arithmetic leaves over
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
SHAPES = [(4,), (5, 4), (3, 4, 2), (2, 4, 2, 2)]
WEIGHTS = ["none", "class", "sample", "both"]
IGNORED = ["none", "some", "all"]
REDUCTIONS = ["none", "mean", "sum", "weighted_mean"]
TABLE = [0.5, 2.0, 1.0, 0.25]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def reduced(reduction, loss, weight, valid, times, norm):
    rows = [[list(row) for row in part.double().reshape(1, -1).tolist()] for part in (loss, weight, valid, times, norm)]
    if reduction == "none":
        return (valid * times * weight * loss).to(F64)
    if reduction == "sum":
        return torch.tensor(naive.total(*rows[:4]), dtype=F64)
    return torch.tensor(getattr(naive, reduction)(*rows), dtype=F64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(device, dtype, gamma, shape):
    """192 combinations in each of 48 tests."""
    dim = 1 if len(shape) > 1 else 0
    places = shape[:dim] + shape[dim + 1 :]
    ones = torch.ones(places, dtype=F64)
    for reduction, weighed, ignored, soft, smoothing in itertools.product(
        REDUCTIONS, WEIGHTS, IGNORED, [False, True], [0.0, 0.1]
    ):
        x = (torch.randn(shape, dtype=F64) * 3).to(dtype)
        y = torch.randint(4, places)
        valid = {"none": ones > 0, "some": torch.rand(places) < 0.6, "all": ones < 0}[ignored]
        table = TABLE if weighed in ("class", "both") else None
        times = torch.rand(places, dtype=dtype).to(F64) if weighed in ("sample", "both") else ones
        loss = FocalLoss(gamma, weight=table, label_smoothing=smoothing, reduction=reduction).to(device)
        meta = {"sample_weight": times.to(device)} if weighed in ("sample", "both") and places else {}
        if not places:
            times = ones
        if soft:
            target = nn.functional.one_hot(y, 4).movedim(-1, dim).to(dtype)
            meta["mask"] = valid.to(device)
        else:
            target = torch.where(valid, y, torch.full_like(y, -100))
        found = loss(x.to(device).requires_grad_(), target.to(device), **meta)
        case = (reduction, weighed, ignored, soft, smoothing)
        assert found.dtype == (F64 if dtype == F64 else torch.float32), case
        flat = x.double().movedim(dim, -1).reshape(-1, 4).tolist()
        plain, modulated = [], []
        for row, label in zip(flat, y.reshape(-1).tolist(), strict=True):
            plain.append(reference.softmax_focal(row, label, 0.0, None, table, smoothing))
            modulated.append(reference.softmax_focal(row, label, gamma, None, table, smoothing))
        plain, modulated = (torch.tensor(v, dtype=F64).reshape(places) for v in (plain, modulated))
        weight = torch.where(plain > 0, modulated / plain.clamp_min(1e-300), ones)
        norm = torch.tensor(TABLE, dtype=F64)[y] if table is not None and not soft else ones
        expected = reduced(reduction, plain, weight, valid.to(F64), times, norm)
        tol = TOLERANCE[dtype]
        torch.testing.assert_close(
            found.detach().cpu().double(), expected, rtol=tol, atol=tol, msg=lambda m, c=case: f"{c} {m}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sigmoid(device, dtype, gamma, shape):
    """96 combinations in each of 48 tests."""
    ones = torch.ones(shape, dtype=F64)
    for reduction, weighed, ignored, soft, alpha in itertools.product(
        REDUCTIONS, ["none", "sample"], IGNORED, [False, True], [None, 0.25]
    ):
        x = (torch.randn(shape, dtype=F64) * 3).to(dtype)
        y = (torch.rand(shape, dtype=F64) if soft else torch.randint(2, shape)).to(dtype)
        valid = {"none": ones > 0, "some": torch.rand(shape) < 0.6, "all": ones < 0}[ignored]
        times = torch.rand(shape, dtype=dtype).to(F64) if weighed == "sample" else ones
        meta = {"sample_weight": times.to(device)} if weighed == "sample" else {}
        target = torch.where(valid, y, torch.full_like(y, -100))
        loss = SigmoidFocalLoss(gamma, alpha=alpha, reduction=reduction).to(device)
        found = loss(x.to(device).requires_grad_(), target.to(device), **meta)
        pairs = list(zip(x.double().reshape(-1).tolist(), y.double().reshape(-1).tolist(), strict=True))
        plain = torch.tensor([reference.sigmoid_focal(a, b, 0.0) for a, b in pairs], dtype=F64).reshape(shape)
        modulated = torch.tensor([reference.sigmoid_focal(a, b, gamma, alpha) for a, b in pairs], dtype=F64).reshape(
            shape
        )
        expected = reduced(reduction, plain, modulated / plain, valid.to(F64), times, ones)
        tol = TOLERANCE[dtype]
        case = (reduction, weighed, ignored, soft, alpha)
        torch.testing.assert_close(
            found.detach().cpu().double(), expected, rtol=tol, atol=tol, msg=lambda m, c=case: f"{c} {m}"
        )
