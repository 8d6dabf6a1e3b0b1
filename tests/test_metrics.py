"""Metrics of groups, classes and weights: loops, torchmetrics' own numbers, ranks, copies, and self.log."""

import copy
import math
import pickle
from importlib import import_module

import metrics_worker as worker
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_kit import QUIET, trainer
from ranks import run_ranks
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MulticlassRecall, MulticlassStatScores

from reweigh.lightning_callbacks import (
    EffectiveSampleSize,
    GroupAccuracy,
    SplitAccuracy,
    WeightEntropy,
    WorstClassRecall,
    WorstGroupAccuracy,
)
from reweigh.losses import CrossEntropy, Objective
from reweigh.weighting import Focal
from reweigh.weighting.functional import effective_sample_size

CLASSES, GROUPS = worker.CLASSES, worker.GROUPS


def filled(metric, *arguments, batch=None):
    rows = torch.arange(len(arguments[0])).split(batch or max(1, len(arguments[0])))
    for part in rows:
        metric.update(*(value[part] for value in arguments))
    return metric.compute()


def by_hand(labels, target, key, keys):
    """Accuracy by key with loops; nan where there is none."""
    right, seen = [0] * keys, [0] * keys
    for label, wanted, k in zip(labels, target, key, strict=True):
        seen[k] += 1
        right[k] += label == wanted
    return [r / s if s else math.nan for r, s in zip(right, seen, strict=True)]


samples = st.lists(st.tuples(*[st.integers(0, CLASSES - 1)] * 2, st.integers(0, GROUPS - 1)), min_size=1, max_size=40)


# groups and classes


@given(samples, st.integers(1, 7))
def test_groups_and_classes_are_loops(rows, batch):
    labels, target, group = (list(column) for column in zip(*rows, strict=True))
    arguments = torch.tensor(labels), torch.tensor(target), torch.tensor(group)
    expected = by_hand(labels, target, group, GROUPS)
    found = filled(GroupAccuracy(GROUPS), *arguments, batch=batch)
    assert found.tolist() == pytest.approx(expected, nan_ok=True)
    worst = filled(WorstGroupAccuracy(GROUPS), *arguments, batch=batch)
    assert worst.item() == pytest.approx(min(value for value in expected if not math.isnan(value)))

    recall = by_hand(labels, target, target, CLASSES)
    worst = filled(WorstClassRecall(CLASSES), *arguments[:2], batch=batch)
    assert worst.item() == pytest.approx(min(value for value in recall if not math.isnan(value)))

    splits = filled(SplitAccuracy(worker.COUNTS), *arguments[:2], batch=batch)
    micro = filled(SplitAccuracy(worker.COUNTS, average="micro"), *arguments[:2], batch=batch)
    for name, classes in {"many": [0], "medium": [1, 2, 3], "few": [4], "all": range(CLASSES)}.items():
        known = [recall[c] for c in classes if not math.isnan(recall[c])]
        wanted = sum(known) / len(known) if known else math.nan
        assert splits[name].item() == pytest.approx(wanted, nan_ok=True), name
        hits = [label == wanted for label, wanted in zip(labels, target, strict=True) if wanted in classes]
        wanted = sum(hits) / len(hits) if hits else math.nan
        assert micro[name].item() == pytest.approx(wanted, nan_ok=True), name


def test_they_are_torchmetrics_own():
    logits, target, group, _ = worker.data()
    recall = MulticlassRecall(CLASSES, average=None)(logits, target)
    assert WorstClassRecall(CLASSES)(logits, target) == recall.min()
    right, *_, support = MulticlassStatScores(CLASSES, average=None)(logits, target).unbind(-1)
    splits = SplitAccuracy(worker.COUNTS)(logits, target)
    assert splits["medium"].item() == pytest.approx((right / support)[1:4].mean().item())
    assert splits["all"].item() == pytest.approx(MulticlassAccuracy(CLASSES)(logits, target).item())
    micro = SplitAccuracy(worker.COUNTS, average="micro")(logits, target)
    assert micro["all"] == MulticlassAccuracy(CLASSES, average="micro")(logits, target)

    own = MulticlassAccuracy(CLASSES, average="micro")
    accuracies = [own(logits[group == g], target[group == g]).item() for g in range(1, GROUPS)]
    found = GroupAccuracy(GROUPS)(logits, target, group)
    assert found[0].isnan()
    assert found[1:].tolist() == pytest.approx(accuracies)
    assert WorstGroupAccuracy(GROUPS)(logits, target, group).item() == pytest.approx(min(accuracies))


