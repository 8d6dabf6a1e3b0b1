"""CoBa: the paper's form against the naive reference, its identities, and every defect of the published code."""

import copy
import math

import pytest
import torch
from references import coba as naive

from reweigh import CoBa, MultiTaskLoss

F64 = torch.float64


def losses(num_records, num_tasks, *, seed=0, absent=0.0):
    """Noisy curves that fall at different speeds, some of which turn; nan where a record lacks a task."""
    generator = torch.Generator().manual_seed(seed)
    speed = torch.rand(num_tasks, generator=generator, dtype=F64) * 0.2
    turn = torch.rand(num_tasks, generator=generator, dtype=F64) * 2 * num_records
    t = torch.arange(num_records, dtype=F64).unsqueeze(1)
    curve = torch.exp(-speed * t) + 0.02 * (t - turn).clamp_min(0.0)
    curve = curve * (1 + 0.05 * torch.rand(num_records, num_tasks, generator=generator, dtype=F64))
    curve = curve * torch.logspace(-2, 3, num_tasks, dtype=F64)
    gone = torch.rand(num_records, num_tasks, generator=generator, dtype=F64) < absent
    return torch.where(gone, math.nan, curve)


def shares(weighting):
    """Weights with every task present."""
    from reweigh.weighting.conformance import task_terms

    return weighting.weigh(task_terms(0, weighting.num_tasks))


def run(records, weighting=None, **options):
    """Weights after each record; nan is absent."""
    weighting = weighting or CoBa(num_tasks=records.shape[1], **options)
    loss = MultiTaskLoss([str(k) for k in range(records.shape[1])], weighting)
    out = []
    for record in records:
        loss.observe_validation(torch.where(record.isnan(), 7.0, record), mask=~record.isnan())
        loss.update("validation")
        out.append(shares(weighting))
    return torch.stack(out)


def rows(records):
    return [[None if math.isnan(x) else x for x in record] for record in records.tolist()]


