"""A model of one's own: compare, its command, kills and crashes, advice; promises and tuning of the suites."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import own_model
import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console

from reweigh.benchmarks import advise, cli, compare, recipes
from reweigh.benchmarks import runner as runner_module
from reweigh.benchmarks.advice import RESULTS, evidence
from reweigh.benchmarks.own import OwnModel, RunError
from reweigh.benchmarks.progress import Progress
from reweigh.benchmarks.runner import run
from reweigh.benchmarks.store import Store
from reweigh.benchmarks.suites import SUITES, DigitsLT50, Gate, Method, Metric, Outcome, Suite, Trial
from reweigh.benchmarks.suites.base import Recorded
from reweigh.benchmarks.suites.training import quiet as silence
from reweigh.benchmarks.summary import summarize
from reweigh.benchmarks.tune import candidates, tune
from reweigh.losses import CrossEntropy, FocalLoss, Objective

HERE = Path(__file__).resolve().parent
METRICS = ["test/recall", "-test/loss"]
FAST = {"max_epochs": 2}


def quiet():
    return Console(quiet=True)


def call(*arguments):
    return cli.main([str(argument) for argument in arguments])


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def keys(folder):
    return sorted((r["suite"], r["method"], r["seed"]) for r in lines(folder) if r["kind"] == "run")


def own(objectives=("cross_entropy", "focal"), seeds=2, name="mine", factory=own_model.Net, data=own_model.Data):
    return OwnModel(factory, data, objectives, METRICS, seeds, FAST, name)


# compare


def test_objectives_are_compared_like_with_like(tmp_path):
    """Same initial weights, same first batch; the mean of what the module logs; a report that can be made again."""
    names = ["cross_entropy", "focal(gamma=1.0)", "class_balanced", "balanced_softmax"]
    found = compare(
        own_model.Net, own_model.Data, names, metrics=METRICS, seeds=3, trainer=FAST, out=tmp_path, console=quiet()
    )
    assert [row.method.name for row in found.rows] == names
    assert found.baseline.method.name == "cross_entropy"
    assert [metric.higher_is_better for metric in found.suite.metrics] == [True, False]
    starts = {}
    for row in found.rows:
        for done in row.runs:
            starts.setdefault(done.seed, set()).add(done.details["start"])
            assert done.step_ms > 0
    assert all(len(values) == 1 for values in starts.values())
    assert len(set.union(*starts.values())) == 3
    # what a plain loop over Lightning gives
    pl.seed_everything(1, workers=True, verbose=False)
    module = own_model.Net(Objective(CrossEntropy()))
    pl.seed_everything(1, workers=True, verbose=False)
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    data = own_model.Data(1)
    with silence():
        trainer.fit(module, datamodule=data)
        (wanted,) = trainer.test(module, datamodule=data, verbose=False)
    mine = next(done for done in found.baseline.runs if done.seed == 1)
    assert mine.metrics == pytest.approx({name: wanted[name] for name in ("test/recall", "test/loss")})

    before = json.loads((tmp_path / "results.json").read_text())["suites"]
    (tmp_path / "results.json").unlink()
    assert call("report", tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text())["suites"] == before
    assert "class_balanced" in (tmp_path / "report.html").read_text()


def test_what_may_be_given(tmp_path):
    """Objectives, functions and names; one data module for all; callbacks of one's own; validation without a test."""

    class Validated(own_model.Net):
        test_step = pl.LightningModule.test_step

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    class Watched(own_model.Data):
        def val_dataloader(self):
            return self.test_dataloader()

    class Count(pl.Callback):
        steps = 0

        def on_train_batch_end(self, *args):
            self.steps += 1

    counted = Count()
    objective = FocalLoss(1.0)
    found = compare(
        Validated,
        Watched(0),
        {"plain": "cross_entropy", "mine": objective, "made": lambda: FocalLoss(3.0)},
        metrics=["-val/loss"],
        seeds=1,
        trainer={**FAST, "callbacks": [counted]},
        out=tmp_path,
        name="watched",
        console=quiet(),
    )
    assert [row.method.name for row in found.rows] == ["plain", "mine", "made"]
    assert counted.steps == 0  # every run has a copy
    assert "FocalLoss(1.0)" in found.rows[1].method.what


