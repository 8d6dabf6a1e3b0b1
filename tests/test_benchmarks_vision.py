"""The suites on users' images, on tiny data of the same form: pairing, repetition, metrics, refusals."""

import json
import os
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reweigh.benchmarks.readers import DataError
from reweigh.benchmarks.suites import cifar_lt, group_images, image_lists, multilabel_images, vision
from reweigh.benchmarks.suites.classes import FromRoot
from reweigh.benchmarks.suites.training import Classifier, EpochOrder, WeightedOrder
from reweigh.benchmarks.suites.vision import Files, ImageSet, Pictures, framed, load_weights, network, outputs, part

CIFAR = cifar_lt.CIFAR_LT
LISTS = (image_lists.ImageNetLT, image_lists.PlacesLT, image_lists.INaturalist18)
GROUPS = (group_images.Waterbirds, group_images.CelebABlond)
LABELS = (multilabel_images.Coco, multilabel_images.VocMLT, multilabel_images.CocoMLT)
ALL = (*CIFAR, *LISTS, *GROUPS, *LABELS)
FIRST = (cifar_lt.Cifar10LT10, image_lists.ImageNetLT, group_images.Waterbirds, multilabel_images.Coco)
"""One of each family; the others are as slow and share its code."""


def marked(kinds):
    return [kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


# tiny data


def picture(path, seed, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_cifar(root, classes=10, per_class=20):
    folder = root / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    for seed, name in enumerate(files):
        count = classes * (2 if "test" in name else per_class // (len(files) - 1))
        labels = [i % classes for i in range(count)]
        data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
        key = b"labels" if classes == 10 else b"fine_labels"
        (folder / name).write_bytes(pickle.dumps({b"data": data, key: labels}, protocol=2))
    return root


LIST_SIZES = (12, 6, 5, 2)
"""Training images of each class, against the limits 10 and 4."""


def write_lists(root, kind):
    for label in range(4):
        for number in range(4):
            picture(root / f"images/class {label}/{number}.png", 10 * label + number)
    for name, file in kind.files:
        counts = LIST_SIZES if name == "train" else (2,) * 4
        lines = [f"images/class {label}/{i % 4}.png {label}" for label in range(4) for i in range(counts[label])]
        (root / file).write_text("\n".join(lines))
    return root


GROUP_SIZES = {"train": (6, 2, 3, 5), "val": (2, 2, 2, 2), "test": (3, 2, 2, 2)}


def write_groups(root, kind):
    rows, number = [], 0
    folder = root if kind is group_images.Waterbirds else root / "img_align_celeba"
    for split, (_, sizes) in enumerate(GROUP_SIZES.items()):
        for group, size in enumerate(sizes):
            for _ in range(size):
                picture(folder / f"{number}.png", number)
                rows.append((f"{number}.png", group // 2, group % 2, split))
                number += 1
    if kind is group_images.Waterbirds:
        lines = ["img_filename,y,place,split", *(",".join(map(str, row)) for row in rows)]
        (root / "metadata.csv").write_text("\n".join(lines))
    else:
        own = [f"{name},{2 * y - 1},{2 * place - 1}" for name, y, place, _ in rows]
        (root / "list_attr_celeba.csv").write_text("\n".join(["image_id,Blond_Hair,Male", *own]))
        own = [f"{name},{split}" for name, *_, split in rows]
        (root / "list_eval_partition.csv").write_text("\n".join(["image_id,partition", *own]))
    return root


KEPT = 16


def write_labels(root, kind):
    rng = np.random.default_rng(1)
    chance = np.array([0.9, 0.35, 0.1])
    for (file, folder), count in ((kind.train_files, 30), (kind.test_files, 12)):
        there = rng.random((count, 3)) < chance
        there[:KEPT] = False  # 12, 6 and 2 of the first 16
        for label, size in enumerate((12, 6, 2)):
            there[:size, label] = True
        there[12:KEPT, 0] = there[12:KEPT, 1] = True
        there[:12, 0][-4:] = False
        images = [{"id": i + 1, "file_name": f"{i}.png"} for i in range(count)]
        pairs = [(i + 1, int(label) + 7) for i in range(count) for label in np.flatnonzero(there[i])]
        content = {
            "images": images,
            "categories": [{"id": label + 7, "name": "abc"[label]} for label in range(3)],
            "annotations": [{"image_id": image, "category_id": label} for image, label in pairs],
        }
        for i in range(count):
            picture(root / folder / f"{i}.png", i)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(content))
    if kind.keep:
        (root / kind.keep).write_text("\n".join(str(i + 1) for i in range(KEPT)))
    return root


def write(root, kind):
    if kind in CIFAR:
        return write_cifar(root, kind.classes)
    return (write_lists if kind in LISTS else write_groups if kind in GROUPS else write_labels)(root, kind)


@pytest.fixture
def shrunk(monkeypatch):
    """Makes a suite tiny: three steps, small images, small numbers."""

    def make(kind):
        own = {"steps": 3, "batch_size": 8, "loaders": 0, "accelerator": "cpu"}
        if "look_every" in kind.training:
            own["look_every"] = 2
        if "rate_warmup" in kind.training:
            own["rate_warmup"] = 2
        monkeypatch.setattr(kind, "training", {**kind.training, **own})
        monkeypatch.setattr(vision.ResNet, "__init__", small(vision.ResNet.__init__))
        if kind in CIFAR:
            monkeypatch.setattr(kind, "largest", 20)
            monkeypatch.setattr(kind, "imbalance", 10)
        else:
            monkeypatch.setattr(kind, "size", 32)
        if kind in LISTS:
            monkeypatch.setattr(kind, "classes", 4)
            monkeypatch.setattr(image_lists, "MANY", 10)
            monkeypatch.setattr(image_lists, "FEW", 4)
        if kind in LABELS:
            monkeypatch.setattr(kind, "val_images", 8)
            monkeypatch.setattr(multilabel_images, "HEAD", 10)
            monkeypatch.setattr(multilabel_images, "TAIL", 4)
        if kind in GROUPS:
            monkeypatch.setattr(kind, "own", {**kind.own, "jtt": {"first_steps": 2, "times": 20}})
        return kind

    return make


def small(real):
    """Networks of a block per stage and 8 times fewer channels."""

    def init(self, blocks, widths, classes, *, stem):
        real(self, (1,) * len(blocks), [width // 8 for width in widths], classes, stem=stem)

    return init


FEW_KINDS = (cifar_lt.Cifar10LT10, image_lists.ImageNetLT, image_lists.INaturalist18, *GROUPS, *LABELS)


@pytest.fixture(params=marked(FEW_KINDS), ids=lambda kind: kind.name)
def tiny(request, shrunk, tmp_path):
    """A suite on data of its own."""
    return shrunk(request.param)(write(tmp_path, request.param))


# every suite


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_suites_are_consistent(kind):
    suite = kind()
    methods, metrics = [m.name for m in suite.methods], [m.name for m in suite.metrics]
    assert len(set(methods)) == len(methods)
    assert len(set(metrics)) == len(metrics)
    assert suite.from_root
    assert not suite.gates
    assert suite.quick[0] == suite.default[0] == suite.baseline.name
    assert set(suite.quick) | set(suite.default) <= set(methods)
    assert len({suite.fingerprint(method) for method in methods}) == len(methods)
    assert suite.unavailable() == f"needs --data-root with {suite.needs}"
    with pytest.raises(DataError, match="needs --data-root"):
        suite.prepare(0)
    assert json.loads(json.dumps(suite.description())) == suite.description()
    assert "measured nothing" in " ".join(suite.notes)
    assert all("memory" not in figure.source for figure in suite.published)
    before = suite.fingerprint("posthoc_la" if "posthoc_la" in methods else methods[0])
    suite.training = {**suite.training, "lr": 0.123}
    assert suite.fingerprint("posthoc_la" if "posthoc_la" in methods else methods[0]) != before


def test_names_are_all_different():
    assert len({kind.name for kind in ALL}) == len({kind.__name__ for kind in ALL}) == 16
    for kind in ALL:
        assert pickle.loads(pickle.dumps(kind)) is kind  # workers get suites


@pytest.mark.parametrize("kind", marked(ALL), ids=lambda kind: kind.name)
def test_every_method_trains(kind, shrunk, tmp_path):
    suite = shrunk(kind)(write(tmp_path, kind))
    assert suite.unavailable() is None
    trial = suite.prepare(0)
    methods = [method.name for method in suite.methods] if kind in FEW_KINDS else suite.quick
    for name in methods:
        outcome = trial.run(name)
        assert set(outcome.metrics) >= {metric.name for metric in suite.metrics}, name
        assert all(np.isfinite(value) for value in outcome.metrics.values()), name
        json.dumps(outcome.details)


def test_runs_repeat_bit_by_bit(tiny):
    second = "jtt" if isinstance(tiny, group_images.GroupImageSuite) else tiny.methods[2].name
    for method in (tiny.baseline.name, second):
        once = tiny.prepare(4).run(method)
        torch.rand(7)  # what happened before in this process must not matter
        again = tiny.prepare(4).run(method)
        assert once.metrics == again.metrics, method
        assert once.details == again.details, method
    assert tiny.prepare(4).data_hash == tiny.prepare(4).data_hash


def test_methods_share_initial_network_and_batches(tiny, monkeypatch):
    seen = {}

    def step(module, batch, batch_idx):
        log = seen.setdefault(method, [])
        if not log:
            log.append(torch.cat([p.detach().flatten() for p in module.net.parameters()]))
        log.append(batch[0].clone())
        inputs, target, *rest = batch
        return module.objective(module.net(inputs), target, **dict(zip(module.meta, rest, strict=True)))

    monkeypatch.setattr(Classifier, "training_step", step)
    trial, others = tiny.prepare(1), ("resampling", "group_dro_balanced", "jtt")
    methods = [entry.name for entry in tiny.methods if entry.trained and entry.name not in others]
    for method in methods:
        trial.run(method)
    for method in methods:
        assert len(seen[method]) == 4, method
        for ours, theirs in zip(seen[method], seen[methods[0]], strict=True):
            assert torch.equal(ours, theirs), method
    assert len(methods) >= 4
    before, method = seen.pop(methods[0]), methods[0]
    tiny.prepare(2).run(method)
    assert not torch.equal(seen[method][0], before[0])


@pytest.mark.parametrize("kind", marked(kind for kind in FEW_KINDS if kind not in GROUPS), ids=lambda kind: kind.name)
def test_what_is_not_trained_is_the_same_beside_and_without_the_baseline(kind, shrunk, tmp_path):
    suite = shrunk(kind)(write(tmp_path, kind))
    free = next(method.name for method in suite.methods if not method.trained)
    trial = suite.prepare(0)
    trial.run(suite.baseline.name)
    beside = trial.run(free)
    assert beside.metrics == suite.prepare(0).run(free).metrics
    assert beside.step_ms is None


# metrics against naive loops


def test_shot_accuracies_are_means_over_classes(shrunk, tmp_path, monkeypatch):
    trial = shrunk(image_lists.ImageNetLT)(write_lists(tmp_path, image_lists.ImageNetLT)).prepare(0)
    target = trial.parts["test"].targets
    answer = target.clone()
    answer[0] = 3  # one of two of class 0
    answer[4:6] = 0  # all of class 2
    logits = torch.nn.functional.one_hot(answer, 4).float()
    found = trial._test({"test": logits, "val": logits}).metrics
    recall = []
    for label in range(4):
        mine = [int(a) == label for a, t in zip(answer, target, strict=True) if t == label]
        recall.append(sum(mine) / len(mine))
    assert recall == [0.5, 1.0, 0.0, 1.0]
    assert found["many"] == recall[0]
    assert found["medium"] == (recall[1] + recall[2]) / 2
    assert found["few"] == recall[3]
    assert found["accuracy"] == pytest.approx(5 / 8) == pytest.approx(found["val_balanced_accuracy"])
    monkeypatch.setattr(image_lists, "POINTS", 2)
    details = trial._test({"test": logits, "val": logits}).details
    assert details["class_counts"] == [9, 4]  # means of 12 and 6, of 5 and 2, rounded to even
    assert details["class_recall"] == [0.75, 0.5]
    assert len(details["class_names"]) == 2


@pytest.mark.parametrize("kind", GROUPS, ids=lambda kind: kind.name)
def test_group_metrics_are_those_of_the_network(kind, shrunk, tmp_path):
    suite = shrunk(kind)(write_groups(tmp_path, kind))
    trial = suite.prepare(0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = suite.network(trial.data, suite.training).eval()
    outcome = trial._test(net)
    right = {group: [] for group in range(4)}
    part = trial.parts["test"]
    for at in range(len(part)):
        inputs, target, group = part[[at]]
        with torch.no_grad():
            right[int(group)].append(int(net(inputs).argmax()) == int(target))
    accuracy = [sum(found) / len(found) for found in right.values()]
    assert [len(found) for found in right.values()] == list(GROUP_SIZES["test"])
    assert outcome.details["group_accuracy"] == pytest.approx(accuracy)
    assert outcome.details["group_counts"] == list(GROUP_SIZES["train"])
    assert outcome.metrics["worst_group"] == pytest.approx(min(accuracy))
    assert outcome.metrics["average"] == pytest.approx(sum(accuracy) / 4)
    shares = [size * found for size, found in zip(GROUP_SIZES["train"], accuracy, strict=True)]
    assert outcome.metrics["train_average"] == pytest.approx(sum(shares) / 16)
    assert outcome.metrics["gap"] == pytest.approx(sum(accuracy) / 4 - min(accuracy))


@pytest.mark.parametrize("kind", LABELS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("lines", [None, torch.tensor([0.3, 0.5, 0.9])])
def test_label_metrics_are_those_of_the_answers(kind, lines, shrunk, tmp_path):
    trial = shrunk(kind)(write_labels(tmp_path, kind)).prepare(0)
    truth = trial._truth("test")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(truth.shape, generator=generator) + truth
    outcome = trial._test(logits, torch.zeros(trial._truth("val").shape), lines)
    found, p = outcome.metrics, logits.sigmoid()
    precisions, recalls, averages, hits, said_all, true_all = [], [], [], 0, 0, 0
    for label in range(3):
        line = 0.5 if lines is None else float(lines[label])
        said = [float(value) > line for value in p[:, label]]
        true = [bool(value) for value in truth[:, label]]
        both = sum(a and b for a, b in zip(said, true, strict=True))
        precisions.append(both / sum(said) if any(said) else 0.0)
        recalls.append(both / sum(true))
        hits, said_all, true_all = hits + both, said_all + sum(said), true_all + sum(true)
        order = sorted(range(len(true)), key=lambda row, label=label: -float(p[row, label]))
        marks = [sum(true[row] for row in order[: place + 1]) / (place + 1) for place in range(len(order))]
        averages.append(sum(mark for mark, row in zip(marks, order, strict=True) if true[row]) / sum(true))
    cp, cr = sum(precisions) / 3, sum(recalls) / 3
    assert found["cf1"] == pytest.approx(2 * cp * cr / (cp + cr))
    assert found["of1"] == pytest.approx(2 * hits / (said_all + true_all))
    assert found["map"] == pytest.approx(sum(averages) / 3)
    if kind.keep:
        assert trial.counts.tolist() == [12, 10, 2]
        trial.counts = torch.tensor([12, 6, 2])
        found = trial._test(logits, torch.zeros(trial._truth("val").shape), lines).metrics
        assert [found[f"{name}_map"] for name in ("head", "medium", "tail")] == pytest.approx(averages)


# data


@pytest.mark.parametrize("kind", CIFAR, ids=lambda kind: kind.name)
def test_cifar_sizes_and_settings_are_the_published_ones(kind):
    sizes = kind.sizes()
    assert sizes[0] == {10: 5000, 100: 500}[kind.classes]
    assert sizes[-1] in (sizes[0] // kind.imbalance, sizes[0] // kind.imbalance + 1)
    epoch = -(-sum(sizes) // 128)
    training = kind.training
    assert (training["steps"], training["rate_warmup"]) == (200 * epoch, 5 * epoch)
    assert [training[name] for name in ("lr", "weight_decay", "batch_size")] == [0.1, 2e-4, 128]
    assert training["optimizer"] == "sgd"
    if kind is cifar_lt.Cifar10LT100:
        assert sum(sizes) == 12406
    if kind is cifar_lt.Cifar100LT100:
        assert sum(sizes) == 10847


def test_cifar_parts_are_a_tail_and_the_whole_test(shrunk, tmp_path):
    suite = shrunk(cifar_lt.Cifar10LT10)(write_cifar(tmp_path))
    data, other = suite.data(0), suite.data(1)
    assert data.parts.keys() == {"train", "test"}
    assert torch.bincount(data.parts["train"].targets).tolist() == suite.sizes()
    assert torch.bincount(data.parts["test"].targets).tolist() == [2] * 10
    assert data.by_size == list(range(10))
    assert suite.prepare(0).data_hash != suite.prepare(1).data_hash
    assert torch.equal(data.parts["test"][[0, 5]][0], other.parts["test"][[0, 5]][0])
    raw = suite.read()["test"][0][5].astype(np.float32) / 255
    expected = (raw - np.float32(vision.CIFAR_MEAN)) / np.float32(vision.CIFAR_STD)
    assert np.allclose(data.parts["test"][[5]][0][0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_what_can_be_learned_is_learned(shrunk, tmp_path):
    """Each class has a colour of its own: images and labels stay together through selection, order and augmentation."""
    suite = shrunk(cifar_lt.Cifar10LT10)(write_cifar(tmp_path))
    colours = np.array([[(label % 8) >> bit & 1 for bit in range(3)] for label in range(10)], np.uint8) * 200
    colours[8:] = 100, 200, 0
    colours[9] = 0, 100, 200
    for file in (tmp_path / "cifar-10-batches-py").iterdir():
        batch = pickle.loads(file.read_bytes())
        batch[b"data"] = batch[b"data"] // 8 + colours[batch[b"labels"]].repeat(1024, axis=1)
        file.write_bytes(pickle.dumps(batch, protocol=2))
    suite.training = {**suite.training, "steps": 150, "batch_size": 32, "rate_warmup": 20}
    assert suite.prepare(0).run("balanced_softmax").metrics["accuracy"] >= 0.5  # chance is 0.1


def test_drw_defers_to_the_last_fifth_and_beta_is_the_papers(shrunk, tmp_path):
    kind = shrunk(cifar_lt.Cifar10LT10)
    suite = kind(write_cifar(tmp_path))
    assert {suite.options(name)["beta"] for name in ("cb", "cb_focal", "drw")} == {0.9999}
    assert "0.9999" in suite.method("cb").what
    suite.training = {**suite.training, "steps": 10}
    head = suite.prepare(0).run("drw").details["weights"]["head"]
    assert {value for value in head[:8] if value is not None} == {1.0}
    assert all(value is None or value < 1.0 for value in head[8:])
    assert len(head) == 10


def test_validation_images_are_not_in_training(shrunk, tmp_path):
    for kind in LABELS:
        split = shrunk(kind)(write_labels(tmp_path / kind.name, kind)).read()
        names = {part: {path.name for path in found.paths} for part, found in split.items()}
        assert len(names["val"]) == 8
        assert not names["val"] & names["train"]
        if kind.keep:
            assert names["train"] == {f"{i}.png" for i in range(KEPT)}
        assert all(found.labels.any(1).all() for found in split.values()) or kind.keep


def test_weights_are_taken_from_the_users_file(shrunk, tmp_path):
    kind = group_images.Waterbirds
    suite = shrunk(kind)(write_groups(tmp_path, kind))
    plain = suite.prepare(0)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        other = network("resnet18", 5)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    trial = suite.prepare(0)
    assert trial.data_hash != plain.data_hash
    net = suite.network(trial.data, suite.training)
    assert torch.equal(net.conv1.weight, other.conv1.weight)
    assert torch.equal(net.layer4[0].downsample[0].weight, other.layer4[0].downsample[0].weight)
    assert net.fc.weight.shape[0] == 2
    with pytest.raises(DataError, match="weights of the network, found no fitting"):
        load_weights(network("resnet32", 2), tmp_path / "weights.pt")
    for content in (b"no weights", pickle.dumps(os.system)):
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(DataError, match="state dict of tensors") as caught:
            suite.prepare(0).run("erm")
        assert "\n" not in str(caught.value)
    torch.save([1], tmp_path / "weights.pt")
    with pytest.raises(DataError, match="state dict of tensors, found list"):
        suite.prepare(0).run("erm")


# refusals


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"echo run > {self.mark}",)


def test_hostile_pickles_are_refused_in_one_line(shrunk, tmp_path):
    suite = shrunk(cifar_lt.Cifar10LT10)(write_cifar(tmp_path))
    mark = tmp_path / "mark"
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps({b"data": Hostile(mark)}))
    why = suite.unavailable()
    assert "it was not run" in why
    assert "\n" not in why
    with pytest.raises(DataError, match="it was not run"):
        suite.prepare(0)
    assert not mark.exists()


@pytest.mark.parametrize("kind", marked(FEW_KINDS), ids=lambda kind: kind.name)
def test_wrong_folders_are_named_in_one_line(kind, shrunk, tmp_path):
    why = shrunk(kind)(tmp_path).unavailable()
    assert str(tmp_path) in why
    assert "\n" not in why
    why = shrunk(kind)(tmp_path / "nothing").unavailable()
    assert "nothing" in why


def test_data_may_lie_one_folder_deeper(shrunk, tmp_path):
    for kind in (image_lists.ImageNetLT, *GROUPS, *LABELS):
        inner = write(tmp_path / kind.name / kind.folders[0], kind)
        suite = shrunk(kind)(tmp_path / kind.name)
        assert suite.unavailable() is None
        assert suite.home == inner


def test_too_small_data_are_refused(shrunk, tmp_path, monkeypatch):
    kind = shrunk(cifar_lt.Cifar10LT10)
    monkeypatch.setattr(kind, "largest", 21)
    assert "must have 21 images of each class, found one with 20" in kind(write_cifar(tmp_path / "a")).unavailable()
    kind = shrunk(image_lists.ImageNetLT)
    suite = kind(write_lists(tmp_path / "b", kind))
    (tmp_path / "b/ImageNet_LT_train.txt").write_text("images/class 0/0.png 0\n" * 12)
    assert "every class in [0, 4) must have a sample" in suite.unavailable()
    rows = [f"images/class {label}/0.png {label}\n" * 5 for label in range(4)]
    (tmp_path / "b/ImageNet_LT_train.txt").write_text("".join(rows))
    assert "found none of many (5 to 5 per class)" in suite.unavailable()
    kind = shrunk(multilabel_images.CocoMLT)
    suite = kind(write_labels(tmp_path / "c", kind))
    monkeypatch.setattr(kind, "val_images", 15)
    assert "must have 15 images besides the 16 of coco_mlt.txt for validation, found 14" in suite.unavailable()
    monkeypatch.setattr(kind, "val_images", 8)
    (tmp_path / "c/coco_mlt.txt").write_text("1\n2\n13\n")
    assert "must have head, tail and medium labels" in suite.unavailable()
    (tmp_path / "c/coco_mlt.txt").write_text("13\n14\n")
    assert "every category must have an image" in suite.unavailable()
    kind = shrunk(multilabel_images.Coco)
    suite = kind(write_labels(tmp_path / "d", kind))
    file = tmp_path / "d" / kind.test_files[0]
    file.write_text(file.read_text().replace('"c"', '"d"'))
    assert "only one of them has 'c', 'd'" in suite.unavailable()


def test_missing_group_is_refused(shrunk, tmp_path):
    kind = shrunk(group_images.Waterbirds)
    suite = kind(write_groups(tmp_path, kind))
    file = tmp_path / "metadata.csv"
    kept = [line for line in file.read_text().split("\n") if not line.endswith(",0,1,1")]
    file.write_text("\n".join(kept))
    assert "every group in [0, 4) must have a sample, found none of group 1" in suite.unavailable()


@pytest.mark.parametrize("kind", [image_lists.ImageNetLT, group_images.Waterbirds, multilabel_images.Coco])
def test_truncated_images_give_one_clear_error(kind, shrunk, tmp_path):
    suite = shrunk(kind)(write(tmp_path, kind))
    assert suite.unavailable() is None
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    for loaders in (0, 1) if kind in GROUPS else (0,):  # in a process of its own, and in this one
        suite.training = {**suite.training, "loaders": loaders}
        with pytest.raises(DataError, match=r"\.png: must be a whole image") as caught:
            suite.prepare(0).run(suite.baseline.name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path))
        assert caught.value.__cause__ is None


def test_images_that_vanish_are_named(tmp_path):
    source = Files([tmp_path / "gone.png"], tmp_path, 8, frame="whole")
    with pytest.raises(DataError, match=r"gone\.png: must be an image file, found no file"):
        source.read([0], None)


# networks


@pytest.mark.parametrize(
    ("name", "classes", "number"),
    [("resnet32", 10, 464_154), ("resnet32", 100, 470_004), ("resnet18", 1000, 11_689_512)],
)
def test_parameters_are_as_many_as_published(name, classes, number):
    net = network(name, classes)
    assert sum(parameter.numel() for parameter in net.parameters()) == number
    size = 32 if name == "resnet32" else 64
    assert net(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_resnet18_has_torchvisions_names():
    names = set(network("resnet18", 2).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer1.1.bn2.bias", "fc.bias"} <= names
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.num_batches_tracked"} <= names
    assert not any(name.startswith("layer1.0.downsample") for name in names)
    assert len(names) == 122  # as torchvision's


def test_shortcuts_without_parameters_pad_channels():
    block = vision.Block(4, 8, 2, projected=False).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    inputs = torch.rand(1, 4, 6, 6)
    found = block(inputs)
    assert torch.equal(found[:, 2:6], inputs[:, :, ::2, ::2])
    assert not found[:, :2].any()
    assert not found[:, 6:].any()


def test_other_networks_come_from_timm(monkeypatch, shrunk, tmp_path):
    kind = shrunk(image_lists.ImageNetLT)
    suite = kind(write_lists(tmp_path, kind))
    suite.training = {**suite.training, "model": "vit_tiny"}
    monkeypatch.setattr(image_lists, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert suite.unavailable() == "the network 'vit_tiny' needs timm: pip install timm"
    with pytest.raises(ImportError, match="needs timm: pip install timm"):
        network("vit_tiny", 4)
    monkeypatch.undo()
    asked = []
    fake = ModuleType("timm")

    def create_model(name, **options):
        asked.append((name, options))
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, options["num_classes"]))

    fake.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert network("vit_tiny", 4)(torch.zeros(1, 3, 1, 1)).shape == (1, 4)
    assert asked == [("vit_tiny", {"pretrained": False, "num_classes": 4})]


def test_missing_pillow_is_said(monkeypatch, tmp_path):
    from reweigh.benchmarks.suites import classes

    monkeypatch.setattr(classes, "find_spec", lambda name: None)
    assert group_images.Waterbirds(tmp_path).unavailable() == "needs pillow: pip install pillow"


# images


def test_augmentation_depends_on_seed_draw_and_image_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)

    def seen(seed, items):
        return ImageSet(Pictures(pixels), torch.arange(6), augment=True, seed=seed)[items][0]

    together = seen(1, [0, 7, 14, 3])
    for place, item in enumerate([0, 7, 14, 3]):
        assert torch.equal(seen(1, [item])[0], together[place])
    many = [6 * draw + 2 for draw in range(40)]
    assert not torch.equal(seen(1, many), seen(2, many))
    assert len({image.numpy().tobytes() for image in seen(1, many)}) > 30
    plain = ImageSet(Pictures(pixels), torch.arange(6))
    inputs, target = plain[[8, 1]]
    assert target.tolist() == [2, 1]
    assert torch.equal(inputs[0], plain[[2]][0][0])


def test_crops_are_shifts_of_the_padded_image():
    pixels = np.full((1, 8, 8, 3), 255, np.uint8)
    source = Pictures(pixels, (0, 0, 0), (1, 1, 1))
    views = [np.random.Generator(np.random.Philox(key=[0, n])) for n in range(300)]
    found = source.read([0] * 300, views)[:, 0]
    rows, columns = found.any(2).sum(1), found.any(1).sum(1)
    assert set(rows.tolist()) == set(columns.tolist()) == {4, 5, 6, 7, 8}
    marked = np.zeros((1, 8, 8, 3), np.uint8)
    marked[0, :, :4] = 255
    found = Pictures(marked, (0, 0, 0), (1, 1, 1)).read([0] * 300, views)[:, 0]
    left = found[:, 4, :4].sum(1) > found[:, 4, 4:].sum(1)
    assert 90 < left.sum() < 210  # mirrored as often as not


def test_random_parts_are_inside_and_large_enough():
    rng = np.random.default_rng(0)
    for width, height, scale in ((40, 30, 0.08), (30, 40, 0.64), (500, 20, 0.64)):
        for _ in range(50):
            left, top, right, bottom = part(rng, width, height, scale)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            if width < 100:
                assert (right - left) * (bottom - top) >= 0.9 * scale * width * height
            assert 0.7 < (right - left) / (bottom - top) < 1.43


def test_frames_are_the_published_ones(tmp_path):
    assert framed("whole", 32, 16) == (0, 0, 32, 16)
    assert framed("square", 32, 16) == (8, 0, 24, 16)
    assert framed("inner", 32, 16) == (2, 1, 30, 15)  # 256 squashed pixels, the middle 224
    picture(tmp_path / "a.png", 0, (32, 16))
    pixels = np.asarray(Image.open(tmp_path / "a.png"), np.float32) / 255
    expected = (pixels[:, 8:24] - np.float32(vision.IMAGENET_MEAN)) / np.float32(vision.IMAGENET_STD)
    found = Files([tmp_path / "a.png"], tmp_path, 16, frame="square").read([0], None)
    assert np.allclose(found[0].transpose(1, 2, 0), expected, atol=1e-6)


def test_every_sample_of_a_training_has_a_number_of_its_own():
    for inner in (EpochOrder(5, 2, 3), WeightedOrder(torch.tensor([0.0, 0, 0, 1, 1]), 2, 3)):
        order = vision.Views(inner)
        items = []
        for epoch in range(3):
            order.set_epoch(epoch)
            batches = list(order)
            assert [[item % 5 for item in batch] for batch in batches] == list(inner)
            assert list(order) == batches
            items += [item for batch in batches for item in batch]
        assert [item // 5 for item in items] == list(range(15))


def test_hashes_see_names_labels_and_pixels_and_not_the_place(tmp_path):
    target = torch.arange(2)

    def digest(root, names=("a.png", "b.png"), labels=target):
        return ImageSet(Files([root / name for name in names], root, 8), labels).digest()

    base = digest(tmp_path)
    assert digest(tmp_path / "elsewhere") == base
    assert digest(tmp_path, ("a.png", "c.png")) != base
    assert digest(tmp_path, labels=target.flip(0)) != base
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    before = ImageSet(Pictures(pixels), target).digest()
    pixels[0, 0, 0, 0] = 1
    assert ImageSet(Pictures(pixels), target).digest() != before


def test_outputs_are_without_augmentation_and_leave_the_random_state():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    data = ImageSet(Pictures(pixels), torch.arange(7), augment=True, seed=1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    before = torch.get_rng_state()
    found = outputs(net, data, {"batch_size": 3})
    assert torch.equal(torch.get_rng_state(), before)
    assert found.shape == (7, 2)
    with torch.no_grad():
        assert torch.allclose(found, net(data.plain()[range(7)][0]), atol=1e-6)


def test_reading_in_other_processes_changes_nothing(shrunk, tmp_path):
    kind = shrunk(group_images.Waterbirds)
    suite = kind(write_groups(tmp_path, kind))
    alone = suite.prepare(0).run("erm").metrics
    suite.training = {**suite.training, "loaders": 1}
    assert suite.prepare(0).run("erm").metrics == alone


def test_devices_are_those_of_lightning(monkeypatch):
    assert vision.place({}) == vision.place({"accelerator": "cpu"}) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert vision.place({"accelerator": "auto"}).type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends, "mps", SimpleNamespace(is_available=lambda: True))
    assert vision.place({"accelerator": "auto"}).type == "mps"
    assert issubclass(cifar_lt.CifarLT, FromRoot)
