"""How often each token occurs in a text, in constant memory. Needs no tokenizer and no data library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from .config import check_whole
from .counting import _is_numbers, _names, in_order, same_random_state

Ids = NDArray[Any]

_LABELS, _INPUTS, _MASK = "labels", "input_ids", "attention_mask"
_PIECE = 2**20  # ids looked at together
_PARTS = 4096  # arrays kept before they are counted
_ROWS = 1000  # rows of a table read together


def token_counts(
    data: Any,
    vocab_size: int,
    *,
    column: str | int | None = None,
    ignore_index: int = -100,
    exclude: Iterable[int] = (),
    max_tokens: int | None = None,
    sharded: bool | None = None,
) -> Tensor:
    """How often each token id occurs; the same numbers as ``numpy.bincount``.

    The text streams through a tally of ``vocab_size`` numbers, so it may be larger than memory, and a generator that
    can be read only once is used up.

    Special tokens count like any other: an end-of-sequence token that the model is trained to predict has the weight
    of its true frequency. ``exclude`` leaves ids out, as in a text that was tokenised without special tokens; their
    count of 0 then means "never seen", which is the *largest* weight of
    :class:`~reweigh.weighting.PowerLawDecay`, so name the same ids as its ``neutral=``.

    Args:
        data: Token ids as a tensor, array (memory-mapped too) or list; an iterable of token-id sequences or of batches;
            a batch; a ``DataLoader`` (read from start to end with its ``collate_fn`` and workers, not its sampler); a
            ``Dataset`` or ``IterableDataset`` of torch or of Hugging Face ``datasets``, whose columns are read in
            blocks. Of batches and rows that are dicts, ``labels`` are counted, else ``input_ids``. ``attention_mask``
            takes away entries of ``input_ids``, and of any other column that repeats ``input_ids`` (it says nothing
            about a decoder's labels).
        vocab_size: Number of ids, at least ``len(tokenizer)``: ``tokenizer.vocab_size`` leaves out added tokens. Where
            the model pads its vocabulary, give the width of its logits; ids that do not occur count 0.
        column: What to count instead: the key of a dict, or the position in a tuple or list of tensors.
        ignore_index: Entries that do not count.
        exclude: Ids whose count is to be 0, such as ``tokenizer.all_special_ids``.
        max_tokens: Stop after so many tokens that count, on each rank.
        sharded: Whether each rank of a process group reads its own share, so that counts are added over ranks:
            ``True`` adds, ``False`` takes this process's counts without communication, ``None`` compares the ranks and
            raises where they differ. All but ``False`` must be called on every rank. Without a process group it makes
            no difference.

    Returns:
        ``(V,)`` int64, on the CPU.

    Raises:
        TypeError: If what is found are not token ids, or no column can be told.
        ValueError: If an id is negative or beyond ``vocab_size``, if nothing is left to count, or if ranks differ.

    The global random state (Python, numpy, torch, CUDA) is left as it was.

    Example:
        >>> token_counts([[2, 0, 0], [1, -100]], 4)
        tensor([2, 1, 1, 0])
        >>> token_counts([{"input_ids": [3, 1, 0], "attention_mask": [1, 1, 0]}], 4, exclude=[3])
        tensor([0, 1, 0, 0])
    """
    tally = _Tally(vocab_size, ignore_index, exclude, max_tokens)
    if sharded and isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler):
        raise ValueError(
            "token_counts: sharded must not be True for a DataLoader with a DistributedSampler, which is read without "
            "its sampler, whole on each rank; got sharded=True"
        )
    with same_random_state():
        for ids, marks in _entries(data, column, ignore_index):
            tally.add(ids, marks)
            if tally.full:
                break
    counts = _over_ranks(tally.result(), sharded)
    if not bool(counts.any()):
        raise ValueError(f"token_counts: found no token to count (ignore_index={ignore_index})")
    return counts


# from data to arrays of ids


def _entries(data: Any, column: str | int | None, ignore_index: int) -> Iterator[tuple[Ids, Ids | None]]:
    """Flat ids, and where they count (``None``: everywhere)."""
    if isinstance(data, (Tensor, np.ndarray)) or _is_numbers(data):
        yield _ids(_chosen(data, column)), None
        return
    for element in _elements(data, column):
        if isinstance(element, Mapping):
            yield _of_batch(element, column, ignore_index)
        else:
            yield _ids(_chosen(element, column)), None


def _elements(data: Any, column: str | int | None) -> Iterator[Any]:
    if isinstance(data, Mapping):
        yield data
    elif isinstance(data, DataLoader):
        yield from in_order(data)
    elif hasattr(data, "column_names") and hasattr(data, "with_format"):
        yield from _blocks(data, column)
    elif isinstance(data, TensorDataset):
        yield data.tensors
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        yield from (data[i] for i in range(len(data)))  # type: ignore[arg-type]  # map-style ones have a length
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        yield from data
    else:
        raise TypeError(
            f"token_counts: data must be token ids, a dataset, a DataLoader or an iterable, got {type(data).__name__}"
        )


def _blocks(data: Any, column: str | int | None) -> Iterable[Any]:
    """Rows of a column store, many at once and only the columns needed, where it can do that."""
    names = data.column_names
    on_the_fly = (getattr(data, "format", None) or {}).get("type") == "custom"  # its columns are not what rows hold
    wanted = [] if names is None or on_the_fly else _needed(names, column)
    if wanted and hasattr(data, "__len__"):
        data = data.with_format("numpy", columns=wanted)
    elif wanted and hasattr(data, "select_columns"):
        data = data.select_columns(wanted)
    return data.iter(batch_size=_ROWS) if hasattr(data, "iter") else data  # type: ignore[no-any-return]


def _needed(names: Sequence[str], column: str | int | None) -> list[str]:
    counted = _column(names, column)
    if counted is None:
        return []
    masked = _MASK in names and _INPUTS in names
    return [counted, *(name for name in (_INPUTS, _MASK) if masked and name != counted)]


def _column(names: Iterable[str], column: str | int | None) -> str | None:
    present = list(names)
    return next((name for name in ((_LABELS, _INPUTS) if column is None else (column,)) if name in present), None)


def _of_batch(batch: Mapping[str, Any], column: str | int | None, ignore_index: int) -> tuple[Ids, Ids | None]:
    counted = _column(batch, column)
    if counted is None:
        wish = f"{_LABELS!r} or {_INPUTS!r}" if column is None else repr(column)
        raise TypeError(
            f"token_counts: column must name token ids; {wish} is not in a {type(batch).__name__}{_names(batch)}"
        )
    ids = _ids(batch[counted])
    if batch.get(_MASK) is None or batch.get(_INPUTS) is None:
        return ids, None
    marks = _integers(batch[_MASK], _MASK, "biu") != 0
    if counted != _INPUTS:
        inputs = _ids(batch[_INPUTS])
        aligned = inputs.size == ids.size == marks.size
        return ids, marks if aligned and bool(((inputs == ids) | (ids == ignore_index)).all()) else None
    if marks.size != ids.size:
        raise ValueError(f"token_counts: {_MASK} must mark each of the {ids.size} {_INPUTS}, got {marks.size} entries")
    return ids, marks


def _chosen(element: Any, column: str | int | None) -> Any:
    several = isinstance(element, (tuple, list)) and any(isinstance(part, (Tensor, np.ndarray)) for part in element)
    if isinstance(column, str) or (column is not None and not several):
        raise TypeError(
            f"token_counts: column={column!r} must name an entry of each row or batch, got {type(element).__name__}"
        )
    if several and column is not None:
        return element[column]
    if several and len(element) > 1:
        raise TypeError(
            f"token_counts: cannot tell which of the {len(element)} tensors of a {type(element).__name__} holds the "
            "labels; give column= its position, or an iterable of its rows if all are text"
        )
    return element


def _ids(value: Any) -> Ids:
    return _integers(value, "token ids", "iu")


def _integers(value: Any, what: str, kinds: str) -> Ids:
    """Any nesting of sequences, arrays and tensors as one flat array."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.detach().cpu()
        found = found.numpy() if found.dtype != torch.bfloat16 else found.float().numpy()
    elif isinstance(value, (int, np.integer)):
        found = np.asarray([value])
    if isinstance(found, np.ndarray) and found.dtype != object:
        if found.dtype.kind in kinds or not found.size:
            return found.reshape(-1)
    elif isinstance(found, (Sequence, np.ndarray)) and not isinstance(found, (str, bytes)):
        if not len(found):
            return np.zeros(0, np.int64)
        if not isinstance(found[0], (int, np.integer)):
            return np.concatenate([_integers(part, what, kinds) for part in found])
        try:
            flat = np.asarray(found if isinstance(found, np.ndarray) else list(found))
        except (ValueError, OverflowError):
            flat = np.zeros(1, object)
        if flat.dtype.kind in kinds:
            return flat
    kind = getattr(value, "dtype", None) or type(value).__name__
    hint = "; tokenise the text first" if isinstance(value, (str, bytes)) else ""
    raise TypeError(f"token_counts: {what} must be integers, got {kind}{hint}")


# from ids to counts


class _Tally:
    """Counts ids piece by piece; small arrays are counted together."""

    def __init__(self, vocab_size: int, ignore_index: int, exclude: Iterable[int], max_tokens: int | None) -> None:
        self.vocab_size = check_whole("token_counts", "vocab_size", vocab_size, low=1)
        self.left = None if max_tokens is None else check_whole("token_counts", "max_tokens", max_tokens, low=1)
        self.ignore_index = ignore_index
        self.counts = np.zeros(vocab_size, np.int64)
        self._waiting: list[Ids] = []
        self._size = 0
        self._kept: Ids | None = None
        dropped = [int(i) for i in exclude]
        if dropped:
            if min(dropped) < 0 or max(dropped) >= vocab_size:
                wrong = min(dropped) if min(dropped) < 0 else max(dropped)
                raise ValueError(f"token_counts: exclude must hold ids in [0, {vocab_size}), got {wrong}")
            self._kept = np.ones(vocab_size, bool)
            self._kept[dropped] = False

    @property
    def full(self) -> bool:
        return self.left == 0

    def add(self, ids: Ids, marks: Ids | None) -> None:
        for start in range(0, ids.size, _PIECE):
            if self.full:
                return
            part = slice(start, start + _PIECE)
            self._add(ids[part].astype(np.int64, copy=False), None if marks is None else marks[part])

    def _add(self, ids: Ids, marks: Ids | None) -> None:
        valid = ids != self.ignore_index
        ids = ids[valid if marks is None else valid & marks]
        if not ids.size:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            hint = (
                "is it the ignore_index?"
                if low < 0
                else "vocab_size must be at least len(tokenizer), which, unlike tokenizer.vocab_size, has added tokens"
            )
            raise ValueError(
                f"token_counts: token ids must be in [0, {self.vocab_size}), got {low if low < 0 else high}; {hint}"
            )
        if self._kept is not None:
            ids = ids[self._kept[ids]]
        if self.left is not None:
            ids = ids[: self.left]
            self.left -= ids.size
        self._waiting.append(ids)
        self._size += ids.size
        if self._size >= _PIECE or len(self._waiting) >= _PARTS:
            self._settle()

    def _settle(self) -> None:
        if self._waiting:
            self.counts += np.bincount(np.concatenate(self._waiting), minlength=self.vocab_size)
        self._waiting, self._size = [], 0

    def result(self) -> Tensor:
        self._settle()
        return torch.from_numpy(self.counts)


def _over_ranks(counts: Tensor, sharded: bool | None) -> Tensor:
    """These counts, or all ranks' together where each has read its own share."""
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    if alone or sharded is False:
        return counts
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else counts.device
    if sharded:
        total = counts.to(device)
        dist.all_reduce(total)
        return total.cpu()
    edges = torch.cat([counts, -counts]).to(device)
    dist.all_reduce(edges, op=dist.ReduceOp.MAX)
    most, least = edges.cpu().chunk(2)
    if not torch.equal(most, -least):
        raise ValueError(
            "token_counts: ranks have read different text; sharded must be True (add their counts) or False (each "
            "keeps its own), got None"
        )
    return counts
