"""Numbers that the authors' code of CoBa gives: tests/golden/core_coba.json."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from reweigh import CoBa, CrossEntropy, MultiTaskLoss, Objective

F64 = torch.float64
CASES = {
    case["id"]: case for case in json.loads((Path(__file__).parent / "golden" / "core_coba.json").read_text())["cases"]
}
WANTED = {"constant": "uniform weights", "warmup2": "uniform until two records exist", "nan_record": "skip the record"}
TRAJECTORIES = [name for name, case in CASES.items() if "ratios" in case["inputs"] and name not in WANTED]


def tensor(rows):
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=F64)


def used(case, *, present=None, fidelity="reference", **options):
    """Weights by the step that uses them, driven as the authors' trainer does; value and gradient must agree."""
    config, ratios = case["config"], tensor(case["inputs"]["ratios"])
    interval = config["coba_update_interval"]
    num_tasks = len(ratios)
    weighting = CoBa(
        warmup=config["coba_warmup_steps"] // interval,
        history=config["coba_history_length"],
        tau=config["coba_tau"],
        fidelity=fidelity,
        **options,
    )
    loss = MultiTaskLoss([f"task{k}" for k in range(num_tasks)], weighting)
    loss.update("validation", losses=torch.ones(num_tasks, dtype=F64))  # L(0), so that ratios are the losses
    found, generator = {}, torch.Generator().manual_seed(0)
    for step in range(interval, ratios.shape[1] + 1, interval):
        leaves = torch.rand(num_tasks, generator=generator, dtype=F64).requires_grad_()
        value = loss(leaves)
        (slope,) = torch.autograd.grad(value, leaves)
        torch.testing.assert_close(value, (slope * leaves).sum(), rtol=1e-12, atol=0)
        found[str(step)] = slope
        loss.update("step")
        record = ratios[:, step - 1]
        loss.observe_validation(record, mask=record != 0 if present is None else present[:, step - 1])
        loss.update("validation")
    return found


def test_every_case_is_covered():
    losses = {"loss_coba", "loss_coba_missing_task", "loss_case4", "loss_case1"}
    assert set(CASES) == {*TRAJECTORIES, *WANTED, *losses}
    assert {name: case["want"] for name, case in CASES.items() if "want" in case} == WANTED
    assert len(CASES) == 13


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name):
    expected = CASES[name]["expected"]
    found = used(CASES[name])
    assert expected["weights_by_step"].keys() <= found.keys()
    for step, weights in expected["weights_by_step"].items():
        torch.testing.assert_close(found[step], torch.tensor(weights, dtype=F64), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[max(found, key=int)].tolist(), expected["loss"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fidelity", ["paper", "reference"])
def test_constant_losses_have_uniform_weights(fidelity):
    case = CASES["constant"]
    found = used(case, fidelity=fidelity)
    for step in case["expected"]["weights_by_step"]:
        torch.testing.assert_close(found[step], torch.full((3,), 1 / 3, dtype=F64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("fidelity", ["paper", "reference"])
def test_warmup_of_two_is_uniform_until_there_are_two_records(fidelity):
    found = used(CASES["warmup2"], fidelity=fidelity)
    for step, weights in found.items():
        even = torch.allclose(weights, torch.full((3,), 1 / 3, dtype=F64), rtol=1e-12)
        assert even == (int(step) <= 2)
        assert weights.isfinite().all()
        torch.testing.assert_close(weights.sum().item(), 1.0, rtol=1e-14, atol=0)


@pytest.mark.parametrize("fidelity", ["paper", "reference"])
def test_nan_record_is_skipped(fidelity):
    """It changes what a missing task would change, and nothing before it."""
    case = CASES["nan_record"]
    ratios = tensor(case["inputs"]["ratios"])
    found = used(case, fidelity=fidelity)
    absent = used(case, fidelity=fidelity, present=ratios.isfinite())
    for step, weights in found.items():
        assert torch.equal(weights, absent[step])
    if fidelity == "reference":
        for step, weights in case["expected"]["weights_by_step"].items():
            if "nan" not in weights:
                torch.testing.assert_close(found[step], torch.tensor(weights, dtype=F64), rtol=1e-10, atol=1e-12)


def token_losses(case):
    """Cross entropy of every token, which count, and the task of every sample."""
    logits = torch.tensor(case["inputs"]["logits"], dtype=F64, requires_grad=True)
    labels = torch.tensor(case["inputs"]["labels"])
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return logits, labels, losses, (labels != -100).double(), torch.tensor(case["inputs"]["task_id"]).squeeze(1)


def check(case, value, logits):
    torch.testing.assert_close(value.item(), case["expected"]["loss"], rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(
        slope, torch.tensor(case["expected"]["grad"]["logits"], dtype=F64), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", ["loss_coba", "loss_coba_missing_task", "loss_case4"])
def test_loss(name):
    """The weighted mean over the tasks present; task losses are means over tokens (case 4: means over samples)."""
    case = CASES[name]
    logits, _, losses, valid, task = token_losses(case)
    weighting = CoBa(fidelity="reference")
    loss = MultiTaskLoss(["0", "1", "2"], weighting)
    weighting.get_buffer("shares").copy_(torch.tensor(case["inputs"]["weights"], dtype=F64))
    means = {}
    for k in task.unique().tolist():
        mine, here = losses[task == k], valid[task == k]
        means[str(k)] = (mine.sum(1) / here.sum(1)).mean() if name == "loss_case4" else mine.sum() / here.sum()
    if name != "loss_case4":
        for k, mean in means.items():
            torch.testing.assert_close(mean.item(), case["expected"]["task_loss"][int(k)], rtol=1e-6, atol=0)  # float32
    check(case, loss(means), logits)


def test_loss_without_tasks():
    """Case 1, the mean over all tokens, needs no task weights."""
    case = CASES["loss_case1"]
    logits, labels, *_ = token_losses(case)
    check(case, Objective(CrossEntropy())(logits.flatten(0, 1), labels.flatten()), logits)
