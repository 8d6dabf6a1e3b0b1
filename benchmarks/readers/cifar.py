"""CIFAR-10 and CIFAR-100 from the pickles of their authors, and the long-tailed selections made from them."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .common import DataError, check_folder, check_present, read_bytes, shown

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

_FOLDER = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
_FILES = {
    10: {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    100: {"train": ["train"], "test": ["test"]},
}
_LABELS = {10: "labels", 100: "fine_labels"}
_PIXELS = 3 * 32 * 32


def read_cifar(root: Path, classes: int) -> dict[str, tuple[Images, Labels]]:
    """Images ``(N, 32, 32, 3)`` and labels ``(N,)`` (for CIFAR-100 the fine ones), under "train" and "test".

    The pickles are read by an unpickler that knows lists, dicts, texts, numbers and arrays of bytes, and nothing else:
    a file that names any other object is refused, and nothing that it names is imported or run.

    Args:
        root: The folder ``cifar-10-batches-py`` or ``cifar-100-python``, or the one that holds it.
        classes: 10 or 100.

    Raises:
        DataError: A missing or broken file, a hostile one, a label outside ``[0, classes)``, a class without a sample.
    """
    if classes not in _FILES:
        raise DataError(f"read_cifar: classes must be 10 or 100, found {classes!r}")
    names, inner = _FILES[classes], _FOLDER[classes]
    files = [*names["train"], *names["test"]]
    kind, holds = f"a CIFAR-{classes}", f"it holds {', '.join(files)}, or {inner} with these"
    folder = check_folder(root, kind, holds)
    if (folder / inner).is_dir():
        folder = folder / inner
    check_folder(folder, kind, holds, files)
    found = {}
    for part, own in names.items():
        batches = [_read_batch(folder / file, classes) for file in own]
        images = np.concatenate([batch[0] for batch in batches])
        labels = np.concatenate([batch[1] for batch in batches])
        check_present(labels, classes, f"{folder}, {part} ({', '.join(own)})")
        found[part] = images, labels
    return found


def _read_batch(file: Path, classes: int) -> tuple[Images, Labels]:
    content = _Unpickler(file).read()
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold a dict, found {type(content).__name__}")
    entries = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for name in ("data", _LABELS[classes]):
        if name not in entries:
            raise DataError(f"{file}: must have an entry {name!r}, found {shown(sorted(map(str, entries)))}")
    data, labels = entries["data"], entries[_LABELS[classes]]
    array = data.array if isinstance(data, _Array) else None
    if array is None or array.ndim != 2 or array.shape[1] != _PIXELS or not len(array):
        kind = type(data).__name__ if array is None else f"shape {array.shape}"
        raise DataError(f"{file}: 'data' must be an array of bytes (N, {_PIXELS}) with N >= 1, found {kind}")
    if not isinstance(labels, list) or len(labels) != len(array):
        kind = f"{len(labels)}" if isinstance(labels, list) else type(labels).__name__
        raise DataError(f"{file}: {_LABELS[classes]!r} must be a list of {len(array)} labels, found {kind}")
    for at, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise DataError(
                f"{file}: a label must be an integer in [0, {classes}), found {shown(label)} (number {at + 1})"
            )
    images = array.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


class _Unpickler(pickle.Unpickler):
    """Stands in for the four names that CIFAR's pickles hold; no name is ever looked up in a module."""

    def __init__(self, file: Path) -> None:
        self.file, self.data = file, read_bytes(file)
        super().__init__(io.BytesIO(self.data), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {("_codecs", "encode"): _encode}
        for numpy_module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            allowed[numpy_module, "_reconstruct"] = _reconstruct
        allowed["numpy", "ndarray"] = _never
        allowed["numpy", "dtype"] = _dtype
        if (module, name) not in allowed:
            raise DataError(
                f"{self.file}: a CIFAR pickle holds only dicts, lists, texts, integers and arrays, "
                f"found {shown(f'{module}.{name}')}; it was not run"
            )
        return _Stand(allowed[module, name])

    def read(self) -> Any:
        """The content, with arrays as :class:`_Array`."""
        try:
            for count, (code, number, _) in enumerate(pickletools.genops(self.data), start=1):
                if code.name in ("PUT", "LONG_BINPUT") and isinstance(number, int) and number > count:
                    raise DataError(f"it must number its objects one by one, found number {number}")  # takes all memory
            return self.load()
        except DataError as error:
            known = str(error).startswith(f"{self.file}: ")
            raise DataError(str(error) if known else f"{self.file}: {error}") from None
        except Exception as error:  # a broken pickle may raise anything
            why = str(error) or type(error).__name__
            raise DataError(f"{self.file}: must be a whole CIFAR pickle, found a broken one ({why})") from None


class _Stand:
    """What the pickle gets for a name: it can be called, and cannot be changed."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: object) -> Any:
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        raise DataError("only arrays may have a state, found one for a function")


class _Array:
    """An array of bytes, filled by its state."""

    array: Images | None = None

    def __setstate__(self, state: object) -> None:
        form = "(version, shape, type, order, bytes)"
        if not isinstance(state, tuple) or len(state) != 5:
            raise DataError(f"the state of an array must be {form}, found {shown(state)}")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise DataError(f"the state of an array must be {form}, found {shown(state)}")
        whole = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not whole or math.prod(shape) != len(data):
            raise DataError(f"an array must have as many bytes as its shape says, found {len(data)} for {shown(shape)}")
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _DType:
    """The type uint8, the only one."""

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which a byte has not."""


def _dtype(code: object, *_: object) -> _DType:
    if code not in ("u1", b"u1"):
        raise DataError(f"an array must be of bytes (u1), found the type {shown(code)}")
    return _DType()


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: object, encoding: object = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):  # how Python 3 writes bytes in old protocols
        raise DataError(f"bytes must be written in latin1, found {shown(encoding)}")
    return text.encode("latin1")


