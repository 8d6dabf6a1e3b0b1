"""Numbers that the authors of the self-adjusting dice loss get: tests/golden/core_dice.json, read by its own rules."""

import json
import math
from pathlib import Path

import pytest
import torch

from reweigh import HardNegatives, Objective, Overlap, SelfAdjustingDice

DATA = json.loads((Path(__file__).parent / "golden" / "core_dice.json").read_text())
CASES = {case["id"]: case for case in DATA["cases"]}
OTHERS = {
    "bin_smooth0_allneg_sat",
    "bin_ohem",
    "bin_extreme_alpha001",
    "bin_docstring_1d",
    "mc_default",
    "mc_ohem",
    "mc_two_class_f32",
}


def plain(case):
    """A case whose number is to be matched."""
    expected = case["expected"]
    odd = {"want", "quirk", "dtype"} & case.keys() or expected.get("reference_nan") or "reference_error" in expected
    return not odd


PLAIN = [name for name, case in CASES.items() if plain(case)]
pytestmark = pytest.mark.filterwarnings("ignore:SelfAdjustingDice. with alpha")


def objective(case, elements=None, weighting=None):
    """The authors' binary mode is set-level over the batch, their multi-class mode per example."""
    config, inputs = case["config"], case["inputs"]
    smooth, alpha, square = config["smooth"], config["alpha"], config["square_denominator"]
    first = inputs["input"][0]
    if not isinstance(first, list) or len(first) == 1:
        criterion = Overlap(
            activation="sigmoid",
            over="batch",
            focus=alpha,
            square=square,
            smooth_nr=smooth / 2,
            smooth_dr=smooth / 2,
            empty="keep",
            elements=elements,
        )
    else:
        activation = "softmax" if config["with_logits"] else "none"
        criterion = SelfAdjustingDice(alpha, smooth=smooth, square=square, activation=activation)
    return Objective(criterion, weighting, config["reduction"])


def run(case, dtype=torch.float64, **parts):
    inputs, meta = case["inputs"], {}
    logits = torch.tensor(inputs["input"], dtype=dtype, requires_grad=True)
    target = torch.tensor(inputs["target"])
    if case["config"].get("index_label_position") is False:
        target = target.to(dtype)
    if "mask" in inputs:
        meta["mask"] = torch.tensor(inputs["mask"]).bool().reshape(-1)
        if len(inputs["input"][0]) > 1:
            meta["num_items"] = len(inputs["input"])  # the authors divide by masked examples as well
    loss = objective(case, **parts)(logits, target, **meta)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name):
    loss, grad = run(CASES[name])
    expected = CASES[name]["expected"]
    wanted = torch.tensor(expected["loss"], dtype=torch.float64)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)
    slope = torch.tensor(expected["grad"]["input"], dtype=torch.float64)
    torch.testing.assert_close(grad, slope, rtol=1e-8, atol=1e-12)


def test_every_case_has_a_test():
    assert len(DATA["cases"]) == len(CASES) == 15
    assert {name for name, case in CASES.items() if not plain(case)} == OTHERS


def test_nothing_predicted_and_nothing_there_is_zero():
    loss, grad = run(CASES["bin_smooth0_allneg_sat"])
    assert loss.item() == 0.0
    assert (grad == 0).all()


def test_extreme_logits_have_the_exact_value():
    """In float64 the authors' factor is 0 where (1 - p)**alpha is still 0.61 at a logit of 50."""
    case = CASES["bin_extreme_alpha001"]
    loss, grad = run(case)
    above, below = 1.0, 1.0  # smooth is 1
    for (x,), (y,) in zip(case["inputs"]["input"], case["inputs"]["target"], strict=True):
        log_p = -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
        log_q = log_p - x
        q = math.exp(0.01 * log_q + log_p)
        above, below = above + 2 * q * y, below + q * q + y
    assert loss.item() == pytest.approx(1 - above / below, rel=1e-12)
    assert loss.item() == pytest.approx(0.3683, abs=1e-4)
    assert grad.isfinite().all()
    assert (grad[0] != 0).all()


def test_moderate_confidence_is_finite_in_float32():
    case = CASES["mc_two_class_f32"]
    loss, grad = run(case, torch.float32)
    exact, slope = run(case)
    assert grad.isfinite().all()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-4, atol=1e-6)


def test_the_unsquared_form_is_per_example_too():
    """The authors divide each example's numerator by the whole batch there; the golden number is another."""
    case = CASES["mc_default"]
    loss, _ = run(case)
    total = 0.0
    smooth = case["config"]["smooth"]
    p = torch.tensor(case["inputs"]["input"], dtype=torch.float64).softmax(1).tolist()
    for row, label in zip(p, case["inputs"]["target"], strict=True):
        total += sum(1 - (2 * q * (c == label) + smooth) / (q + (c == label) + smooth) for c, q in enumerate(row))
    assert loss.item() == pytest.approx(total / len(p), rel=1e-10)
    assert abs(loss.item() - case["expected"]["loss"]) > 0.1


def test_hard_negatives_are_as_many_as_asked():
    """ratio 1 keeps two negatives beside two positives; the authors' strict threshold keeps none of six here."""
    case = CASES["bin_ohem"]
    loss, grad = run(case, elements=HardNegatives(1.0))
    target = torch.tensor(case["inputs"]["target"])
    assert int(((grad != 0) & (target == 0)).sum()) == 2
    hardest = torch.tensor(case["inputs"]["input"]).masked_fill(target == 1, -math.inf).reshape(-1).topk(2).indices
    assert (grad.reshape(-1)[hardest] != 0).all()
    kept = target.reshape(-1).bool()
    kept[hardest] = True
    logits = torch.tensor(case["inputs"]["input"], dtype=torch.float64)[kept]
    torch.testing.assert_close(loss, objective(case)(logits, target[kept]), rtol=1e-12, atol=0)
    assert abs(loss.item() - case["expected"]["loss"]) > 1e-3


def test_logits_without_a_class_dimension_work():
    """The authors' docstring example, which their code cannot run."""
    case = CASES["bin_docstring_1d"]
    loss, grad = run(case)
    p = torch.tensor(case["inputs"]["input"], dtype=torch.float64).sigmoid()
    y = torch.tensor(case["inputs"]["target"], dtype=torch.float64)
    smooth = case["config"]["smooth"]
    wanted = 1 - (2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert grad.shape == (5,)
    few, _ = run(case, elements=HardNegatives(case["config"]["ohem_ratio"]))
    assert few.item() == pytest.approx(1 - (2 * p[1].item() + smooth) / (p[1].item() + 1 + smooth), rel=1e-12)


def test_hard_negatives_work_for_several_classes():
    """Where the authors' code raises: ratio 4 keeps every example of class 0."""
    case = CASES["mc_ohem"]
    everything, _ = run(case, weighting=HardNegatives(case["config"]["ohem_ratio"]))
    torch.testing.assert_close(everything, run(case)[0], rtol=1e-12, atol=0)
    none, grad = run(case, weighting=HardNegatives(0.0))
    assert (grad[torch.tensor(case["inputs"]["target"]) == 0] == 0).all()
    assert none < everything
