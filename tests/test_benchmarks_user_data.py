"""The suites on users' text, columns, scenes and tables, on tiny data: pairing, repetition, metrics, refusals."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

from reweigh.benchmarks.readers import DataError, load_scene, read_nyuv2, span_f1, spans
from reweigh.benchmarks.suites import conll, nyuv2, user_table, user_text
from reweigh.benchmarks.suites.conll import Conll
from reweigh.benchmarks.suites.digits_two_tasks import relative_change
from reweigh.benchmarks.suites.language import END, UNKNOWN
from reweigh.benchmarks.suites.nyuv2 import NYUv2
from reweigh.benchmarks.suites.user_table import TableClasses, TableNumbers
from reweigh.benchmarks.suites.user_text import TextLM

ALL = (TextLM, Conll, NYUv2, TableClasses, TableNumbers)
MODULES = {TextLM: user_text, Conll: conll, NYUv2: nyuv2, TableClasses: user_table, TableNumbers: user_table}
ids = {"ids": lambda kind: kind.name}


# tiny data


def write_text(root, documents=30):
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(60)]
    chance = 1 / np.arange(1, 61)
    (root / "text").mkdir(parents=True)
    texts = [" ".join(rng.choice(words, 40, p=chance / chance.sum())) + "." for _ in range(documents)]
    (root / "text/a.txt").write_text("\n\n".join(texts[: documents // 2]))
    lines = [json.dumps({"text": text}) for text in texts[documents // 2 :]]
    (root / "text/b.jsonl").write_text("\n".join(lines))


CONLL_SIZES = {"train": 24, "val": 8, "test": 10}


def write_conll(root, names=conll.FILES[0]):
    root.mkdir(parents=True, exist_ok=True)
    for seed, (part, name) in enumerate(names.items()):
        rng = np.random.default_rng(seed)
        lines = ["-DOCSTART- -X- O", ""]
        for _ in range(CONLL_SIZES[part]):
            for _ in range(rng.integers(2, 9)):
                kind = rng.integers(6)
                word = f"{('Ada', 'IBM')[kind] if kind < 2 else 'the'}{rng.integers(3) or ''}"
                lines.append(f"{word} NN {('B-PER', 'B-ORG')[kind] if kind < 2 else 'O'}")
                if kind == 0 and rng.random() < 0.5:
                    lines.append("Lovelace NN I-PER")
            lines.append("")
        (root / name).write_text("\n".join(lines))


SCENES = {"train": 10, "val": 3}


def write_nyuv2(root):
    rng = np.random.default_rng(0)
    for part, number in SCENES.items():
        for at in range(number):
            label = np.repeat(np.repeat(rng.choice([-1, 0, 0, 0, 1, 2, 3], (3, 4)), 3, 0), 3, 1)
            normal = np.stack([np.sin(label), np.cos(label), 0 * label], -1)
            scene = {
                "image": np.stack([label, label % 2, label % 3], -1) / 4 + rng.normal(0, 0.1, (9, 12, 3)),
                "label": label,
                "depth": np.where(label < 0, 0, label + 1.0)[..., None],
                "normal": np.where(label[..., None] < 0, 0, normal),
            }
            for kind, array in scene.items():
                (root / part / kind).mkdir(parents=True, exist_ok=True)
                np.save(root / part / kind / f"{at}.npy", array.astype(np.float32))


def write_table(root, kind, rows=220):
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    first, second = rng.normal(size=rows), rng.choice(["x", "y"], rows)
    if kind is TableClasses:
        target = np.repeat(["common", "less", "rare"], [rows - 50, 40, 10])
    else:
        target = np.round(np.exp(rng.normal(0, 0.3, rows)) * 10 + first, 3)
        target[:45] = np.round(rng.uniform(30, 40, 45), 3)
    lines = ["a,b,target", *(f"{a:.4f},{b},{t}" for a, b, t in zip(first, second, target, strict=True))]
    (root / "table.csv").write_text("\n".join(lines))


def write(root, kind):
    makers = {TextLM: write_text, Conll: write_conll, NYUv2: write_nyuv2}
    if kind in makers:
        makers[kind](root)
    else:
        write_table(root, kind)
    return root


SMALL = {
    TextLM: {"batch_size": 8, "width": 8, "rate_warmup": 1},
    Conll: {"batch_size": 8, "width": 8, "hidden": 8, "shape_width": 4, "look_every": 2},
    NYUv2: {"batch_size": 4, "widths": [4, 8], "loaders": 0, "rate_warmup": 1, "lr": 0.1},
    TableClasses: {"batch_size": 32, "hidden": [8, 8]},
    TableNumbers: {"batch_size": 32, "hidden": 8},
}


@pytest.fixture
def shrunk(monkeypatch):
    """Makes a suite tiny: three steps of a small network."""

    def make(kind):
        monkeypatch.setattr(kind, "training", {**kind.training, "steps": 3, "accelerator": "cpu", **SMALL[kind]})
        if kind is TextLM:
            monkeypatch.setattr(user_text, "VOCABULARY", 40)
            monkeypatch.setattr(user_text, "CONTEXT", 16)
        return kind

    return make


@pytest.fixture(params=ALL, **ids)
def tiny(request, shrunk, tmp_path):
    """A suite on data of its own."""
    return shrunk(request.param)(write(tmp_path, request.param))


# every suite


@pytest.mark.parametrize("kind", ALL, **ids)
def test_suites_are_consistent(kind, monkeypatch):
    suite = kind()
    methods, metrics = [m.name for m in suite.methods], [m.name for m in suite.metrics]
    assert len(set(methods)) == len(methods)
    assert len(set(metrics)) == len(metrics)
    assert suite.chosen_by in metrics
    assert suite.from_root
    assert suite.slow
    assert not suite.gates
    assert suite.quick[0] == suite.default[0] == suite.baseline.name
    assert set(suite.quick) | set(suite.default) <= set(methods)
    assert set(suite.own) <= set(methods)
    assert suite.unavailable() == f"needs --data-root with {suite.needs}"
    with pytest.raises(DataError, match="needs --data-root"):
        suite.prepare(0)
    assert json.loads(json.dumps(suite.description())) == suite.description()
    assert "measured nothing" in suite.notes[0]
    assert pickle.loads(pickle.dumps(kind)) is kind
    before = {method: suite.fingerprint(method) for method in methods}
    assert len(set(before.values())) == len(methods)
    for method, own in suite.own.items():
        for key in own:
            other = suite.with_own(method, {key: "other"})
            assert other.fingerprint(method) != before[method], (method, key)
    constants = {
        user_text: ["VOCABULARY", "CONTEXT"],
        conll: ["VOCABULARY", "SEEN"],
        nyuv2: ["CLASSES", "VAL"],
        user_table: ["FEWEST"] if kind is TableClasses else ["QUARTERS", "FEWEST_NUMBERS", "OUTER", "FINE"],
    }[MODULES[kind]]
    for constant in constants:
        with monkeypatch.context() as patch:
            patch.setattr(MODULES[kind], constant, 7)
            assert suite.fingerprint(methods[0]) != before[methods[0]], constant
    suite.training = {**suite.training, "lr": 0.123}
    assert all(suite.fingerprint(method) != before[method] for method in methods)


def test_every_method_trains(tiny):
    assert tiny.unavailable() is None
    trial = tiny.prepare(0)
    for method in tiny.methods:
        outcome = trial.run(method.name)
        assert set(outcome.metrics) >= {metric.name for metric in tiny.metrics}, method.name
        assert all(math.isfinite(value) for value in outcome.metrics.values()), method.name
        json.dumps(outcome.details)
        if not method.trained:
            assert outcome.step_ms is None


def test_runs_repeat_bit_by_bit(tiny):
    for method in (tiny.baseline.name, tiny.methods[1].name, tiny.methods[-1].name):
        once = tiny.prepare(4).run(method)
        torch.rand(7)  # what happened before in this process must not matter
        again = tiny.prepare(4).run(method)
        assert once.metrics == again.metrics, method
        assert once.details == again.details, method
    same = tiny.prepare(5).data_hash == tiny.prepare(4).data_hash
    assert same == isinstance(tiny, Conll)  # whose split is that of the files
    assert tiny.prepare(4).data_hash == tiny.prepare(4).data_hash


def test_what_is_not_trained_is_the_same_beside_and_without_the_baseline(tiny):
    for free in (method.name for method in tiny.methods if not method.trained):
        trial = tiny.prepare(1)
        trial.run(tiny.baseline.name)
        assert trial.run(free).metrics == tiny.prepare(1).run(free).metrics, free


def test_methods_share_initial_network_and_batches(tiny, monkeypatch):
    from reweigh.benchmarks.suites import dense, recurrent, tagger, training

    seen = {}
    for kind in (training.Classifier, recurrent.Language, tagger.Tagging, dense.Dense):

        def logged(module, batch, batch_idx, real=kind.training_step):
            log = seen.setdefault((method, getattr(module, "tasks", None)), [])
            if not log:
                log.append([torch.cat([p.detach().flatten() for p in module.net.parameters()])])
            log.append([part.clone() for part in batch[:2]])
            return real(module, batch, batch_idx)

        monkeypatch.setattr(kind, "training_step", logged)
    trial = tiny.prepare(1)
    for method in (entry.name for entry in tiny.methods if entry.trained):
        trial.run(method)
    assert len(seen) >= 5
    first = next(iter(seen.values()))
    for key, log in seen.items():
        assert len(log) == 4, key
        for ours, theirs in zip(log, first, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), key
    method = tiny.baseline.name
    seen.clear()
    tiny.prepare(2).run(method)
    other = next(iter(seen.values()))
    assert not torch.equal(other[0][0], first[0][0])


def test_every_method_has_its_own_objective(tiny):
    trial = tiny.prepare(0)
    made = {}
    for method in (entry.name for entry in tiny.methods if entry.trained):
        if isinstance(tiny, TableNumbers):
            made[method] = tiny.objective(method, trial.density, trial.data.sizes)
        elif isinstance(tiny, (TextLM, Conll)):
            made[method] = tiny.objective(method, trial.counts)
        else:
            made[method] = tiny.objective(method)
    if isinstance(tiny, NYUv2):
        assert repr(made.pop("single")) == repr(made["equal"])
    assert len({repr(objective) for objective in made.values()}) == len(made) >= 4


def test_wrong_folders_are_named_in_one_line(tiny, tmp_path):
    kind = type(tiny)
    empty = tmp_path / "empty"
    empty.mkdir()
    for root in (empty, tmp_path / "nothing"):
        why = kind(root).unavailable()
        assert str(root) in why
        assert "\n" not in why
        with pytest.raises(DataError) as caught:
            kind(root).prepare(0)
        assert str(caught.value) == why


@pytest.mark.parametrize("kind", [Conll, NYUv2], **ids)
def test_data_may_lie_one_folder_deeper(kind, shrunk, tmp_path):
    inner = write(tmp_path / kind.folders[0], kind)
    suite = shrunk(kind)(tmp_path)
    assert suite.unavailable() is None
    assert suite.home == inner


# text


def test_documents_are_in_one_part_each(shrunk, tmp_path):
    suite = shrunk(TextLM)(write(tmp_path, TextLM))
    documents = suite.read()
    assert len(documents) == 30
    found = suite.data(0)
    number = {word: at for at, word in enumerate(found.words)}
    rows = {part: found.parts[part][0].flatten().tolist() for part in ("train", "val", "test")}
    texts = [[number.get(word, UNKNOWN) for word in (*text[:-1].split(), ".")] for text in documents]
    places = {}
    for part, stream in rows.items():
        pieces, start = [], 0
        for at, own in enumerate(stream):
            if own == END:
                pieces.append(stream[start:at])
                start = at + 1
        assert all(texts.count(piece) for piece in pieces)
        places[part] = {tuple(piece) for piece in pieces}
        assert len(pieces) >= {"train": 20, "val": 3, "test": 3}[part]
    assert not places["train"] & places["test"]
    assert not places["train"] & places["val"]
    assert not places["val"] & places["test"]


@pytest.mark.parametrize("shift", [None, torch.linspace(-1, 1, 40)])
def test_language_metrics_by_a_naive_loop(shift, shrunk, tmp_path):
    trial = shrunk(TextLM)(write(tmp_path, TextLM)).prepare(0)
    net, _ = trial._train("ce")
    found = trial._test(net, shift).metrics
    counts = [int((trial.parts["train"][0] == word).sum()) for word in range(40)]
    limit = sorted(count for count in counts[2:] if count)[(38 - counts[2:].count(0) - 1) // 2]
    right, seen, losses = {True: 0, False: 0}, {True: 0, False: 0}, []
    for ids in trial.parts["test"][0]:
        with torch.no_grad():
            logits = net(ids[None])[0] - (0 if shift is None else shift)
        for place in range(len(ids) - 1):
            target = int(ids[place + 1])
            losses.append(-float(logits[place].log_softmax(-1)[target]))
            if target != UNKNOWN:
                rare = counts[target] <= limit
                seen[rare] += 1
                right[rare] += int(logits[place].argmax()) == target
    assert found["rare_accuracy"] == pytest.approx(right[True] / seen[True])
    assert found["frequent_accuracy"] == pytest.approx(right[False] / seen[False])
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_rare_words_are_there_in_long_texts_and_in_short_ones(shrunk, tmp_path, monkeypatch):
    suite = shrunk(TextLM)(write(tmp_path, TextLM))
    for vocabulary in (12, 40, 8000):
        monkeypatch.setattr(user_text, "VOCABULARY", vocabulary)
        data = suite.data(0)
        known = data.counts[2:]
        assert len(data.counts) == min(vocabulary, len(data.words))
        assert 0.4 < float((known <= data.rare).double().mean()) < 0.8
        assert math.isfinite(suite.prepare(0).run("pdl").metrics["rare_accuracy"])


def test_unusable_texts_are_refused(shrunk, tmp_path):
    kind = shrunk(TextLM)
    (tmp_path / "text.txt").write_text("one\n\ntwo")
    assert "must hold at least 20 documents" in kind(tmp_path).unavailable()
    (tmp_path / "text.txt").write_text("")
    assert "must not be empty" in kind(tmp_path).unavailable()
    (tmp_path / "text.txt").unlink()
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"txt": "b"}')
    assert "text.jsonl, line 2: must have a field 'text'" in kind(tmp_path).unavailable()
    (tmp_path / "text.jsonl").write_text('{"text": "a b"}\n' * 19 + '{"text": "a')  # cut off
    assert "text.jsonl, line 20: must be JSON" in kind(tmp_path).unavailable()
    (tmp_path / "text.jsonl").write_text('{"text": "a b"}\n' * 20)
    with pytest.raises(DataError, match="part of seed 0 must have at least 16 words, found 9; give more text"):
        kind(tmp_path).prepare(0)


def test_a_text_without_rare_words_is_refused(shrunk, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(["a " * 20] * 20))
    with pytest.raises(DataError, match="must have rare and frequent words"):
        shrunk(TextLM)(tmp_path).prepare(0)


# columns


@pytest.mark.parametrize("names", conll.FILES)
def test_sentences_are_encoded_by_the_training_file(names, shrunk, tmp_path):
    write_conll(tmp_path, names)
    suite = shrunk(Conll)(tmp_path)
    data = suite.prepare(0).data
    assert data.tags == ["O", "B-ORG", "B-PER", "I-PER"]
    sentences = suite.read()
    assert {part: len(found) for part, found in data.parts.items()} == CONLL_SIZES
    for part, own in sentences.items():
        for at, (words, tags) in enumerate(own):
            inputs, target = data.parts[part][[at]]
            assert inputs.shape == (1, len(words), 2)
            assert [data.tags[tag] for tag in target[0].tolist()] == tags
            assert inputs[0, :, 1].tolist() == [conll.shape(word) for word in words]
    inputs, target = data.parts["train"][[0, 1, 2]]
    lengths = [len(words) for words, _ in sentences["train"][:3]]
    assert target.shape == inputs.shape[:2] == (3, max(lengths))
    assert (target != -100).sum(1).tolist() == (inputs[:, :, 0] > 0).sum(1).tolist() == lengths
    assert data.counts.tolist() == [sum(tags.count(tag) for _, tags in sentences["train"]) for tag in data.tags]


def test_unknown_words_and_tags(shrunk, tmp_path):
    suite = shrunk(Conll)(write(tmp_path, Conll))
    with (tmp_path / "test.txt").open("a") as file:
        file.write("\nZebra NN B-LOC\nthe NN O\n")
    trial = suite.prepare(0)
    inputs, target = trial.parts["test"][[CONLL_SIZES["test"]]]
    assert inputs[0, 0].tolist() == [conll.UNKNOWN, 3]
    assert target.tolist() == [[-1, 0]]
    assert trial.data.spans["test"][-1] == {("LOC", 0, 1)}
    assert trial.run("ce").metrics["recall"] < 1.0


@pytest.mark.parametrize(
    ("word", "number"),
    [("1999", 1), ("B2B", 1), ("the", 2), ("Ada", 3), ("A", 4), ("IBM", 4), ("iPod", 5), ("McCoy", 5), (",", 6)],
)
def test_shapes(word, number):
    assert conll.shape(word) == number
    assert number < conll.SHAPES
    assert conll.normalised("B2B") == "b0b"


def test_what_is_beyond_the_end_changes_nothing():
    from reweigh.benchmarks.suites.tagger import Sentences, Tagger, logits

    torch.manual_seed(0)
    net = Tagger(9, conll.SHAPES, 3, {**Conll.training, "width": 4, "hidden": 5}).eval()
    features = [torch.randint(1, 7, (length, 2)) for length in (3, 9, 1, 5)]
    data = Sentences(features, [torch.zeros(len(own), dtype=torch.int64) for own in features])
    together = logits(net, data, 4)
    alone = torch.cat([net(own[None])[0] for own in features])
    assert together.shape == (18, 3)
    assert torch.allclose(together, alone, atol=1e-6)


def test_span_metrics_by_a_naive_loop(shrunk, tmp_path):
    trial = shrunk(Conll)(write(tmp_path, Conll)).prepare(0)
    generator = torch.Generator().manual_seed(1)
    sentences = {part: trial.suite.read()[part] for part in ("val", "test")}
    found = {
        part: torch.randn(sum(len(words) for words, _ in own), 4, generator=generator)
        for part, own in sentences.items()
    }
    metrics = trial._test(found)
    outside, mine, truth, at = [], [], [], 0
    for _, tags in sentences["test"]:
        answer = [trial.data.tags[int(row.argmax())] for row in found["test"][at : at + len(tags)]]
        outside += [a == "O" for a, t in zip(answer, tags, strict=True) if t == "O"]
        mine.append(spans(answer))
        truth.append(spans(tags))
        at += len(tags)
    precision, recall, f1 = span_f1(mine, truth)
    assert [metrics[name] for name in ("precision", "recall", "f1")] == [precision, recall, f1]
    assert 0 < f1 < 1
    assert metrics["outside_accuracy"] == pytest.approx(sum(outside) / len(outside))
    perfect = torch.nn.functional.one_hot(torch.cat(list(trial.parts["test"].targets)), 4).float()
    assert trial._test({**found, "test": perfect})["f1"] == 1.0


def test_the_tuned_line_is_the_best_of_all(shrunk, tmp_path):
    trial = shrunk(Conll)(write(tmp_path, Conll)).prepare(0)
    target = torch.cat(list(trial.parts["val"].targets))
    val = torch.nn.functional.one_hot(target, 4).float()
    val[:, 0] += 1.6  # O is ahead by too much
    shift = trial._line(val, conll.SHIFTS)
    assert -2.6 < shift < -0.6
    assert shift == -1.0  # the one that changes least
    assert trial._line(val - 9 * torch.tensor([1.0, 0, 0, 0]), (-1.0, 0.0, 1.0)) == 0.0  # all give the same


def test_networks_are_those_of_the_best_step(shrunk, tmp_path):
    suite = shrunk(Conll)(write(tmp_path, Conll))
    outcome = suite.prepare(0).run("ce")
    assert outcome.details["chosen_step"] in (2, 3)


def test_what_can_be_tagged_is_tagged(shrunk, tmp_path):
    suite = shrunk(Conll)(write(tmp_path, Conll))
    suite.training = {**suite.training, "steps": 60, "look_every": 20, "lr": 3e-2, "width": 16, "dropout": 0.0}
    assert suite.prepare(0).run("ce").metrics["f1"] > 0.9


def test_unusable_columns_are_refused(shrunk, tmp_path):
    kind = shrunk(Conll)
    write_conll(tmp_path)
    (tmp_path / "dev.txt").unlink()
    assert f"{tmp_path / 'dev.txt'}: must be a file, found nothing" in kind(tmp_path).unavailable()
    (tmp_path / "dev.txt").write_text("")
    assert "dev.txt: must not be empty" in kind(tmp_path).unavailable()
    (tmp_path / "dev.txt").write_text("a NN O\nb NN")  # cut off
    assert "dev.txt, line 2: must have 3 columns, as above, found 2" in kind(tmp_path).unavailable()
    (tmp_path / "dev.txt").write_text("a NN O\n\nb NN X-PER\n")
    assert "dev.txt, sentence 2: a tag must be O, or B, I, E or S" in kind(tmp_path).unavailable()
    (tmp_path / "dev.txt").write_text("a NN O\n")
    assert "dev.txt: must have the tag O and another one, found O" in kind(tmp_path).unavailable()


# scenes


def test_scenes_are_in_one_part_each(shrunk, tmp_path):
    suite = shrunk(NYUv2)(write(tmp_path, NYUv2))
    index = read_nyuv2(tmp_path)
    drawn = set()
    for seed in range(3):
        parts = suite.data(seed)
        names = {part: [scene.image for scene in data.scenes] for part, data in parts.items()}
        assert len(names["val"]) == 1
        assert sorted(names["train"] + names["val"]) == sorted(scene.image for scene in index["train"])
        assert names["test"] == [scene.image for scene in index["val"]]
        drawn |= set(names["val"])
    assert len(drawn) > 1
    image, label, depth, normal = parts["test"][[2, 0]]
    for row, number in enumerate((2, 0)):
        wanted = load_scene(index["val"][number])
        assert np.array_equal(image[row].permute(1, 2, 0), wanted["image"])
        assert np.array_equal(label[row], wanted["label"])
        assert np.array_equal(depth[row], wanted["depth"])
        assert np.array_equal(normal[row].permute(1, 2, 0), wanted["normal"])


def answers(seed, classes=13):
    generator = torch.Generator().manual_seed(seed)
    return {
        "segmentation": torch.randn(3, classes, 9, 12, generator=generator),
        "depth": torch.randn(3, 9, 12, generator=generator),
        "normal": torch.nn.functional.normalize(torch.randn(3, 3, 9, 12, generator=generator), dim=1),
    }


def test_dense_losses_and_metrics_by_a_naive_loop(shrunk, tmp_path):
    from reweigh.benchmarks.suites.dense import DenseScores, losses

    data = shrunk(NYUv2)(write(tmp_path, NYUv2)).data(0)["test"]
    _, label, depth, normal = data[[0, 1, 2]]
    found = answers(0)
    found["segmentation"] = found["segmentation"] + 3 * torch.nn.functional.one_hot(label.clamp(min=0), 13).permute(
        0, 3, 1, 2
    )
    entropy, errors, cosines, angles, hits = [], [], [], [], []
    overlap, union = [0] * 13, [0] * 13
    for b, y, x in np.ndindex(3, 9, 12):
        true, logits = int(label[b, y, x]), found["segmentation"][b, :, y, x].double()
        if true >= 0:
            said = int(logits.argmax())
            entropy.append(-float(logits.log_softmax(0)[true]))
            hits.append(said == true)
            for c in range(13):
                overlap[c] += said == true == c
                union[c] += c in (said, true)
        if depth[b, y, x] != 0:
            errors.append(abs(float(found["depth"][b, y, x]) - float(depth[b, y, x])))
        if normal[b, :, y, x].any():
            ours, theirs = found["normal"][b, :, y, x].double(), normal[b, :, y, x].double()
            cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
            cosines.append(1 - cosine)
            angles.append(math.degrees(math.acos(cosine)))
    assert len(entropy) < label.numel()
    assert len(errors) == len(cosines) < label.numel()
    loss = losses(found, label, depth, normal)
    assert float(loss["segmentation"]) == pytest.approx(np.mean(entropy), rel=1e-5)
    assert float(loss["depth"]) == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(loss["normal"]) == pytest.approx(np.mean(cosines), rel=1e-5)
    scores = DenseScores(13)
    for at in range(3):  # batch by batch
        own = {task: answer[at : at + 1] for task, answer in found.items()}
        scores.update(own, label[at : at + 1], depth[at : at + 1], normal[at : at + 1])
    metrics = scores.compute()
    there = [a / b for a, b in zip(overlap, union, strict=True) if b]
    assert metrics["miou"] == pytest.approx(np.mean(there), rel=1e-5)
    assert metrics["pixel_accuracy"] == pytest.approx(np.mean(hits), rel=1e-5)
    assert metrics["depth_error"] == pytest.approx(np.mean(errors), rel=1e-6)
    assert metrics["angle"] == pytest.approx(np.mean(angles), rel=1e-6)


def test_targets_that_are_missing_give_no_loss():
    from reweigh.benchmarks.suites.dense import losses

    found = {task: answer.requires_grad_() for task, answer in answers(1).items()}
    nothing = torch.full((3, 9, 12), -1), torch.zeros(3, 9, 12), torch.zeros(3, 3, 9, 12)
    total = sum(losses(found, *nothing).values())
    assert total.item() == 0.0
    total.backward()
    assert all(not answer.grad.any() for answer in found.values())


def test_delta_m_is_a_mean_over_tasks():
    alone = {"miou": 0.4, "pixel_accuracy": 0.5, "depth_error": 2.0, "angle": 30.0}
    found = {"miou": 0.2, "pixel_accuracy": 0.6, "depth_error": 1.0, "angle": 33.0}
    wanted = ((-0.5 + 0.2) / 2 + 0.5 - 0.1) / 3
    assert relative_change(found, alone, NYUv2.signs) == pytest.approx(wanted)
    assert relative_change(alone, alone, NYUv2.signs) == 0.0
    with pytest.raises(DataError, match="must have a miou other than 0"):
        relative_change(found, {**alone, "miou": 0.0}, NYUv2.signs)


def test_single_task_models_are_the_measure(shrunk, tmp_path, monkeypatch):
    from reweigh.benchmarks.suites import dense

    suite = shrunk(NYUv2)(write(tmp_path, NYUv2))
    tasks = []
    real = dense.Dense.of
    monkeypatch.setattr(dense.Dense, "of", lambda own: tasks.append(own) or real(own))
    trial = suite.prepare(1)
    single, equal = trial.run("single").metrics, trial.run("equal").metrics
    assert tasks == [("segmentation",), ("depth",), ("normal",), nyuv2.TASKS]
    assert single["delta_m"] == single["val_delta_m"] == 0.0
    assert equal["delta_m"] == pytest.approx(relative_change(equal, single, suite.signs))


def test_all_methods_have_the_same_rate(shrunk, tmp_path):
    suite = shrunk(NYUv2)(write(tmp_path, NYUv2))
    shared = [{key: suite.options(m.name)[key] for key in suite.training} for m in suite.methods]
    assert all(own == shared[0] for own in shared)
    assert "CoBa(warmup=100, history=200)" in repr(suite.objective("coba"))


@pytest.mark.parametrize("size", [(8, 16), (9, 13), (7, 7)])
def test_answers_have_the_size_of_the_image(size):
    from reweigh.benchmarks.suites.dense import EncoderDecoder

    found = EncoderDecoder([4, 8, 8, 8], nyuv2.HEADS)(torch.rand(2, 3, *size))
    assert found["segmentation"].shape == (2, 13, *size)
    assert found["depth"].shape == (2, *size)
    assert found["normal"].shape == (2, 3, *size)
    assert torch.allclose(found["normal"].norm(dim=1), torch.ones(2, *size), atol=1e-5)


def test_unusable_scenes_are_refused(shrunk, tmp_path):
    kind = shrunk(NYUv2)
    suite = kind(write(tmp_path, NYUv2))
    depth = tmp_path / "train/depth/3.npy"
    depth.unlink()
    assert "train/depth: must have the same names as its neighbours, without '3.npy'" in suite.unavailable()
    np.save(depth, np.ones((9, 13), np.float32))
    assert suite.unavailable() is None  # only the first scene is opened before the training
    suite.training = {**suite.training, "steps": 6}
    for loaders in (0, 1):  # in this process, and in one of its own
        suite.training = {**suite.training, "loaders": loaders}
        with pytest.raises(DataError, match=r"3\.npy: must be floats \(9, 12\)") as caught:
            suite.prepare(0).run("equal")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path))
    depth.write_bytes(depth.read_bytes()[:150])
    suite.training = {**suite.training, "loaders": 0}
    with pytest.raises(DataError, match=r"3\.npy: must be a whole \.npy array"):
        suite.prepare(0).run("equal")
    (tmp_path / "train/label/0.npy").write_bytes(b"")
    nyuv2._read.cache_clear()
    assert "train/label/0.npy: must not be empty" in suite.unavailable()
    np.save(tmp_path / "train/label/0.npy", np.full((9, 12), 13.0))
    assert "a label must be a whole number in [-1, 13), found 13.0" in suite.unavailable()


def test_scenes_of_another_size_are_refused(shrunk, tmp_path):
    suite = shrunk(NYUv2)(write(tmp_path, NYUv2))
    for kind, shape in (("image", (6, 6, 3)), ("label", (6, 6)), ("depth", (6, 6)), ("normal", (6, 6, 3))):
        np.save(tmp_path / f"val/{kind}/1.npy", np.ones(shape, np.float32))
    with pytest.raises(DataError, match=r"1\.npy: must have the size of the first scene, \(9, 12\), found \(6, 6\)"):
        suite.data(0)["test"][[0, 1]]


# tables


@pytest.mark.parametrize("kind", [TableClasses, TableNumbers], **ids)
def test_rows_are_in_one_part_each(kind, shrunk, tmp_path):
    suite = shrunk(kind)(write(tmp_path, kind))
    table = suite.read()
    assert table.names == ("a", "b=x", "b=y")
    labels = table.target if kind is TableClasses else user_table.bins(table.target)
    rows = user_table.stratified(labels, 3)
    used = np.concatenate(list(rows.values()))
    assert sorted(used) == list(range(220))
    for label in np.unique(labels):
        number = int((labels == label).sum())
        for part in ("val", "test"):
            assert int((labels[rows[part]] == label).sum()) == max(1, round(0.2 * number))
    data = suite.data(3)
    train = table.inputs[rows["train"]].astype(np.float64)
    for part, at in rows.items():
        inputs, target = data.parts[part][:2]
        assert np.allclose(inputs, (table.inputs[at] - train.mean(0)) / train.std(0), atol=1e-5)
        assert target.tolist() == table.target[at].tolist()


def test_table_classes_are_ordered_by_size(shrunk, tmp_path):
    data = shrunk(TableClasses)(write(tmp_path, TableClasses)).data(0)
    assert [data.names[label] for label in data.by_size] == ["common", "less", "rare"]
    assert torch.bincount(data.parts["train"][1])[data.by_size].tolist() == [102, 24, 6]


def test_class_metrics_are_those_of_the_answers(shrunk, tmp_path):
    trial = shrunk(TableClasses)(write(tmp_path, TableClasses)).prepare(0)
    target = trial.parts["test"][1]
    answer = target.clone()
    rare, common = trial.by_size[-1], trial.by_size[0]
    answer[torch.nonzero(target == rare)[0]] = common
    logits = torch.nn.functional.one_hot(answer, 3).float() * 9
    found = trial._test({"test": logits, "val": torch.zeros(len(trial.parts["val"][1]), 3)}).metrics
    assert found["worst_recall"] == found["tail_recall"] == 0.5
    assert found["head_recall"] == 1.0
    assert found["balanced_accuracy"] == pytest.approx(2.5 / 3)
    assert found["accuracy"] == pytest.approx(43 / 44)
    assert found["val_balanced_accuracy"] == pytest.approx(1 / 3)


def test_two_classes_will_do(shrunk, tmp_path):
    suite = shrunk(TableClasses)(write(tmp_path, TableClasses))
    file = tmp_path / "table.csv"
    file.write_text(file.read_text().replace("less", "rare"))
    for seed in (0, 1):  # with and without recording of weights
        trial = suite.prepare(seed)
        for name in ("ce", "posthoc_la", "inverse", "drw"):
            found = trial.run(name)
            assert all(math.isfinite(value) for value in found.metrics.values())
            assert (found.step_ms is None) == (name == "posthoc_la")
    assert trial.run("ce").metrics == suite.prepare(1).run("ce").metrics


def test_columns_that_never_change_are_left_alone(shrunk, tmp_path):
    for kind in (TableClasses, TableNumbers):
        root = write(tmp_path / kind.name, kind)
        header, *lines = (root / "table.csv").read_text().split("\n")
        (root / "table.csv").write_text(
            "\n".join([f"same,gap,{header}", *(f"7,{'' if at else 1},{line}" for at, line in enumerate(lines))])
        )
        data = shrunk(kind)(root).data(0)
        assert all(torch.isfinite(part[0]).all() for part in data.parts.values())
        assert not data.parts["test"][0][:, :2].any()  # missing cells got the mean


def test_ranges_are_quarters_and_small_ones_are_joined(monkeypatch):
    monkeypatch.setattr(user_table, "FEWEST_NUMBERS", 3)
    target = np.array([0.0] * 5 + [1.0] * 4 + [2.0] * 3 + [3.0] * 3)
    assert user_table.bins(target).tolist() == [0] * 5 + [1] * 4 + [2] * 3 + [3] * 3
    monkeypatch.setattr(user_table, "FEWEST_NUMBERS", 4)
    assert user_table.bins(target).tolist() == [0] * 5 + [1] * 4 + [2] * 6
    monkeypatch.setattr(user_table, "FEWEST_NUMBERS", 6)
    assert user_table.bins(target).tolist() == [0] * 9 + [1] * 6
    monkeypatch.setattr(user_table, "FEWEST_NUMBERS", 8)
    assert user_table.bins(target).tolist() == [0] * 15
    rng = np.random.default_rng(0)
    monkeypatch.setattr(user_table, "FEWEST_NUMBERS", 40)
    for _ in range(20):
        target = rng.lognormal(0, rng.uniform(0.1, 2), rng.integers(80, 900))
        found = user_table.bins(target)
        sizes = np.bincount(found)
        assert sizes.min() >= 40
        assert (np.diff(found[np.argsort(target)]) >= 0).all()


def test_fine_bins_are_of_equal_width_within_the_range():
    target = np.concatenate([np.linspace(0, 100, 1001), [1e9, -1e9]])
    found = user_table.fine_bins(target)
    low, high = user_table.limits(target)
    width = (high - low) / user_table.FINE
    for value, place in zip(target, found, strict=True):
        assert place == min(max(math.floor((value - low) / width), 0), user_table.FINE - 1)
    assert set(found.tolist()) == set(range(user_table.FINE))


def test_number_metrics_by_a_naive_loop(shrunk, tmp_path):
    trial = shrunk(TableNumbers)(write(tmp_path, TableNumbers)).prepare(0)
    off = torch.tensor([2.0, -3.0, 5.0, 7.0])[: len(trial.data.sizes)]

    class Answers(torch.nn.Module):
        """Off by a number that depends on the range."""

        def forward(self, inputs):
            part = next(part for part, (rows, *_) in trial.parts.items() if torch.equal(rows, inputs))
            _, target, which = trial.parts[part]
            return (target + off[which] - trial.center) / trial.scale

    found = trial._test(Answers()).metrics
    sizes = trial.data.sizes
    assert len(sizes) >= 2
    assert sizes == torch.bincount(trial.parts["train"][2]).tolist()
    assert found["few_mae"] == pytest.approx(abs(float(off[np.argmin(sizes)])), rel=1e-4)
    assert found["many_mae"] == pytest.approx(abs(float(off[np.argmax(sizes)])), rel=1e-4)
    assert found["balanced_mae"] == pytest.approx(float(off.abs().mean()), rel=1e-4)
    which, target = trial.parts["test"][2], trial.parts["test"][1].double()
    assert found["mae"] == pytest.approx(float(off.abs()[which].mean()), rel=1e-4)
    residual = float((off[which].double() ** 2).sum())
    assert found["r2"] == pytest.approx(1 - residual / float(((target - target.mean()) ** 2).sum()), rel=1e-4)


def test_number_weights_divide_by_their_sum(shrunk, tmp_path):
    suite = shrunk(TableNumbers)(write(tmp_path, TableNumbers))
    trial = suite.prepare(0)
    _, target, which = trial.parts["train"]
    sizes = torch.tensor(trial.data.sizes).double()
    for method, group, counts, power in (
        ("density", trial.fine, trial.density, 1.0),
        ("density_sqrt", trial.fine, trial.density, 0.5),
        ("quarters", which, sizes, 1.0),
    ):
        weight = counts[group] ** -power
        wanted = (weight * target.double() ** 2).sum() / weight.sum()
        found = suite.objective(method, trial.density, trial.data.sizes)(torch.zeros(len(target)), target, group=group)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_unusable_tables_are_refused(shrunk, tmp_path):
    file = tmp_path / "table.csv"
    numbers, classes = shrunk(TableNumbers)(tmp_path), shrunk(TableClasses)(tmp_path)

    def both(text):
        file.write_text(text)
        why = [suite.unavailable() for suite in (classes, numbers)]
        assert all("\n" not in reason and str(file) in reason for reason in why if reason)
        return why

    assert all("must not be empty" in why for why in both(""))
    assert all("must have a column 'target', found 'a', 'b'" in why for why in both("a,b\n1,2\n"))
    assert all("must have rows below its header" in why for why in both("a,target\n"))
    assert all("line 3: must have the 2 columns" in why for why in both("a,target\n1,2\n3"))
    assert all("must have an input column" in why for why in both("target\n1\n2\n"))
    one, other = both("a,target\n" + "1,x\n" * 9 + "2,y\n" * 4)
    assert "every class must have at least 5 rows, found class 'y' with 4" in one
    assert "must be a number, found 'x'" in other
    one, other = both("a,target\n" + "".join(f"{i},{i % 9}\n" for i in range(200)))
    assert one is None
    assert "must have at least 10 different numbers (fewer are classes), found 9" in other
    *_, other = both("a,target\n" + "".join(f"{i},{i}\n" for i in range(79)))
    assert "must have two ranges of values with 40 rows each, found 79 rows" in other
    *_, other = both("a,target\n" + "".join(f"{i},{max(0, i - 9985)}\n" for i in range(10_000)))
    assert "most of them in one range" in other
