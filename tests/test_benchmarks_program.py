"""The program: command line, resuming, damaged folders, and the report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reweigh.benchmarks import cli
from reweigh.benchmarks.store import Store
from reweigh.benchmarks.suites import DigitsLT50
from reweigh.benchmarks.summary import summarize

TINY = {**DigitsLT50.training, "steps": 10}
ALL = [method.name for method in DigitsLT50.methods]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Trainings of 10 steps."""
    monkeypatch.setattr(DigitsLT50, "training", TINY)


def call(*arguments):
    return cli.main([str(argument) for argument in arguments])


def run(folder, *, seeds=2, methods="posthoc_la,focal"):
    return call("run", "digits_lt50", "--seeds", seeds, "--methods", methods, "--workers", 1, "--out", folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All methods on 6 seeds; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsLT50, "training", TINY)
        assert run(folder, seeds=6, methods=",".join(ALL)) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def lines(folder):
    return (folder / "runs.jsonl").read_text().splitlines()


def keys(folder):
    records = [json.loads(line) for line in lines(folder)]
    return sorted((r["suite"], r["method"], r["seed"]) for r in records if r["kind"] == "run")


def grid(seeds, methods):
    return sorted(("digits_lt50", method, seed) for seed in range(seeds) for method in methods)


# the command line


