"""Every registered task weighting in a training: resumed at every step, and spread over ranks. Found by discovery."""

import pytest
import task_training
import torch
from ranks import run_ranks
from task_training import EPOCH, STEPS, methods, train

METHODS = methods()


ONCE = [  # in `make test` the first example of each method, with two micro-batches a step
    pytest.param(
        name,
        example,
        micro,
        id=f"{name}-{example}-{micro}",
        marks=[] if (example, micro) == (0, 2) else [pytest.mark.slow],
    )
    for name, example in METHODS
    for micro in (1, 2)
]


@pytest.mark.parametrize(("name", "example", "micro"), ONCE)
def test_resumed_at_every_step_and_epoch_end_the_bits_are_the_same(name, example, micro):
    snapshots = []
    whole = train(name, example, scenario="rough", micro=micro, snapshots=snapshots)
    assert len(snapshots) == STEPS + STEPS // EPOCH
    for number, snapshot in enumerate(snapshots):
        again = train(name, example, scenario="rough", micro=micro, start=snapshot)
        left = len(again["weights"])
        for key, value in again.items():
            wanted = whole[key][STEPS - left :] if key in ("weights", "totals") else whole[key]
            assert torch.equal(value, wanted), f"{key} after snapshot {number}"


def test_the_training_moves_every_adaptive_method():
    """So that equality above says something: weights change on the way, with some example of each method."""
    moved = {name: False for name, _ in METHODS}
    for name, example in METHODS:
        weights = train(name, example)["weights"]
        moved[name] |= not torch.allclose(weights[0], weights[-1], rtol=1e-3)
    assert sorted(name for name, did in moved.items() if not did) == ["fixed", "temperature_mixing"]


@pytest.mark.parametrize(
    ("world", "runs"),
    [
        (2, "ddp"),
        pytest.param(2, "even,rough", marks=pytest.mark.slow),
        pytest.param(4, "rough", marks=pytest.mark.slow),
    ],
)
def test_ranks_equal_one_process_on_the_joined_batch(world, runs, tmp_path):
    """Uneven batches, ranks without a task, tasks that nobody has; under DDP and with gradients averaged by hand."""
    results, wrong = run_ranks(task_training.__file__, world, tmp_path, runs, timeout=300, strict=()), []
    for key in results[0]:
        name, example, scenario = eval(key)
        alone = train(name, example, scenario="rough" if scenario == "ddp" else scenario, steps=11)
        for part in alone.keys() - {"weights"}:  # a rank's own losses are not the joined ones
            for result in results:
                found = result[key][part]
                if not torch.allclose(found, alone[part], rtol=1e-9, atol=1e-11):
                    wrong.append(f"{key} {part}: off by {(found - alone[part]).abs().max():.1e}")
                if part.startswith("loss.") and not torch.equal(found, results[0][key][part]):
                    wrong.append(f"{key} {part}: ranks differ")
    assert not wrong, "\n".join(wrong)
    assert len(results[0]) == len(METHODS) * len(runs.split(","))
