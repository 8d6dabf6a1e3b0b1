"""Numbers that published closed-form, learned and random task weightings give: the files named in ``FILES``."""

import json
import math
from pathlib import Path

import pytest
import torch

from reweigh import (
    IMTLL,
    RLW,
    STCH,
    UWO,
    UWSO,
    GeometricMean,
    LogSTCH,
    MultiTaskLoss,
    RevisedUncertainty,
    ScaleInvariant,
    Uncertainty,
)

F64 = torch.float64
TASKS = ["a", "b", "c"]
FILES = {
    name: json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())
    for name in (
        "mtl_uw",
        "mtl_uw_revised",
        "mtl_imtl_l",
        "mtl_uw_so",
        "mtl_gls",
        "mtl_scale_invariant",
        "mtl_rlw",
        "mtl_stch",
        "core_uncertainty",
    )
}
CASES = {case["id"]: case for case in FILES["core_uncertainty"]["cases"]}


def same(found, wanted):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=F64), torch.tensor(wanted, dtype=F64), rtol=1e-10, atol=1e-10
    )


def called(loss, row):
    """Total and gradient with respect to each loss, which must be the effective weight."""
    losses = {
        task: torch.tensor(value, dtype=F64, requires_grad=True) for task, value in zip(loss.tasks, row, strict=True)
    }
    total = loss(losses)
    total.backward()
    slopes = torch.stack([value.grad for value in losses.values()])
    torch.testing.assert_close(torch.stack([*loss.effective_weights(losses).values()]).double(), slopes)
    return total.detach(), slopes


def test_every_part_of_every_file_is_accounted_for():
    common = {"source", "config", "losses"}
    assert {name: set(data) - common for name, data in FILES.items() if name != "core_uncertainty"} == {
        "mtl_uw": {"caseA"},
        "mtl_uw_revised": {"records"},
        "mtl_imtl_l": {"records"},
        "mtl_uw_so": {"T10", "uw_o"},
        "mtl_gls": {"records"},
        "mtl_scale_invariant": {"records"},
        "mtl_rlw": {"records"},
        "mtl_stch": {"libmtl", "plain"},
    }
    assert [case["mu"] for case in FILES["mtl_stch"]["plain"]] == [1.0]
    assert set(CASES) == {*EXACT, "kendall_s_m800", "kendall_nan_loss", "awl_sigma0"}


# closed forms


@pytest.mark.parametrize(
    ("name", "weighting", "records"),
    [
        ("mtl_gls", GeometricMean(), FILES["mtl_gls"]["records"]),
        ("mtl_scale_invariant", ScaleInvariant(), FILES["mtl_scale_invariant"]["records"]),
        ("mtl_uw_so", UWSO(10.0), FILES["mtl_uw_so"]["T10"]),
        ("mtl_uw_so", UWO(), FILES["mtl_uw_so"]["uw_o"]),
        ("mtl_stch", STCH(1.0), FILES["mtl_stch"]["plain"][0]["records"]),
    ],
    ids=["gls", "scale_invariant", "uw_so", "uw_o", "stch"],
)
def test_closed_forms(name, weighting, records):
    loss = MultiTaskLoss(TASKS, weighting)
    assert len(records) == len(FILES[name]["losses"])
    for row, record in zip(FILES[name]["losses"], records, strict=True):
        total, slopes = called(loss, row)
        same(total, record["total"])
        same(slopes, record.get("dtotal_dloss", record.get("weights")))
        loss.update("step")


def test_gls_weights_are_not_the_ones_that_the_reference_logs():
    """Which are in the reverse order of the effective ones."""
    for record in FILES["mtl_gls"]["records"]:
        effective, logged = record["dtotal_dloss"], record["libmtl_reported_weight"]
        order = sorted(range(3), key=effective.__getitem__)
        assert order == sorted(range(3), key=logged.__getitem__, reverse=True)


