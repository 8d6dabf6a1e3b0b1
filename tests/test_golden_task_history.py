"""Whole trajectories of published history-based task weightings: tests/golden/mtl_*.json."""

import json
from pathlib import Path

import pytest
import torch

from reweigh import DWA, IGB, GO4Align, MultiTaskLoss, NormalizedLossBalance

NAMES = ["dwa", "igb_v1", "mtard_nlb", "go4align_core"]
DATA = {name: json.loads((Path(__file__).parent / "golden" / f"mtl_{name}.json").read_text()) for name in NAMES}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def called(loss, values):
    """Total and gradient of one training call."""
    leaf = vector(values).requires_grad_()
    total = loss(leaf)
    (grad,) = torch.autograd.grad(total, leaf)
    return total.detach(), grad


def tasks(count):
    return [f"task{k}" for k in range(count)]


def test_dwa():
    data = DATA["dwa"]
    loss = MultiTaskLoss(tasks(3), DWA(data["config"]["T"]))
    for epoch, (values, record) in enumerate(zip(data["epoch_mean_losses"], data["records"], strict=True)):
        assert record["epoch"] == epoch
        total, grad = called(loss, values)
        torch.testing.assert_close(total, vector(record["total"]), **EXACT)
        torch.testing.assert_close(grad, vector(record["dtotal_dloss"]), **EXACT)
        torch.testing.assert_close(torch.stack([*loss.weights.values()]), vector(record["weights"]), **EXACT)
        loss.update("step", index=epoch)
        loss.update("epoch", index=epoch)


def test_dwa_batch_by_batch():
    """Four batches an epoch: all have the epoch's weights."""
    data = DATA["dwa"]["batched"]
    loss, step = MultiTaskLoss(tasks(3), DWA(DATA["dwa"]["config"]["T"])), 0
    for epoch, (batches, record) in enumerate(zip(data["batch_losses"], data["records"], strict=True)):
        assert record["epoch"] == epoch
        for values in batches:
            total, grad = called(loss, values)
            torch.testing.assert_close(grad, vector(record["weights"]), **EXACT)
            torch.testing.assert_close(total, (vector(record["weights"]) * vector(values)).sum(), **EXACT)
            loss.update("step", index=step)
            step += 1
        loss.update("epoch", index=epoch)
    assert step == 20


def test_dwa_batch_by_batch_in_one_accumulated_step():
    """The same epochs as one optimizer step of four micro-batches."""
    data = DATA["dwa"]["batched"]
    loss = MultiTaskLoss(tasks(3), DWA(DATA["dwa"]["config"]["T"]))
    for batches, record in zip(data["batch_losses"], data["records"], strict=True):
        for values in batches:
            torch.testing.assert_close(called(loss, values)[1], vector(record["weights"]), **EXACT)
        loss.update("step")
        loss.update("epoch")


def test_igb():
    data = DATA["igb_v1"]
    loss = MultiTaskLoss(tasks(3), IGB(data["config"]["base_epoch"]))
    for epoch, (values, record) in enumerate(zip(data["losses"], data["records"], strict=True)):
        assert record["epoch"] == epoch
        total, grad = called(loss, values)
        torch.testing.assert_close(total, vector(record["total"]), **EXACT)
        torch.testing.assert_close(grad, vector(record["dtotal_dloss"]), **EXACT)
        torch.testing.assert_close(grad * vector(values), vector(record["weights"]), **EXACT)
        loss.update("step", index=epoch)
        loss.update("epoch", index=epoch)


def test_normalized_loss_balance():
    data = DATA["mtard_nlb"]
    config = data["config"]
    assert config["init_weights"] == [0.5, 0.5]
    loss = MultiTaskLoss(["natural", "adversarial"], NormalizedLossBalance(config["lr"], beta=config["beta"]))
    for values, record in zip(data["losses"], data["records"], strict=True):
        total, grad = called(loss, values)
        torch.testing.assert_close(total, vector(record["total"]), **EXACT)
        torch.testing.assert_close(grad, vector(record["weights"]), **EXACT)
        loss.update("step")
        torch.testing.assert_close(loss.weighting.summary()["share"], vector(record["weights"]), **EXACT)


@pytest.mark.parametrize(("groups", "key"), [(3, "task_score"), (1, "one_group_weight")])
def test_go4align(groups, key):
    """With as many groups as tasks the weights are the scores, with one group their mean."""
    data = DATA["go4align_core"]
    loss = MultiTaskLoss(tasks(3), GO4Align(groups, step_size=data["config"]["robust_step_size"]))
    for values, record in zip(data["losses"], data["records"], strict=True):
        total, grad = called(loss, values)
        wanted = vector(record[key]).expand(3)
        torch.testing.assert_close(grad, wanted, **EXACT)
        torch.testing.assert_close(total, (wanted * vector(values)).sum(), **EXACT)
        loss.update("step")
        torch.testing.assert_close(loss.weighting.summary()["share"], vector(record["adv_probs"]), **EXACT)


def test_no_record_and_no_case_is_left_out():
    assert {name: set(data) - {"source", "config", "losses", "epoch_mean_losses"} for name, data in DATA.items()} == {
        "dwa": {"records", "batched"},
        "igb_v1": {"records"},
        "mtard_nlb": {"records"},
        "go4align_core": {"records"},
    }
    assert all(len(data["records"]) == 40 for data in DATA.values())
    assert len(DATA["dwa"]["batched"]["records"]) == 5
    seen = {name: set(data["records"][0]) for name, data in DATA.items()}
    assert seen == {
        "dwa": {"epoch", "weights", "total", "dtotal_dloss"},
        "igb_v1": {"epoch", "weights", "total", "dtotal_dloss"},
        "mtard_nlb": {"weights", "total"},
        "go4align_core": {"adv_probs", "task_score", "one_group_weight"},
    }
