"""Numbers per training sample: read, written, joined, saved, moved, and what is refused."""

import copy
import io
import os
import pickle
import sys

import pytest
import torch

from reweigh.losses import AdaWACLoss, CrossEntropy, Objective
from reweigh.weighting import AdaWAC, LossTerms, SampleTable, SampleWeight, Weighting
from reweigh.weighting.sample import note, places

F64 = torch.float64


def at(*numbers):
    return torch.tensor(numbers, dtype=torch.long)


def test_what_was_written_is_read():
    table = SampleTable(5, 2, fill=0.5)
    table.write(at(3, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert table.read(at(1, 3, 0)).tolist() == [[3.0, 4.0], [1.0, 2.0], [0.5, 0.5]]
    assert table.rows.dtype == torch.float32
    table.reset()
    assert (table.rows == 0.5).all()


@pytest.mark.parametrize("index", [5, -1, 1000])
@pytest.mark.parametrize("storage", [False, True])
def test_an_index_out_of_range_is_named(index, storage, tmp_path):
    table = SampleTable(5, storage=str(tmp_path) if storage else None)
    message = rf"SampleTable: index must be in \[0, 5\), the number of samples declared, got {index}"
    with pytest.raises(ValueError, match=message):
        table.read(at(0, index))
    with pytest.raises(ValueError, match=message):
        table.write(at(0, index), torch.zeros(2, 1))


def test_the_owner_is_named_where_it_asks():
    loss = AdaWACLoss(4)
    with pytest.raises(ValueError, match=r"AdaWAC: index must be in \[0, 4\), the number of samples declared, got 9"):
        loss(torch.ones(2, requires_grad=True), torch.ones(2), index=at(1, 9))
    with pytest.raises(ValueError, match="'index' is missing; pass index="):
        loss(torch.ones(2, requires_grad=True), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleTable(0), "num_samples must be >= 1, got 0"),
        (lambda: SampleTable(3, 0), "columns must be >= 1, got 0"),
        (lambda: SampleTable(3, fill=float("nan")), "fill must be finite, got nan"),
        (lambda: SampleTable(3, storage="/nowhere/at/all"), "storage must be an existing folder"),
        (lambda: SampleTable(3, storage=".", device="cuda"), "storage keeps the table on the CPU, got device='cuda'"),
        (lambda: SampleWeight(3, weights=[1.0]), "weights must hold num_samples=3 numbers, got 1"),
        (lambda: SampleWeight(3, weights=[1.0, -1.0, 0.0]), "weights must be finite and >= 0, got -1 at position 1"),
        (lambda: SampleWeight(3).set([0, 0], 2.0), "index must name each sample once"),
        (lambda: SampleWeight(3).set([0, 1], [1.0, 2.0, 3.0]), "weights must be one number or 2, got 3"),
        (lambda: SampleWeight(3).set([0], -2.0), "weights must be finite and >= 0, got -2"),
        (lambda: SampleWeight(3).set([7], 2.0), "index must be in [0, 3)"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError) as found:
        make()
    assert message in str(found.value)


def test_a_mapped_table_is_the_same_and_leaves_no_file(tmp_path):
    plain, mapped = SampleTable(1000, 2, fill=1.0), SampleTable(1000, 2, fill=1.0, storage=str(tmp_path))
    assert list(tmp_path.iterdir()) == []  # on systems that keep open files without a name
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        index = torch.randperm(1000, generator=generator)[:50]
        rows = torch.randn(50, 2, generator=generator)
        plain.write(index, rows)
        mapped.write(index, rows)
    assert torch.equal(plain.rows, mapped.rows)
    assert torch.equal(copy.deepcopy(mapped).rows, plain.rows)
    assert torch.equal(pickle.loads(pickle.dumps(mapped)).rows, plain.rows)


def test_a_copy_is_independent():
    table = SampleTable(3)
    other = copy.deepcopy(table)
    other.write(at(0), torch.ones(1, 1))
    assert table.rows[0] == 0.0


def test_it_is_no_buffer_but_is_saved(tmp_path):
    """Data-parallel wrappers broadcast buffers at every forward; checkpoints hold the table all the same."""
    weighting = AdaWAC(6)
    assert [name for name, _ in weighting.named_buffers() if "logit" in name] == []
    weighting.logit.write(at(2), torch.full((1, 1), 3.0))
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    fresh = AdaWAC(6, storage=str(tmp_path))  # where it is kept is not what it is
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.logit.rows, weighting.logit.rows)


def test_a_checkpoint_of_another_length_is_refused():
    with pytest.raises(RuntimeError, match=r"logit.rows in the checkpoint is \(5, 1\), but \(6, 1\)"):
        AdaWAC(6).load_state_dict(AdaWAC(5).state_dict())


def test_a_checkpoint_without_the_table_starts_fresh_and_says_so():
    state = AdaWAC(4).state_dict()
    del state["logit.rows"]
    with pytest.warns(UserWarning, match="the checkpoint has no logit.rows; starting fresh"):
        AdaWAC(4).load_state_dict(state)


def test_it_keeps_its_precision_and_its_values():
    table = SampleTable(3, fill=0.1)
    before = table.rows.clone()
    for change in (lambda t: t.half(), lambda t: t.double(), lambda t: t.to(torch.bfloat16)):
        assert torch.equal(change(table).rows, before)


def test_it_moves_with_the_module_unless_it_is_told_to_stay():
    moving, staying = SampleTable(3), SampleTable(3, device="cpu")
    assert moving.to("meta").rows.is_meta
    assert not staying.to("meta").rows.is_meta
    back = moving.to_empty(device="cpu")
    assert (back.rows == 0.0).all()  # no uninitialised memory


def test_built_on_the_meta_device_it_still_has_values():
    with torch.device("meta"):
        loss = AdaWACLoss(3)
    assert loss.weighting.logit.rows.tolist() == [[0.0]] * 3


def terms(loss, index, mask=None, times=None):
    loss = torch.as_tensor(loss, dtype=F64)
    mask = None if mask is None else torch.as_tensor(mask)
    return LossTerms(
        loss, mask=mask, index=torch.as_tensor(index), multiplicity=None if times is None else torch.as_tensor(times)
    )


def by_hand(found):
    """Mean and times of each sample."""
    rows = zip(found.samples.tolist(), found.times.tolist(), found.means.tolist(), strict=True)
    return {sample: (times, means) for sample, times, means in rows if times > 0}


def test_copies_of_a_sample_are_averaged():
    batch = terms([1.0, 5.0, 3.0], [7, 2, 7])
    assert by_hand(SampleTable(11).seen(note(None, batch, batch.loss))) == {7: (2.0, [2.0]), 2: (1.0, [5.0])}


def test_sample_weights_are_copies():
    batch = terms([1.0, 5.0, 4.0], [7, 2, 7], times=[2.0, 0.0, 1.0])
    assert by_hand(SampleTable(11).seen(note(None, batch, batch.loss))) == {7: (3.0, [2.0])}


def test_masked_samples_are_not_seen_whatever_stands_there():
    batch = terms([1.0, float("nan"), 3.0], [7, 10**9, 7], mask=[True, False, True])
    rows = note(None, batch, batch.loss)
    assert rows.isfinite().all()
    assert by_hand(SampleTable(11).seen(rows)) == {7: (2.0, [2.0])}


def test_a_sample_of_several_terms_has_their_mean():
    loss = [[1.0, 3.0], [2.0, 100.0]]
    batch = terms(loss, [0, 1], mask=[[True, True], [True, False]])
    assert by_hand(SampleTable(11).seen(note(None, batch, batch.loss))) == {0: (1.0, [2.0]), 1: (1.0, [2.0])}


def test_an_empty_batch_teaches_nothing():
    batch = terms(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert SampleTable(11).seen(note(None, batch, batch.loss)).samples.numel() == 0


class Rows(Weighting):
    """Keeps the rows of the last step."""

    update_on = "step"

    def __init__(self):
        super().__init__()
        self.add_rows("rows", 2)
        self.add_rows("epochs", 1, on="epoch")
        self.heard = {}

    def weigh(self, terms):
        return torch.ones_like(terms.loss)

    def observe(self, terms):
        self.collect("rows", torch.stack([terms.loss, 2 * terms.loss], 1))
        self.collect("epochs", terms.loss.sum().reshape(1, 1))

    def commit(self, sums):
        self.heard = {name: rows.clone() for name, rows in sums.items()}


def test_rows_wait_for_their_event_and_are_cleared_by_it():
    weighting = Rows()
    for value in (1.0, 2.0):
        weighting.observe(LossTerms(torch.tensor([value], dtype=F64)))
    weighting.update("step")
    assert {name: rows.tolist() for name, rows in weighting.heard.items()} == {"rows": [[1.0, 2.0], [2.0, 4.0]]}
    weighting.update("step")
    assert weighting.heard["rows"].shape == (0, 2)
    weighting.update("epoch")
    assert weighting.heard["epochs"].tolist() == [[1.0], [2.0]]


def test_rows_are_dropped_by_discard_reset_and_loading():
    for drop in (Rows.discard, Rows.reset, lambda w: w.load_state_dict(w.state_dict())):
        weighting = Rows()
        weighting.observe(LossTerms(torch.ones(3, dtype=F64)))
        drop(weighting)
        weighting.update("step")
        assert weighting.heard["rows"].numel() == 0


def test_rows_hold_no_graph():
    weighting = Rows()
    weighting.observe(LossTerms(torch.ones(3, dtype=F64, requires_grad=True) * 2))
    assert not any(row.requires_grad for row in weighting._rows["rows"])


def test_a_loop_that_never_sends_events_is_told(monkeypatch):
    monkeypatch.setattr(sys.modules["reweigh.weighting.dynamics"], "_MOST_WAITING", 3)
    weighting = Rows()
    batch = LossTerms(torch.ones(1, dtype=F64))
    for _ in range(3):
        weighting.observe(batch)
    with pytest.warns(UserWarning, match=r"Rows: 3 training forwards without an update\('step'\)"):
        weighting.collect("rows", torch.ones(1, 2))
    assert len(weighting._rows["rows"]) == 1


def test_a_sum_of_ones_own_cannot_join_rows():
    weighting = Rows()
    weighting.sync = lambda part: part
    weighting.observe(LossTerms(torch.ones(1, dtype=F64)))
    with pytest.raises(TypeError, match="Rows: rows need sync 'auto' or None"):
        weighting.update("step")


def test_one_number_sums_survive_compilation():
    """torch.compile drops what is added to a 0-d tensor on the CPU."""

    class Counter(Rows):
        def __init__(self):
            super().__init__()
            self.add_pending("count")

        def observe(self, terms):
            self.accumulate("count", terms.loss.sum())

    objective = Objective(CrossEntropy(), Counter()).train()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    value = compiled(torch.zeros(2, 3, requires_grad=True), at(0, 1))
    objective.update("step")
    assert objective.weighting.heard["count"].shape == ()
    assert objective.weighting.heard["count"].item() == pytest.approx(2 * value.item())
    torch._dynamo.reset()


def test_set_weights_act_and_are_saved():
    weighting = SampleWeight(5, weights=[1.0, 2.0, 3.0, 4.0, 5.0])
    weighting.set(at(0, 4), [7.0, 9.0])
    objective = Objective(CrossEntropy(), weighting)
    logits, target = torch.zeros(3, 2), at(0, 1, 0)
    assert objective.weights(logits, target, index=at(4, 0, 2)).tolist() == [9.0, 7.0, 3.0]
    fresh = SampleWeight(5)
    fresh.load_state_dict(weighting.state_dict())
    assert torch.equal(fresh.table.rows, weighting.table.rows)
    weighting.reset()
    assert weighting.table.rows.flatten().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    weighting.set([], 3.0)  # an empty error set is no error


def test_weights_given_at_construction_outlive_a_journey_without_values():
    weighting = SampleWeight(3, weights=[1.0, 2.0, 3.0]).to("meta").to_empty(device="cpu")
    assert weighting.table.rows.flatten().tolist() == [1.0, 2.0, 3.0]


def test_a_checkpoint_is_taken_over_by_a_module_without_values():
    saved = SampleWeight(3, weights=[1.0, 2.0, 3.0]).state_dict()
    weighting = SampleWeight(3).to("meta")
    weighting.load_state_dict(saved, assign=True)
    assert weighting.table.rows.flatten().tolist() == [1.0, 2.0, 3.0]
    weighting.set([0], 9.0)
    assert saved["table.rows"][0] == 1.0


def test_bringing_copies_together_leaves_the_table_as_it_was():
    table = SampleTable(10, 2)
    table.rows.copy_(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))
    table.rows[3, 0] = float("nan")
    before = table.rows.clone()
    batch = terms([1.0, 2.0, 3.0, 4.0], [3, 7, 3, 7])
    found = table.seen(note(None, batch, batch.loss))
    torch.testing.assert_close(found.before, before[[3, 7, 3, 7]], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(table.rows, before, rtol=0, atol=0, equal_nan=True)


def test_an_interruption_leaves_the_table_as_it_was(monkeypatch):
    table = SampleTable(10)
    table.rows.fill_(0.25)

    batch = terms([1.0, 2.0], [3, 7])
    rows, reading = note(None, batch, batch.loss), torch.Tensor.index_select
    calls = []

    def second_time(self, *args):
        calls.append(table.rows.flatten().tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reading(self, *args)

    monkeypatch.setattr(torch.Tensor, "index_select", second_time)
    with pytest.raises(KeyboardInterrupt):
        table.seen(rows)
    monkeypatch.undo()
    assert calls[1] != [0.25] * 10  # it was in the middle
    assert (table.rows == 0.25).all()


@pytest.mark.parametrize("exact", [2**24, 0], ids=["through the table", "by sorting"])
def test_both_ways_of_finding_copies_say_the_same(exact, monkeypatch):
    monkeypatch.setattr(sys.modules["reweigh.weighting.sample"], "_EXACT", exact)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(20, (200,), generator=generator)
    loss = torch.rand(200, generator=generator, dtype=F64)
    batch = terms(loss, index)
    found = SampleTable(20).seen(note(None, batch, loss))
    for sample, (times, means) in by_hand(found).items():
        mine = loss[index == sample]
        assert times == len(mine)
        assert means[0] == pytest.approx(mine.mean().item(), rel=1e-12)


def test_only_terms_that_count_make_a_sample_and_its_copies():
    """A masked term's copies and numbers, NaN included, are nothing."""
    loss = torch.tensor([[1.0, 3.0], [2.0, 5.0]], dtype=F64)
    batch = terms(loss, [4, 6], mask=[[True, False], [True, True]])
    batch = batch._replace(multiplicity=torch.tensor([[2.0, 7.0], [1.0, 3.0]], dtype=F64))
    value = torch.tensor([[1.0, float("nan")], [2.0, 5.0]], dtype=F64)
    rows = note(None, batch, value)
    assert rows.tolist() == [[4.0, 2.0, 2.0], [6.0, 3.0, 3 * (2.0 + 3 * 5.0) / 4]]


def test_an_empty_batch_of_several_terms_teaches_nothing():
    for mask in (None, torch.zeros(0, 2, dtype=torch.bool)):
        batch = terms(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), mask=mask)
        assert note(None, batch, batch.loss).shape == (0, 3)


def test_places_of_samples_that_do_not_count_may_be_anything():
    batch = terms([1.0, 2.0, 3.0], [-1, 2, 10**9], mask=[False, True, False])
    assert places(None, batch).tolist() == [0, 2, 0]
    batch = terms([1.0, 2.0], [5, -7], times=torch.tensor([1.0, 0.0]))
    assert places(None, batch).tolist() == [5, 0]
    assert places(None, terms([1.0], [-1])).tolist() == [-1]  # refused by the table


def test_a_full_disk_is_an_error_at_once(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    if not hasattr(os, "posix_fallocate"):
        pytest.skip("files cannot be reserved here")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        SampleTable(10, storage=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_lost_its_values_goes_on_from_the_start():
    """What was pending when it went to the meta device is gone, and no reason to fail; a pinned table stays."""
    for device, kept in (("cpu", 5.0), (None, 0.0)):
        loss = AdaWACLoss(6, device=device)
        loss.weighting.logit.write(at(1), torch.tensor([[5.0]]))
        loss.train()(torch.tensor([2.0], requires_grad=True), torch.zeros(1), index=at(3))
        loss = loss.to("meta").to_empty(device="cpu")
        loss(torch.tensor([2.0], requires_grad=True), torch.zeros(1), index=at(3))
        loss.update("step")
        assert loss.weighting.logit.rows.flatten().tolist() == [0.0, kept, 0.0, 2.0, 0.0, 0.0]
