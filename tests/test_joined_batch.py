"""Two gloo processes are one process on the joined batch, for every registered method whose samples can be split."""

import gc

import joined_batch as worker
import pytest
import torch
from ranks import run_ranks

from reweigh import weighting
from reweigh.losses.conformance import example_meta
from reweigh.weighting import dynamics
from reweigh.weighting.conformance import TERMS

DONE = {}
IDS = ["-".join(map(str, case)) for case in worker.CASES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(worker.__file__, 2, tmp_path_factory.mktemp("joined"), timeout=300)


def whole(case):
    """One process on the joined batch, in one piece; asked for by several tests."""
    key = repr(case)
    if key not in DONE:
        DONE[key] = worker.run(case, None, 1)
    return DONE[key]


def close(found, wanted, key):
    tolerance = 1e-6 if wanted.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{key}: {text}")


@pytest.mark.parametrize("shards", worker.SHARDS)
@pytest.mark.parametrize("case", worker.CASES, ids=IDS)
def test_two_ranks_are_one_process(ranks, case, shards):
    alone = whole(case)
    both = [rank[f"{case} {shards}"] for rank in ranks]
    sizes = worker.SHARDS[shards]
    width = alone["slope"].shape[1]
    slopes = [part["slope"].reshape(worker.STEPS, size, width) for part, size in zip(both, sizes, strict=True)]
    close(torch.cat(slopes, 1).flatten(0, 1), alone["slope"], "slope")
    for key, wanted in alone.items():
        if key == "slope":
            continue
        assert torch.equal(both[0][key], both[1][key]), f"ranks differ in {key}"
        close(both[0][key], wanted, key)


@pytest.mark.parametrize("case", worker.CASES, ids=IDS)
def test_micro_batches_teach_what_the_batch_does(ranks, case):
    """On one rank and on two; where weights look at their own term only, losses and gradients are the same, too."""
    alone, split = whole(case), worker.run(case, None, 2)
    factor = worker.made(case).weighting
    local = factor is None or factor.scope == "local"
    if any(part.update_on == "forward" for part in dynamics(worker.made(case))):
        return  # a forward is a step there
    for rank in (split, *(rank[f"{case} micro"] for rank in ranks)):
        for key, wanted in alone.items():
            if key == "slope" or (key == "loss" and not local):
                continue
            close(rank[key], wanted, key)


def test_ranks_that_give_different_things_are_told(ranks):
    """On both ranks, so that none waits for the other."""
    for number, rank in enumerate(ranks):
        assert "Gathered: all ranks must give the same kinds of inputs" in rank["refusal"]
        assert f"rank {number} gives" in rank["refusal"]


def test_evaluation_sends_no_message(ranks):
    assert ranks[0]["alone"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_gradient_cannot_be_gathered():
    with pytest.raises(TypeError, match=r"Gathered: base must be detached.*Focal"):
        weighting.Focal().gathered()


def test_gathered_is_its_base_in_one_process():
    terms = TERMS["binary"](0)
    base = weighting.HardNegatives(1.0)
    assert torch.equal(base.gathered().weigh(terms), base.weigh(terms))
    assert repr(base.gathered()) == "Gathered(HardNegatives(1.0))"


def test_most_methods_take_part():
    """What is left out: tasks, pairs and sets of pixels, whose samples are related."""
    names = {name for kind, name, _ in worker.CASES if kind == "weighting"}
    left = set(weighting.available()) - names
    related = {name for name in left if weighting.registry.record(name).acts_on in ("task", "pair", "region")}
    assert left == related, sorted(left - related)
    assert sum(worker.stateful(case) for case in worker.CASES) > 15


def alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case[2] else [])
        for case in worker.CASES
        if worker.stateful(case)
    ],
)
def test_two_hundred_steps_leave_nothing_behind(case):
    """State never holds a graph: as many tensors are alive after 200 steps as after 20."""
    objective = worker.made(case).train()
    inputs = objective.example_inputs(worker.BATCH)
    meta = example_meta(objective, worker.BATCH)
    net = torch.nn.Linear(1, 1, dtype=torch.float64)
    before = 0
    for step in range(200):
        if step == 20:
            before = alive()
        first = inputs[0] * net.weight.squeeze()  # a new graph at every step
        objective(first, *inputs[1:], **meta).sum().backward()
        objective.update("step", index=step)
    assert alive() <= before
    for part in dynamics(objective):
        assert all(value.grad_fn is None and not value.requires_grad for value in part.state_dict().values())
