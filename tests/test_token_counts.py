"""Token counts of anything, against ``numpy.bincount``; what power-law decay makes of them."""

import random

import numpy as np
import pytest
import torch
from ranks import run_ranks
from references import language_worker as worker
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from reweigh.losses import CausalLM, Objective, PowerLawDecayLoss
from reweigh.weighting import PowerLawDecay, class_counts, token_counts
from reweigh.weighting.conformance import check_weighting

V = 9
GENERATOR = np.random.default_rng(5)
ROWS = [GENERATOR.integers(0, V - 1, size).tolist() for size in GENERATOR.integers(1, 12, 40)]  # id 8 never occurs
FLAT = np.concatenate([np.asarray(row) for row in ROWS])
TRUE = torch.from_numpy(np.bincount(FLAT, minlength=V))
WIDTH = max(map(len, ROWS))
PADDED = torch.tensor([row + [0] * (WIDTH - len(row)) for row in ROWS])
MARKS = torch.tensor([[1] * len(row) + [0] * (WIDTH - len(row)) for row in ROWS])
LABELS = PADDED.masked_fill(MARKS == 0, -100)
RAGGED = np.empty(len(ROWS), object)
RAGGED[:] = [np.asarray(row, np.int32) for row in ROWS]


class Rows(Dataset):
    def __init__(self, form=lambda row: {"input_ids": row}, rows=ROWS):
        self.form, self.rows, self.reads = form, rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.reads += 1
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
        return self.form(self.rows[i])


class Stream(IterableDataset):
    def __iter__(self):
        return ({"input_ids": row} for row in ROWS)


class Store:
    """Rows in columns, read the way of Hugging Face data sets; notes which columns were asked for."""

    def __init__(self, columns, sized=True, known=True, style=None):
        self.columns, self.style, self.asked = columns, style, []
        self.column_names = list(columns) if known else None
        self.format = {"type": style}
        if sized:
            self.__class__ = type("SizedStore", (Store,), {"__len__": lambda self: len(ROWS)})

    def with_format(self, style, columns=None):
        assert style == "numpy"
        return self.select_columns(columns)

    def select_columns(self, columns):
        self.asked += columns
        return Store({name: self.columns[name] for name in columns}, sized=False)

    def iter(self, batch_size):
        size = len(next(iter(self.columns.values())))
        for start in range(0, size, batch_size):
            block = {name: values[start : start + batch_size] for name, values in self.columns.items()}
            yield {"input_ids": block["ids"]} if self.style == "custom" else block


def pad(batch):
    width = max(len(row["input_ids"]) for row in batch)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch]
    marks = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(marks)}


