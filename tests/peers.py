"""Other libraries, for tests side by side: skipped where they are not installed."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import pytest


def peer(package, module):
    """``package.module`` without running any ``__init__`` on the way, which may import what is not installed.

    Packages on the path become empty stand-ins that know their folder, so that relative imports inside them work.
    """
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    name, folders = package, list(spec.submodule_search_locations)
    for part in ["", *module.split(".")[:-1]]:
        if part:
            name, folders = f"{name}.{part}", [f"{folder}/{part}" for folder in folders]
        if name not in sys.modules:
            stand_in = types.ModuleType(name)
            stand_in.__path__, stand_in.stands_in = folders, True
            sys.modules[name] = stand_in
    return importlib.import_module(f"{package}.{module}")


def importable(module, monkeypatch):
    """See that ``import module`` works in a test: as it is, or with stand-ins for the packages above it.

    A page shows the import that its reader has, and some packages import torchvision or more on the way to losses. A
    package that would disturb others has a folder ``<package>-alone`` on the path, which is looked into for it only.
    What had to be stood in for is forgotten after the test.
    """
    top, _, rest = module.partition(".")
    for folder in [Path(entry, f"{top}-alone") for entry in sys.path]:
        if folder.is_dir():
            monkeypatch.syspath_prepend(str(folder))
    if importlib.machinery.PathFinder.find_spec(top) is None:
        pytest.skip(f"{top} is not installed")

    def loaded():
        return [name for name in sys.modules if name == top or name.startswith(f"{top}.")]

    try:
        if any("stands_in" in vars(sys.modules[name]) for name in loaded()):
            raise ImportError(f"{top} has stand-ins of another test")
        return importlib.import_module(module)
    except Exception:
        if not rest:
            raise
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    found = peer(top, rest)
    for name in loaded():
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    return found