def test_the_log_form_of_stch_over_its_phases():
    """One step per epoch; the reference leaves the maximum out of the value, so that gradients are what is compared."""
    config, records = FILES["mtl_stch"]["config"]["libmtl"], FILES["mtl_stch"]["libmtl"]
    loss = MultiTaskLoss(TASKS, LogSTCH(config["mu"], nadir_epoch=config["warmup_epoch"]))
    for epoch, (row, record) in enumerate(zip(FILES["mtl_stch"]["losses"], records, strict=False)):
        assert record["epoch"] == epoch
        same(called(loss, row)[1], record["dtotal_dloss"])
        loss.update("step")
        loss.update("epoch")
    assert len(records) == 10 > config["warmup_epoch"] + 1


@pytest.mark.parametrize("normalize", ["sum_to_1", "sum_to_k"])
def test_random_weights_from_given_draws(normalize):
    loss, key = MultiTaskLoss(TASKS, RLW(normalize=normalize)), {"sum_to_1": "weights", "sum_to_k": "weights_times_K"}
    for row, record in zip(FILES["mtl_rlw"]["losses"], FILES["mtl_rlw"]["records"], strict=True):
        loss.weighting.get_buffer("draw").copy_(torch.tensor(record["z"], dtype=F64))
        total, slopes = called(loss, row)
        same(slopes, record[key[normalize]])
        if normalize == "sum_to_1":
            same(total, record["total"])
            same(slopes, record["dtotal_dloss"])


# learned


def trajectory(loss, name, records, parameter, lr, value, slope):
    """The whole of it, with the parameter moved by our own gradient."""
    (learned,) = loss.parameters()
    optimizer = torch.optim.SGD(loss.parameters(), lr=lr)
    for row, record in zip(FILES[name]["losses"], records, strict=True):
        optimizer.zero_grad()
        same(learned.detach(), record[value])
        total, slopes = called(loss, row)
        same(total, record["total"])
        same(slopes, record["dtotal_dloss"])
        same(learned.grad, record[slope])
        optimizer.step()
        loss.update("step")
    assert loss.weighting.get_parameter(parameter) is learned


def test_uncertainty():
    case = FILES["mtl_uw"]["caseA"]
    loss = MultiTaskLoss(TASKS, Uncertainty(init=case["init"])).double()
    trajectory(loss, "mtl_uw", case["records"], "log_scale", case["lr"], "s", "dtotal_ds")
    assert all(record["weights_libmtl"] == record["dtotal_dloss"] for record in case["records"])


def test_imtl_l():
    loss = MultiTaskLoss(TASKS, IMTLL()).double()
    trajectory(loss, "mtl_imtl_l", FILES["mtl_imtl_l"]["records"], "log_scale", 0.01, "s", "dtotal_ds")


def test_revised_uncertainty():
    config, records = FILES["mtl_uw_revised"]["config"], FILES["mtl_uw_revised"]["records"]
    loss = MultiTaskLoss(TASKS, RevisedUncertainty(2.0 * math.log(config["init"]), raw=True)).double()
    trajectory(loss, "mtl_uw_revised", records, "sigma", config["lr"], "p", "dtotal_dp")


def test_revised_uncertainty_by_its_logarithm():
    """The same total at the same place; the gradient by the chain rule."""
    loss = MultiTaskLoss(TASKS, RevisedUncertainty()).double()
    s = loss.weighting.log_scale
    for row, record in zip(FILES["mtl_uw_revised"]["losses"], FILES["mtl_uw_revised"]["records"], strict=True):
        p = torch.tensor(record["p"], dtype=F64)
        s.data, s.grad = 2.0 * p.abs().log(), None
        total, slopes = called(loss, row)
        same(total, record["total"])
        same(slopes, record["dtotal_dloss"])
        same(s.grad * 2.0 / p, record["dtotal_dp"])


# core_uncertainty.json

EXACT = ["kendall_mixed", "kendall_opt_reg", "kendall_zero_loss", "awl_init", "libmtl_init", "yaringal"]
KINDS = {"cls": "categorical", "reg": "gaussian"}


def numbers(values):
    return torch.tensor([float(value) for value in values], dtype=F64)