SOURCES = {
    "tensor": lambda: torch.from_numpy(FLAT),
    "int16 tensor": lambda: torch.from_numpy(FLAT).short(),
    "labels tensor": lambda: LABELS,
    "array": lambda: FLAT,
    "uint16 array": lambda: FLAT.astype(np.uint16),
    "array of arrays": lambda: RAGGED,
    "list": FLAT.tolist,
    "list of lists": lambda: ROWS,
    "list of lists of lists": lambda: [ROWS[:7], ROWS[7:]],
    "list of tensors": lambda: [torch.tensor(row) for row in ROWS],
    "generator": lambda: (row for row in ROWS),
    "generator of ids": lambda: (i for row in ROWS for i in row),
    "generator of batches": lambda: (LABELS[i : i + 6] for i in range(0, 40, 6)),
    "batch": lambda: {"input_ids": PADDED, "attention_mask": MARKS},
    "batch with labels": lambda: {"input_ids": 0 * PADDED, "labels": LABELS},
    "batch with unmasked labels": lambda: {"input_ids": PADDED, "labels": PADDED, "attention_mask": MARKS},
    "ragged batch": lambda: {"input_ids": ROWS, "attention_mask": [[1] * len(row) for row in ROWS]},
    "rows": lambda: [{"input_ids": row, "attention_mask": None} for row in ROWS],
    "data set": Rows,
    "data set of tensors": lambda: Rows(torch.tensor),
    "subset": lambda: Subset(Rows(rows=ROWS * 2), range(40)),
    "concat": lambda: ConcatDataset([Rows(rows=ROWS[:9]), Rows(rows=ROWS[9:])]),
    "tensor data set": lambda: TensorDataset(LABELS),
    "stream": Stream,
    "loader": lambda: DataLoader(Rows(), batch_size=7, shuffle=True, drop_last=True, collate_fn=pad),
    "loader of tensors": lambda: DataLoader(TensorDataset(LABELS), batch_size=7),
    "loader of a part": lambda: DataLoader(
        Rows(rows=ROWS * 2), batch_size=7, sampler=SubsetRandomSampler(range(40)), collate_fn=pad
    ),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=7, collate_fn=pad),
    "loader with workers": lambda: DataLoader(Rows(), batch_size=20, collate_fn=pad, num_workers=1),
    "store": lambda: Store({"text": None, "input_ids": ROWS, "attention_mask": [[1] * len(row) for row in ROWS]}),
    "store of arrays": lambda: Store({"input_ids": RAGGED}),
    "streamed store": lambda: Store({"input_ids": ROWS, "text": None}, sized=False),
    "streamed store, columns unknown": lambda: Store({"input_ids": ROWS, "text": ROWS}, sized=False, known=False),
    "store with a transform": lambda: Store({"ids": ROWS}, style="custom"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_counts_equal_numpy(kind):
    counts = token_counts(SOURCES[kind](), V)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, TRUE)


def test_counts_are_those_of_class_counts():
    assert torch.equal(token_counts(LABELS, V), class_counts(LABELS, num_classes=V))


def test_the_default_column_is_what_is_predicted():
    batch = {"input_ids": PADDED, "labels": LABELS.flip(0), "attention_mask": 0 * MARKS}
    assert torch.equal(token_counts(batch, V), TRUE)  # a decoder's labels: the mask is about the other side
    assert torch.equal(token_counts({**batch, "attention_mask": MARKS}, V, column="input_ids"), TRUE)
    with pytest.raises(ValueError, match="found no token to count"):
        token_counts(batch, V, column="input_ids")
    assert torch.equal(token_counts({"x": LABELS}, V, column="x"), TRUE)
    for data in (TensorDataset(PADDED, LABELS), DataLoader(TensorDataset(PADDED, LABELS), batch_size=6)):
        assert torch.equal(token_counts(data, V, column=1), TRUE)


