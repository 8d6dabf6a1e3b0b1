"""Numbers that the authors of LDR and ALDR get: tests/golden/core_dro_label.json."""

import json
from pathlib import Path

import pytest
import torch

from reweigh import ALDRLoss, LDRLoss
from reweigh.losses import functional

CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "core_dro_label.json").read_text())["cases"]
}
CE = ["ce_v1"]
LDR = ["ldr_class_default", "ldr_lam_small"]
ALDR = ["aldr_script", "aldr_softplus", "aldr_extreme"]
FLOAT32 = torch.finfo(torch.float32).eps  # what a table keeps of a number


def read(case):
    inputs = case["inputs"]
    return torch.tensor(inputs["logits"], dtype=torch.float64, requires_grad=True), torch.tensor(inputs["labels"])


def close(loss, logits, case, value=1e-9, slope=1e-8):
    expected = case["expected"]
    torch.testing.assert_close(loss.item(), expected["loss"], rtol=value, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    wanted = torch.tensor(expected["grad"]["logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, wanted, rtol=slope, atol=1e-12)


def test_no_case_is_left_out():
    assert set(CASES) == {*CE, *LDR, *ALDR, "ldr_all_very_negative"}


@pytest.mark.parametrize("name", CE)
def test_cross_entropy_less_the_logarithm_of_the_number_of_classes(name):
    logits, target = read(CASES[name])
    close(LDRLoss()(logits, target), logits, CASES[name])


@pytest.mark.parametrize("name", LDR)
def test_ldr(name):
    case = CASES[name]
    logits, target = read(case)
    given = {"margin": case["config"]["threshold"], "scores": "softplus"}
    close(LDRLoss(case["config"]["Lambda"], **given)(logits, target), logits, case)
    close(functional.ldr_loss(logits, target, case["config"]["Lambda"], **given), logits, case)


def test_ldr_where_every_softplus_vanishes():
    """The authors' code divides 0 by 0; equal logits are equal scores of 1, whatever they are."""
    case = CASES["ldr_all_very_negative"]
    logits, target = read(case)
    loss = LDRLoss(case["config"]["Lambda"], margin=case["config"]["threshold"], scores="softplus")
    value = loss(logits, target)
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.isfinite().all()
    assert grad[0, 0] < 0
    torch.testing.assert_close(value, loss(torch.zeros_like(logits), target), rtol=1e-12, atol=0)


def aldr(case):
    config = case["config"]
    return {
        "temperature": config["Lambda"],
        "alpha": config["alpha"],
        "margin": config["threshold"],
        "scores": "softplus" if config["softplus"] else "abs",
    }


@pytest.mark.parametrize("name", ALDR)
def test_aldr_with_temperatures_that_the_caller_keeps(name):
    """The loss is that of the last visit, at the temperatures after it."""
    case = CASES[name]
    logits, target = read(case)
    given = aldr(case)
    about = {key: value for key, value in given.items() if key != "margin"}
    held = torch.full((len(target),), given["temperature"], dtype=torch.float64)
    for wanted in case["expected"]["lambda_trace"]:
        before, held = held, functional.adaptive_temperatures(logits, held, **about)
        torch.testing.assert_close(held, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=0)
    close(functional.aldr_loss(logits, target, before, **given), logits, case)


@pytest.mark.parametrize("name", ALDR)
def test_aldr_with_its_table(name):
    """The same to the precision of the table, which is the authors' own."""
    case = CASES[name]
    logits, target = read(case)
    given = aldr(case)
    loss = ALDRLoss(len(target), **given)
    index = torch.arange(len(target))
    for step, wanted in enumerate(case["expected"]["lambda_trace"]):
        value = loss(logits, target, index=index)
        loss.update("step", index=step)
        found = given["temperature"] * loss.criterion.table.rows.squeeze(1).double()
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=FLOAT32, atol=0)
    close(value, logits, case, value=FLOAT32, slope=FLOAT32)
