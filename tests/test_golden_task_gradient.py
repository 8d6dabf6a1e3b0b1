"""Trajectories of the authors' FAMO, and of GradNorm in both forms: every record of the two files."""

import json
from pathlib import Path

import pytest
import torch

from reweigh import FAMO, GradNorm, MultiTaskLoss

GOLDEN = Path(__file__).parent / "golden"
FAMOS = json.loads((GOLDEN / "mtl_famo.json").read_text())
NORMS = json.loads((GOLDEN / "mtl_gradnorm.json").read_text())
NAMES = ["a", "b", "c"]
CASES = {
    "gamma1e3": ({}, FAMOS["case_gamma1e3"]),
    "minlosses": (
        {"min_losses": FAMOS["case_minlosses"]["min_losses"], "weight_decay": FAMOS["case_minlosses"]["gamma"]},
        FAMOS["case_minlosses"]["records"],
    ),
}


def vector(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(found, wanted, tol=1e-10):
    torch.testing.assert_close(found.detach(), vector(wanted), rtol=tol, atol=tol)


def total_and_slope(objective, losses, **meta):
    given = {name: vector(x).requires_grad_() for name, x in zip(NAMES, losses, strict=True)}
    total = objective(given, **meta)
    return total, torch.stack(torch.autograd.grad(total, [*given.values()]))


@pytest.mark.parametrize("name", CASES)
def test_famo(name):
    arguments, records = CASES[name]
    objective = MultiTaskLoss(NAMES, FAMO(**arguments))
    for step, record in enumerate(records):
        assert record.keys() == {"w", "z", "total", "dtotal_dloss", "w_after"}
        close(objective.weighting.logits, record["w"])
        close(objective.weighting.logits.softmax(0), record["z"])
        total, slope = total_and_slope(objective, FAMOS["losses"][step])
        close(total, record["total"])
        close(slope, record["dtotal_dloss"])
        close(torch.stack([*objective.effective_weights(vector(FAMOS["losses"][step])).values()]), slope.tolist())
        objective.update("step", index=step, losses=vector(FAMOS["losses"][step + 1]))
        close(objective.weighting.logits, record["w_after"])


def test_every_famo_case_has_a_test():
    assert set(FAMOS) == {"source", "config", "losses", "case_gamma1e3", "case_minlosses"}
    assert len(FAMOS["losses"]) == 40
    assert [len(records) for _, records in CASES.values()] == [39, 39]


class Problem:
    """The file's model: one shared layer, three tasks, plain descent."""

    def __init__(self):
        data = {name: vector(value) for name, value in NORMS["problem"].items()}
        self.x, self.y, self.v, self.scale = data["X"], data["Y"], data["V"], data["scale"]
        self.layer = torch.nn.Parameter(data["W0"])

    def losses(self):
        errors = ((self.x @ self.layer).tanh() @ self.v - self.y).square().mean(0)
        return dict(zip(NAMES, self.scale * errors, strict=True))

    def step(self, objective, record, norms, lr):
        """One step; the norms that the objective saw are the record's."""
        losses = self.losses()
        close(torch.stack([*losses.values()]), record["losses"], 1e-8)
        seen = []
        stop = objective.watch(lambda _, terms, weights: seen.append((terms, weights)))
        objective(losses, shared=self.layer).backward()
        stop()
        ((terms, weights),) = seen
        close(terms.extras["gradient_norm"], record[norms], 1e-8)
        close(weights, record["weights"], 1e-8)
        close(self.layer.grad, record["grad_W"], 1e-8)
        with torch.no_grad():
            self.layer -= lr * self.layer.grad
        self.layer.grad = None


def test_grad_norm_of_the_paper():
    config = NORMS["config"]["paper"]
    problem = Problem()
    objective = MultiTaskLoss(NAMES, GradNorm(NORMS["config"]["alpha"], lr=config["lr_w"]))
    for step, record in enumerate(NORMS["paper"]):
        assert record["step"] == step
        problem.step(objective, record, "grad_norms_raw", config["lr_W"])
        weighting, norm = objective.weighting, vector(record["grad_norms_raw"])
        first = vector(NORMS["paper"][0]["losses"])
        before = weighting.level.clone()
        objective.update("step", index=step)
        close(weighting.first, first.tolist(), 1e-8)
        # the balancing loss and its target, from the weights that the step used
        size, ratio = before * norm, vector(record["losses"]) / first
        target = size.mean() * (ratio / ratio.mean()) ** 1.5
        close(target, record["target"], 1e-8)
        assert (size - target).abs().sum().item() == pytest.approx(record["L_grad"], rel=1e-8)
        moved = (before - config["lr_w"] * vector(record["dLgrad_dw"])).clamp_min(1e-6)
        close(weighting.level, (3 * moved / moved.sum()).tolist(), 1e-8)


def test_grad_norm_as_a_softmax():
    config = NORMS["config"]["libmtl"]
    problem = Problem()
    objective = MultiTaskLoss(NAMES, GradNorm(NORMS["config"]["alpha"], lr=config["lr_scale"], form="softmax"))
    number = config["steps_per_epoch"]
    for place, record in enumerate(NORMS["libmtl"]):
        assert (record["epoch"], record["step"]) == divmod(place, number)
        before = objective.weighting.level.clone()
        close(before, record["loss_scale"], 1e-8)
        problem.step(objective, record, "raw_grad_norms", config["lr_W"])
        objective.update("step", index=place)
        moved = objective.weighting.level - before
        slope = record["grad_loss_scale"]
        close(moved, [0.0] * 3 if slope is None else [-config["lr_scale"] * s for s in slope], 1e-8)
        if place % number == number - 1:
            close(objective.weighting.running[0] / number, NORMS["libmtl_epoch_mean_losses"][place // number], 1e-8)
            objective.update("epoch", index=place // number)
    close(objective.weighting.first, NORMS["libmtl_epoch_mean_losses"][0], 1e-8)


def test_every_grad_norm_record_has_a_test():
    assert set(NORMS) == {"source", "config", "problem", "libmtl", "libmtl_epoch_mean_losses", "paper"}
    assert (len(NORMS["libmtl"]), len(NORMS["libmtl_epoch_mean_losses"]), len(NORMS["paper"])) == (40, 8, 10)
    assert set(NORMS["problem"]) == {"X", "Y", "W0", "V", "scale"}
    assert all(r["epoch"] == 0 for r in NORMS["libmtl"] if r["grad_loss_scale"] is None)