def test_only_the_columns_needed_are_read():
    marks = [[1] * len(row) for row in ROWS]
    for columns, column, asked in (
        ({"input_ids": ROWS, "text": None}, None, ["input_ids"]),
        ({"input_ids": ROWS, "attention_mask": marks, "text": None}, None, ["input_ids", "attention_mask"]),
        ({"labels": ROWS, "input_ids": ROWS}, None, ["labels"]),
        ({"labels": ROWS, "input_ids": ROWS, "attention_mask": marks}, None, ["labels", "input_ids", "attention_mask"]),
        ({"labels": None, "mine": ROWS}, "mine", ["mine"]),
    ):
        store = Store(columns)
        assert torch.equal(token_counts(store, V, column=column), TRUE)
        assert store.asked == asked


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    marks = [[1] * (len(row) - len(row) // 3) + [0] * (len(row) // 3) for row in ROWS]
    kept = [row[: len(row) - len(row) // 3] for row in ROWS]
    data = datasets.Dataset.from_dict({"text": [" ".join(map(str, row)) for row in ROWS], "input_ids": ROWS})
    masked = data.add_column("attention_mask", marks)
    expected = torch.from_numpy(np.bincount(np.concatenate(kept), minlength=V))
    assert torch.equal(token_counts(data, V), TRUE)
    assert torch.equal(token_counts(data.shuffle(seed=1).select(range(40)), V), TRUE)
    assert torch.equal(token_counts(data.with_format("torch"), V), TRUE)
    assert torch.equal(token_counts(masked, V), expected)
    assert torch.equal(token_counts(masked.add_column("labels", ROWS), V), expected)
    assert torch.equal(token_counts(masked.to_iterable_dataset(), V), expected)
    assert torch.equal(token_counts(DataLoader(data, batch_size=6, collate_fn=pad), V), TRUE)
    stream = datasets.IterableDataset.from_generator(lambda: ({"input_ids": row} for row in ROWS))
    assert torch.equal(token_counts(stream, V), TRUE)
    assert torch.equal(token_counts(stream.map(lambda row: {"labels": row["input_ids"]}), V), TRUE)
    words = data.select_columns(["text"]).with_transform(
        lambda block: {"input_ids": [[int(word) for word in text.split()] for text in block["text"]]}
    )
    assert torch.equal(token_counts(words, V), TRUE)
    with pytest.raises(TypeError, match=r"is not in a DatasetDict with keys \['train'\]"):
        token_counts(datasets.DatasetDict(train=data), V)


def test_a_memory_mapped_file(tmp_path):
    path = tmp_path / "tokens.bin"
    FLAT.astype(np.uint16).tofile(path)
    assert torch.equal(token_counts(np.memmap(path, np.uint16, "r"), V), TRUE)


def test_large_pieces_are_cut_and_many_small_ones_counted_together():
    long = np.resize(FLAT, 2**20 + 17)
    assert torch.equal(token_counts(long, V), torch.from_numpy(np.bincount(long, minlength=V)))
    assert torch.equal(token_counts((i % V for i in range(9999)), V), torch.full((V,), 1111))
    rows = ([i % V, 0] for i in range(4500))
    assert torch.equal(token_counts(rows, V), torch.tensor([5000] + [500] * (V - 1)))


def test_excluded_ids_count_nothing():
    expected = TRUE.clone()
    expected[[0, 3]] = 0
    for ids in ([0, 3], {0, 3}, torch.tensor([3, 0]), (0, 3, 8)):
        assert torch.equal(token_counts(ROWS, V, exclude=ids), expected)
    assert torch.equal(token_counts(FLAT, V, ignore_index=5)[5:6], torch.tensor([0]))


@pytest.mark.parametrize("most", [1, 17, len(FLAT), 10**6])
def test_counting_stops_after_max_tokens(most):
    assert torch.equal(token_counts(ROWS, V, max_tokens=most), torch.from_numpy(np.bincount(FLAT[:most], minlength=V)))
    rest = FLAT[FLAT != 3][:most]
    assert torch.equal(
        token_counts(LABELS, V, exclude=[3], max_tokens=most), torch.from_numpy(np.bincount(rest, minlength=V))
    )


def test_no_more_is_read_than_counted():
    rows = iter(ROWS)
    token_counts(rows, V, max_tokens=len(ROWS[0]) + 1)
    assert list(rows) == ROWS[2:]
    endless = iter(lambda: [1, 2], None)
    assert token_counts(endless, V, max_tokens=1000).tolist() == [0, 500, 500, 0, 0, 0, 0, 0, 0]


def random_state():
    python, (_, keys, *rest) = random.getstate(), np.random.get_state()  # noqa: NPY002
    return python, keys.tolist(), rest, torch.get_rng_state().tolist()


def test_counting_leaves_the_random_state_alone():
    before = random_state()
    data = Rows()
    token_counts(DataLoader(data, batch_size=7, shuffle=True, collate_fn=pad), V)
    assert data.reads == 40
    assert random_state() == before


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([0, 9], {}, ValueError, r"token ids must be in \[0, 9\), got 9; vocab_size must be at least len\(tokenizer\)"),
        ([0, -1], {}, ValueError, r"token ids must be in \[0, 9\), got -1; is it the ignore_index\?"),
        ([-100, -100], {}, ValueError, r"found no token to count \(ignore_index=-100\)"),
        ([], {}, ValueError, "found no token to count"),
        (iter([]), {}, ValueError, "found no token to count"),
        ([[1, 2]], {"exclude": [1, 2]}, ValueError, "found no token to count"),
        ([1], {"exclude": [9]}, ValueError, r"exclude must hold ids in \[0, 9\), got 9"),
        ([1], {"exclude": [-1, 9]}, ValueError, r"exclude must hold ids in \[0, 9\), got -1"),
        ([1], {"max_tokens": 0}, ValueError, "max_tokens must be >= 1, got 0"),
        ([1.5], {}, TypeError, "token ids must be integers, got float"),
        ([True], {}, TypeError, "token ids must be integers, got list"),
        ([[0], ["a"]], {}, TypeError, "token ids must be integers, got str; tokenise the text first"),
        ([[0, 2**70]], {}, TypeError, "token ids must be integers, got list"),
        (torch.tensor([0.0]), {}, TypeError, "token ids must be integers, got torch.float32"),
        (torch.tensor([0.0]).bfloat16(), {}, TypeError, "token ids must be integers, got torch.bfloat16"),
        (torch.tensor([True]), {}, TypeError, "token ids must be integers, got torch.bool"),
        ("text", {}, TypeError, "data must be token ids, a dataset, a DataLoader or an iterable, got str"),
        (["text"], {}, TypeError, "token ids must be integers, got str; tokenise the text first"),
        (5, {}, TypeError, "data must be token ids, .* got int"),
        ({"text": ["a"]}, {}, TypeError, r"'labels' or 'input_ids' is not in a dict with keys \['text'\]"),
        ([{"labels": [1]}], {"column": "b"}, TypeError, r"'b' is not in a dict with keys \['labels'\]"),
        ([[1, 2]], {"column": "b"}, TypeError, "column='b' must name an entry of each row or batch, got list"),
        ([[1, 2]], {"column": 1}, TypeError, "column=1 must name an entry of each row or batch, got list"),
        (
            TensorDataset(PADDED, LABELS),
            {},
            TypeError,
            "cannot tell which of the 2 tensors of a tuple holds the labels; give column= its position",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            {},
            ValueError,
            "attention_mask must mark each of the 2 input_ids, got 1 entries",
        ),
        (
            DataLoader(Rows(), sampler=DistributedSampler(Rows(), num_replicas=2, rank=0)),
            {"sharded": True},
            ValueError,
            "sharded must not be True for a DataLoader with a DistributedSampler",
        ),
    ],
)
def test_errors_say_what_is_wrong(data, options, error, message):
    with pytest.raises(error, match=f"token_counts: .*{message}"):
        token_counts(data, V, **options)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.0, TypeError)])