@pytest.mark.parametrize("absent", [0.0, 0.3, 0.8])
@pytest.mark.parametrize(
    "options",
    [
        {"warmup": 4, "history": 20},
        {"warmup": 4, "history": 100, "tau": 1.0},
        {"warmup": 10, "history": 5, "tau": 3.0},
        {"warmup": 1, "history": 2},
        {"warmup": 30, "history": 7},
    ],
    ids=str,
)
def test_equals_the_naive_reference(options, absent):
    for seed, num_tasks in enumerate((1, 2, 3, 8)):
        records = losses(60, num_tasks, seed=seed, absent=absent)
        found = run(records, **options)
        wanted = torch.tensor(naive.shares(rows(records), **options), dtype=F64)
        wanted = wanted / wanted.sum(1, keepdim=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("fidelity", ["paper", "reference"])
class TestIdentities:
    def test_weights_sum_to_one_and_are_positive(self, fidelity):
        found = run(losses(80, 6, absent=0.2), warmup=5, history=12, fidelity=fidelity)
        torch.testing.assert_close(found.sum(1), torch.ones(80, dtype=F64), rtol=1e-14, atol=0)
        assert (found > 0).all()
        if fidelity == "reference":
            assert (found >= (1 - 1e-12) / 60).all()

    def test_identical_tasks_weigh_the_same(self, fidelity):
        records = losses(40, 1).expand(40, 4)
        found = run(records, warmup=5, history=12, fidelity=fidelity)
        torch.testing.assert_close(found, torch.full_like(found, 0.25), rtol=1e-12, atol=0)

    def test_units_do_not_matter(self, fidelity):
        records = losses(40, 4, absent=0.1)
        found = run(records, warmup=5, history=12, fidelity=fidelity)
        scaled = run(records * torch.tensor([1.0, 1e3, 1e-4, 7.0]), warmup=5, history=12, fidelity=fidelity)
        torch.testing.assert_close(scaled, found, rtol=1e-9, atol=1e-12)

    def test_scaling_all_ratios_changes_nothing(self, fidelity):
        records = losses(40, 4)
        records[0] = 1.0
        scaled = records * 3.7
        scaled[0] = 1.0
        found = run(records, warmup=5, history=12, fidelity=fidelity)
        torch.testing.assert_close(run(scaled, warmup=5, history=12, fidelity=fidelity), found, rtol=1e-9, atol=1e-12)

    def test_permuting_tasks_permutes_weights(self, fidelity):
        records, order = losses(40, 5, absent=0.1), torch.tensor([3, 0, 4, 1, 2])
        found = run(records, warmup=5, history=12, fidelity=fidelity)
        moved = run(records[:, order], warmup=5, history=12, fidelity=fidelity)
        torch.testing.assert_close(moved, found[:, order], rtol=1e-11, atol=1e-13)

    def test_slope_of_a_line_is_exact(self, fidelity):
        slopes = torch.tensor([-0.01, 0.002, -0.03], dtype=F64)
        weighting = CoBa(warmup=3, history=16, fidelity=fidelity, num_tasks=3)
        records = 1 + slopes * torch.arange(30, dtype=F64).unsqueeze(1)
        run(records, weighting)
        torch.testing.assert_close(weighting.summary()["slope"], slopes, rtol=1e-12, atol=0)

    def test_one_task_has_weight_one(self, fidelity):
        found = run(losses(40, 1), warmup=5, history=12, fidelity=fidelity)
        assert torch.equal(found, torch.ones_like(found))


def test_lines_with_gaps_keep_their_slope_in_the_papers_form():
    """Why places are kept: packed together, a line with gaps is steeper than it is."""
    slopes = torch.tensor([-0.01, -0.03], dtype=F64)
    records = 1 + slopes * torch.arange(30, dtype=F64).unsqueeze(1)
    records[5:20:2, 0] = math.nan
    kept, packed = (CoBa(warmup=3, history=25, fidelity=form, num_tasks=2) for form in ("paper", "reference"))
    run(records, kept)
    run(records, packed)
    torch.testing.assert_close(kept.summary()["slope"], slopes, rtol=1e-12, atol=0)
    assert packed.summary()["slope"][0] < 1.2 * slopes[0]


def test_divergence_factor_is_capped_in_the_papers_form_only():
    t = torch.arange(40, dtype=F64).unsqueeze(1)
    records = 2.0 - torch.exp(0.015 * t) * torch.tensor([1.0, 0.9, 0.5], dtype=F64)  # ever faster
    factors = {}
    for fidelity in ("paper", "reference"):
        weighting = CoBa(warmup=4, history=10, fidelity=fidelity, num_tasks=3)
        run(records, weighting)
        factors[fidelity] = weighting.summary()["divergence_factor"].item()
    assert factors["paper"] == 1.0
    assert factors["reference"] > 1.5


def test_a_task_that_diverges_loses_weight():
    t = torch.arange(60, dtype=F64).unsqueeze(1)
    records = torch.exp(-t * torch.tensor([0.05, 0.02, 0.02], dtype=F64))
    records[30:, 0] = records[30, 0] + 0.05 * torch.arange(30, dtype=F64)
    found = run(records, warmup=4, history=10)
    assert found[45, 0] < 0.5 * found[45, 1:].min()


def test_divergence_factor_sees_the_largest_ratio_only():
    """A limit of the method that its docstring names: the second softmax alone holds back the others."""
    t = torch.arange(40, dtype=F64).unsqueeze(1)
    records = torch.exp(-t * torch.tensor([0.3, 0.01, 0.02], dtype=F64))
    worse = records.clone()
    worse[20:, 0] += 0.01 * torch.arange(20, dtype=F64)
    good, bad = (CoBa(warmup=4, history=10, num_tasks=3) for _ in range(2))
    kept, held_back = run(records, good)[-1], run(worse, bad)[-1]
    assert torch.equal(good.summary()["divergence_factor"], bad.summary()["divergence_factor"])
    assert good.summary()["divergence_factor"] < 1.0
    assert bad.summary()["slope"][0] > 0.0
    assert held_back[0] != kept[0]


@pytest.mark.parametrize("fidelity", ["paper", "reference"])
class TestDefectsOfThePublishedCode:
    def test_constant_losses(self, fidelity):
        """Also after a fall, where rounding leaves slopes of 1e-17."""
        records = torch.full((60, 3), 0.7, dtype=F64)
        records[:3] = torch.tensor([1.0, 3.0, 2.0], dtype=F64)
        found = run(records, warmup=4, history=10, fidelity=fidelity)
        for part in (found[:3], found[-10:], run(records[5:], warmup=4, history=10, fidelity=fidelity)):
            torch.testing.assert_close(part, torch.full_like(part, 1 / 3), rtol=1e-12, atol=0)

    def test_task_never_seen(self, fidelity):
        """The others are balanced among themselves, it has the mean weight."""
        records = losses(40, 3)
        records[:, 1] = math.nan
        found = run(records, warmup=4, history=10, fidelity=fidelity)
        rest = run(records[:, [0, 2]], warmup=4, history=10, fidelity=fidelity)
        torch.testing.assert_close(found[:, [0, 2]], rest * 2 / 3, rtol=1e-10, atol=0)
        torch.testing.assert_close(found[:, 1], torch.full((40,), 1 / 3, dtype=F64), rtol=1e-12, atol=0)

    def test_task_seen_late_or_lost(self, fidelity):
        records = losses(60, 3)
        records[:30, 1] = math.nan
        records[40:, 2] = math.nan
        found = run(records, warmup=4, history=8, fidelity=fidelity)
        assert found.isfinite().all()
        third = torch.tensor(1 / 3, dtype=F64)
        torch.testing.assert_close(found[31, 1], third, rtol=1e-12, atol=0)  # its baseline, and one ratio
        torch.testing.assert_close(found[-1, 2], third, rtol=1e-12, atol=0)  # out of the window
        assert (found[35] - third).abs().min() > 1e-3

    def test_one_bad_record_is_left_behind(self, fidelity):
        """nan and inf are skipped; the record of the other tasks stands."""
        records = losses(40, 3)
        for bad in (math.nan, math.inf, -math.inf):
            weighting = CoBa(warmup=4, history=10, fidelity=fidelity, num_tasks=3)
            loss = MultiTaskLoss(["0", "1", "2"], weighting)
            for t, record in enumerate(records):
                loss.observe_validation(torch.where((torch.arange(3) == 1) & (t == 20), bad, record))
                loss.update("validation")
            gap = records.clone()
            gap[20, 1] = math.nan
            assert torch.equal(shares(weighting), run(gap, warmup=4, history=10, fidelity=fidelity)[-1])

    def test_warmup_longer_than_the_history(self, fidelity):
        found = run(losses(60, 3), warmup=30, history=5, fidelity=fidelity)
        assert torch.equal(found[:29], torch.full((29, 3), 1 / 3, dtype=F64))
        assert (found[29] - 1 / 3).abs().max() > 1e-3
        assert found.isfinite().all()

    @pytest.mark.parametrize("warmup", [1, 2, 3])
    def test_short_warmup(self, fidelity, warmup):
        """Two ratios are what a slope needs: the third record is the first that moves weights."""
        found = run(losses(10, 3), warmup=warmup, history=5, fidelity=fidelity)
        assert torch.equal(found[:2], torch.full((2, 3), 1 / 3, dtype=F64))
        assert (found[2:] - 1 / 3).abs().amax(1).min() > 1e-4

    @pytest.mark.parametrize("stop", [2, 3, 5, 17, 39])
    def test_resume_past_the_warmup(self, fidelity, stop):
        """Bit-equal, in the warm-up and after the ring has turned."""
        records = losses(60, 3, absent=0.1)
        options = {"warmup": 4, "history": 12, "capacity": 30, "fidelity": fidelity}
        whole, first, second = (CoBa(num_tasks=3, **options) for _ in range(3))
        expected = run(records, whole)
        run(records[:stop], first)
        second.load_state_dict(first.state_dict())
        assert torch.equal(run(records[stop:], second), expected[stop:])

    def test_validation_without_anything(self, fidelity):
        """A record that nobody filled moves no baseline and breaks nothing."""
        records = losses(30, 3)
        records[[0, 7, 8, 20]] = math.nan
        found = run(records, warmup=4, history=10, fidelity=fidelity)
        assert found.isfinite().all()
        nothing = run(torch.full((30, 3), math.nan, dtype=F64), warmup=4, history=10, fidelity=fidelity)
        torch.testing.assert_close(nothing, torch.full_like(nothing, 1 / 3), rtol=1e-12, atol=0)

    def test_zero_is_a_loss_like_any_other(self, fidelity):
        records = losses(30, 2)
        records[10:, 0] = 0.0
        found = run(records, warmup=4, history=6, fidelity=fidelity)
        weighting = CoBa(warmup=4, history=6, fidelity=fidelity, num_tasks=2)
        run(records, weighting)
        assert weighting.summary()["slope"][0] == 0.0
        assert found.isfinite().all()

    def test_a_task_that_starts_at_zero_waits_for_its_baseline(self, fidelity):
        records = losses(30, 2)
        late = records.clone()
        late[:5, 0] = math.nan
        records[:5, 0] = 0.0
        found = run(records, warmup=8, history=6, fidelity=fidelity)
        assert torch.equal(found, run(late, warmup=8, history=6, fidelity=fidelity))

    def test_all_ignored_task_leaves_the_sum(self, fidelity):
        weighting = CoBa(warmup=4, history=10, fidelity=fidelity)
        loss = MultiTaskLoss(["a", "b", "c"], weighting)
        for record in losses(20, 3):
            loss.update("validation", losses=record)
        leaves = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
        omega = loss.weights(torch.ones(3, dtype=F64))
        value = loss(leaves, mask=torch.tensor([True, False, True]))
        share = omega[[0, 2]] / omega[[0, 2]].sum()
        torch.testing.assert_close(value, share[0] * 1.0 + share[1] * 3.0, rtol=1e-12, atol=0)
        alone = loss({"b": leaves[1]})
        torch.testing.assert_close(alone, leaves[1], rtol=1e-12, atol=0)
        assert loss({}).item() == 0.0


def test_before_the_warmup_is_over_the_total_is_the_mean():
    loss = MultiTaskLoss(["a", "b", "c"], CoBa())
    loss.update("validation", losses={"a": torch.tensor(1.0), "b": torch.tensor(9.0), "c": torch.tensor(3.0)})
    value = loss({"a": torch.tensor(1.0), "b": torch.tensor(2.0), "c": torch.tensor(6.0)})
    torch.testing.assert_close(value, torch.tensor(3.0))
    torch.testing.assert_close(loss({"b": torch.tensor(2.0), "c": torch.tensor(6.0)}), torch.tensor(4.0))


def test_without_renormalizing_absent_shares_are_missing():
    records = losses(20, 3)
    kept, cut = CoBa(warmup=4, num_tasks=3), CoBa(warmup=4, renormalize=False, num_tasks=3)
    torch.testing.assert_close(run(records, kept), run(records, cut), rtol=1e-14, atol=0)
    loss = MultiTaskLoss(["0", "1", "2"], cut)
    value = loss({"0": torch.tensor(2.0, dtype=F64)})
    torch.testing.assert_close(value, 2.0 * shares(kept)[0], rtol=1e-12, atol=0)


def test_capacity_keeps_the_newest_slopes():
    """The divergence factor forgets; nothing else changes. Below the capacity, nothing at all."""
    records = losses(60, 3)
    full = run(records, warmup=4, history=10)
    assert torch.equal(full[:23], run(records, warmup=4, history=10, capacity=20)[:23])
    weighting = CoBa(warmup=4, history=10, capacity=20, num_tasks=3)
    run(records, weighting)
    totals = CoBa(warmup=4, history=10, num_tasks=3)
    run(records, totals)
    newest = totals.get_buffer("totals")[37:57]
    factor = (20 * (-5.0 * 20 * newest / newest.abs().sum()).softmax(0)[-1]).clamp_max(1.0)
    torch.testing.assert_close(weighting.summary()["divergence_factor"], factor, rtol=1e-10, atol=0)


def test_ranks_with_parts_of_the_validation_data_equal_one():
    """Two ranks, uneven batches, one of which lacks a task: the mean over everything that was seen."""
    records = losses(30, 3)
    generator = torch.Generator().manual_seed(1)
    one = CoBa(warmup=4, history=10, num_tasks=3)
    ranks = [CoBa(warmup=4, history=10, num_tasks=3) for _ in range(2)]
    alone = MultiTaskLoss(["0", "1", "2"], one)
    parts = [MultiTaskLoss(["0", "1", "2"], weighting) for weighting in ranks]
    for t, record in enumerate(records):
        noise = 0.1 * torch.rand(2, 3, generator=generator, dtype=F64)
        counts = torch.tensor([[3.0, 1.0, 0.0 if t % 3 else 2.0], [1.0, 4.0, 2.0]], dtype=F64)
        for rank in range(2):
            alone.observe_validation(record * (1 + noise[rank]), counts=counts[rank])
            parts[rank].observe_validation(record * (1 + noise[rank]), counts=counts[rank])
        total = sum(weighting._pending["seen"] for weighting in ranks)
        for part in parts:
            part.weighting.sync = lambda flat, total=total: total.reshape(flat.shape).clone()
            part.update("validation", index=t)
        alone.update("validation", index=t)
        torch.testing.assert_close(shares(ranks[0]), shares(one), rtol=1e-9, atol=1e-12)
        assert torch.equal(shares(ranks[0]), shares(ranks[1]))


def test_a_record_may_be_gathered_over_several_steps():
    """Losses seen before a step event belong to the record that the next validation event makes."""
    records = losses(20, 3)
    whole, apart = CoBa(warmup=4, history=10, num_tasks=3), CoBa(warmup=4, history=10, num_tasks=3)
    left, right = MultiTaskLoss(["0", "1", "2"], whole), MultiTaskLoss(["0", "1", "2"], apart)
    for record in records:
        for value in (0.5 * record, 1.5 * record):
            left.observe_validation(value)
            right.observe_validation(value)
            right.update("step")
        left.update("validation")
        right.update("validation")
        torch.testing.assert_close(shares(apart), shares(whole), rtol=1e-12, atol=0)


def test_checkpoint_of_other_tasks_is_matched_by_name():
    records = losses(20, 3)
    old = MultiTaskLoss(["a", "b", "c"], CoBa(warmup=4, history=10))
    for record in records:
        old.update("validation", losses=record)
    new = MultiTaskLoss(["c", "d", "a"], CoBa(warmup=4, history=10))
    with pytest.warns(UserWarning, match="other tasks"):
        new.load_state_dict(old.state_dict())
    before = old.weights(torch.ones(3, dtype=F64))
    after = new.weights(torch.ones(3, dtype=F64))
    torch.testing.assert_close(after[0] / after[2], before[2] / before[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        new.weighting.summary()["slope"][[0, 2]], old.weighting.summary()["slope"][[2, 0]], rtol=1e-12, atol=0
    )
    assert new.weighting.summary()["slope"][1] == 0.0


def test_copies_go_on_alike():
    records = losses(40, 3)
    weighting = CoBa(warmup=4, history=10, num_tasks=3)
    run(records[:20], weighting)
    twin = copy.deepcopy(weighting)
    assert torch.equal(run(records[20:], weighting), run(records[20:], twin))


def test_extreme_losses_keep_weights_finite():
    generator = torch.Generator().manual_seed(0)
    for fidelity in ("paper", "reference"):
        records = 10.0 ** (60 * torch.rand(60, 4, generator=generator, dtype=F64) - 30)
        found = run(records, warmup=3, history=6, fidelity=fidelity)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(1), torch.ones(60, dtype=F64), rtol=1e-12, atol=0)


def test_events_may_come_from_inside_inference_mode():
    records = losses(20, 3)
    plain, mixed = CoBa(warmup=4, history=10, num_tasks=3), CoBa(warmup=4, history=10, num_tasks=3)
    wanted = run(records, plain)
    loss = MultiTaskLoss(["0", "1", "2"], mixed)
    for t, record in enumerate(records):
        with torch.inference_mode(t % 3 != 1):
            loss.observe_validation(record * 1.0)
            loss.update("validation")
    assert torch.equal(shares(mixed), wanted[-1])


def test_moving_and_reloading_keeps_the_state():
    """Also where loading replaces the buffers."""
    records = losses(40, 3)
    expected = run(records, CoBa(warmup=4, history=10, num_tasks=3))
    weighting = CoBa(warmup=4, history=10, num_tasks=3)
    run(records[:20], weighting)
    state = {name: value.clone() for name, value in weighting.state_dict().items()}
    run(records[20:25], weighting)
    weighting.load_state_dict(state, assign=True)
    weighting.half()
    assert torch.equal(run(records[20:], weighting), expected[20:])


def test_the_shorthand_for_a_warmup_still_works():
    weighting = CoBa(warmup=4, num_tasks=3)
    assert weighting.warmup(5).weigh is not None


def test_nothing_is_read_back():
    """One read of the record counter and of the clock after loading, none after that."""
    weighting = CoBa(warmup=4, history=10, num_tasks=3)
    records = losses(20, 3)
    run(records[:10], weighting)
    loss = MultiTaskLoss(["0", "1", "2"], weighting)
    loss.observe_validation(records[10])
    loss.update("validation")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        weighting.observe_validation(loss.criterion.terms(records[11]))
        weighting.update("validation")
        shares(weighting)
    assert not [event for event in found.key_averages() if event.key == "aten::_local_scalar_dense"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("warmup", 0), ("history", 1), ("tau", 0.0), ("tau", math.nan), ("capacity", 0), ("fidelity", "code")],
)
def test_wrong_arguments(argument, value):
    with pytest.raises(ValueError, match=f"CoBa: {argument} must be"):
        CoBa(**{argument: value})
