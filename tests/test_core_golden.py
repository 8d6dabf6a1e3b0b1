"""Numbers that published implementations return: tests/golden/core_focal.json, read by its own rules."""

import json
import math
from pathlib import Path

import pytest
import torch
from references import focal as reference

from reweigh.losses import FocalLoss, SigmoidFocalLoss
from reweigh.losses.functional import sigmoid_focal_loss, sigmoid_focal_loss_star

DATA = json.loads((Path(__file__).parent / "golden" / "core_focal.json").read_text())
CASES = {case["id"]: case for case in DATA["cases"]}
TO_MATCH = [
    name
    for name, case in CASES.items()
    if not ({"want", "quirk", "dtype"} & case.keys())
    and not case["expected"].get("reference_nan")
    and "reference_error" not in case["expected"]
]
OTHERS = {
    "sig_extreme_g05",
    "sig_empty_mean",
    "sig_lowprec_float32",
    "sig_lowprec_g05_float16",
    "smx_one_class_g05",
    "smx_ignore_minus100",
}


def run(case, dtype=torch.float64):
    """The loss and the gradient of its sum, by the library."""
    config, inputs = case["config"], case["inputs"]
    logits = torch.tensor(inputs["logits"], dtype=dtype, requires_grad=True)
    if config["ref"] == "softmax":
        loss = FocalLoss(config["gamma"], alpha=config["alpha"], reduction=config["reduction"])(
            logits, torch.tensor(inputs["targets"])
        )
    else:
        targets = torch.tensor(inputs["targets"], dtype=dtype)
        alpha = None if config["alpha"] == -1 else config["alpha"]
        if config["ref"] == "tv":
            loss = SigmoidFocalLoss(config["gamma"], alpha=alpha, reduction=config["reduction"])(logits, targets)
        else:
            assert (config["ref"], alpha, config["reduction"]) == ("star", None, "none")
            loss = sigmoid_focal_loss_star(logits, targets, config["gamma"])
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


def wanted(nested):
    """Nested lists with "nan" and "inf" as strings, as a tensor."""
    numbers = [wanted(item) for item in nested] if isinstance(nested, list) else float(nested)
    return torch.stack(numbers) if isinstance(numbers, list) else torch.tensor(numbers, dtype=torch.float64)


def test_every_case_has_a_test():
    assert len(DATA["cases"]) == len(CASES) == 16
    assert set(TO_MATCH) | OTHERS == set(CASES)
    assert not set(TO_MATCH) & OTHERS


@pytest.mark.parametrize("name", TO_MATCH)
def test_matches_the_published_code(name):
    case = CASES[name]
    loss, grad = run(case)
    assert case["wrt"] == ["logits"]
    torch.testing.assert_close(loss, wanted(case["expected"]["loss"]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, wanted(case["expected"]["grad"]["logits"]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in TO_MATCH if CASES[name]["config"]["ref"] == "tv"])
def test_functional_twin_equals_the_class(name):
    config, inputs = CASES[name]["config"], CASES[name]["inputs"]
    logits, targets = (torch.tensor(inputs[key], dtype=torch.float64) for key in ("logits", "targets"))
    alpha = None if config["alpha"] == -1 else config["alpha"]
    found = sigmoid_focal_loss(logits, targets, config["gamma"], alpha=alpha, reduction=config["reduction"])
    assert torch.equal(found, run(CASES[name])[0])


@pytest.mark.parametrize("name", TO_MATCH)
def test_the_naive_reference_agrees_too(name):
    """The references of the other tests are themselves right."""
    case = CASES[name]
    config, inputs = case["config"], case["inputs"]
    alpha = None if config["alpha"] == -1 else config["alpha"]
    if config["ref"] == "softmax":
        pairs = zip(inputs["logits"], inputs["targets"], strict=True)
        terms = [reference.softmax_focal(x, y, config["gamma"], alpha) for x, y in pairs]
    else:
        flat = [torch.tensor(inputs[key], dtype=torch.float64).flatten().tolist() for key in ("logits", "targets")]
        pairs = zip(*flat, strict=True)
        if config["ref"] == "tv":
            terms = [reference.sigmoid_focal(x, y, config["gamma"], alpha) for x, y in pairs]
        else:
            terms = [reference.focal_star(x, y, config["gamma"]) for x, y in pairs]
    terms = torch.tensor(terms, dtype=torch.float64)
    expected = wanted(case["expected"]["loss"])
    found = terms.mean() if config["reduction"] == "mean" else terms.reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_saturated_gamma_half_is_finite():
    """Want: finite; the gradient tends to 0 for right answers and to +-alpha_t for wrong ones."""
    case = CASES["sig_extreme_g05"]
    loss, grad = run(case)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    expected = torch.tensor([[0.0, -0.25, 0.0, -0.25], [0.75, 0.0, 0.75, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(loss, wanted(case["expected"]["loss"]), rtol=1e-9, atol=1e-12)


def test_empty_mean_is_zero_and_attached():
    logits = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    loss = SigmoidFocalLoss(2, alpha=0.25, reduction="mean")(logits, torch.zeros(0, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.shape == (0,)
    assert math.isnan(float(CASES["sig_empty_mean"]["expected"]["loss"]))


def test_one_class_gives_zero():
    """Want: 0 loss, 0 gradient."""
    loss, grad = run(CASES["smx_one_class_g05"])
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_ignored_rows_leave_the_mean():
    """Want: ignored rows give 0 loss and 0 gradient and leave the mean."""
    case = CASES["smx_ignore_minus100"]
    loss, grad = run(case)
    kept = [i for i, label in enumerate(case["inputs"]["targets"]) if label != -100]
    assert len(kept) == 4
    removed = {
        **case,
        "inputs": {key: [rows[i] for i in kept] for key, rows in case["inputs"].items()},
    }
    alone, alone_grad = run(removed)
    torch.testing.assert_close(loss, alone, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(grad[kept], alone_grad, rtol=1e-12, atol=1e-15)
    assert torch.equal(grad[2], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(grad[4], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["sig_lowprec_float32", "sig_lowprec_g05_float16"])
def test_low_precision_keeps_confident_right_answers(name):
    """Finite everywhere, and the relative error of the loss against float64 stays below 1e-5 (float32 inside)."""
    case = CASES[name]
    dtype = getattr(torch, case["dtype"])
    loss, grad = run(case, dtype)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    exact, exact_grad = run(case)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-37)
    if dtype == torch.float32:
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-37)