@pytest.mark.parametrize("kind", ["logits", "probabilities", "classes"])
def test_every_kind_of_prediction(kind):
    logits, target, group, _ = worker.data()
    preds = {"logits": logits, "probabilities": logits.softmax(1), "classes": logits.argmax(1)}[kind]
    assert WorstGroupAccuracy(GROUPS)(preds, target, group) == WorstGroupAccuracy(GROUPS)(logits, target, group)
    assert WorstClassRecall(CLASSES)(preds, target) == WorstClassRecall(CLASSES)(logits, target)
    assert SplitAccuracy(worker.COUNTS)(preds, target) == SplitAccuracy(worker.COUNTS)(logits, target)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_binary_scores_follow_torchmetrics(threshold):
    scores, group = torch.randn(60), torch.arange(60) % 3
    target = (scores + torch.randn(60) > 0).long()
    for preds in (scores, scores.sigmoid()):
        expected = [BinaryAccuracy(threshold)(preds[group == g], target[group == g]).item() for g in range(3)]
        assert GroupAccuracy(3, threshold=threshold)(preds, target, group).tolist() == pytest.approx(expected)
    recall = MulticlassRecall(2, average=None)((scores.sigmoid() > threshold).long(), target)
    assert WorstClassRecall(2, threshold=threshold)(scores, target) == recall.min()
    assert WorstClassRecall(2, threshold=threshold)(scores, target.bool()) == recall.min()


def test_more_dimensions_and_ignored_targets():
    logits, target = torch.randn(4, CLASSES, 3, 2), torch.randint(CLASSES, (4, 3, 2))
    target[0, :, 0] = -1
    group = torch.tensor([0, 1, 1, 3])
    flat, labels = target.reshape(-1), logits.movedim(1, -1).reshape(-1, CLASSES)
    kept = flat != -1
    spread = group[:, None, None].expand_as(target)
    expected = GroupAccuracy(GROUPS)(labels[kept], flat[kept], spread.reshape(-1)[kept])
    for given_group in (group, spread):
        found = GroupAccuracy(GROUPS, ignore_index=-1)(logits, target, given_group)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    expected = MulticlassRecall(CLASSES, average=None, ignore_index=-1)(logits, target)
    assert WorstClassRecall(CLASSES, ignore_index=-1)(logits, target) == expected.min()


def test_the_worst_group_of_all_data_is_not_the_mean_of_the_worst():
    metric = WorstGroupAccuracy(2)
    metric.update(torch.tensor([1, 0]), torch.tensor([1, 1]), torch.tensor([0, 1]))
    metric.update(torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0, 1]))
    assert metric.compute() == 0.5  # the worst of each batch is 0


def test_thresholds_are_those_of_the_protocol():
    metric = SplitAccuracy([101, 100, 20, 19])
    metric.update(torch.tensor([0, 0, 2, 3]), torch.tensor([0, 1, 2, 3]))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == {"many": 1.0, "medium": 0.5, "few": 1.0, "all": 0.75}
    empty = SplitAccuracy([5, 5], many=3, few=3)
    empty.update(torch.tensor([0]), torch.tensor([0]))
    assert empty.compute()["medium"].isnan()
    assert empty.compute()["many"] == 1.0  # class 1 was not seen and does not count as 0


# weights


weights_of = st.lists(st.tuples(st.floats(0.0, 1e6), st.integers(0, 3)), min_size=1, max_size=30)


@given(weights_of, st.integers(1, 7))
def test_sizes_and_entropies_are_loops(rows, batch):
    weights, counts = zip(*rows, strict=True)
    arguments = torch.tensor(weights, dtype=torch.float64), torch.tensor(counts)
    copies = [w for w, n in rows for _ in range(n)]
    total = math.fsum(copies)
    size = filled(EffectiveSampleSize(), *arguments, batch=batch).item()
    share = filled(EffectiveSampleSize(share=True), *arguments, batch=batch).item()
    entropy = filled(WeightEntropy(kind="entropy"), *arguments, batch=batch).item()
    kl = filled(WeightEntropy(kind="kl"), *arguments, batch=batch).item()
    normalized = filled(WeightEntropy(), *arguments, batch=batch).item()
    if not copies:
        assert all(math.isnan(value) for value in (size, share, entropy, kl, normalized))
        return
    squares = math.fsum(w * w for w in copies)
    assert size == pytest.approx(total**2 / squares if squares else 0.0)
    assert share == pytest.approx(size / len(copies))
    if not total:
        assert all(math.isnan(value) for value in (entropy, kl, normalized))
        return
    wanted = -math.fsum(w / total * math.log(w / total) for w in copies if w / total > 0)
    assert entropy == pytest.approx(wanted, abs=1e-6)
    assert kl == pytest.approx(math.log(len(copies)) - wanted, abs=1e-6)
    assert normalized == pytest.approx(wanted / math.log(len(copies)) if len(copies) > 1 else 1.0, abs=1e-6)


