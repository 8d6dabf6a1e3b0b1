"""The suites of weak groups and wrong labels: data, pairing of methods, selection, and that runs repeat bit by bit."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from reweigh.benchmarks.suites import DigitsLTNoisy, DigitsSpurious, digits_lt_noisy, digits_spurious, training
from reweigh.benchmarks.suites.training import Classifier, EpochOrder, KeepBest, WeightedOrder
from reweigh.losses import CrossEntropy, Objective

DATA = load_digits()


@pytest.fixture
def spurious(monkeypatch):
    """Trainings of 24 steps, looked at three times."""
    monkeypatch.setattr(DigitsSpurious, "training", {**DigitsSpurious.training, "steps": 24, "look_every": 8})
    return DigitsSpurious()


@pytest.fixture
def noisy(monkeypatch):
    """Trainings of 24 steps."""
    monkeypatch.setattr(DigitsLTNoisy, "training", {**DigitsLTNoisy.training, "steps": 24})
    monkeypatch.setattr(digits_lt_noisy, "LOOK_EVERY", 8)
    return DigitsLTNoisy()


def diary(monkeypatch, log):
    """Write down initial weights and every batch of each training, under what ``log`` is asked for."""

    def step(module, batch, batch_idx):
        own = log()
        if not own:
            own.append(torch.cat([p.detach().flatten() for p in module.net.parameters()]))
        own.append(batch[0].clone())
        inputs, target, *rest = batch
        return module.objective(module.net(inputs), target, **dict(zip(module.meta, rest, strict=True)))

    monkeypatch.setattr(Classifier, "training_step", step)


# weak groups


@pytest.mark.parametrize("seed", range(3))
def test_composites_hold_what_they_say(seed):
    marked = np.arange(1.0, 1798.0)[:, None, None] * np.ones((1, 8, 8))  # each digit knows its number
    found = digits_spurious.composites(16 * marked, DATA.target, seed)
    used = []
    for part, (images, label, group) in found.items():
        canvas = images.reshape(-1, 8, 10)
        number = canvas[:, 0, 1].astype(int) - 1
        used.append(number)
        assert np.array_equal(canvas[:, :, 1:9], np.broadcast_to(number[:, None, None] + 1.0, (len(number), 8, 8)))
        assert np.array_equal(label, DATA.target[number] >= 5)
        side = group - 2 * label
        edges = canvas[:, :, [0, 9]]
        assert np.array_equal(edges, np.broadcast_to(np.eye(2)[side][:, None, :], edges.shape))
        if part != "train":
            assert np.bincount(group).tolist() == [digits_spurious.HELD_OUT[part]] * 4
    everything = np.concatenate(used)
    assert len(everything) == len(set(everything.tolist())) == 1797
    assert np.bincount(found["train"][2]).tolist() == [527, 16, 16, 522]


def test_seeds_differ_and_repeat():
    suite = DigitsSpurious()
    assert suite.prepare(0).data_hash == suite.prepare(0).data_hash != suite.prepare(1).data_hash
    suite = DigitsLTNoisy()
    assert suite.prepare(0).data_hash == suite.prepare(0).data_hash != suite.prepare(1).data_hash


def test_every_group_method_has_its_own_objective(spurious):
    counts = spurious.prepare(0).counts
    made = {method.name: repr(spurious.objective(method.name, counts)) for method in spurious.methods}
    same = {"erm", "resampling", "jtt"}  # other batches, other sample weights
    assert {made[name] for name in same} == {made["erm"]}
    assert len(set(made.values())) == len(made) - 2


def test_group_methods_share_initial_network_and_batches(spurious, monkeypatch):
    seen = {}
    diary(monkeypatch, lambda: seen.setdefault(method, []))
    trial = spurious.prepare(1)
    for method in ("erm", "group_dro", "group_weights", "cvar", "resampling", "group_dro_balanced"):
        trial.run(method)
    for method, log in seen.items():
        assert len(log) == 25
        assert torch.equal(log[0], seen["erm"][0])
        alike = all(torch.equal(ours, theirs) for ours, theirs in zip(log, seen["erm"], strict=True))
        assert alike == (method not in ("resampling", "group_dro_balanced")), method
    for ours, theirs in zip(seen["resampling"], seen["group_dro_balanced"], strict=True):
        assert torch.equal(ours, theirs)


def test_jtt_weighs_what_a_short_training_gets_wrong(spurious, monkeypatch):
    trial = spurious.with_own("jtt", {"first_steps": 8}).prepare(0)
    weights, milliseconds, details = trial._errors()
    assert set(weights.tolist()) == {1.0, 20.0}
    assert milliseconds > 0
    *_, group = trial.parts["train"]
    assert torch.bincount(group[weights == 20.0], minlength=4).tolist() == details["errors"]
    wrong_side = sum(details["errors"][1:3]) / 32
    assert wrong_side > sum(details["errors"]) / len(group)  # the shortcut is learned first

    given = {}
    real = training.train

    def spy(net, objective, data, options, **others):
        given[len(given)] = data, others["module"].meta, options["steps"]
        return real(net, objective, data, options, **others)

    monkeypatch.setattr(training, "train", spy)
    trial.run("jtt")
    (_, names, steps), (data, weighed, full) = given[0], given[1]
    assert (names, steps) == (("group",), 8)
    assert (weighed, full) == (("group", "sample_weight"), 24)
    assert torch.equal(data[3], weights)


def test_group_metrics_are_those_of_the_network(spurious):
    trial = spurious.prepare(0)

    class Answers(torch.nn.Module):
        """Right, but for 28 of the 112 test samples of group 1 and for all of group 3."""

        def forward(self, inputs):
            _, target, group = trial.parts["test"] if len(inputs) == 448 else trial.parts["val"]
            answer = target.clone()
            answer[(group == 1).nonzero().flatten()[:28]] ^= 1
            answer[group == 3] ^= 1
            return torch.nn.functional.one_hot(answer, 2).float()

    outcome = trial._test(Answers())
    assert outcome.details["group_accuracy"] == pytest.approx([1.0, 0.75, 1.0, 0.0])
    found = outcome.metrics
    assert found["worst_group"] == 0.0
    assert found["average"] == found["gap"] == pytest.approx(2.75 / 4)
    assert found["rare_groups"] == pytest.approx(0.875)
    assert found["train_average"] == pytest.approx((527 + 0.75 * 16 + 16) / 1081)


@pytest.mark.parametrize("method", ["erm", "group_dro_adjusted", "resampling", "jtt"])
def test_group_runs_repeat_bit_by_bit(spurious, method):
    once = spurious.prepare(3).run(method)
    torch.rand(7)
    again = spurious.prepare(3).run(method)
    assert once.metrics == again.metrics
    assert once.details == again.details


@pytest.mark.parametrize("name", [method.name for method in DigitsSpurious.methods])
def test_every_group_method_trains(spurious, name):
    found = spurious.prepare(0).run(name)
    assert set(found.metrics) == {metric.name for metric in spurious.metrics}
    assert found.step_ms > 0
    assert found.details["chosen_step"] in (8, 16, 24)


def test_the_best_look_is_kept_and_the_first_of_equals():
    scores = iter([0.2, 0.5, 0.5, 0.4])
    seen = []

    def score(net):
        assert not net.training
        seen.append(net.weight.detach().clone())
        return next(scores)

    net = torch.nn.Linear(2, 2)
    best = KeepBest(score, 3)
    data = torch.randn(8, 2), torch.randint(2, (8,))
    options = {"steps": 10, "batch_size": 4, "lr": 0.1, "weight_decay": 0.0}
    training.train(net, Objective(CrossEntropy()), data, options, seed=0, callbacks=[best])
    assert len(seen) == 4  # after 3, 6, 9 and the last
    assert best.step == 6
    assert torch.equal(net.weight, seen[1])
    assert not torch.equal(net.weight, seen[3])


def test_weighted_order_draws_by_weight_and_repeats():
    weights = torch.tensor([0.0, 1.0, 3.0]).double()
    order = WeightedOrder(weights.repeat(1000), 64, seed=1)
    first = list(order)
    assert list(order) == first
    drawn = torch.tensor([index % 3 for batch in first for index in batch])
    assert len(drawn) == 3000
    shares = torch.bincount(drawn, minlength=3) / 3000
    assert shares[0] == 0
    assert shares[2].item() == pytest.approx(0.75, abs=0.03)
    order.set_epoch(1)
    assert list(order) != first
    assert len(order) == len(EpochOrder(3000, 64, 1)) == len(first)


# wrong labels


def test_four_of_ten_labels_of_each_class_are_another():
    clean = np.repeat(np.arange(10), 1000)
    given = digits_lt_noisy.corrupted(clean, np.random.default_rng(0))
    table = np.zeros((10, 10), int)
    np.add.at(table, (clean, given), 1)
    assert table.diagonal().tolist() == [600] * 10
    others = table[~np.eye(10, dtype=bool)]
    assert others.sum() == 4000
    assert abs(others - 400 / 9).max() < 5 * (400 / 9) ** 0.5  # each other class is as likely
    assert np.allclose(digits_lt_noisy.transition(), np.eye(10) * (0.6 - 0.4 / 9) + 0.4 / 9, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_test_labels_are_right_and_the_others_are_not(seed):
    trial = DigitsLTNoisy().prepare(seed)
    rows, by_size = digits_lt_noisy.split(DATA.target, seed)
    assert sum(map(len, rows.values())) == len(set(np.concatenate(list(rows.values())).tolist()))
    clean = {part: torch.from_numpy(DATA.target[rows[part]]) for part in rows}
    assert torch.equal(trial.parts["test"][1], clean["test"])
    assert torch.bincount(clean["test"]).tolist() == [45] * 10
    sizes = digits_lt_noisy.class_sizes()
    assert (sizes[0], sizes[-1]) == (110, 11)
    assert torch.bincount(clean["train"])[by_size].tolist() == sizes
    for part in ("train", "val"):
        wrong = clean[part] != trial.parts[part][1]
        expected = sum(round(0.4 * n) for n in (sizes if part == "train" else [15] * 10))
        assert wrong.sum() == expected
    assert torch.equal(trial.wrong, clean["train"] != trial.parts["train"][1])


def test_every_noise_method_has_its_own_objective(noisy):
    made = {method.name: repr(noisy.objective(method.name)) for method in noisy.methods}
    assert made["ce"] == made["ce_early"]
    assert len(set(made.values())) == len(made) - 1


def test_noise_methods_share_initial_network_and_batches(noisy, monkeypatch):
    seen = {}
    diary(monkeypatch, lambda: seen.setdefault(method, []))
    trial = noisy.prepare(1)
    for method in ("ce", "ce_early", "gce", "aldr", "super_loss", "small_loss"):
        trial.run(method)
    for log in seen.values():
        assert len(log) == 25
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(log, seen["ce"], strict=True))


def test_stopping_early_is_the_same_training(noisy, monkeypatch):
    trial = noisy.prepare(0)
    last, _, step = trial._train("ce")
    assert step is None
    looks = iter([0.1, 0.2, 0.3])  # the last one is best, so nothing differs
    monkeypatch.setattr(type(trial), "_right", lambda self, net, part: torch.tensor([next(looks)]))
    early, _, step = trial._train("ce_early")
    assert step == 24
    for ours, theirs in zip(early.parameters(), last.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    looks = iter([0.1, 0.3, 0.2])
    early, _, step = trial._train("ce_early")
    assert step == 16
    assert not torch.equal(early[0].weight, last[0].weight)


@pytest.mark.parametrize("method", ["ce_early", "aldr", "super_loss", "self_paced"])
def test_noise_runs_repeat_bit_by_bit(noisy, method):
    once = noisy.prepare(3).run(method)
    torch.rand(7)
    again = noisy.prepare(3).run(method)
    assert once.metrics == again.metrics
    assert once.details == again.details


@pytest.mark.parametrize("name", [method.name for method in DigitsLTNoisy.methods])
def test_every_noise_method_trains(noisy, name):
    found = noisy.prepare(0).run(name)
    assert set(found.metrics) == {metric.name for metric in noisy.metrics}
    assert found.step_ms > 0
    assert found.metrics["accuracy"] == pytest.approx(np.mean(found.details["class_recall"]))


def test_noise_metrics_are_those_of_the_network(noisy):
    trial = noisy.prepare(0)
    rare = trial.by_size[-1]

    class Answers(torch.nn.Module):
        """Says every label that it was given, but takes 9 of 45 test samples of the rarest class for the commonest."""

        def forward(self, inputs):
            part = next(part for part, (images, _) in trial.parts.items() if torch.equal(images, inputs))
            answer = trial.parts[part][1].clone()
            if part == "test":
                answer[(answer == rare).nonzero().flatten()[:9]] = trial.by_size[0]
            return 20.0 * torch.nn.functional.one_hot(answer, 10).float()

    found = trial._test(Answers()).metrics
    assert found["accuracy"] == pytest.approx(0.98)
    assert found["tail_recall"] == pytest.approx((1 + 1 + 0.8) / 3)
    assert found["worst_recall"] == pytest.approx(0.8)
    assert found["head_recall"] == found["learned_wrong"] == found["val_accuracy"] == 1.0
    assert found["ece"] == pytest.approx(0.02, abs=1e-3)
