"""Every case of core_asl.json: numbers of the authors' code where it is right, the wanted behaviour where it is not."""

import json
from pathlib import Path

import pytest
import torch

from reweigh.losses import AsymmetricLoss, AsymmetricSingleLabelLoss, BinaryCrossEntropy, Objective
from reweigh.weighting import AsymmetricFocal

GOLDEN = Path(__file__).parent / "golden"
CASES = {case["id"]: case for case in json.loads((GOLDEN / "core_asl.json").read_text())["cases"]}
ODD = {
    "ml_soft", "ml_extreme_nograd", "ml_gammapos_half_extreme", "ml_target_minus1", "ml_lowprec_right_float16",
    "ml_lowprec_wrong_bfloat16", "sl_ignore",
}  # fmt: skip


def built(case, **other):
    config = case["config"]
    if config["cls"] == "ASLSingleLabel":
        return AsymmetricSingleLabelLoss(
            config["gamma_neg"], config["gamma_pos"], label_smoothing=config["eps"], reduction=config["reduction"]
        )
    return AsymmetricLoss(
        config["gamma_neg"],
        config["gamma_pos"],
        clip=config["clip"],
        detach=config["disable_torch_grad_focal_loss"],
        **{"reduction": "sum", **other},
    )


def run(loss, case, dtype=torch.float64, whole=False):
    logits = torch.tensor(case["inputs"]["logits"], dtype=dtype, requires_grad=True)
    targets = torch.tensor(case["inputs"]["targets"], dtype=torch.int64 if whole else torch.float64)
    value = loss(logits, targets)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value, grad, targets


def close(found, wanted, rtol):
    torch.testing.assert_close(found.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("whole", [False, True], ids=["floating targets", "integer targets"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ODD])
def test_the_authors_numbers(name, whole):
    case = CASES[name]
    value, grad, _ = run(built(case), case, whole=whole or name.startswith("sl_"))
    close(value, case["expected"]["loss"], 1e-9)
    close(grad, case["expected"]["grad"]["logits"], 1e-8)


def test_odd_cases_are_those_that_the_file_marks():
    marked = {
        name
        for name, case in CASES.items()
        if {"want", "quirk", "dtype"} & case.keys()
        or case["expected"].get("reference_nan")
        or "reference_error" in case["expected"]
    }
    assert marked == ODD


def test_soft_labels_are_the_sum_of_two_terms():
    case = CASES["ml_soft"]
    value, grad, y = run(built(case), case)
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64, requires_grad=True)
    each = built(case, reduction="none")
    apart = (y * each(logits, torch.ones_like(y)) + (1 - y) * each(logits, torch.zeros_like(y))).sum()
    torch.testing.assert_close(value, apart, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(apart, logits)[0], rtol=1e-12, atol=1e-15)
    assert abs(value.item() - case["expected"]["loss"]) > 0.1


def test_the_authors_soft_labels_are_a_composition_too():
    case = CASES["ml_soft"]
    mixed = Objective(BinaryCrossEntropy(shift=0.05), AsymmetricFocal(4, 1, detach=False), "sum")
    value, grad, _ = run(mixed, case)
    close(value, case["expected"]["loss"], 1e-9)
    close(grad, case["expected"]["grad"]["logits"], 1e-8)


def test_wrong_positives_never_die():
    case = CASES["ml_extreme_nograd"]
    value, grad, _ = run(built(case, reduction="none"), case)
    torch.testing.assert_close(value[0, [1, 3]], torch.tensor([50.0, 100.0], dtype=torch.float64))
    torch.testing.assert_close(grad[0, [1, 3]], torch.tensor([-1.0, -1.0], dtype=torch.float64))
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ml_gammapos_half_extreme", "ml_lowprec_right_float16", "ml_lowprec_wrong_bfloat16"])
def test_finite_where_the_authors_are_not(name, dtype):
    value, grad, _ = run(built(CASES[name]), CASES[name], dtype)
    exact, slope, _ = run(built(CASES[name]), CASES[name])
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(value.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-6)
    torch.testing.assert_close(grad.double(), slope, rtol=5e-2 if dtype == torch.bfloat16 else 5e-3, atol=1e-3)


def test_unknown_labels_count_for_nothing():
    case = CASES["ml_target_minus1"]
    value, grad, targets = run(built(case), case)
    known = targets != -1
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
    torch.testing.assert_close(value, built(case)(logits, targets.clamp_min(0), mask=known))
    assert (grad[~known] == 0).all()
    assert (~known).any()


def test_ignored_rows_are_dropped():
    case = CASES["sl_ignore"]
    value, grad, target = run(built(case), case, whole=True)
    kept = target != -100
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
    torch.testing.assert_close(value, built(case)(logits[kept], target[kept]))
    assert (grad[~kept] == 0).all()
