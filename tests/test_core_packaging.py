"""The package as others get it: contents, layering, what importing costs and pulls in, documentation that runs."""

import ast
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import reweigh
from reweigh import losses, weighting

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ["weighting", "losses", "lightning_callbacks", "benchmarks"]  # each may import the ones before it
NOT_PACKAGES = {"tests", "docs", "build", "dist", "site", "runs"}


def sources(*rooms):
    """Python files of the library, by room; the root's own ``__init__`` for ``""``."""
    files = [ROOT / "__init__.py"] if "" in rooms else []
    for room in rooms:
        files += sorted((ROOT / room).rglob("*.py")) if room else []
    assert files
    return files


LIBRARY = sources("", *ROOMS)


def name(path):
    return str(path.relative_to(ROOT))


def packages_of_the_tree():
    found = {"reweigh"}
    for init in ROOT.rglob("__init__.py"):
        parts = init.relative_to(ROOT).parts[:-1]
        if parts and parts[0] not in NOT_PACKAGES and not parts[0].startswith("."):
            found.add(".".join(("reweigh", *parts)))
    return found


def test_the_package_list_is_the_tree():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_of_the_tree()
    for path in LIBRARY:  # no module outside a package
        assert (path.parent / "__init__.py").exists(), name(path)


def test_py_typed_is_listed_for_every_room():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert {room for room, files in data.items() if "py.typed" in files} == {
        "reweigh",
        *(f"reweigh.{r}" for r in ROOMS),
    }
    for room in ("", *ROOMS):
        assert (ROOT / room / "py.typed").exists()


def copy_of_the_tree(target):
    """What git would clone, without the version control (a build writes into its source folder)."""
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if (
            path.is_file()
            and not parts[0].startswith(".")
            and parts[0] not in NOT_PACKAGES
            and ".egg-info" not in parts[0]
        ):
            if "__pycache__" in parts:
                continue
            to = target.joinpath(*parts)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = copy_of_the_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", out, source],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path, source


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    wheel, source = wheel
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {file for file in names if file.endswith(".py")}
    rooms = [source / "__init__.py", *(path for room in ROOMS for path in (source / room).rglob("*.py"))]
    assert modules == {f"reweigh/{path.relative_to(source)}" for path in rooms}
    typed = {file for file in names if file.endswith("py.typed")}
    assert typed == {"reweigh/py.typed", *(f"reweigh/{room}/py.typed" for room in ROOMS)}
    assert not [file for file in names if "test" in file.lower() and not file.startswith("reweigh/")]
    assert any(file.endswith("licenses/LICENSE") for file in names)


