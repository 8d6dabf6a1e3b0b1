"""The suites by family: splits, pairing, runs that repeat bit by bit, metrics against naive loops."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reweigh.benchmarks.suites import SUITES, DigitsOverlayML, PydocLM, PydocQuotes, UnicodeCategory, topics
from reweigh.benchmarks.suites.classes import exponential, long_tail, reliability
from reweigh.benchmarks.suites.digits_overlay_ml import DIGITS, IMAGES, MOST, overlays
from reweigh.benchmarks.suites.language import END, RARE, UNKNOWN, by_frequency, encoded
from reweigh.benchmarks.suites.multilabel import best_lines
from reweigh.benchmarks.suites.pydoc_quotes import tagged
from reweigh.benchmarks.suites.recurrent import Reader, continued
from reweigh.benchmarks.suites.tagging import AROUND, OUTSIDE, windows
from reweigh.benchmarks.suites.unicode_category import FEWEST, HELD_OUT, characters
from reweigh.benchmarks.tune import candidates

NEW = (UnicodeCategory, DigitsOverlayML, PydocQuotes, PydocLM)
needs_topics = pytest.mark.skipif(bool(topics.unavailable()), reason="this Python has no help topics")


@pytest.fixture(params=NEW, ids=lambda kind: kind.name)
def tiny(request, monkeypatch):
    """A suite with trainings of 6 steps."""
    kind = request.param
    if kind().unavailable():
        pytest.skip("this Python has no help topics")
    monkeypatch.setattr(kind, "training", {**kind.training, "steps": 6})
    if kind is PydocLM:
        from reweigh.benchmarks.suites import language

        monkeypatch.setattr(language, "LENGTH", 6)
    if kind is DigitsOverlayML:
        from reweigh.benchmarks.suites import digits_overlay_ml

        monkeypatch.setattr(digits_overlay_ml, "IMAGES", {"train": 200, "val": 500, "test": 100})
    return kind()


def test_runs_repeat_bit_by_bit_and_seeds_differ(tiny):
    for method in (tiny.baseline.name, tiny.methods[1].name, tiny.methods[2].name):
        once = tiny.prepare(3).run(method)
        torch.rand(7)  # what happened before in this process must not matter
        again = tiny.prepare(3).run(method)
        assert once.metrics == again.metrics, method
        assert once.details == again.details, method
        assert set(once.metrics) >= {metric.name for metric in tiny.metrics}
    assert tiny.prepare(4).data_hash != tiny.prepare(3).data_hash == tiny.prepare(3).data_hash


def test_methods_share_initial_network_and_batches(tiny, monkeypatch):
    from reweigh.benchmarks.suites import recurrent, training

    seen = {}

    def step(module, batch, batch_idx):
        log = seen.setdefault(method, [])
        if not log:
            log.append(torch.cat([p.detach().flatten() for p in module.net.parameters()]))
        log.append(batch[0].clone())
        return module.objective(module.net(batch[0]), batch[-1])

    monkeypatch.setattr(training.Classifier, "training_step", step)
    monkeypatch.setattr(recurrent.Language, "training_step", step)
    trial = tiny.prepare(1)
    trained = [entry.name for entry in tiny.methods if entry.trained]
    for method in trained:
        trial.run(method)
        assert len(seen[method]) == 7, method
        for ours, theirs in zip(seen[method], seen[trained[0]], strict=True):
            assert torch.equal(ours, theirs), method
    assert len(trained) >= 4


def test_what_is_not_trained_is_the_same_beside_and_without_the_baseline(tiny):
    free = next(method.name for method in tiny.methods if not method.trained)
    trial = tiny.prepare(0)
    plain = trial.run(tiny.baseline.name)
    beside = trial.run(free)
    assert beside.metrics == tiny.prepare(0).run(free).metrics
    assert beside.metrics != plain.metrics
    assert beside.step_ms is None
    assert plain.step_ms is None or plain.step_ms > 0


def test_every_method_has_its_own_objective(tiny):
    trial = tiny.prepare(0)
    made = {}
    for method in tiny.methods:
        if not method.trained:
            continue
        if isinstance(tiny, UnicodeCategory):
            made[method.name] = tiny.objective(method.name)
        elif isinstance(tiny, DigitsOverlayML):
            made[method.name] = tiny.objective(method.name, trial.data)
        elif isinstance(tiny, PydocQuotes):
            made[method.name] = tiny.objective(method.name, 0.09)
        else:
            made[method.name] = tiny.objective(method.name, trial.counts)
    assert len({repr(objective) for objective in made.values()}) == len(made)


@pytest.mark.parametrize("name", [name for name, kind in SUITES.items() if kind.grid])
def test_grids_hold_the_chosen_settings(name):
    """What a suite uses is among what it says it was chosen from."""
    suite = SUITES[name]()
    assert suite.chosen_by in {metric.name for metric in suite.metrics}
    for method, grid in suite.grid.items():
        options = suite.options(method)
        for setting, values in grid.items():
            assert options[setting] in values, (method, setting)


@pytest.mark.parametrize("name", SUITES)
def test_no_method_is_tuned_more_than_the_baseline(name):
    suite = SUITES[name]()
    sizes = {method: len(candidates(suite, method)) for method in suite.grid}
    if suite.baseline.name in sizes:
        assert max(sizes.values()) == sizes[suite.baseline.name]


# classes


@given(st.integers(20, 500), st.floats(1.0, 100.0), st.integers(2, 30))
def test_sizes_fall_from_the_largest_to_the_smallest(largest, imbalance, classes):
    sizes = exponential(largest, imbalance, classes)
    assert sizes[0] == largest
    assert sizes[-1] == round(largest / imbalance)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_long_tail_share_nothing(seed):
    target = np.repeat(np.arange(4), 50)
    parts, by_size = long_tail(target, [30, 10, 4, 1], {"test": 8, "val": 3}, seed)
    chosen = np.concatenate(list(parts.values()))
    assert len(set(chosen.tolist())) == len(chosen) == 45 + 4 * 11
    assert np.bincount(target[parts["train"]], minlength=4)[by_size].tolist() == [30, 10, 4, 1]


def test_reliability_is_counts_of_bins():
    p = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.45, 0.55]])
    found = reliability(p, torch.tensor([0, 1, 1]), bins=10)
    assert [(number, right) for number, _, right in found] == [(1, 1.0), (2, 0.5)]
    assert [confidence for _, confidence, _ in found] == pytest.approx([0.55, 0.935])


def test_characters_have_names_of_their_own():
    names, categories = characters()
    assert len(names) == len(categories) > 20_000
    assert min(categories.count(name) for name in set(categories)) >= FEWEST
    assert not any(words[0] in ("HANGUL", "CJK") and words[1:2] in (["SYLLABLE"], ["UNIFIED"]) for words in names)


def test_categories_are_split_by_class():
    data = UnicodeCategory().data(0)
    sizes = {part: torch.bincount(target, minlength=len(data.names)) for part, (_, target) in data.parts.items()}
    whole = sum(sizes.values())
    for part, (share, most) in HELD_OUT.items():
        expected = [min(round(share * n), most) for n in whole.tolist()]
        assert sizes[part].tolist() == expected
    ordered = sizes["train"][data.by_size]
    assert ordered.tolist() == sorted(ordered.tolist(), reverse=True)
    assert ordered[0] / ordered[-1] > 300  # the imbalance is the data's own


# several labels


@pytest.mark.parametrize("seed", range(2))
def test_overlays_hold_the_digits_they_say(seed):
    images = np.zeros((1797, 8, 8), np.float32)
    digit = np.arange(1797) % 10
    images[np.arange(1797), 0, 0] = 1 + np.arange(1797) % 10  # the corner tells which digit it is
    found, by_size = overlays(images, digit, seed)
    counts = found["train"][1].sum(0)[by_size]
    assert counts[:3].min() > 5 * counts[-3:].max()
    spread = found["test"][1].sum(0)
    assert spread.max() < 1.3 * spread.min()
    for part, (canvas, labels) in found.items():
        assert canvas.shape == (IMAGES[part], 1, 14, 14)
        assert set(labels.sum(1).tolist()) <= set(range(1, MOST + 1))
        for row in range(20):
            marks = {round(16 * value) - 1 for value in canvas[row].ravel() if value > 0}
            assert marks <= set(np.flatnonzero(labels[row]).tolist())  # a corner may be hidden, none may be foreign
    assert sum(DIGITS.values()) == 1797


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.35, 0.5, 0.8, 0.9]), st.booleans()), min_size=2, max_size=12))
def test_lines_give_the_largest_f1(pairs):
    p, truth = torch.tensor([[a] for a, _ in pairs]), torch.tensor([[int(b)] for _, b in pairs])

    def f1(line):
        said = p > line
        hits = int((said & (truth == 1)).sum())
        return 2 * hits / max(1, int(said.sum()) + int(truth.sum()))

    line = float(best_lines(p, truth))
    if not truth.any():
        assert line == 0.5
        return
    # equal probabilities cannot be told apart by a line, so the best is among lines between different ones
    values = sorted({a for a, _ in pairs})
    lines = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(values))]
    if len(values) == len(pairs):
        assert f1(line) == pytest.approx(max(f1(other) for other in lines))


def test_label_metrics_are_those_of_the_answers(monkeypatch):
    from reweigh.benchmarks.suites import digits_overlay_ml

    monkeypatch.setattr(digits_overlay_ml, "IMAGES", {"train": 200, "val": 500, "test": 100})
    trial = DigitsOverlayML().prepare(0)
    truth = {part: trial.parts[part][1] for part in ("test", "val")}
    perfect = trial._test(20 * truth["test"] - 10, 20 * truth["val"] - 10, None).metrics
    assert [perfect[name] for name in ("map", "tail_ap", "head_ap", "macro_f1")] == pytest.approx([1.0] * 4)
    assert perfect["ece"] < 1e-3
    silent = trial._test(-10 - truth["test"], 20 * truth["val"] - 10, None).metrics
    assert silent["macro_f1"] == 0.0  # says no to everything
    assert silent["map"] < 0.6
    moved = trial._test(20 * truth["test"] - 30, 20 * truth["val"] - 10, torch.full((10,), 1e-7)).metrics
    assert moved["macro_f1"] == pytest.approx(1.0)


# tagging


def test_quotation_marks_are_taken_out():
    found = tagged('use "a b" or\n"c, never " alone')
    assert found == [
        ("use", False),
        ("a", True),
        ("b", True),
        ("or", False),
        ("c", True),
        (",", True),
        ("never", True),
        ("alone", False),
    ]
    assert tagged('an "open\nmark" stays out') == [(word, False) for word in ("an", "open", "mark", "stays", "out")]


def test_windows_are_centred_and_end_with_the_text():
    texts = {"train": [[("b", False), ("a", True), ("a", False)]], "test": [[("z", True), ("a", False)]]}
    parts = windows(texts, 4)
    a, b = 2, 3  # by frequency
    rows, labels = parts["train"]
    assert rows.shape == (3, 2 * AROUND + 1)
    assert rows[:, AROUND].tolist() == [b, a, a]
    assert rows[0].tolist() == [OUTSIDE] * AROUND + [b, a, a] + [OUTSIDE] * (AROUND - 2)
    assert labels.tolist() == [[0.0], [1.0], [0.0]]
    assert parts["test"][0][:, AROUND].tolist() == [1, a]  # a word that training has not seen


@needs_topics
def test_topics_are_in_one_part_each():
    names = sorted(topics.topics())
    parts = topics.split(names, 3)
    assert sorted(itertools.chain(*parts.values())) == names
    assert parts != topics.split(names, 4)


@needs_topics
def test_tag_metrics_are_those_of_the_answers():
    trial = PydocQuotes().prepare(0)
    truth = trial.parts["test"][1].squeeze(1)
    p = torch.where(truth > 0, 0.4, 0.1)
    found = trial._test(p, trial.parts["val"][1].squeeze(1), 0.5, 0.3).metrics
    assert found["f1"] == found["recall"] == 0.0
    assert found["f1_tuned"] == found["average_precision"] == found["val_f1"] == 1.0
    assert found["bias"] == pytest.approx(abs(float(p.double().mean() - truth.double().mean())), abs=1e-6)


# language models


def test_words_are_numbered_by_frequency():
    data = encoded({"train": [["a", "b", "b"], ["c", "b", "a"]], "val": [["b", "z"]], "test": [["c", "c"]]}, 4, 2)
    b, a = 2, 3
    assert data.words[2:] == ["b", "a"]
    assert data.parts["train"][0].flatten().tolist() == [a, b, b, END, UNKNOWN, b, a, END]
    assert data.parts["val"][0].tolist() == [[b, UNKNOWN]]
    assert data.counts.tolist() == [2, 1, 3, 2]


@needs_topics
def test_language_metrics_by_a_naive_loop(monkeypatch):
    monkeypatch.setattr(PydocLM, "training", {**PydocLM.training, "steps": 3})
    trial = PydocLM().prepare(0)
    net, _ = trial._train("ce")
    found = trial._test(net, None).metrics
    right, seen, losses, top = {True: 0, False: 0}, {True: 0, False: 0}, [], 0
    with torch.no_grad():
        for ids in trial.parts["test"][0]:
            logits = net(ids[None])[0]
            for place in range(len(ids) - 1):
                target = int(ids[place + 1])
                losses.append(float(torch.nn.functional.cross_entropy(logits[place], ids[place + 1])))
                if target == UNKNOWN:
                    continue
                rare = int(trial.counts[target]) <= RARE
                seen[rare] += 1
                right[rare] += int(logits[place].argmax()) == target
                top += rare and target in logits[place].topk(5).indices.tolist()
    assert found["rare_accuracy"] == pytest.approx(right[True] / seen[True])
    assert found["frequent_accuracy"] == pytest.approx(right[False] / seen[False])
    assert found["rare_top5"] == pytest.approx(top / seen[True])
    assert found["perplexity"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)


def test_continuations_are_the_likeliest_words():
    torch.manual_seed(0)
    net = Reader(7, 5, 0.0).eval()
    prompts = torch.randint(7, (3, 4))
    with torch.no_grad():
        written = continued(net, prompts, 5, None)
        text = prompts
        for _ in range(5):
            text = torch.cat([text, net(text)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(text[:, 4:], written)
        shift = torch.full((7,), 50.0)
        shift[6] = 0.0
        assert (continued(net, prompts, 5, shift) == 6).all()


def test_losses_by_frequency_keep_every_word():
    loss, counts = torch.arange(6.0), torch.tensor([0, 1, 1, 2, 5, 100])
    found = by_frequency(loss, counts)
    assert sum(number for *_, number in found) == 6
    assert found[1] == (pytest.approx((1 + 1 + 2) / 3), pytest.approx(2.0), 3)