def test_the_vocabulary_has_a_size(size, error):
    with pytest.raises(error, match="token_counts: vocab_size must be"):
        token_counts([0], size)


# several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(worker.__file__, 2, tmp_path_factory.mktemp("ranks"), "counting")


def test_ranks_add_their_shares(ranks):
    whole = torch.from_numpy(np.bincount(torch.cat(worker.TEXT).numpy(), minlength=worker.VOCAB))
    early = sum(torch.bincount(torch.cat(worker.TEXT[rank::2])[:4], minlength=worker.VOCAB) for rank in range(2))
    for rank in ranks:
        assert torch.equal(rank["added"], whole)
        assert torch.equal(rank["compared"], whole)
        assert torch.equal(rank["added, one rank empty"], whole)
        assert torch.equal(rank["added, stopped early"], early)


def test_ranks_that_differ_must_say_what_they_mean(ranks):
    own = torch.bincount(torch.cat(worker.TEXT[::2]), minlength=worker.VOCAB)
    assert torch.equal(ranks[0]["own"], own)
    for rank in ranks:
        assert rank["differ"].startswith("token_counts: ranks have read different text; sharded must be True")


def test_without_a_process_group_sharded_changes_nothing():
    for sharded in (None, True, False):
        assert torch.equal(token_counts(ROWS, V, sharded=sharded), TRUE)


# what power-law decay makes of counts

