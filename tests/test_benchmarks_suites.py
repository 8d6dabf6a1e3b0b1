"""The digits suite: splits, pairing, and runs that repeat bit by bit."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from reweigh.benchmarks.suites import SUITES, DigitsLT50
from reweigh.benchmarks.suites.digits_lt50 import class_sizes, split
from reweigh.benchmarks.suites.training import EpochOrder, reproducible

TARGET = load_digits().target


@pytest.fixture
def tiny(monkeypatch):
    """The suite with trainings of 10 steps."""
    monkeypatch.setattr(DigitsLT50, "training", {**DigitsLT50.training, "steps": 10})
    return DigitsLT50()


def test_sizes_follow_the_exponential():
    assert class_sizes() == [110, 71, 46, 30, 19, 13, 8, 5, 3, 2]
    assert sum(class_sizes()) == 307


@pytest.mark.parametrize("seed", range(10))
def test_split_is_disjoint_and_long_tailed(seed):
    parts, by_size = split(TARGET, seed)
    everything = np.concatenate(list(parts.values()))
    assert len(set(everything.tolist())) == len(everything) == 307 + 450 + 150
    for part, count in (("test", 45), ("val", 15)):
        assert np.bincount(TARGET[parts[part]], minlength=10).tolist() == [count] * 10
    assert np.bincount(TARGET[parts["train"]], minlength=10)[by_size].tolist() == class_sizes()


def test_seeds_differ_in_class_order_and_repeat():
    orders = {tuple(split(TARGET, seed)[1]) for seed in range(10)}
    assert len(orders) == 10
    first, again = split(TARGET, 4)[0], split(TARGET, 4)[0]
    assert all(np.array_equal(first[part], again[part]) for part in first)
    assert DigitsLT50().prepare(0).data_hash != DigitsLT50().prepare(1).data_hash


def test_batch_order_depends_on_seed_and_epoch_only():
    order = EpochOrder(10, 4, seed=1)
    first = list(order)
    assert list(order) == first  # reading it once more, as counting classes does, shifts nothing
    assert sorted(i for batch in first for i in batch) == list(range(10))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert len(order) == 3
    order.set_epoch(1)
    assert list(order) != first
    assert list(EpochOrder(10, 4, seed=2)) != first


def test_methods_of_a_seed_share_batches_and_initial_weights(tiny, monkeypatch):
    """What differs between methods must be the loss alone, also for those that have their classes counted first."""
    from reweigh.benchmarks.suites import training

    seen = {}

    def step(module, batch, batch_idx):
        log = seen.setdefault(method, [])
        if not log:
            log.append(torch.cat([p.detach().flatten() for p in module.net.parameters()]))
        log.append(batch[1].clone())
        return module.objective(module.net(batch[0]), batch[1])

    monkeypatch.setattr(training.Classifier, "training_step", step)
    trial = tiny.prepare(1)
    for method in ("ce", "inverse", "balanced_softmax", "drw"):
        trial.run(method)
    for method in ("inverse", "balanced_softmax", "drw"):
        assert len(seen[method]) == 11
        for ours, theirs in zip(seen[method], seen["ce"], strict=True):
            assert torch.equal(ours, theirs)


def test_runs_repeat_bit_by_bit(tiny):
    for method in ("ce", "posthoc_la", "cb_focal", "drw"):
        once = tiny.prepare(3).run(method)
        torch.rand(7)  # what happened before in this process must not matter
        again = tiny.prepare(3).run(method)
        assert once.metrics == again.metrics, method
        assert once.details == again.details, method
    assert tiny.prepare(4).run("ce").metrics != tiny.prepare(3).run("ce").metrics


def test_posthoc_is_the_same_beside_and_without_a_ce_run(tiny):
    """A resumed run has no CE model at hand and trains it anew."""
    trial = tiny.prepare(0)
    plain = trial.run("ce")
    beside = trial.run("posthoc_la")
    assert beside.metrics == tiny.prepare(0).run("posthoc_la").metrics
    assert beside.metrics != plain.metrics
    assert beside.step_ms is None


def test_weights_come_from_the_counts_and_drw_defers(tiny):
    trial = tiny.prepare(0)
    weights = trial.run("inverse").details["weights"]
    counts = trial.counts.double()
    expected = (1 / counts) * 10 / (1 / counts).sum()
    tail = trial.by_size[-3:]
    known = [value for value in weights["tail"] if value is not None]
    assert known == pytest.approx([float(expected[tail].mean())] * len(known))
    assert known
    head = trial.run("drw").details["weights"]["head"]
    assert head[:8] == [1.0] * 8  # 80 % of 10 steps
    assert max(head[8:]) < 0.5


def test_metrics_are_those_of_the_predictions(tiny):
    trial = tiny.prepare(0)
    target = trial.parts["test"][1]
    wrong = trial.by_size[-1]
    logits = 10.0 * torch.nn.functional.one_hot(target, 10).float()
    missed = (target == wrong).nonzero().flatten()[:9]  # 9 of 45 samples of the rarest class
    logits[missed] = 10.0 * torch.nn.functional.one_hot(torch.tensor(trial.by_size[0]), 10).float()
    found = trial._test({"test": logits, "val": logits[:150]}).metrics
    assert found["worst_recall"] == pytest.approx(0.8)
    assert found["tail_recall"] == pytest.approx((1 + 1 + 0.8) / 3)
    assert found["head_recall"] == 1.0
    assert found["balanced_accuracy"] == pytest.approx(0.98) == pytest.approx(found["accuracy"])
    assert found["natural_accuracy"] == pytest.approx(1 - 0.2 * 2 / 307)
    rare, common = 2 * 36 / (36 + 45), 2 * 45 / (45 + 54)
    assert found["macro_f1"] == pytest.approx((8 + rare + common) / 10)
    assert found["ece"] == pytest.approx(0.02, abs=1e-3)  # confident everywhere, right in 98 %


def test_global_state_is_restored():
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    with reproducible(5):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 1
        torch.rand(3)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


def test_global_state_is_restored_after_an_error(tiny, monkeypatch):
    trial, before = tiny.prepare(0), torch.get_rng_state()
    monkeypatch.setattr(tiny, "training", {**tiny.training, "lr": -1.0})
    with pytest.raises(ValueError, match="learning rate"):
        trial.run("ce")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_consistent(name):
    suite = SUITES[name]()
    methods, metrics = [m.name for m in suite.methods], [m.name for m in suite.metrics]
    assert len(set(methods)) == len(methods)
    assert len(set(metrics)) == len(metrics)
    assert suite.quick[0] == suite.baseline.name
    assert set(suite.quick) <= set(methods)
    for gate in suite.gates:
        assert gate.method in methods
        assert gate.metric in metrics
        assert suite.method(gate.method).claim
    prints = {suite.fingerprint(method) for method in methods}
    assert len(prints) == len(methods)


@pytest.mark.parametrize("name", SUITES)
def test_own_settings_do_not_steer_the_training_by_accident(name):
    """A method's setting that bears the name of one of the optimizer's must be meant: the learning rate alone is."""
    suite = SUITES[name]()
    steering = {"optimizer", "milestones", "rate_warmup", "accelerator", "loaders", "steps", "batch_size"}
    for method in suite.methods:
        assert not steering & set(suite.own.get(method.name, {})), method.name


def test_fingerprint_sees_settings(tiny):
    changed = tiny.fingerprint("ce")
    assert changed == tiny.fingerprint("ce")
    tiny.training = {**tiny.training, "lr": 1e-3}
    assert tiny.fingerprint("ce") != changed
