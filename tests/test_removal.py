"""A sample weight of 0 removes a sample, whatever it holds, and what is not finite is never learned for good."""

import pytest
import torch

from reweigh import BinaryCrossEntropy, CrossEntropy, Focal, InverseClassLoss, Objective

F64 = torch.float64


@pytest.mark.parametrize("criterion", [CrossEntropy(), BinaryCrossEntropy()], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "sequence_mean"])
def test_weight_zero_removes_even_what_is_not_a_number(criterion, reduction):
    objective = Objective(criterion, Focal(1.0) * InverseClassLoss(4), reduction)
    logits, target = criterion.example_inputs(6)
    dirty = logits.clone()
    dirty[2] = torch.nan
    dirty.requires_grad_()
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 0.5], dtype=F64)
    loss = objective(dirty, target, sample_weight=weight)
    loss.backward()
    keep = weight > 0
    alone = Objective(criterion, Focal(1.0) * InverseClassLoss(4), reduction)
    wanted = alone(logits[keep], target[keep], sample_weight=weight[keep])
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert (dirty.grad[2] == 0).all()
    for part in (objective, alone):
        part.update("step")
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-12, atol=0)


def test_weight_zero_joins_the_mask():
    logits, target = CrossEntropy().example_inputs(4)
    mask = torch.tensor([True, True, False, True])
    terms = CrossEntropy().terms(logits, target, mask=mask, sample_weight=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert terms.mask.tolist() == [True, False, False, True]


def test_a_sample_weight_of_the_wrong_shape_is_named_as_such():
    logits, target = CrossEntropy().example_inputs(4)
    for weight in (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])):
        with pytest.raises(ValueError, match=r"sample_weight must have the terms' shape .*, got \(3,\)"):
            CrossEntropy().terms(logits, target, sample_weight=weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("make", [lambda: InverseClassLoss(4), lambda: Focal(1.0).ema(0.5, 4)])
def test_a_step_that_is_not_finite_is_not_learned(make, bad):
    """As when a gradient scaler skips an overflowing step: the loss says so, the state goes on."""
    objective = Objective(CrossEntropy(), make())
    logits, target = CrossEntropy().example_inputs(6)
    broken = logits.clone()
    broken[0] = torch.nan
    broken[1, target[1]] = -bad if bad == torch.inf else bad
    assert not objective(broken, target).isfinite()
    objective.update("step")
    objective(logits, target)
    objective.update("step")
    assert all(value.isfinite().all() for value in objective.state_dict().values())


def test_a_plugin_that_overrides_observe_is_observed():
    class Listener(Focal.__mro__[1]):
        def __init__(self):
            super().__init__()
            self.heard = 0

        def weigh(self, terms):
            return torch.ones_like(terms.loss)

        def observe(self, terms):
            self.heard += 1

    listener = Listener()
    Objective(CrossEntropy(), listener)(*CrossEntropy().example_inputs(4))
    Objective(CrossEntropy(), 2.0 * listener * listener)(*CrossEntropy().example_inputs(4))
    assert listener.heard == 2
