"""What the library says unasked: a weight that cancels, an alpha that only rescales."""

import warnings

import pytest
import torch

from reweigh import ClassWeight, CrossEntropy, FocalLoss, Objective

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