def test_the_wheel_works_outside_the_tree(wheel, tmp_path):
    """Installed into an empty folder and imported from there."""
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--disable-pip-version-check",
    ]
    done = subprocess.run([*command, "--target", target, wheel[0]], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, reweigh, pathlib, sys; "
        "assert pathlib.Path(reweigh.__file__).is_relative_to(sys.argv[1]), reweigh.__file__; "
        "loss = reweigh.FocalLoss()(torch.zeros(2, 3), torch.tensor([0, 1])); "
        "assert loss.isfinite(); print(reweigh.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(target)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PROJECT["project"]["version"]


COST = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import reweigh, reweigh.losses, reweigh.weighting
took = time.perf_counter() - start
heavy = {"lightning", "pytorch_lightning", "matplotlib", "sklearn", "scipy", "jsonargparse", "pandas", "transformers"}
print(took, ",".join(sorted({name.partition(".")[0] for name in set(sys.modules) - before} & heavy)))
"""


def test_importing_is_light(tmp_path):
    """No optional dependency is imported, and the library adds less than 150 ms to torch (the best of eight).

    The first time compiles the sources, as it does once after an installation.
    """
    times, env = [], {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(8):
        done = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 0, done.stderr
        took, _, heavy = done.stdout.strip().partition(" ")
        assert heavy == ""
        times.append(float(took))
        if times[-1] < 0.15:
            break
    assert min(times) < 0.15


# layering, by reading the sources


def imports(path):
    """Absolute names of all modules a file imports, at any depth of the code."""
    package = ("reweigh", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    allowed = {f"reweigh.{other}" for other in ROOMS[: ROOMS.index(room) + 1]}
    for path in sources(room):
        for module in imports(path):
            if module == "reweigh" or module.startswith("reweigh."):
                top = ".".join(module.split(".")[:2])
                fine = top in allowed or (module == "reweigh" or top.split(".")[-1] not in ROOMS)
                assert fine, f"{name(path)} imports {module}"


def test_the_import_check_can_fail(tmp_path):
    """It sees relative imports across rooms and imports inside functions."""
    path = ROOT / "weighting" / "base.py"
    assert "reweigh.weighting.dynamics" in set(imports(path))
    assert "reweigh.weighting.algebra" in set(imports(path))


ADAPTERS = {"losses/huggingface.py": {"transformers"}}
"""Files that speak to a library that is imported only when it is used (see test_importing_is_light)."""


@pytest.mark.parametrize("room", ["weighting", "losses"])
def test_the_core_needs_torch_only(room):
    inside = sys.stdlib_module_names | {"torch", "reweigh", "numpy"}
    for path in sources(room):
        allowed = inside | ADAPTERS.get(name(path), set())
        for module in imports(path):
            assert module.partition(".")[0] in allowed, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", ADAPTERS)
def test_adapters_import_their_library_inside_functions(path):
    tree = ast.parse((ROOT / path).read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {n.partition(".")[0] for node in top for n in [getattr(node, "module", None) or ""]} & ADAPTERS[path]


@pytest.mark.parametrize("path", sources(*ROOMS), ids=name)
def test_no_assert_in_library_code(path):
    found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not found


def test_relative_imports_stay_in_their_room():
    for path in sources(*ROOMS):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{name(path)}:{node.lineno}"


# names


def modules(*roots):
    for root in roots:
        yield root.__name__
        for info in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
            yield info.name


MODULES = sorted(modules(weighting, losses))


@pytest.mark.parametrize("module", ["reweigh", *MODULES])
def test_public_names_exist(module):
    module = importlib.import_module(module)
    public = getattr(module, "__all__", [])
    assert len(public) == len(set(public))
    for attribute in public:
        assert hasattr(module, attribute), attribute


def test_the_root_has_everything():
    assert set(reweigh.__all__) >= set(losses.__all__) | set(weighting.__all__)
    assert not set(losses.__all__) & set(weighting.__all__)
    for attribute in {*losses.__all__, *weighting.__all__}:
        value = getattr(reweigh, attribute)
        assert value.__doc__ is None or isinstance(value.__doc__, str)
        if isinstance(value, type):
            assert value.__doc__, f"{attribute} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    """Every example in a docstring runs as printed."""
    module = importlib.import_module(module)
    failures = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, globs=dict(vars(module))):
        runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_there_are_doctests():
    finder = doctest.DocTestFinder()
    classes = {registry.get(key) for registry in (losses.registry, weighting.registry) for key in registry.available()}
    for cls in classes:
        if cls.__module__.startswith("reweigh."):
            assert any(test.examples for test in finder.find(cls, globs={})), f"{cls.__name__} has no example"


def test_no_machine_in_any_file():
    """No absolute path of somebody's computer."""
    local = re.compile(r"(?<![\w.~/:-])/(?:home|Users|root|work|mnt|opt|tmp)/\w")
    kinds = {".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".json", ".txt", ".cfg"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = parts[0].startswith(".") and parts[0] not in (".ci", ".pre-commit-config.yaml")
        if hidden or ".egg-info" in parts[0] or parts[0] in ("build", "dist", "site", "runs") or not path.is_file():
            continue
        if path.suffix in kinds or path.name in ("Makefile", "run"):
            found = local.search(path.read_text(errors="replace"))
            assert found is None, f"{name(path)}: {found.group()}"