COUNTS = [50.0, 20.0, 6.0, 4.0]
LOGITS, TOKENS = CausalLM().example_inputs(6)
TORCH = LOGITS[:, :-1].reshape(-1, 4), TOKENS[:, 1:].reshape(-1)


@pytest.mark.parametrize("alpha", [0.25, 1.0, -0.5])
@pytest.mark.parametrize("normalize", ["none", "classes", "samples"])
def test_every_normalisation_is_torch_with_a_table(alpha, normalize):
    """Plain sum, mean over tokens, sum of weights; each with the table as it is or with mean 1."""
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    table = (counts + 1.0) ** -alpha
    if normalize == "classes":
        table = table / table.mean()
    if normalize == "samples":
        table = table / ((counts * table).sum() / counts.sum())
    found = PowerLawDecay(COUNTS, alpha=alpha, normalize=normalize).table()
    torch.testing.assert_close(found, table, rtol=1e-12, atol=0)
    total = cross_entropy(*TORCH, weight=table, reduction="sum")
    for reduction, expected in (
        ("sum", total),
        ("mean", total / TORCH[1].numel()),
        ("weighted_mean", cross_entropy(*TORCH, weight=table)),
    ):
        loss = PowerLawDecayLoss(COUNTS, alpha=alpha, normalize=normalize, reduction=reduction)
        torch.testing.assert_close(loss(LOGITS, TOKENS), expected, rtol=1e-12, atol=0)


def test_the_mean_weight_over_the_vocabulary_is_one():
    table = PowerLawDecay([9, 0, 3, 1], alpha=0.7, normalize="classes").table()
    assert table[[0, 2, 3]].mean().item() == pytest.approx(1.0, rel=1e-12)
    assert table[1] == table.max()


