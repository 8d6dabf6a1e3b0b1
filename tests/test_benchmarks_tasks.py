"""The multi-task suite: pairs of disjoint digits, pairing of methods, delta-m."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from reweigh.benchmarks.suites import DigitsTwoTasks
from reweigh.benchmarks.suites.digits_two_tasks import DIGITS, PAIRS, TASKS, delta_m, pairs

DATA = load_digits()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(DigitsTwoTasks, "training", {**DigitsTwoTasks.training, "steps": 40})
    return DigitsTwoTasks()


def test_pairs_are_two_digits_and_no_digit_is_in_two_parts():
    marked = np.arange(1797, dtype=np.float64)[:, None, None] * np.ones((1, 8, 8))  # each digit knows its number
    found = pairs(marked, np.arange(1797), 3)
    assert {part: len(arrays[0]) for part, arrays in found.items()} == PAIRS
    used = {part: set(arrays[1].tolist()) | set(arrays[2].tolist()) for part, arrays in found.items()}
    assert not used["train"] & used["test"]
    assert not used["train"] & used["val"]
    assert not used["val"] & used["test"]
    assert all(len(used[part]) <= DIGITS[part] for part in used)
    images, left, right, ink = found["test"]
    canvas = images.reshape(-1, 8, 13) * 16
    assert np.array_equal(canvas[:, 0, 0], left)
    assert np.array_equal(canvas[:, 0, -1], right)
    assert np.array_equal(canvas[:, 0, 6], np.maximum(left, right))
    assert np.array_equal(ink, 64.0 * (left - right))


def test_delta_m_is_the_mean_signed_relative_change():
    alone = {"left_accuracy": 0.8, "right_accuracy": 0.5, "ink_mae": 10.0}
    found = {"left_accuracy": 0.4, "right_accuracy": 0.6, "ink_mae": 5.0}
    assert delta_m(found, alone) == pytest.approx((-0.5 + 0.2 + 0.5) / 3)
    assert delta_m(alone, alone) == 0.0


def test_runs_repeat_bit_by_bit_and_single_models_are_the_measure(tiny):
    trial = tiny.prepare(1)
    for method in ("single", "equal", "coba", "uncertainty"):
        assert trial.run(method).metrics == tiny.prepare(1).run(method).metrics, method
    assert trial.run("single").metrics["delta_m"] == 0.0


def test_methods_share_data_batches_and_initial_network(tiny, monkeypatch):
    from reweigh.benchmarks.suites.two_digits import Pairs

    seen = {}

    def step(module, batch, batch_idx):
        log = seen.setdefault((method, module.tasks), [])
        if not log:
            log.append(torch.cat([p.detach().flatten() for p in module.net.parameters()]))
        log.append(batch[1].clone())
        return module.objective(module.task_losses(batch))

    monkeypatch.setattr(Pairs, "training_step", step)
    trial = tiny.prepare(0)
    for method in ("equal", "first", "coba", "dwa"):
        trial.run(method)
    assert len(seen) == 3 + 4  # single-task models once per trial
    for log in seen.values():
        assert len(log) == 41
        for ours, theirs in zip(log, seen["equal", TASKS], strict=True):
            assert torch.equal(ours, theirs)


def test_every_method_has_its_own_objective(tiny):
    made = {method.name: repr(tiny.objective(method.name)) for method in tiny.methods}
    assert made["single"] == made["equal"]
    assert len(set(made.values())) == len(made) - 1
