"""Two gloo processes against one process on the joined batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_distributed_worker import SIZE, objective
from lightning_kit import QUIET, network, samples
from ranks import run_lightning

from reweigh.losses import CrossEntropy, Objective
from reweigh.weighting import InverseClassLoss

pytestmark = QUIET
WORKER = Path(__file__).parent / "lightning_distributed_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has after the same runs."""
    return run_lightning(WORKER, tmp_path_factory.mktemp("ranks"))


def test_ranks_agree_to_the_bit(ranks):
    for run in ("lightning", "plain"):
        first, second = (rank[run]["state"] for rank in ranks)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def single():
    """One process, each batch what both ranks see together, two of them per optimizer step."""
    net, loss = network(), objective()
    loss.update("fit", class_counts=np.bincount(samples(SIZE)[1], minlength=3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = samples(SIZE)
    step, rows = 0, []
    for epoch in range(3):
        for start in range(0, SIZE, 8):
            part = slice(start, start + 8)
            parts = [loss.components(net(x[part]), y[part])]
            (loss(net(x[part]), y[part]) / 2).backward()
            rows += parts
            if start % 16 == 8:
                optimizer.step()
                optimizer.zero_grad()
                loss.update("step", index=step)
                step += 1
        loss.update("epoch", index=epoch)
    state = {
        **{f"net.{k}": v for k, v in net.state_dict().items()},
        **{f"loss.{k}": v for k, v in loss.state_dict().items()},
    }
    return state, rows


@pytest.mark.parametrize("run", ["lightning", "plain"])
def test_two_ranks_equal_one_process_on_the_joined_batches(ranks, single, run):
    state, _ = single
    found = ranks[1][run]["state"]
    assert found.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
    learned = found["loss.weighting.operands.0.operands.1.class_loss"]
    assert not torch.allclose(learned, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0.01)


def test_a_buffer_in_place_of_a_pending_sum_would_be_wrong(ranks):
    """The trap this guards against is there: DDP overwrites the buffers of rank 1 with those of rank 0."""
    (trapped, true), (_, same) = (rank["trap"] for rank in ranks)
    assert true == same
    assert trapped != true


def test_counts_are_those_of_the_whole_data_set(ranks):
    whole = np.bincount(samples(SIZE)[1], minlength=3).tolist()
    for rank in ranks:
        assert rank["counts"].tolist() == whole
        assert rank["sharded"].tolist() == whole  # an IterableDataset that gives each rank its own half
        assert rank["repeated"].tolist() == whole  # one that gives each rank everything
    assert all("sharded=False" in rank["refused"] for rank in ranks)


def test_monitor_adds_up_the_ranks_once_per_row(ranks, single):
    _, parts = single
    assert ranks[0]["rows"] == ranks[1]["rows"]
    assert [row["reweigh/loss/num_terms"] for row in ranks[0]["rows"]] == [16.0] * 9
    raw = [sum(part.raw.item() for part in parts[i : i + 2]) / 2 for i in range(0, len(parts), 2)]
    assert [row["reweigh/loss/raw_loss"] for row in ranks[0]["rows"]] == pytest.approx(raw, rel=1e-12)
    mean = [sum(part.mean_weight.item() for part in parts[i : i + 2]) / 2 for i in range(0, len(parts), 2)]
    assert [row["reweigh/loss/mean_weight"] for row in ranks[0]["rows"]] == pytest.approx(mean, rel=1e-12)
    # the driver's packed sum at every step, none at an epoch's end; the monitor's class numbers and sums at every row
    assert ranks[0]["reductions"] == {"driver": 9, "monitor": 2 * 9}


def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(ranks):
    saved = ranks[0]["lightning"]["state"]
    prefix = "loss.weighting.operands.0.operands.1."
    alone = Objective(CrossEntropy(), InverseClassLoss(3, smoothing=0.3, to="mean"))
    alone.weighting.load_state_dict(
        {name.removeprefix(prefix): v for name, v in saved.items() if name.startswith(prefix)}
    )
    assert alone.weighting.completed("step") == 9
    assert torch.equal(alone.weighting.class_loss, saved[f"{prefix}class_loss"])
