"""The suites of embeddings and of regression: data, competitors, pairing of methods, metrics, runs that repeat."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch.nn.functional import normalize

from reweigh.benchmarks.suites import diabetes_skewed, digits_nuisance
from reweigh.benchmarks.suites.diabetes_skewed import DiabetesSkewed
from reweigh.benchmarks.suites.digits_nuisance import DigitsNuisance
from reweigh.benchmarks.suites.training import Classifier

DIGITS = load_digits()
DIABETES = load_diabetes()


@pytest.fixture
def nuisance(monkeypatch):
    """Trainings of 6 steps."""
    monkeypatch.setattr(DigitsNuisance, "training", {**DigitsNuisance.training, "steps": 6})
    return DigitsNuisance()


@pytest.fixture
def skewed(monkeypatch):
    """Trainings of 6 steps."""
    monkeypatch.setattr(DiabetesSkewed, "training", {**DiabetesSkewed.training, "steps": 6})
    return DiabetesSkewed()


def diary(monkeypatch, log, network):
    """Write down initial weights of a part and every batch of each training, under what ``log`` is asked for."""

    def step(module, batch, batch_idx):
        own = log()
        if not own:
            own.append(torch.cat([p.detach().flatten() for p in network(module.net).parameters()]))
        own.append(batch[0].clone())
        inputs, target, *rest = batch
        return module.objective(module.net(inputs), target, **dict(zip(module.meta, rest, strict=True)))

    monkeypatch.setattr(Classifier, "training_step", step)


@pytest.mark.parametrize("made", [DigitsNuisance, DiabetesSkewed])
def test_seeds_differ_and_repeat(made):
    suite = made()
    assert suite.prepare(0).data_hash == suite.prepare(0).data_hash != suite.prepare(1).data_hash


@pytest.mark.parametrize("made", [DigitsNuisance, DiabetesSkewed])
def test_names_fit_together(made):
    suite = made()
    names = [method.name for method in suite.methods]
    trained = {method.name for method in suite.methods if method.trained}
    assert len(set(names)) == len(names)
    assert suite.quick[0] == names[0]
    assert set(suite.quick) <= set(names)
    assert set(suite.grid) == trained >= set(suite.own)
    for name in trained:
        for setting, values in suite.grid[name].items():
            assert suite.options(name)[setting] in values
    assert suite.metric(suite.chosen_by).shown is False
    for gate in suite.gates:
        assert suite.method(gate.method).claim
        assert gate.metric in {metric.name for metric in suite.metrics}


# embeddings


def test_nuisances_are_those_that_are_named(monkeypatch):
    monkeypatch.setattr(digits_nuisance, "NOISE", 0.0)
    images = DIGITS.images[:300] / 16.0
    found = digits_nuisance.nuisances(images, np.random.default_rng(0))
    assert found.shape == (300, 12, 12)
    places = set()
    for image, canvas in zip(images, found, strict=True):
        windows = {(down, right): canvas[down : down + 8, right : right + 8] for down in range(5) for right in range(5)}
        factor = canvas.max() / image.max()
        assert 0.4 <= factor <= 1.0
        matching = [at for at, window in windows.items() if np.allclose(window, factor * image, atol=1e-6)]
        assert matching
        assert np.isclose(canvas.sum(), factor * image.sum(), rtol=1e-5)  # nothing else on the canvas
        if len(matching) == 1:
            places.add(matching[0])
    assert len(places) == 25

    monkeypatch.setattr(digits_nuisance, "NOISE", 0.1)
    noisy = digits_nuisance.nuisances(images, np.random.default_rng(0))
    background = digits_nuisance.nuisances(0.0 * images, np.random.default_rng(0))
    assert background.std() == pytest.approx(0.1, rel=0.02)
    assert np.allclose(noisy - background, digits_nuisance.nuisances(images, np.random.default_rng(0)) - background)


@pytest.mark.parametrize("seed", range(3))
def test_digits_are_in_one_part_only(seed):
    rows = digits_nuisance.split(DIGITS.target, np.random.default_rng(seed))
    assert {part: len(at) for part, at in rows.items()} == {"train": 800, "val": 200, "test": 797}
    assert len(set(np.concatenate(list(rows.values())).tolist())) == 1797
    trial = DigitsNuisance().prepare(seed)
    for part, at in rows.items():
        images, label = trial.parts[part]
        assert images.shape == (len(at), 1, 12, 12)
        assert label.tolist() == DIGITS.target[at].tolist()
        assert label.unique().tolist() == list(range(10))


def points(seed, size=24, classes=4):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (size,), generator=generator)
    label[0] = classes  # the only one of its class
    return torch.randn(size, 5, generator=generator, dtype=torch.float64), label


def naive_triplet(x, y, margin):
    losses = []
    for i in range(len(x)):
        near = [(x[i] - x[j]).norm().item() for j in range(len(x)) if j != i and y[j] == y[i]]
        far = [(x[i] - x[j]).norm().item() for j in range(len(x)) if y[j] != y[i]]
        losses.append(max(0.0, margin + max(near) - min(far)) if near and far else 0.0)
    return losses


def naive_supcon(x, y, temperature):
    losses = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        total = sum(math.exp(float(x[i] @ x[j]) / temperature) for j in others)
        shares = [math.exp(float(x[i] @ x[j]) / temperature) / total for j in others if y[j] == y[i]]
        losses.append(-sum(map(math.log, shares)) / len(shares) if shares else 0.0)
    return losses


def naive_multi_similarity(x, y, alpha, beta, base, epsilon):
    losses = []
    for i in range(len(x)):
        near = [float(x[i] @ x[j]) for j in range(len(x)) if j != i and y[j] == y[i]]
        far = [float(x[i] @ x[j]) for j in range(len(x)) if y[j] != y[i]]
        hard_near = [s for s in near if s < max(far) + epsilon]
        hard_far = [s for s in far if near and s > min(near) - epsilon]
        losses.append(
            math.log1p(sum(math.exp(-alpha * (s - base)) for s in hard_near)) / alpha
            + math.log1p(sum(math.exp(beta * (s - base)) for s in hard_far)) / beta
        )
    return losses


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("loss", "naive", "own"),
    [
        (digits_nuisance.batch_hard_triplet, naive_triplet, {"margin": 0.2}),
        (digits_nuisance.supcon, naive_supcon, {"temperature": 0.1}),
        (
            digits_nuisance.multi_similarity,
            naive_multi_similarity,
            {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1},
        ),
    ],
)
def test_competitors_are_what_they_are_called(seed, loss, naive, own):
    x, y = points(seed)
    x.requires_grad_()
    found = loss(x, y, **own)
    assert found.tolist() == pytest.approx(naive(normalize(x.detach()), y, **own), rel=1e-9, abs=1e-9)
    found.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any()


def test_unweighted_pair_loss_is_circle_loss_without_its_weights():
    suite = DigitsNuisance()
    x, y = points(0)
    s, m, gamma = normalize(x) @ normalize(x).T, 0.25, suite.own["pair"]["gamma"]
    wanted = []
    for i in range(1, len(x)):
        near = [j for j in range(len(x)) if j != i and y[j] == y[i]]
        far = [j for j in range(len(x)) if y[j] != y[i]]
        total = sum(torch.exp(gamma * (s[i, j] - m)) for j in far)
        total = total * sum(torch.exp(-gamma * (s[i, j] - 1 + m)) for j in near)
        wanted.append(torch.log1p(total).item())
    assert suite.objective("pair")(x, y).item() == pytest.approx(np.mean(wanted), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_is_that_of_a_loop(seed):
    x, y = points(seed)
    found, nearest = digits_nuisance.retrieval(x, y)
    unit = normalize(x)
    for i in range(len(x)):
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        same = [bool(y[j] == y[i]) for j in others]
        r = sum(same)
        precision = sum(sum(same[: at + 1]) / (at + 1) for at in range(r) if same[at])
        assert found[i].item() == pytest.approx(precision / r if r else 0.0, rel=1e-12)
        assert nearest[i].item() == same[0]


def test_embedding_metrics_are_those_of_the_network(nuisance):
    trial = nuisance.prepare(0)

    class Answers(torch.nn.Module):
        """Every digit at a place of its own, but 8 and 9 at the same one."""

        def forward(self, inputs):
            part = next(part for part, (images, _) in trial.parts.items() if torch.equal(images, inputs))
            return torch.eye(10)[trial.parts[part][1].clamp(max=8)]

    label = trial.parts["test"][1]
    found = trial._test(Answers())
    by_class = found.details["class_map_at_r"]
    assert by_class[:8] == pytest.approx([1.0] * 8)
    assert 0 < min(by_class[8:]) == found.metrics["worst_map_at_r"] < 1
    sizes = torch.bincount(label).double()
    assert found.metrics["map_at_r"] == pytest.approx(float((sizes * torch.tensor(by_class)).sum() / 797))
    different = 797**2 - float((sizes**2).sum())
    assert found.metrics["gap"] == pytest.approx(1 - 2 * float(sizes[8] * sizes[9]) / different)
    _, nearest = digits_nuisance.retrieval(Answers()(trial.parts["test"][0]), label)
    assert found.metrics["recall_at_1"] == pytest.approx(float(nearest.mean()))
    val = digits_nuisance.retrieval(Answers()(trial.parts["val"][0]), trial.parts["val"][1])[0]
    assert found.metrics["val_map_at_r"] == pytest.approx(float(val.mean()))


def test_every_embedding_method_has_its_own_objective():
    suite = DigitsNuisance()
    made = [repr(suite.objective(method.name)) for method in suite.methods if method.trained]
    assert len(set(made)) == len(made)


def test_embedding_methods_share_initial_network_and_batches(nuisance, monkeypatch):
    seen = {}
    diary(monkeypatch, lambda: seen.setdefault(method, []), lambda net: net[0])
    trial = nuisance.prepare(1)
    for method in nuisance.grid:
        trial.run(method)
    first = next(iter(seen.values()))
    for log in seen.values():
        assert len(log) == 7
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(log, first, strict=True))


@pytest.mark.parametrize("method", ["circle_16", "triplet", "softmax", "pixels"])
def test_embedding_runs_repeat_bit_by_bit(nuisance, method):
    once = nuisance.prepare(3).run(method)
    torch.rand(7)
    again = nuisance.prepare(3).run(method)
    assert once.metrics == again.metrics
    assert once.details == again.details


@pytest.mark.parametrize("name", [method.name for method in DigitsNuisance.methods])
def test_every_embedding_method_trains(nuisance, name):
    found = nuisance.prepare(0).run(name)
    assert set(found.metrics) == {metric.name for metric in nuisance.metrics}
    if name == "pixels":
        assert found.step_ms is None
    else:
        assert found.step_ms > 0


def test_settings_of_another_choice_are_used(nuisance):
    trial = nuisance.with_own("circle_16", {"gamma": 8.0, "lr": 0.0}).prepare(0)
    assert "8.0" in repr(trial.suite.objective("circle_16"))
    untrained = trial.run("circle_16").metrics
    assert untrained == nuisance.with_own("pair", {"lr": 0.0}).prepare(0).run("pair").metrics


# regression


def test_quarters_are_quarters():
    quarter = diabetes_skewed.quarters(DIABETES.target)
    assert np.bincount(quarter).tolist() == [110, 111, 110, 111]
    for value in range(3):
        assert DIABETES.target[quarter == value].max() < DIABETES.target[quarter == value + 1].min()


@pytest.mark.parametrize("seed", range(3))
def test_skewed_parts_hold_what_they_say(seed):
    quarter = diabetes_skewed.quarters(DIABETES.target)
    rows = diabetes_skewed.split(quarter, seed)
    used = np.concatenate(list(rows.values()))
    assert len(set(used.tolist())) == len(used)
    assert {part: np.bincount(quarter[at]).tolist() for part, at in rows.items()} == {
        "test": [28] * 4,
        "val": [20] * 4,
        "train": list(diabetes_skewed.TRAIN),
    }
    trial = DiabetesSkewed().prepare(seed)
    train = DIABETES.data[rows["train"]]
    for part, at in rows.items():
        inputs, target, which = trial.parts[part]
        assert np.allclose(inputs.numpy(), (DIABETES.data[at] - train.mean(0)) / train.std(0), atol=1e-5)
        assert target.tolist() == DIABETES.target[at].tolist()
        assert which.tolist() == quarter[at].tolist()
    assert trial.center == pytest.approx(DIABETES.target[rows["train"]].mean())
    assert trial.scale == pytest.approx(DIABETES.target[rows["train"]].std())


def test_smoothed_density_is_that_of_a_loop():
    target = DiabetesSkewed().prepare(0).parts["train"][1].numpy()
    fine, density = diabetes_skewed.smoothed(target)
    counts = [0] * (int(target.max() // 20) + 1)
    for value in target:
        counts[int(value // 20)] += 1
    assert np.bincount(fine).tolist() == counts
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 2.0**2))
    kernel /= kernel.sum()
    for at in range(len(counts)):
        wanted = sum(kernel[d + 2] * counts[at + d] for d in range(-2, 3) if 0 <= at + d < len(counts))
        assert density[at] == pytest.approx(wanted)


def test_density_weights_divide_by_their_sum():
    suite = DiabetesSkewed()
    trial = suite.prepare(0)
    _, target, quarter = trial.parts["train"]
    predicted = torch.zeros(len(target))
    for method, group, counts, power in (
        ("density", trial.fine, trial.density, 1.0),
        ("density_sqrt", trial.fine, trial.density, 0.5),
        ("quarters", quarter, torch.tensor(diabetes_skewed.TRAIN).double(), 1.0),
    ):
        weight = counts[group] ** -power
        wanted = (weight * target.double() ** 2).sum() / weight.sum()
        found = suite.objective(method, trial.density)(predicted, target, group=group)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_every_regression_method_has_its_own_objective():
    suite = DiabetesSkewed()
    density = suite.prepare(0).density
    made = [repr(suite.objective(method.name, density)) for method in suite.methods if method.trained]
    assert len(set(made)) == len(made)


def test_regression_methods_share_initial_network_and_batches(skewed, monkeypatch):
    seen = {}
    diary(monkeypatch, lambda: seen.setdefault(method.name, []), lambda net: net)
    trial = skewed.prepare(1)
    for method in skewed.methods:
        trial.run(method.name)
    assert set(seen) == set(skewed.grid)  # what is done after the training has none
    for log in seen.values():
        assert len(log) == 7
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(log, seen["mse"], strict=True))


@pytest.mark.parametrize("method", ["mse", "density", "posthoc", "cvar"])
def test_regression_runs_repeat_bit_by_bit(skewed, method):
    once = skewed.prepare(3).run(method)
    torch.rand(7)
    again = skewed.prepare(3).run(method)
    assert once.metrics == again.metrics
    assert once.details == again.details


@pytest.mark.parametrize("name", [method.name for method in DiabetesSkewed.methods])
def test_every_regression_method_trains(skewed, name):
    found = skewed.prepare(0).run(name)
    assert set(found.metrics) == {metric.name for metric in skewed.metrics}
    if name == "posthoc":
        assert found.step_ms is None
    else:
        assert found.step_ms > 0


def test_the_line_behind_a_network_is_the_weighted_fit(skewed):
    trial = skewed.prepare(0)
    inputs, target, _ = trial.parts["train"]

    class Answers(torch.nn.Module):
        """The first measurement."""

        def forward(self, inputs):
            return inputs[:, 0]

    found = trial._stretched(Answers())(inputs)
    weights = (1 / trial.density[trial.fine])[:, None].sqrt()
    wanted = (target.double() - trial.center) / trial.scale
    line = torch.stack([inputs[:, 0].double(), torch.ones(len(inputs)).double()], 1)
    fitted = line @ torch.linalg.lstsq(weights * line, weights[:, 0] * wanted).solution
    assert found.tolist() == pytest.approx(fitted.tolist(), abs=1e-5)


def test_the_line_is_put_behind_the_baseline(skewed):
    alone = skewed.prepare(2).run("posthoc")
    trial = skewed.prepare(2)
    plain = trial.run("mse")
    assert trial.run("posthoc").metrics == alone.metrics != plain.metrics


def test_regression_metrics_are_those_of_the_network(skewed):
    trial = skewed.prepare(0)
    off = torch.tensor([3.0, -5.0, 7.0, -11.0])

    class Answers(torch.nn.Module):
        """Off by a number that depends on the quarter."""

        def forward(self, inputs):
            part = next(part for part, (rows, *_) in trial.parts.items() if torch.equal(rows, inputs))
            _, target, quarter = trial.parts[part]
            return (target + off[quarter] - trial.center) / trial.scale

    found = trial._test(Answers())
    assert found.details["quarter_mae"] == pytest.approx([3.0, 5.0, 7.0, 11.0], rel=1e-4)
    assert found.metrics["few_mae"] == pytest.approx(11.0, rel=1e-4)
    assert found.metrics["many_mae"] == pytest.approx(3.0, rel=1e-4)
    assert found.metrics["mae"] == found.metrics["val_mae"] == pytest.approx(6.5, rel=1e-4)
    target = trial.parts["test"][1].double()
    residual = 28 * (9 + 25 + 49 + 121)
    assert found.metrics["r2"] == pytest.approx(1 - residual / float(((target - target.mean()) ** 2).sum()), rel=1e-4)
