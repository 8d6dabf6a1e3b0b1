"""What the authors' group DRO returns at every step: tests/golden/core_dro_group.json, read by its own rules."""

import json
import math
from pathlib import Path

import pytest
import torch

from reweigh.losses import FromLoss, Objective
from reweigh.weighting import GroupCVaR, GroupDRO

DATA = json.loads((Path(__file__).parent / "golden" / "core_dro_group.json").read_text())
CASES = {case["id"]: case for case in DATA["cases"]}
MATCHED = ["default", "adj2", "normalize", "btl"]
OTHERS = ["huge", "btl_alpha1"]


def built(case):
    config = case["config"]
    groups = len(config["group_counts"])
    common = {
        "group_counts": config["group_counts"],
        "adjustment": 0.0 if config["adj"] is None else config["adj"],
        "smoothing": config["gamma"],
        "cadence": "forward",
    }
    if config["btl"]:
        return GroupCVaR(groups, alpha=config["alpha"], minimum=config["min_var_weight"], **common)
    return GroupDRO(
        groups,
        step_size=config["step_size"],
        normalize_losses=config["normalize_loss"],
        absent="decay",
        **common,
    )


def drive(case):
    """Value and gradient at each step, and the state after it."""
    weighting = built(case)
    objective = Objective(FromLoss(lambda losses, zero: losses + zero), weighting)
    for losses, group in zip(case["inputs"]["losses"], case["inputs"]["group"], strict=True):
        losses = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
        value = objective(losses, torch.zeros_like(losses), group=torch.tensor(group))
        (slope,) = torch.autograd.grad(value, losses)
        objective.update("step")
        yield value.detach(), slope, weighting


def test_every_case_has_a_test():
    assert sorted(MATCHED + OTHERS) == sorted(CASES)
    for name in MATCHED:
        assert not {"want", "dtype"} & CASES[name].keys()


@pytest.mark.parametrize("name", MATCHED)
def test_every_step_is_the_authors(name):
    case = CASES[name]
    config, rows = case["config"], case["expected"]["grad"]["losses"]
    counts = torch.tensor(config["group_counts"], dtype=torch.float64)
    added = torch.zeros_like(counts) if config["adj"] is None else torch.tensor(config["adj"]) / counts.sqrt()
    for step, (value, slope, weighting) in enumerate(drive(case)):
        wanted = case["expected"]["trace"][step]
        q = weighting.shares()
        if not config["btl"]:  # the authors' greedy weights are not kept
            torch.testing.assert_close(q, torch.tensor(wanted["adv_probs"], dtype=torch.float64), rtol=1e-9, atol=1e-12)
        running = torch.tensor(wanted["exp_avg_loss"], dtype=torch.float64)
        torch.testing.assert_close(weighting.get_buffer("group_loss"), running, rtol=1e-9, atol=1e-12)
        # their value contains the adjustment, ours does not
        torch.testing.assert_close(value.item() + (q * added).sum().item(), wanted["loss"], rtol=1e-9, atol=1e-12)
        if step == len(rows) - 1:
            torch.testing.assert_close(slope, torch.tensor(rows[step], dtype=torch.float64), rtol=1e-8, atol=1e-12)


def test_huge_losses_are_finite():
    """Want: a log-space update. All losses are equal, so q stays uniform."""
    case = CASES["huge"]
    (found,) = drive(case)
    value, slope, weighting = found
    assert value.item() == pytest.approx(1e4, rel=1e-12)
    assert slope.isfinite().all()
    torch.testing.assert_close(weighting.shares(), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert math.isnan(float(case["expected"]["loss"]))


def test_alpha_one_is_plain_training():
    """Want: ERM, where the authors' code runs off the end of the list: groups count by their share of the data."""
    case = CASES["btl_alpha1"]
    share = torch.tensor(case["config"]["group_counts"], dtype=torch.float64)
    share = share / share.sum()
    for _, _, weighting in drive(case):
        torch.testing.assert_close(weighting.shares(), share)
    assert "IndexError" in case["expected"]["reference_error"]
