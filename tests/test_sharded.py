"""Classes spread over ranks (tensor parallelism): what one process says of the whole logits."""

from pathlib import Path

import pytest
import sharded_worker as worker
import torch
from ranks import run_ranks

pytest.importorskip("torch.distributed.tensor")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Three ranks with 4, 4 and 3 classes."""
    return run_ranks(Path(worker.__file__), 3, tmp_path_factory.mktemp("sharded"), strict=())


@pytest.mark.parametrize("how", ["sharded", "copies", "loss_parallel"])
def test_values_and_gradients(ranks, how):
    whole = worker.run()
    for found in ranks:
        for name, (value, grad) in found[how].items():
            torch.testing.assert_close(value, whole[name][0], rtol=1e-12, atol=0, msg=name)
            torch.testing.assert_close(grad, whole[name][1], rtol=1e-11, atol=1e-15, msg=name)


def test_refusals(ranks):
    for found in ranks:
        placed, twice = found["refusals"]
        assert "sharded along their classes (dimension 1) alone" in placed
        assert "cannot be differentiated again" in twice