def test_the_size_is_the_librarys():
    *_, weights = worker.data()
    assert EffectiveSampleSize()(weights).item() == pytest.approx(effective_sample_size(weights).item())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_changes_nothing(scale):
    *_, weights = worker.data()
    for metric in (EffectiveSampleSize, WeightEntropy):
        one, other = metric(), metric()
        assert other(scale * weights.float()).item() == pytest.approx(one(weights.float()).item(), rel=1e-6)


def test_nearly_equal_weights_keep_their_digits():
    """The divergence is 1e-12 / 2 here, where log N - H in float32 would be 0 or 1e-7."""
    offset = 1e-6 * torch.linspace(-1, 1, 1001, dtype=torch.float64)
    metric = WeightEntropy(kind="kl")
    for part in (1.0 + offset).split(100):
        metric.update(part)
    assert metric.compute().item() == pytest.approx(offset.square().mean().item() / 2, rel=1e-2)


def test_equal_and_lonely_weights():
    assert WeightEntropy()(torch.full((8,), 0.3)) == 1.0
    assert WeightEntropy(kind="kl")(torch.full((8,), 0.3)) == 0.0
    assert EffectiveSampleSize(share=True)(torch.full((8,), 0.3)).item() == pytest.approx(1.0)
    alone = torch.tensor([0.0, 3.0, 0.0, 0.0])
    assert WeightEntropy()(alone) == 0.0
    assert EffectiveSampleSize()(alone) == 1.0


def test_what_counts_nothing_may_hold_anything():
    weights = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
    for counts in (torch.tensor([True, False]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])):
        for metric in (EffectiveSampleSize, WeightEntropy):
            assert metric()(weights, counts) == metric()(weights[0])


def test_they_read_an_objectives_weights():
    logits, target, *_ = worker.data()
    objective = Objective(CrossEntropy(), Focal(2.0))
    found = EffectiveSampleSize()(objective.weights(logits, target))
    assert found.item() == pytest.approx(objective.components(logits, target).effective_sample_size.item(), rel=1e-5)


# what torchmetrics asks of a metric


@pytest.mark.parametrize("name", worker.made())
def test_nothing_seen_is_nan_with_torchmetrics_warning(name):
    metric = worker.made()[name]
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        value = metric.compute()
    values = value.values() if isinstance(value, dict) else [value]
    assert all(entry.isnan().all() for entry in values)
    metric.update(*worker.arguments(name, torch.arange(0)))  # an empty batch adds nothing
    value = metric.compute()
    assert all(entry.isnan().all() for entry in (value.values() if isinstance(value, dict) else [value]))


@pytest.mark.parametrize("name", worker.made())
def test_copies_go_on_by_themselves(name):
    rows = torch.arange(worker.SIZE).split(30)
    metric = worker.made()[name]
    metric.update(*worker.arguments(name, rows[0]))
    twins = [pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()]
    metric.update(*worker.arguments(name, rows[1]))
    for twin in twins:
        assert not torch.equal(spelled(twin).nan_to_num(-1.0), spelled(metric).nan_to_num(-1.0))
        twin.update(*worker.arguments(name, rows[1]))
        assert torch.equal(spelled(twin).nan_to_num(-1.0), spelled(metric).nan_to_num(-1.0))
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert spelled(metric).isnan().all()


def spelled(metric):
    value = metric.compute()
    return torch.stack(list(value.values())) if isinstance(value, dict) else value


@pytest.mark.parametrize("name", worker.made())
def test_states_are_saved_where_asked(name):
    metric = worker.made()[name]
    metric.persistent(True)
    metric.update(*worker.arguments(name, torch.arange(50)))
    other = worker.made()[name]
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1  # torchmetrics saves states, not that there were any
    torch.testing.assert_close(spelled(other), spelled(metric), rtol=0, atol=0, equal_nan=True)


