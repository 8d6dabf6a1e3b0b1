"""Other libraries, for tests side by side: skipped where they are not installed."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types

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
            stand_in.__path__ = folders
            sys.modules[name] = stand_in
    return importlib.import_module(f"{package}.{module}")
