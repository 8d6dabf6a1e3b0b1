"""Class counts of any data: labels, datasets, loaders. Needs no Lightning."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from .config import check_whole

Labels = str | int | Callable[[Any], Any] | None
"""Where labels stand: a dotted name, a position, a function of the batch, or ``None`` for the usual places."""

_ATTRIBUTES = ("targets", "labels")
_KEYS = ("labels", "label", "targets", "target", "y")
_LARGEST_CLASS = 2**24


def class_counts(
    data: Any,
    *,
    num_classes: int | None = None,
    labels: Labels = None,
    ignore_index: int = -100,
    multilabel: bool | None = None,
) -> Tensor:
    """How often each class occurs; the same numbers as ``numpy.bincount``.

    Integer targets of any shape count classes (samples, tokens, pixels). Floating or bool targets ``(N, L, ...)`` are
    multi-hot or soft: each label's (or class's) positives are added up.

    Args:
        data: Labels themselves (tensor, array or sequence of numbers), a dataset, a ``DataLoader``, or a list or dict
            of loaders, which are counted together. Labels that a dataset holds as a whole (``targets``, ``labels``, the
            last tensor of a ``TensorDataset``; through ``Subset`` and ``ConcatDataset``) are read at once; otherwise
            the data set is read from start to end, with the loader's ``collate_fn`` and workers but not its sampler (a
            ``SubsetRandomSampler``'s indices are respected).
        num_classes: Length of the result; ``None`` for the largest class found plus 1. Name it where the last classes
            may have no sample.
        labels: Where to find labels: a dotted name (attribute of the dataset, else key or attribute of the batch), a
            position in the batch, or a function of the batch. ``None``: the last element of a tuple, or the entry
            ``labels``, ``label``, ``targets``, ``target`` or ``y`` of a dict.
        ignore_index: Entries that do not count.
        multilabel: Whether targets are multi-hot; ``None`` to go by their dtype.

    Returns:
        ``(C,)`` int64; float64 for floating targets.

    Raises:
        TypeError: If labels are not numbers, or not where they are looked for.
        ValueError: If a class is negative or beyond ``num_classes``, if nothing is left to count, or if integer targets
            ``(N, L)`` of zeros and ones leave open whether they are multi-hot.

    The global random state (Python, numpy, torch, CUDA) is left as it was.

    Example:
        >>> import torch
        >>> class_counts(torch.tensor([0, 2, 2, -100]), num_classes=4)
        tensor([1, 0, 2, 0])
        >>> class_counts([[1.0, 0.0], [1.0, 1.0]])
        tensor([2., 1.], dtype=torch.float64)
    """
    tally = Tally(num_classes, ignore_index, multilabel)
    with same_random_state():
        visit(data, labels, tally)
    return tally.result()


# from data to targets


def visit(data: Any, labels: Labels, tally: Tally) -> None:
    """Add all targets of the data to a tally."""
    if isinstance(data, (Mapping, list, tuple)) or hasattr(data, "flattened"):
        parts = list(loaders(data))
        if parts and all(isinstance(part, DataLoader) for part in parts):
            for part in parts:
                _visit_loader(part, labels, tally)
            return
    if isinstance(data, DataLoader):
        _visit_loader(data, labels, tally)
        return
    if isinstance(data, (Tensor, np.ndarray)) or _is_numbers(data):
        tally.add(_as_targets(data))
        return
    stored = _stored(data, labels)
    if stored is not None:
        tally.add(stored)
        return
    for sample in _samples(data):
        tally.add(_as_targets(_pick(sample, labels)).unsqueeze(0))


def _visit_loader(loader: DataLoader[Any], labels: Labels, tally: Tally) -> None:
    indices = subset_of(loader)
    stored = _stored(loader.dataset, labels)
    if stored is not None:
        tally.add(stored if indices is None else stored[torch.as_tensor(indices)])
        return
    if isinstance(loader.dataset, IterableDataset):
        _check_rereadable(loader.dataset)
    for batch in in_order(loader):
        tally.add(_as_targets(_pick(batch, labels)))


def in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same data from start to end, with its collate function and workers but not its sampler.

    A ``SubsetRandomSampler``'s indices are respected.
    """
    dataset, indices = loader.dataset, subset_of(loader)
    if indices is not None and not isinstance(dataset, IterableDataset):
        dataset = Subset(dataset, indices)
    unbatched = loader.batch_size is None and loader.batch_sampler is None
    return DataLoader(
        dataset,
        batch_size=None if unbatched else loader.batch_size or 64,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def subset_of(loader: DataLoader[Any]) -> list[int] | None:
    """The part of the data set that a subset sampler leaves."""
    for holder in (loader, loader.batch_sampler):
        sampler = getattr(holder, "sampler", None)
        if isinstance(sampler, SubsetRandomSampler):
            return [int(i) for i in sampler.indices]
    return None


def _stored(data: Any, labels: Labels) -> Tensor | None:
    """All labels of a data set that holds them as a whole, else ``None``."""
    if isinstance(data, IterableDataset):
        return None
    if isinstance(data, Subset):
        inner = _stored(data.dataset, labels)
        return None if inner is None else inner[torch.as_tensor(list(data.indices), dtype=torch.long)]
    if isinstance(data, ConcatDataset):
        parts = [_stored(part, labels) for part in data.datasets]
        known = [part for part in parts if part is not None]
        alike = len({(part.dtype, part.shape[1:]) for part in known}) == 1
        return torch.cat(known) if known and len(known) == len(parts) and alike else None
    if isinstance(data, TensorDataset) and (labels is None or isinstance(labels, int)):
        return data.tensors[-1 if labels is None else labels].detach().cpu()
    if callable(labels) or isinstance(labels, int) or getattr(data, "target_transform", None) is not None:
        return None  # what is stored is not what training sees
    for name in _ATTRIBUTES if labels is None else (labels,):
        targets = _attribute(data, name)
        if targets is not None and targets.ndim and len(targets) == len(data):
            return targets
    return None


def _attribute(data: Any, name: str) -> Tensor | None:
    try:
        return _as_targets(_follow(data, name, keys=False))
    except (AttributeError, TypeError):
        return None


def _samples(data: Any) -> Iterator[Any]:
    if isinstance(data, IterableDataset) or (isinstance(data, Iterable) and not hasattr(data, "__getitem__")):
        _check_rereadable(data)
        yield from data
        return
    try:
        size = len(data)
    except TypeError as error:
        raise TypeError(
            f"class_counts: data must be labels, a dataset or a DataLoader, got {type(data).__name__}"
        ) from error
    for i in range(size):
        yield data[i]


def _check_rereadable(data: Any) -> None:
    if iter(data) is data:
        raise ValueError(
            f"class_counts: {type(data).__name__} can be read only once, and counting would leave nothing for "
            "training; give the weighting its counts=, or make __iter__ return a new iterator"
        )


def _pick(batch: Any, labels: Labels) -> Any:
    if callable(labels):
        return labels(batch)
    if isinstance(labels, int):
        return batch[labels]
    if isinstance(labels, str):
        try:
            return _follow(batch, labels, keys=True)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise TypeError(
                f"class_counts: labels={labels!r} is found neither on the dataset nor in a batch of type "
                f"{type(batch).__name__}{_names(batch)}"
            ) from error
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]
    if isinstance(batch, Mapping):
        for key in _KEYS:
            if key in batch:
                return batch[key]
    raise TypeError(
        f"class_counts: cannot tell where the labels are in a batch of type {type(batch).__name__}{_names(batch)}; "
        "name them with labels= (a key, a position or a function of the batch)"
    )


