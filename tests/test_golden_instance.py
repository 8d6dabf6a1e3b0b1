"""Numbers of KL-DRO's formula, ABSGD's script and the LLM reweighting trainer: tests/golden/core_dro_instance.json."""

import json
import math
from pathlib import Path

import pytest
import torch

from reweigh import KLDRO, CompositionalDRO, FromLoss, LogMeanExp, LossRange, LossTerms, Objective

CASES = {
    case["id"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "core_dro_instance.json").read_text())["cases"]
}
KL = ["kl_r1", "kl_big", "kl_equal"]
RANGE = ["sample_mid", "sample_linupper", "sample_mid_kl01", "sample_equal"]
ABSGD = ["absgd_script", "absgd_overflow"]
STRATEGY = {"mid": "quadratic", "linupper": "linupper"}


def read(case):
    return torch.tensor(case["inputs"]["losses"], dtype=torch.float64, requires_grad=True)


def close(found, wanted, tol):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=tol, atol=1e-12)


def slope(value, losses):
    return torch.autograd.grad(value, losses)[0]


def test_no_case_is_left_out():
    assert {name for name in CASES if not name.startswith("adawac_")} == {*KL, *ABSGD, *RANGE}


@pytest.mark.parametrize("name", KL)
def test_kl_dro(name):
    """The reduction has the robust value, the weighting its gradient; they differ by the divergence."""
    case = CASES[name]
    losses, expected, r = read(case), case["expected"], case["config"]["r"]
    robust = Objective(FromLoss(torch.nn.Identity()), None, LogMeanExp(r))(losses)
    close(robust, expected["loss"], 1e-9)
    close(slope(robust, losses), expected["grad"]["losses"], 1e-8)
    weighted = Objective(FromLoss(torch.nn.Identity()), KLDRO(r))(losses)
    close(weighted, expected["weighted_loss"], 1e-9)
    close(slope(weighted, losses), expected["weights"], 1e-8)
    close((weighted - robust) / r, expected["kl_to_uniform"], 1e-9)


def test_absgd_once_its_missing_start_is_put_back():
    """Its average starts at 0, which leaves out (1 - g)^t times the first batch's, and is multiplied by alpha."""
    case = CASES["absgd_script"]
    config, batches = case["config"], read(case)
    g, alpha = config["drogamma"], config["abAlpha"]
    weighting = CompositionalDRO(config["myLambda"], smoothing=g)
    objective = Objective(FromLoss(torch.nn.Identity()), weighting)
    for step, wanted in enumerate(case["expected"]["trace"]):
        loss = objective(batches[step])
        objective.update("step", index=step)
        log_u = weighting.summary()["log_u"]
        if step == 0:
            first = log_u
        theirs = alpha * (log_u.exp() - (1 - g) ** (step + 1) * first.exp())
        close(theirs, wanted["u"], 1e-9)
        scale = log_u.exp() / theirs
        close(scale * loss.detach(), wanted["loss"], 1e-9)
        assert not log_u.requires_grad  # theirs keeps the graph of all steps
    close(slope(scale * loss, batches), case["expected"]["grad"]["losses"], 1e-8)
    weights = weighting.weigh(LossTerms(batches[0].detach()))
    assert weights.mean() < 1 / g


def test_absgd_does_not_overflow():
    case = CASES["absgd_overflow"]
    config, losses = case["config"], read(case)
    weighting = CompositionalDRO(config["myLambda"], smoothing=config["drogamma"])
    objective = Objective(FromLoss(torch.nn.Identity()), weighting)
    loss = objective(losses[0])
    objective.update("step")
    close(weighting.summary()["log_u"], 1000.0 - math.log(2.0), 1e-12)
    close(loss, 1000.0, 1e-12)
    close(slope(loss, losses), [[1.0, 0.0]], 1e-12)


def range_of(case):
    config = case["config"]
    return LossRange(STRATEGY[config["strategy"]], temperature=config["kl_reg"], burn_in=0)


@pytest.mark.parametrize("name", RANGE)
def test_loss_range(name):
    """Their weights add up to 1; their loss is the batch size times the sum of weight, share of tokens and loss."""
    case = CASES[name]
    losses, expected = read(case), case["expected"]
    share = torch.tensor(case["inputs"]["len_norms"], dtype=torch.float64)
    share = share / share.sum()
    objective = Objective(FromLoss(torch.nn.Identity()), range_of(case), "none")
    close(objective.weights(losses) / len(losses), expected["weights"], 1e-9)
    value = (share * objective(losses)).sum()
    close(value, expected["loss"], 1e-9)
    close(slope(value, losses), expected["grad"]["losses"], 1e-8)


@pytest.mark.parametrize("name", RANGE)
def test_loss_range_on_tokens(name):
    """The share of tokens is what a mean over tokens does by itself, each with its sequence's weight."""
    case = CASES[name]
    losses, expected = read(case), case["expected"]
    lengths = torch.tensor(case["inputs"]["len_norms"], dtype=torch.float64).long()
    weights = Objective(FromLoss(torch.nn.Identity()), range_of(case), "none").weights(losses)
    kept = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = losses[:, None].expand(kept.shape)
    value = (weights[:, None] * tokens)[kept].mean()
    close(value, expected["loss"], 1e-9)
    close(slope(value, losses), expected["grad"]["losses"], 1e-8)