def test_list_names_suites_and_methods(capsys):
    assert call("list") == 0
    out = capsys.readouterr().out
    assert "digits_lt50" in out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in ALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digits_lt5"], "unknown suite 'digits_lt5'; did you mean digits_lt50"),
        (["run", "zzz"], "unknown suite 'zzz'; there is digits_lt50"),
        (["run", "digits_lt50", "--methods", "ce,foccal"], "unknown method 'foccal'; did you mean focal"),
        (["run", "digits_lt50", "--methods", ","], "--methods must name at least one method"),
        (["run", "digits_lt50", "--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["run", "digits_lt50", "--workers", "-1"], "--workers must be >= 1, got -1"),
        (["run", "digits_lt50", "--data-root", "nowhere"], "--data-root must name an existing folder, got 'nowhere'"),
        (["run", "digits_lt50", "--quick", "--full"], "--quick and --full exclude each other"),
        (["run", "digits_lt50", "--first-seed", "-1"], "--first-seed must be >= 0, got -1"),
        (["tune", "digits_lt50", "--methods", "focal"], "unknown method with a grid 'focal'; there is ce"),
        (["tune", "digits_lt5"], "unknown suite 'digits_lt5'"),
        (["check", "nowhere"], "nowhere has no runs.jsonl"),
        (["report", "nowhere"], "nowhere has no runs.jsonl"),
    ],
)
def test_wrong_calls_say_what_is_wrong(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        call("run", "digits_lt50", "--quik")
    assert stop.value.code == 2
    assert "--quik" in capsys.readouterr().err


def test_out_may_not_be_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(tmp_path / "file") == 2
    assert "--out must name a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_quick_says_what_it_is_not(tmp_path, capsys):
    assert call("run", "digits_lt50", "--quick", "--workers", 1, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert keys(tmp_path) == grid(3, DigitsLT50.quick)
    assert "No gates are evaluated" in out
    assert "No significance tests" in out
    assert not re.search(r"^gate ", out, re.MULTILINE)


def test_what_is_run_unless_told_otherwise(tmp_path, monkeypatch):
    assert call("run", "digits_lt50", "--seeds", 1, "--workers", 1, "--out", tmp_path / "default") == 0
    assert keys(tmp_path / "default") == grid(1, DigitsLT50.default)
    assert call("run", "digits_lt50", "--seeds", 1, "--full", "--workers", 1, "--out", tmp_path / "full") == 0
    assert keys(tmp_path / "full") == grid(1, ALL)


def test_all_leaves_out_what_cannot_run_and_what_is_slow(tmp_path, monkeypatch, capsys):
    class Slow(DigitsLT50):
        name, slow = "slow", True

    class Away(DigitsLT50):
        name = "away"

        def unavailable(self):
            return "it is not here"

    monkeypatch.setattr(cli, "SUITES", {"digits_lt50": DigitsLT50, "slow": Slow, "away": Away})
    assert call("run", "all", "--quick", "--seeds", 1, "--methods", "ce", "--workers", 1, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "slow is left out of a quick look" in out
    assert "away is left out: it is not here" in out
    assert keys(tmp_path) == [("digits_lt50", "ce", 0)]
    assert call("run", "away", "--out", tmp_path) == 2
    assert "nothing to run" in capsys.readouterr().err
    assert call("list") == 0
    assert "not here: it is not here" in capsys.readouterr().out


# resuming


def test_a_second_call_adds_only_what_is_missing(tmp_path, capsys):
    assert run(tmp_path, seeds=1) == 0
    before = lines(tmp_path)
    assert run(tmp_path, seeds=1) == 0
    assert lines(tmp_path) == before
    assert "nothing to train" in capsys.readouterr().out
    assert run(tmp_path, seeds=2, methods="focal,inverse") == 0
    assert lines(tmp_path)[: len(before)] == before
    assert keys(tmp_path) == sorted(grid(1, ["posthoc_la"]) + grid(2, ["ce", "focal", "inverse"]))


def test_seeds_may_start_elsewhere(tmp_path, finished):
    """The same seeds, whichever call makes them."""
    assert (
        call(
            "run",
            "digits_lt50",
            "--seeds",
            2,
            "--first-seed",
            4,
            "--methods",
            "focal",
            "--workers",
            1,
            "--out",
            tmp_path,
        )
        == 0
    )
    assert keys(tmp_path) == sorted(("digits_lt50", method, seed) for seed in (4, 5) for method in ("ce", "focal"))
    mine, theirs = Store(tmp_path).read().runs, Store(finished).read().runs
    assert all(run.metrics == theirs[key].metrics for key, run in mine.items())


def test_workers_change_nothing_but_time(tmp_path, finished, monkeypatch):
    monkeypatch.delattr(
        DigitsLT50, "training"
    )  # workers import the module anew, so the suite has to carry its settings
    suite = DigitsLT50()
    suite.training = TINY
    from rich.console import Console

    from reweigh.benchmarks.progress import Progress
    from reweigh.benchmarks.runner import run as run_grid

    quiet = Progress(Console(quiet=True))
    contents = run_grid([(suite, 2, ["ce", "posthoc_la"])], tmp_path, workers=2, command="test", progress=quiet)
    alone = Store(finished).read().runs
    assert sorted(contents.runs) == grid(2, ["ce", "posthoc_la"])
    for key, found in contents.runs.items():
        assert found.metrics == alone[key].metrics
        assert found.data_hash == alone[key].data_hash


@pytest.mark.parametrize(
    ("seeds", "workers", "sizes"), [(3, 2, [8, 8, 4, 4]), (4, 2, [8] * 4), (1, 1, [8]), (1, 4, [4, 4])]
)
def test_the_last_seed_is_shared_out(seeds, workers, sizes):
    from reweigh.benchmarks.runner import plan, spread
    from reweigh.benchmarks.store import Contents

    units = spread(plan(DigitsLT50(), seeds, ALL, Contents()), workers)
    assert [len(unit.methods) for unit in units] == sizes
    assert sorted(("digits_lt50", method, unit.seed) for unit in units for method in unit.methods) == grid(seeds, ALL)
    assert all(("ce" in unit.methods) == ("posthoc_la" in unit.methods) for unit in units)  # one training serves both


SCRIPT = """
import sys
from reweigh.benchmarks.cli import main
from reweigh.benchmarks.suites import DigitsLT50
DigitsLT50.training = {**DigitsLT50.training, "steps": 10}
sys.exit(main(["run", "digits_lt50", "--seeds", "40", "--methods", "focal", "--workers", "1", "--out", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_run_continues_where_it_stopped(tmp_path, finished):
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs.jsonl").exists() or len(lines(tmp_path)) < 4:
            assert child.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    survived = Store(tmp_path).read().runs
    assert 3 <= len(survived) < 80
    seeds = 1 + max(seed for _, _, seed in survived) + 1  # the one it was killed in, and one more
    assert run(tmp_path, seeds=seeds, methods="focal") == 0
    assert keys(tmp_path) == grid(seeds, ["ce", "focal"])  # none lost, none doubled
    after = Store(tmp_path).read().runs
    assert all(after[key] == value for key, value in survived.items())
    whole = Store(finished).read().runs
    assert all(after[key].metrics == whole[key].metrics for key in after if key in whole)


MEET = """
import os, pathlib, time
meeting = pathlib.Path(sys.argv[1]).parent / "meeting"
meeting.mkdir(exist_ok=True)
(meeting / str(os.getpid())).touch()
while len(list(meeting.iterdir())) < 2:
    time.sleep(0.001)
"""


@pytest.mark.slow
def test_two_processes_may_share_a_folder(tmp_path):
    folder = tmp_path / "out"
    script = SCRIPT.replace('"40"', '"8"').replace("sys.exit(", f"{MEET}\nsys.exit(")
    both = [subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait(timeout=120) for child in both] == [0, 0]
    assert keys(folder) == grid(8, ["ce", "focal"])
    sessions = [line for line in lines(folder) if '"kind":"session"' in line]
    assert len(sessions) == 2  # both took part


def test_equal_keys_count_once(folder):
    first = Store(folder).read().runs
    double = json.loads(next(line for line in lines(folder) if '"kind":"run"' in line))
    double["metrics"] = dict.fromkeys(double["metrics"], 0.0)
    with open(folder / "runs.jsonl", "a") as file:
        file.write(json.dumps(double) + "\n")
    assert Store(folder).read().runs == first


# damage


def test_a_half_written_last_line_is_dropped_and_run_again(folder, capsys):
    text = (folder / "runs.jsonl").read_bytes()
    cut = text[: text.rindex(b"\n", 0, -1) + 40]
    (folder / "runs.jsonl").write_bytes(cut)
    assert run(folder, seeds=6, methods=",".join(ALL)) == 0
    assert "the last line was cut off" in capsys.readouterr().out
    assert keys(folder) == grid(6, ALL)
    assert (folder / "runs.jsonl.bak").read_bytes() == cut


def test_a_writer_never_glues_a_result_to_half_a_line(folder):
    store = Store(folder)
    runs = store.read().runs
    lost = runs.pop(("digits_lt50", "drw", 5))
    kept = [line for line in lines(folder) if not ('"drw"' in line and '"seed":5' in line)]
    (folder / "runs.jsonl").write_text("\n".join(kept) + '\n{"kind":"run","sui')
    store.append_run(lost)
    contents = store.read()
    assert contents.runs == {**runs, lost.key: lost}
    assert contents.broken == [len(kept) + 1]
    assert not contents.unfinished


def test_a_corrupt_line_loses_no_other_result(folder, capsys):
    good = lines(folder)
    at = next(i for i, line in enumerate(good) if '"focal"' in line)
    bad = [*good[:at], good[at].replace('"metrics"', '"metr\x00'), *good[at + 1 :]]
    (folder / "runs.jsonl").write_text("\n".join(bad) + "\n")
    damaged = (folder / "runs.jsonl").read_bytes()

    assert call("report", folder) == 0  # reading leaves the file alone
    assert f"line {at + 1} cannot be read" in capsys.readouterr().out
    assert (folder / "runs.jsonl").read_bytes() == damaged

    assert run(folder, seeds=6, methods=",".join(ALL)) == 0
    out = capsys.readouterr().out
    assert f"line {at + 1} cannot be read" in out
    assert "kept as runs.jsonl.bak" in out
    assert "47 of 48 runs are there already" in out
    assert (folder / "runs.jsonl.bak").read_bytes() == damaged
    assert keys(folder) == grid(6, ALL)
    assert set(good) - set(lines(folder)) == {good[at]}  # the others are as they were


def test_an_older_backup_is_not_overwritten(folder):
    (folder / "runs.jsonl.bak").write_text("mine")
    with open(folder / "runs.jsonl", "a") as file:
        file.write("nonsense\n")
    assert "runs.jsonl.bak1" in Store(folder).repair()
    assert (folder / "runs.jsonl.bak").read_text() == "mine"


@pytest.mark.parametrize("change", ["settings", "version"])
def test_other_settings_are_refused_and_nothing_changes(folder, capsys, monkeypatch, change):
    before = (folder / "runs.jsonl").read_bytes()
    if change == "settings":
        monkeypatch.setattr(DigitsLT50, "training", {**TINY, "lr": 1e-3})
    else:
        monkeypatch.setattr(DigitsLT50, "version", 99)
    assert run(folder, seeds=7) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert (folder / "runs.jsonl").read_bytes() == before
    assert call("report", folder) == 0  # they can still be looked at
    assert "Made with other settings than this version's" in capsys.readouterr().out


def test_other_data_are_refused(folder, capsys):
    text = (folder / "runs.jsonl").read_text()
    (folder / "runs.jsonl").write_text(
        re.sub(r'"seed":5(.*?)"data_hash":"\w+"', r'"seed":5\1"data_hash":"0"', text).replace('"drw"', '"dr_"', 1)
    )
    Path(folder / "runs.jsonl").write_text(
        "\n".join(line for line in lines(folder) if '"dr_"' not in line and '"drw","seed":5' not in line) + "\n"
    )
    assert run(folder, seeds=6, methods="drw") == 2
    assert "made on other data" in capsys.readouterr().err


def test_an_unknown_method_in_the_file_is_refused(folder, capsys):
    text = (folder / "runs.jsonl").read_text()
    (folder / "runs.jsonl").write_text(text.replace('"method":"drw"', '"method":"newer"'))
    assert call("report", folder) == 2
    assert "methods that this version does not know: newer" in capsys.readouterr().err


def test_empty_and_hopeless_folders(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text("not json\n[1]\n{}\n")
    assert call("report", tmp_path) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert (tmp_path / "runs.jsonl").read_text() == "not json\n[1]\n{}\n"


def test_without_the_baseline_there_is_no_report(folder, capsys):
    kept = [line for line in lines(folder) if '"method":"ce"' not in line]
    (folder / "runs.jsonl").write_text("\n".join(kept) + "\n")
    assert call("report", folder) == 2
    assert "no run of the baseline 'ce'" in capsys.readouterr().err


# the report


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.images, self.text, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_rebuilt_from_the_runs_alone(folder, capsys):
    names = ("results.json", "report.html")
    first = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    assert call("report", folder) == 0
    out = capsys.readouterr().out
    assert all(method.label in out for method in DigitsLT50.methods)
    assert {name: (folder / name).read_bytes() for name in names} == first


def test_page_needs_nothing_else(folder):
    page = Page()
    html = (folder / "report.html").read_text()
    page.feed(html)
    assert page.links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\(", html)
    assert len(page.images) == 4
    assert all(len(image["alt"]) > 40 for image in page.images)
    for figure in ("differences", "by_class", "reliability", "weights"):
        assert f'id="digits_lt50-{figure}"' in html
    text = " ".join(page.text)
    assert all(method.label in text for method in DigitsLT50.methods)
    assert "viewport" in html
    assert "python -m reweigh.benchmarks run digits_lt50 --seeds 6" in text
    assert "no claim" in text
    assert "torch " in text


def test_results_hold_everything(folder):
    results = json.loads((folder / "results.json").read_text())
    (session,) = results["sessions"]
    assert session["command"].startswith("python -m reweigh.benchmarks run digits_lt50")
    assert {"torch", "numpy", "reweigh", "scikit-learn"} <= set(session["environment"]["versions"])
    (suite,) = results["suites"]
    assert len(suite["runs"]) == 48
    assert suite["seeds"] == list(range(6))
    assert re.fullmatch(r"[0-9a-f]{64}", suite["data_hash"])
    rows = {row["method"]: row for row in suite["summary"]}
    assert set(rows) == set(ALL)
    by_hand = [run["metrics"]["macro_f1"] for run in suite["runs"] if run["method"] == "cb"]
    assert rows["cb"]["mean"]["macro_f1"] == pytest.approx(sum(by_hand) / 6)
    assert rows["ce"]["relative_step_time"] == 1.0
    assert rows["posthoc_la"]["relative_step_time"] is None
    assert rows["focal"]["claim"] is False
    assert rows["cb"]["settings"]["beta"] == 0.999
    assert all(gate["passed"] is None for gate in suite["gates"])  # 6 of 10 seeds


def fake(finished, gains):
    """Ten seeds with a worst recall set by hand."""
    example = next(iter(Store(finished).read().runs.values()))
    runs = []
    for method, gain in gains.items():
        for seed in range(10):
            metrics = {**example.metrics, "worst_recall": 0.3 + gain + 0.001 * seed * (method != "ce")}
            print_of = DigitsLT50().fingerprint(method)
            changes = {"method": method, "seed": seed, "metrics": metrics, "fingerprint": print_of}
            runs.append(type(example)(**{**vars(example), **changes}))
    return runs


def test_gates_pass_and_fail(finished, tmp_path, capsys):
    gains = {"ce": 0.0, "posthoc_la": 0.2, "balanced_softmax": 0.13, "inverse": 0.1, "cb": -0.2, "focal": 0.3}
    runs = fake(finished, gains)
    gates = {result.gate.method: result.passed for result in summarize(DigitsLT50(), runs).gates}
    assert gates == {"posthoc_la": True, "balanced_softmax": False, "inverse": True, "cb": False}
    for one in runs:
        Store(tmp_path).append_run(one)
    arguments = ["run", "digits_lt50", "--methods", "posthoc_la,balanced_softmax,inverse,cb,focal", "--out", tmp_path]
    assert call(*arguments) == 0
    out = capsys.readouterr().out
    assert out.count(": pass, measured") == 2
    assert out.count(": FAIL, measured") == 2
    assert call(*arguments, "--strict") == 1


def test_a_gate_needs_an_interval_without_zero(finished):
    runs = fake(finished, {"ce": 0.0, "cb": 0.0})
    for one in runs:
        if one.method == "cb":
            one.metrics["worst_recall"] = 0.3 + (1.2 if one.seed == 0 else 0.0)  # mean +.12 by one lucky seed
    (gate,) = [result for result in summarize(DigitsLT50(), runs).gates if result.gate.method == "cb"]
    assert gate.passed is False


def test_holm_runs_over_all_methods(finished):
    summary = summarize(DigitsLT50(), fake(finished, {"ce": 0.0, "cb": 0.2, "inverse": 0.2, "focal": 0.1}))
    assert [row.p_holm for row in summary.rows] == [None, *[pytest.approx(3 * 2 / 2**10)] * 3]