def _names(batch: Any) -> str:
    return f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""


def _follow(root: Any, dotted: str, *, keys: bool) -> Any:
    def step(thing: Any, name: str) -> Any:
        if keys and isinstance(thing, Mapping):
            return thing[name]
        if keys and isinstance(thing, Sequence) and name.lstrip("-").isdigit():
            return thing[int(name)]
        return getattr(thing, name)

    return reduce(step, dotted.split("."), root)


def _is_numbers(data: Any) -> bool:
    if not isinstance(data, (list, tuple, range)) or not data:
        return False
    first = data[0]
    while isinstance(first, list) and first:  # rows of labels; tuples are samples
        first = first[0]
    return isinstance(first, (bool, int, float, np.number))


def _as_targets(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.from_numpy(np.ascontiguousarray(value)) if _numeric(value) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_counts: labels must be numbers, got {type(value).__name__}") from error


def _numeric(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf"


# from targets to counts


class Tally:
    """Adds up targets, batch by batch."""

    def __init__(self, num_classes: int | None, ignore_index: int, multilabel: bool | None) -> None:
        self.num_classes = (
            None if num_classes is None else check_whole("class_counts", "num_classes", num_classes, low=1)
        )
        self.ignore_index = ignore_index
        self.multilabel = multilabel
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.width: int | None = None
        self.soft = False
        self.binary_rows = False

    def add(self, target: Tensor) -> None:
        if target.is_complex():
            raise TypeError(f"class_counts: labels must be real numbers, got {target.dtype}")
        if not target.numel():
            return
        wide = target.ndim >= 2
        columns = self.multilabel
        if columns is None:
            columns = wide and (target.dtype == torch.bool or target.is_floating_point())
        if columns and not wide:
            raise ValueError(f"class_counts: multilabel targets must be (N, L), got shape {tuple(target.shape)}")
        if columns:
            self._grow(self._columns(target))
        else:
            self._grow(self._indices(target))

    def _columns(self, target: Tensor) -> Tensor:
        if self.width not in (None, target.shape[1]):
            raise ValueError(
                f"class_counts: targets have {self.width} and {target.shape[1]} labels in different batches"
            )
        self.width = target.shape[1]
        self.soft = self.soft or target.is_floating_point()
        values = target.double()
        values = torch.where(values == self.ignore_index, 0.0, values)
        if bool(((values < 0) | (values > 1) | values.isnan()).any()):
            raise ValueError(
                f"class_counts: multi-hot targets must be in [0, 1], got {values.min():g}..{values.max():g}; "
                "pass multilabel=False if they are class numbers"
            )
        return values.movedim(1, -1).reshape(-1, self.width).sum(0)

    def _indices(self, target: Tensor) -> Tensor:
        if target.is_floating_point() and bool((target != target.round()).any()):
            raise TypeError("class_counts: labels must be classes, got fractions (regression targets have no classes)")
        valid = target.reshape(-1).long()
        valid = valid[valid != self.ignore_index]
        if not valid.numel():
            return self.counts.new_zeros(0)
        low, high = int(valid.min()), int(valid.max())
        limit = self.num_classes or _LARGEST_CLASS
        if low < 0 or high >= limit:
            wrong, hint = (low, "; is it the ignore_index?") if low < 0 else (high, "")
            raise ValueError(f"class_counts: classes must be in [0, {limit}), got {wrong}{hint}")
        self.binary_rows = self.binary_rows or (target.ndim == 2 and target.shape[1] > 1)
        return torch.bincount(valid).double()

    def _grow(self, part: Tensor) -> None:
        if part.numel() > self.counts.numel():
            part, self.counts = self.counts, part.clone()
        self.counts[: part.numel()] += part

    def result(self) -> Tensor:
        if not bool((self.counts > 0).any()):
            raise ValueError(f"class_counts: found no label to count (ignore_index={self.ignore_index})")
        if self.multilabel is None and self.width is None and self.binary_rows and self.counts.numel() <= 2:
            raise ValueError(
                "class_counts: integer targets (N, L) of zeros and ones may be multi-hot or class numbers; "
                "pass multilabel=True or multilabel=False"
            )
        if self.width is not None and self.num_classes not in (None, self.width):
            raise ValueError(f"class_counts: num_classes={self.num_classes}, but targets have {self.width} labels")
        if self.num_classes is not None:
            self._grow(self.counts.new_zeros(self.num_classes))
        return self.counts.clone() if self.soft else self.counts.round().long()


# what must not change


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave the global random state as it was."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def loaders(data: Any) -> Iterable[Any]:
    """The loaders in what Lightning calls a collection of dataloaders."""
    if isinstance(data, Mapping):
        data = list(data.values())
    elif hasattr(data, "flattened"):  # CombinedLoader
        data = data.flattened
    if isinstance(data, (list, tuple)):
        for part in data:
            yield from loaders(part)
    elif data is not None:
        yield data