def test_a_second_call_trains_nothing_and_more_seeds_add(tmp_path):
    options = {"metrics": METRICS, "trainer": FAST, "out": tmp_path, "console": quiet()}
    compare(own_model.Net, own_model.Data, ["cross_entropy", "focal"], seeds=1, **options)
    first = lines(tmp_path)
    compare(own_model.Net, own_model.Data, ["cross_entropy", "focal"], seeds=1, **options)
    assert lines(tmp_path) == first
    compare(own_model.Net, own_model.Data, ["cross_entropy", "focal"], seeds=2, **options)
    assert keys(tmp_path) == sorted(("compare", m, s) for m in ("cross_entropy", "focal") for s in (0, 1))
    with pytest.raises(ValueError, match="made with other settings"):
        compare(own_model.Net, own_model.Data, ["cross_entropy", "focal"], seeds=2, **{**options, "trainer": {}})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"objectives": ["focal"]}, ValueError, "at least two, the baseline first"),
        ({"objectives": "focal"}, ValueError, "at least two"),
        ({"objectives": ["cross_entropy", "focl"]}, ValueError, "unknown objective 'focl'; did you mean focal"),
        ({"objectives": ["cross_entropy", "focal("]}, ValueError, r"must read like focal or focal\(gamma=1.5\)"),
        ({"objectives": {"a": "focal", "b": 3}}, TypeError, "objective 'b' must be a name"),
        ({"objectives": ["focal", "focal"]}, ValueError, "different names"),
        ({"metrics": []}, ValueError, "at least one logged value"),
        ({"metrics": ["-"]}, ValueError, "at least one logged value"),
        ({"seeds": 0}, ValueError, "seeds must be >= 1, got 0"),
        ({"name": "a b"}, ValueError, "name must be letters"),
        ({"module_factory": 3}, TypeError, "module_factory must be callable, got int"),
        ({"datamodule": 3}, TypeError, "LightningDataModule or a function of the seed, got int"),
    ],
)
def test_wrong_arguments(change, error, message, tmp_path):
    given = {
        "module_factory": own_model.Net,
        "datamodule": own_model.Data,
        "objectives": ["cross_entropy", "focal"],
        "metrics": METRICS,
        "out": tmp_path,
        "console": quiet(),
    }
    with pytest.raises(error, match=message):
        compare(**{**given, **change})
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_metric_that_is_not_logged(tmp_path):
    with pytest.raises(RunError, match="must log test/f1, it logs test/recall, test/loss"):
        compare(
            own_model.Net,
            own_model.Data,
            ["cross_entropy", "focal"],
            metrics=["test/f1"],
            trainer=FAST,
            out=tmp_path,
            console=quiet(),
        )


def test_names_of_objectives():
    assert {"focal", "class_balanced", "cross_entropy", "group_dro"} <= set(recipes.names())
    assert recipes.split("a, b(x=[1, 2], y=3) ,c") == ["a", "b(x=[1, 2], y=3)", "c"]
    make, about = recipes.named("class_balanced(beta=0.9)")
    assert "beta=0.9" in repr(make())
    assert about.endswith(".")
    for name in recipes.RECIPES:
        assert isinstance(recipes.named(name)[0](), Objective)


# the command


