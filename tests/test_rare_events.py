"""Weightings that live on epochs or validations: what they saw is committed then, whoever sends the events."""

import copy

import pytest
import torch

from reweigh import CrossEntropy, Objective
from reweigh.weighting import Weighting

F64 = torch.float64


class Slow(Weighting):
    """Weighs everything by the mean loss between the last two of its events."""

    def __init__(self, event):
        super().__init__()
        self.update_on = event
        self.add_state("total", torch.zeros(2, dtype=F64))
        self.add_state("mean", torch.ones((), dtype=F64))
        self.add_pending("seen", 2)

    def weigh(self, terms):
        return self.mean.to(terms.loss.dtype).expand_as(terms.loss)

    def observe(self, terms):
        counts = terms.counts()
        self.accumulate("seen", torch.stack([(counts * terms.loss).sum(), counts.sum()]))

    def commit(self, sums):
        self.total.add_(sums["seen"])

    def refresh(self, event, **signals):
        if event == self.update_on:
            self.mean.copy_(self.total[0] / self.total[1])
            self.total.zero_()


def batches(count):
    return [CrossEntropy().example_inputs(4, seed=seed) for seed in range(count)]


def mean_loss(some):
    return torch.cat([CrossEntropy().terms(*inputs).loss for inputs in some]).mean()


@pytest.mark.parametrize("event", ["epoch", "validation"])
@pytest.mark.parametrize("steps_too", [False, True])
def test_what_was_seen_since_the_last_event_decides(event, steps_too):
    slow = Slow(event)
    objective = Objective(CrossEntropy(), slow)
    for epoch, part in enumerate((batches(6)[:4], batches(6)[4:])):
        for inputs in part:
            before = slow.mean.clone()
            objective(*inputs)
            if steps_too:
                objective.update("step")
            assert torch.equal(slow.mean, before)  # nothing moves before the event
        objective.update(event, index=epoch)
        torch.testing.assert_close(slow.mean, mean_loss(part), rtol=1e-12, atol=0)
        objective.update(event, index=epoch)  # sent twice, counted once
        torch.testing.assert_close(slow.mean, mean_loss(part), rtol=1e-12, atol=0)


@pytest.mark.parametrize("event", ["epoch", "validation"])
def test_saved_in_mid_epoch_it_goes_on_bit_equal(event):
    whole = Objective(CrossEntropy(), Slow(event))
    for inputs in batches(2):
        whole(*inputs)
        whole.update("step")
    resumed = Objective(CrossEntropy(), Slow(event))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for objective in (whole, resumed):
        objective(*batches(3)[2])
        objective.update("step")
        objective.update(event)
    assert torch.equal(whole.weighting.mean, resumed.weighting.mean)
    torch.testing.assert_close(whole.weighting.mean, mean_loss(batches(3)), rtol=1e-12, atol=0)


class Apart(Weighting):
    """Keeps what it trains on and what it is shown of validations apart."""

    def __init__(self):
        super().__init__()
        self.update_on = "validation"
        self.commits = []
        self.add_pending("trained")
        self.add_pending("validated", on="validation")

    def weigh(self, terms):
        return torch.ones_like(terms.loss)

    def observe(self, terms):
        self.accumulate("trained", terms.counts().sum())

    def observe_validation(self, terms):
        self.accumulate("validated", terms.counts().sum())

    def commit(self, sums):
        self.commits.append({name: value.item() for name, value in sums.items()})


def test_a_sum_with_an_event_of_its_own_is_committed_then_and_only_then():
    apart = Apart()
    objective = Objective(CrossEntropy(), apart)
    inputs = CrossEntropy().example_inputs(4)
    objective(*inputs)
    with objective.observing_validation(), torch.no_grad():
        objective(*inputs)
        objective(*inputs)
    objective.update("step")
    assert apart.commits == [{"trained": 4.0}]
    objective(*inputs)
    objective.update("epoch")
    assert len(apart.commits) == 1
    objective.update("validation")
    assert apart.commits[1:] == [{"trained": 4.0, "validated": 8.0}]
    objective.update("validation")
    assert apart.commits[2:] == [{"trained": 0.0, "validated": 0.0}]
