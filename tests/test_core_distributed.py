"""Two gloo processes and one process on the joined batch give the same losses, gradients and weights."""

import pytest
import torch
from ranks import run_ranks
from references import distributed_worker as worker

WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank reports; all runs share one pair of processes, which must end within a minute."""
    return run_ranks(worker.__file__, WORLD, tmp_path_factory.mktemp("ranks"))


def agree(found, expected, tol=1e-12):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tol, atol=tol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("run", worker.RUNS, ids=lambda run: "-".join(map(str, run)))
def test_two_ranks_are_one_process(ranks, run):
    """Loss, gradient, parameters and every state after five steps; empty, ignored and uneven shards included."""
    alone = worker.train(run[0], run[1], micro=1)
    for rank in ranks:
        agree(rank[str(run)], alone)
    for key, value in ranks[0][str(run)].items():  # the ranks agree to the last bit
        if key not in ("grad", "weight", "loss"):
            assert torch.equal(value, ranks[1][str(run)][key]), key


@pytest.mark.parametrize("weighting", ["learned_classes", "everything", "groups"])
@pytest.mark.parametrize("micro", [2, 4, 8])
def test_accumulation_is_one_batch(weighting, micro):
    agree(worker.train("even", weighting, micro=micro), worker.train("even", weighting, micro=1))


def test_the_comparison_can_fail():
    """Other data gives other numbers: the runs do depend on what they are compared by."""
    one, other = worker.train("even", "everything"), worker.train("ignored_rank", "everything")
    assert not torch.allclose(one["loss"], other["loss"])
    assert any(not torch.equal(one[key], other[key]) for key in one if key.endswith("class_loss"))


def test_committing_in_forward_joins_the_ranks(ranks):
    alone = worker.forward_cadence()
    for rank in ranks:
        agree(rank["forward"], alone)


def test_one_all_reduce_per_update(ranks):
    """Three classes: loss sums and counts of one part, weight sums and counts of the other, in one tensor."""
    for rank in ranks:
        assert rank["calls"]["calls"].tolist() == [12]
