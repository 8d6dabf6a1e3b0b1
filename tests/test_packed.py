"""Several sequences in a row: what one sequence per row, padded, gives."""

import pytest
import torch
from gradients import agree, slopes

from reweigh.losses import CausalLM, LinearCausalLM, Objective, SequenceMean, packed_position_ids
from reweigh.weighting import KLDRO, TLDR, Focal

F64 = torch.float64
LENGTHS, CLASSES, WIDTH = [5, 2, 7, 1, 3], 6, 4
REDUCTIONS = ["mean", "weighted_mean", "sum", "batch_mean", "sequence_mean", SequenceMean(weighted=True)]
BY = [None, Focal(1.0).detach(), TLDR(level="sequence", detach=True), Focal(2.0).detach().pooled(), KLDRO(1.0)]


def sequences():
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, WIDTH, generator=generator, dtype=F64)  # noqa: E731
    made = [(draw(n), torch.randint(CLASSES, (n,), generator=generator)) for n in LENGTHS]
    made[2][1][3:5] = -100
    return made, draw(CLASSES)


def padded(made):
    longest = max(LENGTHS)
    hidden = torch.stack([torch.cat([h, h.new_full((longest - len(h), WIDTH), 9.0)]) for h, _ in made])
    labels = torch.stack([torch.cat([y, y.new_full((longest - len(y),), -100)]) for _, y in made])
    return hidden, labels


def rows(made, cut):
    """Packed into rows of equal length: the first sequences, and the others with padding of its own."""
    parts = [made[:cut], made[cut:]] if cut else [made]
    longest = max(sum(len(y) for _, y in part) for part in parts)
    hidden, labels, places = [], [], []
    for part in parts:
        size = sum(len(y) for _, y in part)
        rest = longest - size
        hidden.append(torch.cat([*(h for h, _ in part), torch.zeros(rest, WIDTH, dtype=F64)]))
        labels.append(torch.cat([*(y for _, y in part), torch.full((rest,), -100)]))
        places.append(torch.cat([*(torch.arange(len(y)) for _, y in part), torch.zeros(rest, dtype=torch.long)]))
    return torch.stack(hidden), torch.stack(labels), torch.stack(places)


def moved(labels, places=None):
    """Labels shifted in advance; the last of a sequence has none."""
    made = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    if places is None:
        return made
    last = torch.cat([places[:, 1:] == 0, torch.ones_like(places[:, :1], dtype=torch.bool)], 1)
    return made.masked_fill(last, 3)  # a border that only position_ids tell of, except at the end of a row


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("by", BY, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("impl", ["logits", "chunked"])
def test_packed_is_padded(cut, by, reduction, shift, impl):
    made, vocabulary = sequences()
    wide, labels = padded(made)
    packed, packed_labels, places = rows(made, cut)
    if not shift:
        labels, packed_labels = moved(labels), moved(packed_labels, places)
        packed_labels[:, -1] = -100
    results = []
    for hidden, target, meta in ((wide, labels, {}), (packed, packed_labels, {"position_ids": places})):
        weight = vocabulary.clone().requires_grad_()
        if impl == "chunked":
            objective = Objective(LinearCausalLM(shift=shift, impl="chunked", chunk_rows=3), by, reduction)
            results.append(slopes(objective, (hidden, weight, target), **meta))
        else:
            value = Objective(CausalLM(shift=shift), by, reduction)(hidden @ weight.T, target, **meta)
            results.append((value, torch.autograd.grad(value, [weight])))
    agree(*results, 1e-12)


@pytest.mark.parametrize("reduction", ["batch_mean", "sequence_mean", SequenceMean(weighted=True)], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_sample_weights_of_packed_rows(reduction, whole):
    """Of a row: all of its sequences that often. Of tokens: as in padded rows."""
    made, vocabulary = sequences()
    packed, labels, places = rows(made, 2)
    by = Focal(1.0).detach()
    if whole:
        twice = Objective(CausalLM(), by, reduction)(
            packed[[0, 1, 1]] @ vocabulary.T, labels[[0, 1, 1]], position_ids=places[[0, 1, 1]]
        )
        weights = torch.tensor([1.0, 2.0])
        wanted = twice
    else:
        wide, padded_labels = padded(made)
        count = torch.tensor([3.0, 0.0, 1.0, 2.0, 1.0, 0.5, 1.0], dtype=F64)
        wanted = Objective(CausalLM(), by, reduction)(
            wide @ vocabulary.T, padded_labels, sample_weight=count.expand(len(wide), -1)
        )
        weights = count[places]
    found = Objective(CausalLM(), by, reduction)(
        packed @ vocabulary.T, labels, position_ids=places, sample_weight=weights
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_rows_that_begin_in_the_middle():
    """A sequence that goes on in the next row: its first label there has no predecessor, and it counts by itself."""
    made, vocabulary = sequences()
    hidden, labels = made[2][0], made[2][1]
    two = Objective(CausalLM(), None, "sequence_mean")
    halves = two((hidden[:6] @ vocabulary.T).reshape(2, 3, -1), labels[:6].reshape(2, 3))
    told = two(
        (hidden[:6] @ vocabulary.T).reshape(2, 3, -1),
        labels[:6].reshape(2, 3),
        position_ids=torch.arange(6).reshape(2, 3),
    )
    torch.testing.assert_close(told, halves, rtol=1e-12, atol=0)


def test_positions_from_lengths():
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    assert torch.equal(packed_position_ids(ends), rows(sequences()[0], 0)[2])


@pytest.mark.parametrize("criterion", [CausalLM(), LinearCausalLM()], ids=["logits", "linear"])
def test_errors(criterion):
    inputs = (torch.zeros(2, 3, 4), torch.zeros(2, 3).long())
    if isinstance(criterion, LinearCausalLM):
        inputs = (torch.zeros(2, 3, 5), torch.zeros(4, 5), inputs[1])
    objective = Objective(criterion)
    with pytest.raises(TypeError, match="position_ids must hold integers"):
        objective(*inputs, position_ids=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="position_ids must have the labels' shape"):
        objective(*inputs, position_ids=torch.zeros(2, 4).long())
    nested = Objective(Objective(criterion, None, "sequence_mean"), KLDRO(1.0))
    with pytest.raises(ValueError, match="rows hold several sequences"):
        nested(*inputs, position_ids=torch.zeros(2, 3).long())
    for wrong in ([0, 3, 3], [1, 2], [0]):
        with pytest.raises(ValueError, match="cu_seqlens must ascend from 0"):
            packed_position_ids(torch.tensor(wrong))
    with pytest.raises(TypeError, match="cu_seqlens must hold integers"):
        packed_position_ids(torch.tensor([0.0, 1.0]))
