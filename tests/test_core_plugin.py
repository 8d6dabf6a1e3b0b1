"""Third-party packages: entry points are found, a broken plugin only warns, a name clash is a clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reweigh.weighting.registry import Method, Registry

EXAMPLE = Path(__file__).parent / "plugin_example"

CREATE = """
import json, sys, torch
from reweigh import losses, weighting
losses.FocalLoss()
early = "reweigh_example" in sys.modules
from reweigh.losses import CrossEntropy, Objective
made = weighting.create("example_hardness", power=2.0)
x, y = torch.randn(5, 3), torch.randint(3, (5,))
mean = losses.create("example_hard_mean", power=2.0)(x, y)
same = Objective(CrossEntropy(), made, "weighted_mean")(x, y)
print(json.dumps({
    "weightings": weighting.available(), "objectives": losses.available(), "equal": torch.equal(mean, same),
    "venue": weighting.registry.record("example_hardness").venue,
    "module": type(made).__module__,
    "early": early,
}))
"""


def python(code, *path):
    """Run code in a fresh interpreter with folders in front of its import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def plugin(folder, name, entries, module=None):
    """A distribution as pip would leave it: a module and a dist-info with entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(f"[{group}]\n{line}" for group, line in entries))
    if module is not None:
        (folder / f"{name}.py").write_text(module)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example, built and installed by pip without the network."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in EXAMPLE.rglob("*"):
        if file.is_file() and file.suffix in (".py", ".toml"):
            copy = source / file.relative_to(EXAMPLE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(file.read_text())
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", target, source],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_plugin_is_available(installed):
    done = python(CREATE, installed)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "example_hardness" in found["weightings"]
    assert {"focal", "inverse_frequency"} <= set(found["weightings"])
    assert "example_hard_mean" in found["objectives"]
    assert "example_hardness" not in found["objectives"]
    assert found["equal"]
    assert found["module"] == "reweigh_example"
    assert not found["early"]  # a plugin is not imported before somebody asks for the list
    assert found["venue"] == "plugin reweigh_example:Hardness"


BROKEN = {
    # entry point name: what it points to, the module's text
    "no_module": ("nowhere_at_all:Thing", None),
    "no_name": ("no_name:Nothing", "value = 1"),
    "raises": ("raises:Thing", "raise RuntimeError('out of order')"),
    "syntax": ("syntax:Thing", "def"),
    "not_a_class": ("not_a_class:Thing", "Thing = 3"),
    "wrong_kind": ("wrong_kind:Thing", "class Thing: pass"),
}


def test_a_broken_plugin_only_warns(tmp_path):
    for name, (target, module) in BROKEN.items():
        plugin(tmp_path, name, [("reweigh.weightings", f"{name} = {target}")], module)
    code = """
import json, warnings
from reweigh import weighting
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    names = weighting.available()
assert weighting.create("focal", gamma=1.0).gamma == 1.0
print(json.dumps([names, [str(w.message) for w in caught]]))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    names, texts = json.loads(done.stdout)
    assert "focal" in names
    assert not set(names) & set(BROKEN)
    assert len(texts) == len(BROKEN)
    for name, (target, _) in BROKEN.items():
        assert any(text.startswith(f"weighting plugin {name!r} ({target}) cannot be loaded: ") for text in texts), name


def test_a_name_clash_is_a_clear_error(tmp_path):
    module = "from reweigh.weighting import Weighting\nclass Mine(Weighting):\n    weigh = None\n"
    plugin(tmp_path, "clash", [("reweigh.weightings", "focal = clash:Mine")], module)
    code = """
from reweigh import weighting
for attempt in range(2):
    try:
        weighting.available()
    except ValueError as error:
        text = str(error)
        assert "weighting name 'focal' is taken by reweigh.weighting.difficulty.Focal" in text, text
        assert "clash.Mine cannot have it" in text, text
    else:
        raise SystemExit(f"no error at attempt {attempt}")
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_registries_of_their_own():
    class First:
        pass

    class Second:
        pass

    registry = Registry("thing", "reweigh.tests.nothing")
    assert registry.method("one", paper="p", venue="v")(First) is First
    registry.add(First, Method(name="one", paper="p", venue="w"))  # the same class again, as on a reload
    assert registry.available() == ["one"]
    assert registry.record("one").venue == "w"
    assert isinstance(registry.create("one"), First)
    with pytest.raises(ValueError, match=r"thing name 'one' is taken by .*First, so .*Second cannot have it"):
        registry.add(Second, Method(name="one", paper="p", venue="v"))
    with pytest.raises(ValueError, match=r"no thing is called 'on'; did you mean 'one'\?"):
        registry.create("on")
