"""Group weights: identities, closed forms, absent and soft groups, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reweigh.losses import CrossEntropy, FromLoss, GroupDROLoss, Objective
from reweigh.losses.functional import group_dro_loss
from reweigh.weighting import (
    Focal,
    GroupCVaR,
    GroupDRO,
    GroupFrequency,
    LossTerms,
    group_index,
    group_sampling_weights,
)

F64 = torch.float64
losses_of_groups = st.lists(
    st.lists(st.floats(0.0, 10.0), min_size=3, max_size=3), min_size=1, max_size=6
)  # steps x group means


def terms(loss, group=None, **extras):
    return LossTerms(
        torch.as_tensor(loss, dtype=F64), group=None if group is None else torch.as_tensor(group), extras=extras or None
    )


def teach(weighting, loss, group=None, **extras):
    weighting.observe(terms(loss, group, **extras))
    weighting.update("step")


@given(losses_of_groups, st.floats(0.01, 3.0))
def test_q_is_the_softmax_of_summed_losses(steps, eta):
    """Exponentiated gradient in closed form."""
    weighting = GroupDRO(3, step_size=eta)
    for means in steps:
        teach(weighting, means, [0, 1, 2])
    wanted = (eta * torch.tensor(steps, dtype=F64).sum(0)).softmax(0)
    torch.testing.assert_close(weighting.shares(), wanted, rtol=1e-10, atol=1e-13)


@given(losses_of_groups, st.floats(-50.0, 1e4))
def test_a_constant_on_all_losses_changes_nothing(steps, constant):
    one, other = GroupDRO(3, step_size=0.5), GroupDRO(3, step_size=0.5)
    for means in steps:
        teach(one, means, [0, 1, 2])
        teach(other, [value + constant for value in means], [0, 1, 2])
    torch.testing.assert_close(one.shares(), other.shares(), rtol=1e-7, atol=1e-10)


@given(losses_of_groups)
def test_the_weighted_mean_is_the_sum_over_groups(steps):
    """reduction='mean' of weights times losses is sum_g q_g L_g, between the least and the largest group mean."""
    generator = torch.Generator().manual_seed(len(steps))
    group = torch.randint(3, (20,), generator=generator)
    group[:3] = torch.arange(3)
    loss = torch.rand(20, generator=generator, dtype=F64)
    weighting = GroupDRO(3, step_size=1.0)
    for means in steps:
        teach(weighting, means, [0, 1, 2])
    weights = weighting.weigh(terms(loss, group))
    means = torch.stack([loss[group == g].mean() for g in range(3)])
    value = (weights * loss).mean()
    torch.testing.assert_close(value, (weighting.shares() * means).sum())
    torch.testing.assert_close(weights.mean(), torch.ones((), dtype=F64))
    assert means.min() - 1e-12 <= value <= means.max() + 1e-12


def test_one_group_is_plain_training():
    weighting = GroupDRO(1, step_size=3.0)
    for _ in range(3):
        teach(weighting, [5.0, 1.0], [0, 0])
    torch.testing.assert_close(weighting.weigh(terms([1.0, 2.0, 3.0], [0, 0, 0])), torch.ones(3, dtype=F64))


def test_step_size_zero_keeps_q():
    weighting = GroupDRO(3, step_size=0.0)
    teach(weighting, [9.0, 1.0, 0.0], [0, 1, 2])
    torch.testing.assert_close(weighting.shares(), torch.full((3,), 1 / 3, dtype=F64))


def test_losses_of_ten_thousand_with_step_size_one_are_finite():
    weighting = GroupDRO(3, step_size=1.0)
    for _ in range(5):
        teach(weighting, [1e4, 0.0, 9.9e3], [0, 1, 2])
    assert weighting.shares().isfinite().all()
    assert weighting.get_buffer("log_q").isfinite().all()
    assert weighting.shares()[0] == pytest.approx(1.0)
    teach(weighting, [0.0, 1e5, 0.0], [0, 1, 2])  # and it can come back
    assert weighting.shares()[1] == pytest.approx(1.0)


def test_absent_groups_keep_their_mass_or_decay():
    keep, decay = GroupDRO(3, step_size=1.0), GroupDRO(3, step_size=1.0, absent="decay")
    for weighting in (keep, decay):
        teach(weighting, [1.0, 2.0], [0, 2])
    assert keep.shares()[1].item() == pytest.approx(1 / 3, rel=1e-12)
    pair = torch.tensor([1.0, 2.0], dtype=F64).softmax(0) * 2 / 3
    torch.testing.assert_close(keep.shares()[[0, 2]], pair)
    torch.testing.assert_close(decay.shares(), torch.tensor([1.0, 0.0, 2.0], dtype=F64).softmax(0))
    before = keep.shares().clone()
    keep.observe(terms([], torch.zeros(0, dtype=torch.long)))
    keep.update("step")
    torch.testing.assert_close(keep.shares(), before, rtol=0, atol=0)


def test_each_adjustment_counts_by_itself():
    """A non-positive one does not switch the others off."""
    counts = [100, 25, 4]
    weighting = GroupDRO(3, step_size=1.0, adjustment=[2.0, 0.0, -1.0], group_counts=counts)
    teach(weighting, [1.0, 1.0, 1.0], [0, 1, 2])
    wanted = torch.tensor([2.0 / 10, 0.0, -1.0 / 2], dtype=F64).softmax(0)
    torch.testing.assert_close(weighting.shares(), wanted)
    value = (weighting.weigh(terms([1.0, 1.0, 1.0], [0, 1, 2]))).mean()
    assert value.item() == pytest.approx(1.0)  # the value never contains it


def test_normalised_losses_that_are_all_zero_leave_q():
    weighting = GroupDRO(3, step_size=1.0, normalize_losses=True)
    teach(weighting, [3.0, 1.0, 0.0], [0, 1, 2])
    before = weighting.shares().clone()
    torch.testing.assert_close(before, torch.tensor([0.75, 0.25, 0.0], dtype=F64).softmax(0))
    teach(weighting, [0.0, 0.0, 0.0], [0, 1, 2])
    torch.testing.assert_close(weighting.shares(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_not_learned(bad):
    weighting = GroupDRO(2, step_size=1.0)
    teach(weighting, [1.0, 2.0], [0, 1])
    before = weighting.shares().clone()
    teach(weighting, [bad, bad], [0, 1])
    assert torch.equal(weighting.shares(), before)
    teach(weighting, [bad, 3.0], [0, 1])  # group 1 alone moves, and has nobody to share with
    torch.testing.assert_close(weighting.shares(), before)
    assert weighting.get_buffer("group_loss").isfinite().all()


def test_a_group_whose_loss_is_not_finite_is_not_absent():
    """It must not decay as if its loss had been 0."""
    weighting = GroupDRO(3, step_size=1.0, absent="decay")
    teach(weighting, [math.nan, 2.0], [0, 1])
    assert weighting.shares()[0].item() == pytest.approx(1 / 3, rel=1e-12)
    pair = torch.tensor([2.0, 0.0], dtype=F64).softmax(0) * 2 / 3
    torch.testing.assert_close(weighting.shares()[1:], pair)


def test_q_stays_a_distribution_over_many_steps():
    """Groups come and go; nothing drifts."""
    weighting, generator = GroupDRO(4, step_size=0.05), torch.Generator().manual_seed(0)
    for _ in range(3000):
        here = torch.rand(4, generator=generator) < 0.5
        weighting.commit(
            {"loss_sum": here * torch.rand(4, generator=generator, dtype=F64), "loss_count": here.double()}
        )
    assert weighting.shares().sum().item() == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GroupDRO(3, step_size=0.3, adjustment=1.0, group_counts=[9, 3, 1]),
        lambda: GroupCVaR(3, alpha=0.3, group_counts=[9, 3, 1]),
    ],
)
def test_a_run_that_was_interrupted_goes_on_alike(make):
    generator = torch.Generator().manual_seed(3)
    steps = [
        (3.0 * torch.rand(8, generator=generator, dtype=F64), torch.randint(3, (8,), generator=generator))
        for _ in range(6)
    ]
    through, first = make(), make()
    for loss, group in steps:
        teach(through, loss, group)
    for loss, group in steps[:3]:
        teach(first, loss, group)
    first.observe(terms([100.0], [0]))  # half a step, which is lost with the run
    second = make()
    second.load_state_dict(first.state_dict())
    for loss, group in steps[3:]:
        teach(second, loss, group)
    for name, value in through.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    loss, group = steps[0]
    assert torch.equal(second.weigh(terms(loss, group)), through.weigh(terms(loss, group)))


def test_the_authors_order_weighs_with_what_it_has_just_seen():
    losses, group = torch.tensor([1.0, 3.0], dtype=F64, requires_grad=True), torch.tensor([0, 1])
    objective = Objective(FromLoss(lambda loss, zero: loss + zero), GroupDRO(2, step_size=1.0, cadence="forward"))
    value = objective(losses, torch.zeros(2, dtype=F64), group=group)
    q = torch.tensor([1.0, 3.0], dtype=F64).softmax(0)
    torch.testing.assert_close(value, (q * losses).sum())
    later = Objective(FromLoss(lambda loss, zero: loss + zero), GroupDRO(2, step_size=1.0))
    assert later(losses, torch.zeros(2, dtype=F64), group=group).item() == pytest.approx(2.0)


def test_one_hot_memberships_are_groups():
    generator = torch.Generator().manual_seed(0)
    group, loss = torch.randint(3, (12,), generator=generator), torch.rand(12, generator=generator, dtype=F64)
    hard, soft = GroupDRO(3, step_size=0.7), GroupDRO(3, step_size=0.7, by="membership")
    member = torch.nn.functional.one_hot(group, 3).double()
    teach(hard, loss, group)
    teach(soft, loss, membership=member)
    torch.testing.assert_close(soft.shares(), hard.shares(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        soft.weigh(terms(loss, membership=member)), hard.weigh(terms(loss, group)), rtol=1e-12, atol=0
    )


def test_memberships_arrive_through_the_objective():
    objective = Objective(CrossEntropy(), GroupDRO(2, by="membership"))
    logits, target = torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, -100])
    member = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8], [math.nan, math.nan]])
    assert objective(logits, target, membership=member).item() == pytest.approx(math.log(3))
    with pytest.raises(ValueError, match=r"membership must be a tensor of \(4,\) rows, one per sample, got \(3, 2\)"):
        objective(logits, target, membership=member[:3])
    with pytest.raises(ValueError, match=r"GroupDRO: membership must be \(samples, 2\), got \(4, 3\)"):
        objective(logits, target, membership=torch.ones(4, 3) / 3)
    with pytest.raises(ValueError, match="'membership' is missing; pass membership="):
        objective(logits, target)


def test_memberships_have_rows_that_add_up():
    weighting = GroupDRO(2, by="membership")
    weighting.weigh(terms([1.0, 1.0], membership=torch.tensor([[0.3, 0.7], [0.0, 0.0]])))  # the second has no group
    half = torch.tensor([[0.301, 0.699], [0.55, 0.45]], dtype=torch.bfloat16)
    weighting.weigh(terms([1.0, 1.0], membership=half))
    for wrong in ([[0.5, 0.5], [1.0, 1.0]], [[1.5, -0.5], [1.0, 0.0]], [[math.nan, 1.0], [1.0, 0.0]]):
        with pytest.raises(ValueError, match="membership must have rows of numbers >= 0 that add up to 1"):
            weighting.weigh(terms([1.0, 1.0], membership=torch.tensor(wrong)))


def test_memberships_of_masked_samples_do_not_matter():
    weighting = GroupDRO(2, by="membership", step_size=1.0)
    batch = terms([1.0, 3.0, 0.0], membership=torch.tensor([[1.0, 0.0], [0.2, 0.8], [math.nan, math.inf]]))
    batch = batch._replace(mask=torch.tensor([True, True, False]))
    left = terms([1.0, 3.0], membership=torch.tensor([[1.0, 0.0], [0.2, 0.8]]))
    torch.testing.assert_close(weighting.weigh(batch)[:2], weighting.weigh(left))
    other = GroupDRO(2, by="membership", step_size=1.0)
    for made, seen in ((weighting, batch), (other, left)):
        made.observe(seen)
        made.update("step")
    assert torch.equal(weighting.shares(), other.shares())


def test_pixels_of_a_sample_share_its_group():
    """Terms of (N, H, W) with one group, or one row of memberships, per sample."""
    logits = torch.randn(4, 3, 2, 2, dtype=F64, requires_grad=True)
    target, group = torch.randint(3, (4, 2, 2)), torch.tensor([0, 1, 1, 0])
    member = torch.nn.functional.one_hot(group, 2).double()
    hard = Objective(CrossEntropy(), GroupDRO(2, step_size=1.0))
    soft = Objective(CrossEntropy(), GroupDRO(2, step_size=1.0, by="membership"))
    for _ in range(2):
        one, other = hard(logits, target, group=group), soft(logits, target, membership=member)
        torch.testing.assert_close(one, other)
        hard.update("step")
        soft.update("step")


def test_classes_can_be_the_groups():
    objective = Objective(CrossEntropy(), GroupDRO(3, step_size=1.0, by="category"))
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [3.0, 0.0, 0.0]], requires_grad=True)
    objective(logits, torch.tensor([0, 1, 2]))
    objective.update("step")
    shares = objective.weighting.shares()
    assert shares.argmax() == 2
    assert shares[0] == shares[1]


def test_counts_balance_is_exact_over_micro_batches_and_unbiased():
    counts = [80, 15, 5]
    weighting = GroupDRO(3, step_size=1.0, group_counts=counts, balance="counts")
    assert weighting.scope == "local"
    teach(weighting, [1.0, 2.0, 0.5], [0, 1, 2])
    group = torch.cat([torch.full((n,), g) for g, n in enumerate(counts)])
    loss = torch.rand(100, dtype=F64, generator=torch.Generator().manual_seed(1))
    whole = (weighting.weigh(terms(loss, group)) * loss).mean()  # the training data itself
    wanted = sum(weighting.shares()[g] * loss[group == g].mean() for g in range(3))
    torch.testing.assert_close(whole, wanted)


def test_greedy_filling():
    weighting = GroupCVaR(3, alpha=0.2, group_counts=[900, 90, 10], smoothing=1.0)
    torch.testing.assert_close(weighting.shares(), torch.tensor([0.9, 0.09, 0.01], dtype=F64))  # nothing seen: ERM
    teach(weighting, [0.1, 2.0, 1.0], [0, 1, 2])
    torch.testing.assert_close(weighting.shares(), torch.tensor([0.5, 0.45, 0.05], dtype=F64))
    assert weighting.shares().sum().item() == pytest.approx(1.0)


def test_greedy_filling_mixes_in_plain_training():
    plain, mixed = (GroupCVaR(3, group_counts=[5, 3, 2], smoothing=1.0, minimum=m) for m in (0.0, 0.25))
    for weighting in (plain, mixed):
        teach(weighting, [0.1, 2.0, 1.0], [0, 1, 2])
    torch.testing.assert_close(mixed.shares(), 0.75 * plain.shares() + 0.25 * torch.tensor([0.5, 0.3, 0.2], dtype=F64))


def test_an_adjustment_moves_a_group_up():
    weighting = GroupCVaR(2, alpha=0.3, group_counts=[99, 1], smoothing=1.0, adjustment=2.0)
    teach(weighting, [1.0, 0.5], [0, 1])
    assert weighting.shares()[1].item() == pytest.approx(0.01 / 0.3)


def test_group_frequency_equals_resampling_in_expectation():
    group = torch.tensor([0] * 12 + [1] * 3 + [2])
    loss = torch.rand(16, dtype=F64, generator=torch.Generator().manual_seed(2))
    weighted = (GroupFrequency([12, 3, 1]).weigh(terms(loss, group)) * loss).mean()
    resampled = (group_sampling_weights(group) * loss).sum()
    torch.testing.assert_close(weighted, resampled)
    torch.testing.assert_close(resampled, torch.stack([loss[group == g].mean() for g in range(3)]).mean())
    torch.testing.assert_close(group_sampling_weights(group, power=0.0), torch.full((16,), 1 / 16, dtype=F64))


def test_sampling_weights_serve_torchs_sampler():
    group = torch.tensor([0] * 90 + [1] * 10)
    sampler = torch.utils.data.WeightedRandomSampler(
        group_sampling_weights(group), 4000, generator=torch.Generator().manual_seed(0)
    )
    drawn = group[torch.tensor(list(sampler))]
    assert drawn.double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_group_index_numbers_class_and_attribute():
    label, attribute = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 1, 0])
    found = group_index(label, attribute, 2)
    assert found.tolist() == [1, 2, 5, 4]
    assert torch.equal(found // 2, label)
    assert torch.equal(found % 2, attribute)


def test_the_twin_takes_q_as_it_is():
    logits, target, group = (
        torch.randn(6, 3, dtype=F64),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.tensor([0, 0, 0, 1, 1, 0]),
    )
    shares = torch.tensor([0.3, 0.7], dtype=F64)
    ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    wanted = 0.3 * ce[group == 0].mean() + 0.7 * ce[group == 1].mean()
    torch.testing.assert_close(group_dro_loss(logits, target, shares, group=group), wanted)


def test_it_composes():
    objective = Objective(CrossEntropy(), (GroupDRO(2) * Focal(1.0)).clip(max=3.0))
    logits = torch.randn(4, 3, requires_grad=True)
    objective(logits, torch.tensor([0, 1, 2, 0]), group=torch.tensor([0, 1, 1, 0])).backward()
    assert logits.grad.isfinite().all()


def test_micro_batches_of_a_step_are_one_batch():
    one, other = GroupDRO(2, step_size=1.0), GroupDRO(2, step_size=1.0)
    teach(one, [1.0, 2.0, 4.0], [0, 1, 1])
    other.observe(terms([1.0, 2.0], [0, 1]))
    other.observe(terms([4.0], [1]))
    other.update("step")
    torch.testing.assert_close(one.shares(), other.shares(), rtol=1e-14, atol=0)


def test_evaluation_moves_nothing():
    objective = Objective(FromLoss(torch.nn.MSELoss(reduction="none")), GroupDRO(2, step_size=1.0))
    objective.eval()
    objective(torch.ones(2, requires_grad=True), torch.zeros(2), group=torch.tensor([0, 1]))
    objective.update("step")
    torch.testing.assert_close(objective.weighting.shares(), torch.full((2,), 0.5, dtype=F64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupDRO(0), "num_groups must be >= 1, got 0"),
        (lambda: GroupDRO(2, step_size=-1.0), "step_size must be finite and >= 0, got -1.0"),
        (lambda: GroupDRO(2, adjustment=1.0), "so it needs group_counts, got None"),
        (lambda: GroupDRO(2, adjustment=[1.0], group_counts=[1, 2]), "adjustment must be one number or 2, got 1"),
        (lambda: GroupDRO(2, group_counts=[3, 0]), "group_counts must be 2 numbers > 0, got [3.0, 0.0]"),
        (lambda: GroupDRO(2, balance="counts"), "balance='counts' needs group_counts, got None"),
        (lambda: GroupDRO(2, absent="drop"), "absent must be one of 'keep', 'decay', got 'drop'"),
        (lambda: GroupDRO(2, by="domain"), "by must be one of 'group', 'category', 'membership', got 'domain'"),
        (lambda: GroupCVaR(2, alpha=0.0, group_counts=[1, 1]), "alpha must be finite and > 0 and <= 1, got 0.0"),
        (lambda: group_index(torch.tensor([0]), torch.tensor([2]), 2), "attribute must be in [0, 2), got 2..2"),
        (lambda: group_index(torch.tensor([-1]), torch.tensor([1]), 2), "label must be >= 0, got -1"),
        (lambda: group_sampling_weights(torch.zeros(0, dtype=torch.long)), "non-empty vector of integers >= 0"),
        (lambda: group_sampling_weights([0, 2], num_groups=2), "group must be in [0, 2), got 2"),
        (lambda: GroupCVaR(2, group_counts=None), "GroupCVaR: group_counts must be given, got None"),
        (lambda: GroupFrequency([0, 0]), "must hold at least one positive number"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError) as found:
        make()
    assert message in str(found.value)


def test_a_group_out_of_range_is_named():
    loss = GroupDROLoss(2)
    with pytest.raises(ValueError, match=r"GroupDRO: 'group' must be in \[0, 2\), got 0..2"):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]), group=torch.tensor([0, 2]))