def test_a_collection_updates_both_group_metrics_once():
    both = MetricCollection({"all": GroupAccuracy(GROUPS), "worst": WorstGroupAccuracy(GROUPS)})
    logits, target, group, _ = worker.data()
    for rows in torch.arange(worker.SIZE).split(20):
        both.update(logits[rows], target[rows], group[rows])
    assert [sorted(names) for names in both.compute_groups.values()] == [["all", "worst"]]
    found = both.compute()
    assert found["worst"] == found["all"][1:].min()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(worker.__file__, 2, tmp_path_factory.mktemp("metrics"))


@pytest.mark.parametrize("kind", worker.SHARDS)
def test_two_processes_are_one(ranks, kind):
    alone = worker.run(worker.SHARDS[kind])
    assert not torch.equal(alone["0/size/value"], worker.made()["size"](worker.data()[-1]))  # the mask matters
    for rank in ranks:
        assert rank[kind].keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(rank[kind][key], value, rtol=1e-6, atol=0, equal_nan=True, msg=key)
            if "group" in key or "worst" in key or "split" in key:
                torch.testing.assert_close(rank[kind][key], value, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
class TestLightning:
    pytestmark = QUIET

    def test_logged_by_self_log(self, tmp_path, package):
        base = import_module(package).LightningModule

        class Net(base):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Linear(CLASSES, CLASSES)
                self.worst = WorstGroupAccuracy(GROUPS)
                self.recall = WorstClassRecall(CLASSES)
                self.splits = SplitAccuracy(worker.COUNTS)
                self.size = EffectiveSampleSize(share=True)
                self.objective = Objective(CrossEntropy(), Focal(2.0))

            def training_step(self, batch):
                x, y, _ = batch
                logits = self.net(x)
                self.size.update(self.objective.weights(logits, y))
                self.log("size", self.size, on_step=False, on_epoch=True)
                return self.objective(logits, y)

            def validation_step(self, batch):
                x, y, group = batch
                logits = self.net(x)
                self.worst.update(logits, y, group)
                self.recall.update(logits, y)
                self.splits.update(logits, y)
                self.log("worst", self.worst)
                self.log("recall", self.recall)

            def on_validation_epoch_end(self):
                self.log_dict({f"split/{name}": value for name, value in self.splits.compute().items()})
                self.splits.reset()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        x, y, group, _ = worker.data()
        loader = DataLoader(TensorDataset(x, y, group), batch_size=16)
        model = Net()
        run = trainer(tmp_path, package=package)
        run.fit(model, loader, loader)
        with torch.no_grad():
            logits = model.net(x)
        logged = run.callback_metrics
        assert logged["worst"] == WorstGroupAccuracy(GROUPS)(logits, y, group)
        assert logged["recall"] == WorstClassRecall(CLASSES)(logits, y)
        for name, value in SplitAccuracy(worker.COUNTS)(logits, y).items():
            assert logged[f"split/{name}"] == value
        assert 0 < logged["size"] < 1


# mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupAccuracy(0), "GroupAccuracy: num_groups must be >= 1, got 0"),
        (lambda: WorstGroupAccuracy(2, threshold=2.0), r"WorstGroupAccuracy: threshold must be .*, got 2.0"),
        (lambda: WorstClassRecall(1), "WorstClassRecall: num_classes must be >= 2, got 1"),
        (lambda: SplitAccuracy([3, -1]), "SplitAccuracy: class_counts"),
        (lambda: SplitAccuracy([3, 1], many=5, few=10), "SplitAccuracy: many must be .*, got 5"),
        (lambda: SplitAccuracy([3, 1], average="weighted"), "SplitAccuracy: average must be one of 'macro', 'micro'"),
        (lambda: WeightEntropy(kind="nats"), "WeightEntropy: kind must be one of"),
        (lambda: GroupAccuracy(2)(torch.tensor([1]), torch.tensor([1]), torch.tensor([2])), "between 0 and 1, got 2"),
        (lambda: GroupAccuracy(2)(torch.ones(3), torch.ones(3), torch.tensor([0, 1])), "an entry per sample"),
        (lambda: WorstClassRecall(2)(torch.tensor([1]), torch.tensor([-100])), "target must be between 0 and 1"),
        (lambda: WorstClassRecall(2)(torch.ones(3, 2), torch.ones(2).long()), r"got \(3, 2\)"),
        (lambda: WorstClassRecall(2)(torch.ones(3, 2).long(), torch.ones(3).long()), r"got \(3, 2\) \(torch.int64\)"),
        (lambda: EffectiveSampleSize()(torch.tensor([1.0, -1.0])), "EffectiveSampleSize: weights and counts must be"),
        (lambda: WeightEntropy()(torch.tensor([math.nan])), "got nan that counts 1.0"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