@pytest.mark.parametrize("normalize", ["classes", "samples"])
def test_frequencies_with_eps_scaled_are_counts(normalize):
    shares = [count / 80.0 for count in COUNTS]
    by_count = PowerLawDecay(COUNTS, alpha=0.6, eps=2.0, normalize=normalize)
    by_share = PowerLawDecay(shares, alpha=0.6, eps=2.0 / 80.0, normalize=normalize)
    torch.testing.assert_close(by_share.table(), by_count.table(), rtol=1e-12, atol=0)
    plain = PowerLawDecay(shares, alpha=0.6, eps=2.0 / 80.0).table()
    torch.testing.assert_close(plain, 80.0**0.6 * PowerLawDecay(COUNTS, alpha=0.6, eps=2.0).table(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bounds", [{"max": 0.15}, {"min": 0.05}, {"min": 0.05, "max": 0.15}])
def test_weights_may_be_held_in_a_range(bounds):
    table = PowerLawDecay(COUNTS).table().clamp(**bounds)
    loss = Objective(CausalLM(), PowerLawDecay(COUNTS).clip(**bounds), "weighted_mean")
    torch.testing.assert_close(loss(LOGITS, TOKENS), cross_entropy(*TORCH, weight=table), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", ["none", "classes", "samples"])
def test_neutral_ids_weigh_what_the_counted_text_weighs_on_average(normalize):
    """And change nothing else, whatever their own count was."""
    plain = PowerLawDecay([50, 20, 6], alpha=0.5, normalize=normalize).table()
    mean = (torch.tensor([50.0, 20.0, 6.0]) * plain).sum() / 76
    for count in (0, 1, 1000):
        table = PowerLawDecay([50, count, 20, 6], alpha=0.5, normalize=normalize, neutral=[1]).table()
        torch.testing.assert_close(table[[0, 2, 3]], plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(table[1], mean, rtol=1e-12, atol=0)
    if normalize == "samples":
        assert mean.item() == pytest.approx(1.0, rel=1e-12)


def test_excluded_and_neutral_belong_together():
    """A special token that the count left out is otherwise the heaviest of all."""
    text = [[0, 1, 2, 2, 1, 2, 7], [0, 2, 2, 3, 7]]
    counts = token_counts(text, 8, exclude=[0, 7])
    alone, both = (PowerLawDecay(counts, alpha=0.5, neutral=ids).table() for ids in ([], [0, 7]))
    assert alone[7] == alone.max() > 1.4 * alone[3]
    assert both[2] < both[7] == both[0] < both[3]
    loss = PowerLawDecayLoss(counts, alpha=0.5, neutral={0, 7}, shift=False)
    logits, labels = torch.randn(1, 4, 8, dtype=torch.float64), torch.tensor([[0, 2, 3, 7]])
    torch.testing.assert_close(loss(logits, labels), cross_entropy(logits[0], labels[0], weight=both))


def test_neutral_ids_wait_for_counts_move_and_conform():
    late, now = PowerLawDecay(neutral=[3, 1]), PowerLawDecay(COUNTS, neutral=torch.tensor([1, 3, 3]))
    late.update("fit", class_counts=COUNTS)
    assert torch.equal(late.table(), now.table())
    assert now.half().table().dtype == torch.float64
    assert eval(repr(now), {"PowerLawDecay": PowerLawDecay}).neutral.tolist() == [1, 3]
    check_weighting(PowerLawDecay(COUNTS, alpha=0.5, neutral=[1]))
    check_weighting(PowerLawDecay(alpha=0.5, neutral=[1], normalize="samples"))


def test_shorter_counts_are_continued_to_the_width_of_the_logits():
    counts = token_counts(ROWS, V)
    loss = PowerLawDecayLoss(counts, alpha=0.5, num_classes=16)
    logits, labels = torch.randn(4, 5, 16, dtype=torch.float64), torch.randint(V, (4, 5))
    table = torch.cat([counts, torch.zeros(16 - V, dtype=torch.int64)]).double().add(1).pow(-0.5)
    wide = token_counts(ROWS, 16)  # the same by counting with the wide vocabulary
    expected = cross_entropy(logits[:, :-1].reshape(-1, 16), labels[:, 1:].reshape(-1), weight=table)
    torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-12, atol=0)
    assert torch.equal(PowerLawDecay(wide, alpha=0.5).table(), loss.weighting.table())
    for normalize in ("classes", "samples"):
        narrow, padded = (PowerLawDecay(counts, normalize=normalize, num_classes=size).table() for size in (None, 16))
        assert torch.equal(padded[:V], narrow)
    with pytest.raises(ValueError, match="has 9 class weights, but the criterion has 16 classes"):
        PowerLawDecayLoss(counts)(logits, labels)


def test_counts_that_come_later_are_continued_and_saved():
    waiting = PowerLawDecay(num_classes=6)
    waiting.update("fit", class_counts=COUNTS)
    assert waiting.counts().tolist() == [*COUNTS, 0.0, 0.0]
    again = PowerLawDecay(num_classes=6)
    again.load_state_dict(waiting.state_dict())
    assert torch.equal(again.table(), waiting.table())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"counts": [1, 2, 3], "num_classes": 2}, ValueError, "counts must have num_classes=2 entries, got 3"),
        ({"counts": [1, 2], "neutral": [2]}, ValueError, r"neutral must hold ids in \[0, 2\), got 2"),
        ({"counts": [1, 2], "neutral": [-1]}, ValueError, "neutral must hold ids >= 0, got -1"),
        ({"counts": [1, 2], "neutral": [1.0]}, TypeError, r"neutral must hold token ids, got 1.0 \(float\)"),
        ({"counts": [1, 0], "neutral": [0]}, ValueError, "counts must count a token that is not neutral, got none"),
        (
            {"counts": [0, 0], "num_classes": 3},
            ValueError,
            "counts must hold at least one positive number, got all zeros",
        ),
    ],
)
def test_decay_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=f"PowerLawDecay: {message}"):
        PowerLawDecay(**arguments)


def test_late_counts_say_what_is_wrong():
    with pytest.raises(ValueError, match="PowerLawDecay: class_counts must count a token that is not neutral"):
        PowerLawDecay(neutral=[0]).update("fit", class_counts=[5, 0])