def posed(case, **other):
    """The objective of a case with its parameters set, and its losses."""
    config, given = case["config"], case["inputs"]
    losses = numbers(given["losses"]).requires_grad_()
    names = [f"task{k}" for k in range(len(losses))]
    if config["ref"] == "awl":
        loss = MultiTaskLoss(names, RevisedUncertainty(raw=True), **other).double()
        loss.weighting.sigma.data = numbers(given["params"])
        return loss, losses
    kinds = [KINDS[kind] for kind in config.get("kinds", ["reg"] * len(losses))]
    loss = MultiTaskLoss(names, Uncertainty(kinds), **other).double()
    loss.weighting.log_scale.data = numbers(given["s"])
    return loss, losses


@pytest.mark.parametrize("name", [name for name in EXACT if name != "yaringal"])
def test_cases(name):
    case = CASES[name]
    assert not {"want", "quirk", "dtype"} & case.keys()
    loss, losses = posed(case)
    total = loss(losses)
    slopes = torch.autograd.grad(total, [losses, *loss.parameters()])
    same(total.detach(), case["expected"]["loss"])
    for key, slope in zip(case["wrt"], slopes, strict=True):
        same(slope, case["expected"]["grad"][key])


def test_the_authors_example_is_twice_ours():
    """Its regression has neither of the two halves."""
    case = CASES["yaringal"]
    given, grad = case["inputs"], case["expected"]["grad"]
    prediction = torch.tensor(given["pred"], dtype=F64, requires_grad=True)
    truth = torch.tensor(given["true"], dtype=F64)
    loss = MultiTaskLoss(["a", "b"], Uncertainty()).double()
    loss.weighting.log_scale.data = torch.tensor(given["log_vars"], dtype=F64).squeeze(1)
    total = 2.0 * loss((prediction - truth).square().mean((1, 2)))
    slopes = torch.autograd.grad(total, [prediction, loss.weighting.log_scale])
    same(total.detach(), case["expected"]["loss"])
    same(slopes[0], grad["pred"])
    same(slopes[1].unsqueeze(1), grad["log_vars"])


def test_wanted_a_bounded_s():
    """At s = -800 the reference is inf times 0; here s stands at its bound, and is put there at the step."""
    case = CASES["kendall_s_m800"]
    assert case["want"] == "bounded s"
    loss, losses = posed(case)
    total = loss(losses)
    slopes = torch.autograd.grad(total, [losses, loss.weighting.log_scale])
    weight = 0.5 * math.exp(10.0)
    same(total.detach(), weight - 10.0)
    same(slopes[0], [weight, weight])
    same(slopes[1], [0.5 - weight, 0.5])
    loss.update("step")
    same(loss.weighting.log_scale.detach(), [-10.0, -10.0])


def test_wanted_a_bounded_sigma():
    case = CASES["awl_sigma0"]
    assert case["want"] == "bounded"
    loss, losses = posed(case)
    total = loss(losses)
    slopes = torch.autograd.grad(total, [losses, loss.weighting.sigma])
    weight = 0.5 * math.exp(10.0)
    same(slopes[0], [weight, 0.5, 0.5])
    same(slopes[1][1:], case["expected"]["grad"]["params"][1:])
    edge = math.exp(-5.0)
    same(slopes[1][0], -2.3 / edge**3 + 2.0 * edge / (1.0 + edge**2))
    same(total.detach(), weight * 2.3 + math.log1p(edge**2) + 0.5 * 5.07 + 2.0 * math.log(2.0))
    loss.update("step")
    same(loss.weighting.sigma.detach(), [edge, 1.0, 1.0])


def test_one_nan_loss_does_not_reach_the_parameters():
    """The reference has nan in the gradient of s for ever after; the total says what it says, unless told to skip."""
    case = CASES["kendall_nan_loss"]
    assert case["expected"]["reference_nan"]
    loss, losses = posed(case)
    total = loss(losses)
    assert total.isnan()
    same(torch.autograd.grad(total, loss.weighting.log_scale)[0], [0.0, 0.0])
    loss, losses = posed(case, nonfinite="skip")
    total = loss(losses)
    slopes = torch.autograd.grad(total, [losses, loss.weighting.log_scale])
    same(total.detach(), 0.5)
    same(slopes[0], [0.0, 0.5])
    same(slopes[1], [0.0, 0.0])