def _never(*_: object) -> Any:
    raise DataError("an array must be made by _reconstruct, found a call of ndarray")


def long_tail_counts(largest: int, classes: int, imbalance: float, kind: Literal["exp", "step"] = "exp") -> list[int]:
    """The number of samples of each class, largest first.

    "exp" is ``floor(largest * imbalance ** (-c / (classes - 1)))`` for class c, as in the code of LDAM-DRW (whose
    ``imb_factor`` is ``1 / imbalance``); "step" is ``largest`` for the first ``classes // 2`` classes and
    ``floor(largest / imbalance)`` for the others. The floor is exact: it does not depend on rounding.

    Raises:
        DataError: An argument out of range, or a class that would get no sample.
    """
    if not all(isinstance(number, (int, np.integer)) and number >= 1 for number in (largest, classes)):
        raise DataError(f"long_tail_counts: largest and classes must be integers >= 1, found {largest!r}, {classes!r}")
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise DataError(f"long_tail_counts: imbalance must be finite and >= 1, found {imbalance!r}")
    if kind not in ("exp", "step"):
        raise DataError(f"long_tail_counts: kind must be 'exp' or 'step', found {kind!r}")
    largest, factor = int(largest), Fraction(float(imbalance))
    if kind == "step":
        counts = [largest if c < classes // 2 else math.floor(largest / factor) for c in range(classes)]
    else:
        counts = [_exponential(largest, classes - 1, factor, c) for c in range(classes)]
    if counts[-1] < 1:
        raise DataError(
            f"long_tail_counts: every class must get a sample, found none for class {counts.index(0)} "
            f"(largest {largest}, imbalance {imbalance!r})"
        )
    return counts


def _exponential(largest: int, last: int, factor: Fraction, c: int) -> int:
    """The greatest n with ``n ** last * factor ** c <= largest ** last``."""
    if c == 0:
        return largest
    value: float = largest * float(factor) ** (-c / last)
    nearest = round(value)
    if abs(value - nearest) > 1e-9 * value:
        return math.floor(value)
    shared = math.gcd(c, last)  # a rounding away from an integer: compare exactly
    c, last = c // shared, last // shared
    below: bool = nearest**last * factor.numerator**c <= largest**last * factor.denominator**c
    return nearest if below else nearest - 1


def long_tailed(labels: ArrayLike, counts: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Indices, in ascending order, of ``counts[c]`` random samples of each class c.

    Smaller counts with the same seed choose a part of what larger ones choose.

    Raises:
        DataError: Labels that are no list of integers in ``[0, len(counts))``, or a class with fewer samples.
    """
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"long_tailed: labels must be integers (N,), found {array.dtype} {array.shape}")
    outside = array[(array < 0) | (array >= len(counts))]
    if len(outside):
        raise DataError(f"long_tailed: labels must be in [0, {len(counts)}), found {outside[0]}")
    rng = np.random.default_rng(seed)
    chosen = []
    for c, count in enumerate(counts):
        mine = rng.permutation(np.flatnonzero(array == c))
        if not 0 <= count <= len(mine):
            raise DataError(f"long_tailed: class {c} must have the {count} samples asked for, found {len(mine)}")
        chosen.append(mine[:count])
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, np.int64)
