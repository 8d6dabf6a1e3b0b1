"""Numbers that AdaWAC's authors' code returns: the adawac cases of tests/golden/core_dro_instance.json."""

import json
from pathlib import Path

import pytest
import torch

from reweigh.losses import AdaWACLoss

DATA = json.loads((Path(__file__).parent / "golden" / "core_dro_instance.json").read_text())
CASES = {case["id"]: case for case in DATA["cases"] if case["config"]["ref"] == "adawac"}


def column(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def drive(case, dtype):
    """Objective, losses, weights and inputs of every step; dice is added outside, as the docstring says."""
    config, inputs = case["config"], case["inputs"]
    size = len(inputs["ce"][0])
    objective = AdaWACLoss(size, lr=config["lr_w"])
    objective.weighting.logit.rows = objective.weighting.logit.rows.to(dtype)  # the numbers are double precision
    index = torch.arange(size)
    for step in range(len(inputs["ce"])):
        ce, dac, dice = (column(inputs[name][step]) for name in ("ce", "dac", "dice"))
        weights = objective.weights(ce, dac, index=index)
        ratio = config["dice_ratio"]
        value = ratio * dice.mean() + (1 - ratio) * objective(ce, dac, index=index)
        objective.update("step")
        yield value, weights, (ce, dac, dice)


def test_every_case_has_a_test():
    assert sorted(CASES) == ["adawac_default", "adawac_overflow"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=str)
def test_every_step_is_the_authors(dtype, tolerance):
    """In double precision to the last digits; with the table in single precision, as it is, to its own."""
    case = CASES["adawac_default"]
    expected = case["expected"]
    steps = list(drive(case, dtype))
    for (_, weights, _), wanted in zip(steps, expected["weights_trace"], strict=True):
        torch.testing.assert_close(weights, torch.tensor(wanted, dtype=torch.float64), rtol=tolerance, atol=0)
    value, _, inputs = steps[-1]
    torch.testing.assert_close(value.item(), expected["loss"], rtol=tolerance, atol=0)
    for slope, name in zip(torch.autograd.grad(value, inputs), ("ce", "dac", "dice"), strict=True):
        wanted = torch.tensor(expected["grad"][name][-1], dtype=torch.float64)
        torch.testing.assert_close(slope, wanted, rtol=10 * tolerance, atol=1e-12)


def test_the_closed_form_is_the_authors():
    """The logistic function of the summed differences, in double precision."""
    case = CASES["adawac_default"]
    gaps = torch.tensor(case["inputs"]["ce"], dtype=torch.float64) - torch.tensor(
        case["inputs"]["dac"], dtype=torch.float64
    )
    wanted = torch.tensor(case["expected"]["weights_trace"], dtype=torch.float64)[..., 0]
    torch.testing.assert_close(gaps.cumsum(0).sigmoid(), wanted, rtol=1e-12, atol=0)


def test_large_losses_do_not_overflow():
    """Want: the sigmoid of the accumulated difference."""
    ((value, weights, inputs),) = drive(CASES["adawac_overflow"], torch.float32)
    assert weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert value.item() == pytest.approx(400.0)
    for slope in torch.autograd.grad(value, inputs):
        assert slope.isfinite().all()
