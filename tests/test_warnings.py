"""What the library says unasked: a weight that cancels, an alpha that only rescales."""

import warnings

import pytest
import torch

from reweigh import ClassWeight, CrossEntropy, FocalLoss, InverseClassLoss, InverseFrequency, Objective, Piecewise
from reweigh.losses.objective import _PATIENCE

LOGITS, SAME, MIXED = torch.zeros(3, 2), torch.tensor([1, 1, -100]), torch.tensor([1, 0, 1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: FocalLoss(1.0, weight=[1.0, 5.0]),
        lambda: Objective(CrossEntropy(weight=[1.0, 5.0])),
        lambda: Objective(CrossEntropy(), ClassWeight([1.0, 5.0]), "weighted_mean"),
    ],
)
def test_a_batch_of_one_class_divided_by_its_weights_warns_once(make):
    loss = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(LOGITS, MIXED)
        loss(LOGITS, SAME, num_items=10.0)
        loss.eval()(LOGITS, SAME)
        loss.train()
    with pytest.warns(UserWarning, match="its weight cancels.*pass num_items="):
        loss(LOGITS, SAME)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(LOGITS, SAME)


def test_weights_that_do_not_cancel_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(CrossEntropy(), ClassWeight([1.0, 5.0]))(LOGITS, SAME)
        FocalLoss(1.0, alpha=[1.0, 5.0])(LOGITS, SAME)


def test_a_single_alpha_says_that_it_only_rescales():
    with pytest.warns(UserWarning, match="alpha=0.25 only rescales"):
        half = FocalLoss(alpha=0.25)
    torch.testing.assert_close(half(LOGITS, MIXED), 0.25 * FocalLoss()(LOGITS, MIXED))


MOVING = [
    lambda: Objective(CrossEntropy(), InverseFrequency([3, 1], power=Piecewise([0.0, 1.0], [2]))),
    lambda: Objective(CrossEntropy(), InverseClassLoss(2)),
    lambda: FocalLoss(Piecewise([0.0, 2.0], [2])),
]


def calls(loss, number):
    for _ in range(number):
        loss(LOGITS, MIXED)


@pytest.mark.parametrize("make", MOVING)
def test_weights_that_move_and_hear_of_no_event_say_so_once(make):
    loss = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(loss, _PATIENCE - 1)
        loss.eval()
        calls(loss, 10)
        loss.train()
    with pytest.warns(UserWarning, match="would move in training, but no event has come.*update\\('step'\\)") as found:
        calls(loss, 1)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(loss, _PATIENCE + 1)


@pytest.mark.parametrize("make", [*MOVING, lambda: FocalLoss(2.0)])
@pytest.mark.parametrize("event", ["step", "epoch"])
def test_one_event_or_a_checkpoint_of_one_is_enough(make, event):
    loss, again = make(), make()
    loss.update(event, index=0)
    again.load_state_dict(loss.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(loss, _PATIENCE + 1)
        calls(again, _PATIENCE + 1)