def command(target, *options, folder):
    return call("compare", target, "--out", folder, "--max-epochs", 1, "--seeds", 1, *options)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    given = ("--objectives", "cross_entropy,focal(gamma=1.0)", "--metrics", "test/recall,-test/loss")
    assert command("own_model:build", *given, folder=tmp_path / "a") == 0
    assert keys(tmp_path / "a") == [("compare", "cross_entropy", 0), ("compare", "focal(gamma=1.0)", 0)]
    session = next(line for line in lines(tmp_path / "a") if line["kind"] == "session")
    assert session["command"].startswith("python -m reweigh.benchmarks compare own_model:build --out")
    assert command("own_model:whole", folder=tmp_path / "b") == 0
    assert "promises" not in capsys.readouterr().out
    assert call("check", tmp_path / "b") == 2  # there is nothing to check


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("own_model", (), "must read package.module:function"),
        ("no_such_module:build", (), "no module 'no_such_module' from here"),
        ("own_model:no", (), "own_model has no function 'no'"),
        ("own_model:nothing", (), "must return (module_factory, datamodule) or a mapping"),
        ("own_model:build", (), "--objectives must be given"),
        ("own_model:build", ("--objectives", "cross_entropy,focal"), "--metrics must be given"),
        ("own_model:build", ("--objectives", "focl,focal", "--metrics", "a"), "unknown objective 'focl'"),
        ("own_model:build", ("--objectives", "cross_entropy,focal", "--metrics", "a"), "the module must log a"),
    ],
)
def test_wrong_commands_say_what_is_wrong(target, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    assert command(target, *options, folder=tmp_path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_ten_kills_lose_and_double_nothing(tmp_path):
    """SIGKILL at random moments; then to the end. One kill of a suite's run is in test_benchmarks_program."""
    rng = np.random.default_rng(1)
    script = [sys.executable, "-m", "reweigh.benchmarks", "compare", "own_model:build", "--out", str(tmp_path)]
    script += ["--objectives", "cross_entropy,focal,poly", "--metrics", "test/recall", "--max-epochs", "4"]
    script += ["--seeds", "6", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    seen: Counter = Counter()
    for _ in range(10):
        process = subprocess.Popen(
            script, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(3.0, 9.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = Counter(Store(tmp_path).read().runs.keys())
        assert not seen - done  # nothing that was there is lost
        seen = done
    assert subprocess.run(script, env=environment, capture_output=True, timeout=120).returncode == 0
    wanted = sorted(("compare", m, s) for m in ("cross_entropy", "focal", "poly") for s in range(6))
    assert keys(tmp_path) == wanted
    assert not Store(tmp_path).read().broken


# workers that die, and other backends


class Mortal(Suite):
    """A suite whose trials kill their process the first so many times."""

    name, version, title, summary, story = "mortal", 1, "mortal", "", ""
    methods = (Method("a", "a", ""), Method("b", "b", ""))
    quick = ("a", "b")
    metrics = (Metric("x", "x", ""),)
    known = False

    def __init__(self, folder, deaths):
        super().__init__()
        self.folder, self.deaths = folder, deaths
        self.training = {}

    def protocol(self):
        return {}

    def prepare(self, seed):
        return MortalTrial(self, seed)


class MortalTrial(Trial):
    data_hash = ""

    def __init__(self, suite, seed):
        self.suite, self.seed = suite, seed

    def run(self, method):
        if method == "b" and self.seed == 1:
            marks = len(list(self.suite.folder.glob("dead*")))
            if marks < self.suite.deaths:
                (self.suite.folder / f"dead{marks}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return Outcome({"x": float(self.seed)})


def test_what_a_dead_worker_left_is_done_again(tmp_path):
    (tmp_path / "marks").mkdir()
    suite = Mortal(tmp_path / "marks", 1)
    out = tmp_path / "out"
    run([(suite, 4, ["a", "b"])], out, workers=2, command="test", progress=Progress(quiet()))
    assert keys(out) == sorted(("mortal", m, s) for m in "ab" for s in range(4))
    assert len(list((tmp_path / "marks").iterdir())) == 1


@pytest.mark.slow
def test_workers_that_keep_dying_are_given_up_on(tmp_path, monkeypatch):
    (tmp_path / "marks").mkdir()
    monkeypatch.setattr(runner_module, "ATTEMPTS", 2)
    suite = Mortal(tmp_path / "marks", 99)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match=r"workers died 2 times .*; \d+ runs are missing"):
        run([(suite, 2, ["a", "b"])], out, workers=2, command="test", progress=Progress(quiet()))
    assert ("mortal", "b", 1) not in keys(out)


def test_dask_gives_what_local_processes_give(tmp_path, monkeypatch):
    """Two workers of a cluster that the test starts; the folder is visible to them."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(DigitsLT50, "training", {**DigitsLT50.training, "steps": 5})
    suite = own(seeds=3)
    run([(suite, 3, ["cross_entropy", "focal"])], tmp_path / "l", workers=2, command="", progress=Progress(quiet()))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        run(
            [(suite, 3, ["cross_entropy", "focal"])],
            tmp_path / "d",
            workers=None,
            command="",
            progress=Progress(quiet()),
            backend="dask",
            scheduler=cluster.scheduler_address,
        )
    found = [{key: done.metrics for key, done in Store(tmp_path / name).read().runs.items()} for name in ("l", "d")]
    assert len(found[0]) == 6
    assert found[0] == found[1]


@pytest.mark.parametrize(("backend", "module"), [("dask", "distributed"), ("ray", "ray")])
def test_a_backend_that_is_not_installed_is_said(backend, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert call("run", "digits_lt50", "--seeds", 1, "--backend", backend, "--out", tmp_path) == 2
    assert f"needs {module}: pip install {module}" in capsys.readouterr().err


# promises


def _summary(gates, values, seeds=6):
    suite = Mortal(None, 0)
    suite.gates, suite.seeds = gates, seeds
    suite.methods = tuple(Method(name, name, "") for name in values)
    runs = [
        runner_module.Run("mortal", name, seed, 1, suite.fingerprint(name), "", {"x": value}, None, {}, "s")
        for name, row in values.items()
        for seed, value in enumerate(row)
    ]
    return summarize(suite, runs)


def test_promises_of_harmlessness_and_against_other_methods():
    base = [100.0, 101.0, 102.0, 103.0, 104.0, 105.0]
    near = [a + d for a, d in zip(base, (0.5, -0.5, 0.2, 0.1, -0.3, 0.4), strict=True)]
    high = [a + 5 + 0.01 * i for i, a in enumerate(base)]
    values = {"a": base, "near": near, "high": high}

    def passed(gate):
        return _summary((gate,), values).gates[0].passed

    assert passed(Gate("near", "x", within=0.02))
    assert not passed(Gate("high", "x", within=0.02))
    assert passed(Gate("high", "x", at_least=4.0, versus="near"))
    assert not passed(Gate("near", "x", at_least=4.0, versus="high"))
    assert _summary((Gate("high", "x", at_least=1.0),), values, seeds=7).gates[0].passed is None
    for wrong in ({}, {"at_least": 1.0, "within": 0.1}):
        with pytest.raises(ValueError, match="one of at_least and within"):
            Gate("a", "x", **wrong)


def test_check_tells_by_its_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DigitsLT50, "training", {**DigitsLT50.training, "steps": 20})
    monkeypatch.setattr(DigitsLT50, "seeds", 2)
    for gate, status, word in (
        (Gate("posthoc_la", "ece", within=1e6), 0, "pass"),
        (Gate("posthoc_la", "ece", 1e6), 1, "FAIL"),
    ):
        monkeypatch.setattr(DigitsLT50, "gates", (gate,))
        call("run", "digits_lt50", "--seeds", 2, "--methods", "posthoc_la", "--workers", 1, "--out", tmp_path)
        capsys.readouterr()
        assert call("check", tmp_path) == status
        assert word in capsys.readouterr().out


def test_a_description_is_enough_for_a_report():
    for kind in SUITES.values():
        suite = kind()
        again = Recorded(json.loads(json.dumps(suite.description())))
        assert again.description() == json.loads(json.dumps(suite.description()))
        assert [again.fingerprint(m.name) for m in again.methods] == [suite.fingerprint(m.name) for m in suite.methods]
        with pytest.raises(NotImplementedError, match="known from its results alone"):
            again.prepare(0)


# tuning


def test_tuning_tries_the_whole_grid_on_seeds_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(DigitsLT50, "training", {**DigitsLT50.training, "steps": 60})
    monkeypatch.setattr(DigitsLT50, "grid", {"ce": {"lr": (3e-3, 1e-9), "weight_decay": (0.01, 0.1)}})
    suite = DigitsLT50()
    assert len(candidates(suite, "ce")) == 4
    rows = tune(suite, ["ce"], seeds=2, workers=1)
    assert [len(row.scores) for row in rows] == [2] * 4
    assert rows == sorted(rows, key=lambda row: -row.mean)
    assert {row.own["lr"] for row in rows[:2]} == {3e-3}
    best = rows[0]
    assert best.scores == [
        suite.with_own("ce", best.own).prepare(seed).run("ce").metrics["val_balanced_accuracy"] for seed in (100, 101)
    ]
    with pytest.raises(ValueError, match="no grid for 'focal'"):
        tune(suite, ["focal"], seeds=1, workers=1)
    assert call("tune", "digits_lt50", "--seeds", 1, "--workers", 1) == 0
    assert "best" in capsys.readouterr().out


# advice


def test_advice_for_classes():
    found = advise(["a"] * 900 + ["b"] * 90 + ["c"] * 3)
    assert found.profile["imbalance_factor"] == 300.0
    assert found.profile["counts"] == {"a": 900, "b": 90, "c": 3}
    assert (found.profile["many"], found.profile["medium"], found.profile["few"]) == (1, 1, 1)
    assert found.profile["effective_numbers"]["c"] == pytest.approx((1 - 0.999**3) / (1 - 0.999))
    assert any("fewer than 5" in text for text in found.words)
    assert found.suggestions[0].objective.startswith("posthoc")
    assert not advise(np.repeat([0, 1], [30, 20])).suggestions


def test_advice_for_groups_tokens_and_numbers():
    groups = advise([0] * 100 + [1] * 100, groups=[0] * 95 + [1] * 5 + [1] * 97 + [0] * 3)
    assert groups.kind == "groups"
    assert groups.profile["groups"] == 4
    assert groups.profile["imbalance_factor"] == pytest.approx(97 / 3)
    tokens = advise(token_counts=[1000, 500, 20, 3, 0])
    assert tokens.profile["rare_types"] == 2
    assert tokens.profile["rare_share"] == pytest.approx(23 / 1523)
    numbers = advise(numbers=np.r_[np.linspace(0, 0.9, 90), np.linspace(3, 4, 10)])
    assert list(numbers.profile["counts"].values()) == [90, 0, 0, 10]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of labels"),
        ({"labels": [1, 2], "numbers": [1.0]}, "give one of labels"),
        ({"labels": []}, "labels must not be empty"),
        ({"labels": [1, 2], "groups": [1]}, "must have one length, got 2 and 1"),
        ({"token_counts": [0, 0]}, "counts >= 0, not all 0"),
        ({"token_counts": [1, -1]}, "counts >= 0"),
        ({"numbers": [1.0, float("nan"), 2.0, 3.0]}, "finite values"),
    ],
)
def test_wrong_data_for_advice(given, message):
    with pytest.raises(ValueError, match=message):
        advise(**given)


def test_evidence_is_what_the_committed_results_say():
    found = json.loads((RESULTS / "digits_lt50.json").read_text())
    row = next(row for row in found["summary"] if row["method"] == "balanced_softmax")
    (text,) = evidence(("digits_lt50", "balanced_softmax"))
    assert f"{100 * row['versus_baseline']['worst_recall']['mean']:+.1f}" in text
    assert evidence(("digits_lt50", "no such method"), ("no such suite", "x")) == ()


def test_advice_on_the_command_line(tmp_path, capsys):
    table = tmp_path / "data.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "place", "price"])
        writer.writerows(["cat" if i % 20 else "dog", i % 3, 0.5 + i**2] for i in range(200))
    assert call("advise", table, "--target", "kind") == 0
    assert "from 190 (cat) down to 10 (dog): imbalance factor 19" in capsys.readouterr().out
    assert call("advise", table, "--target", "kind", "--group", "place") == 0
    assert "6 groups" in capsys.readouterr().out
    assert call("advise", table, "--target", "price") == 0
    assert "quarters of that range" in capsys.readouterr().out
    assert call("advise", "--counts", "900,50") == 0
    assert "imbalance factor 18" in capsys.readouterr().out
    text = tmp_path / "words.txt"
    text.write_text("a a a a b c\n\nd a")
    assert call("advise", text) == 0
    assert "8 tokens of 4 kinds" in capsys.readouterr().out
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1\n")
    for arguments, message in (
        ((), "needs a file or --counts"),
        ((table,), "--target must name one of the columns: kind, place, price"),
        ((table, "--target", "sort"), "has no column 'sort'; it has kind, place, price"),
        ((tmp_path / "no.csv", "--target", "a"), "no such file"),
        ((bad, "--target", "a"), "line 2: must have 2 columns, got 1"),
        (("--counts", "9,x"), "must be numbers with commas"),
    ):
        assert call("advise", *arguments) == 2
        assert message in capsys.readouterr().err
