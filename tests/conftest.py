"""Shared by all tests: one thread per worker, reproducible property tests, and ``tests`` itself on the import path."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
if str(HERE) not in sys.path:  # `references` is imported by name in importlib mode
    sys.path.insert(0, str(HERE))

torch.set_num_threads(1)
common = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
settings.register_profile("quick", max_examples=40, **common)
settings.register_profile("nightly", max_examples=2000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, whatever ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_global_state():
    """No test, and so no call of the library, may leave the grad mode or the default dtype changed."""
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before
