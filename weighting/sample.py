"""A row of numbers for every training sample, and what is shared by the weightings that keep one."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from .config import check_number, check_whole, owner_name
from .dynamics import Dynamic
from .terms import LossTerms

_EXACT = 2**24
"""Numbers up to this are exact in single precision."""
_LEAST = torch.finfo(torch.float64).tiny


class Seen(NamedTuple):
    """Samples of a step, those of all ranks; a sample that came several times stands as often, with equal numbers."""

    samples: Tensor
    """``(N,)`` their indices; 0 where nothing counted."""
    times: Tensor
    """``(N,)`` how many copies of the sample counted in the step; 0 where none did."""
    means: Tensor
    """``(N, width)`` what was noted, averaged over those copies."""
    before: Tensor
    """``(N, columns)`` what the table holds of them."""


@final
class SampleTable(Dynamic):
    r"""Numbers per training sample: ``(num_samples, columns)`` in float32, read and written by index.

    A part of weightings and criteria that remember samples. It is saved with them and copied by them, but it is no
    buffer: data-parallel wrappers would send it to every rank at every forward. Its owner writes the same rows on
    every rank, so that it stays equal without.

    Args:
        num_samples: Length of the data set, up to 10^8 and more.
        columns: Numbers per sample.
        fill: What they are at first.
        device: Where the table stays whatever the module does, such as ``"cpu"`` beside a model on a GPU (then each
            step waits for the indices). ``None``: it moves with the module.
        storage: A folder for a memory-mapped file that holds the table instead of memory; the file belongs to this
            process and vanishes with it, checkpoints hold the numbers. Implies ``device="cpu"``. ``None``: memory.

    Raises:
        ValueError: When an index is outside ``[0, num_samples)``; on a device torch's own assertion.

    Example:
        >>> import torch
        >>> table = SampleTable(4, fill=1.0)
        >>> table.write(torch.tensor([2]), torch.tensor([[5.0]]))
        >>> table.read(torch.tensor([1, 2])).flatten().tolist()
        [1.0, 5.0]
    """

    def __init__(
        self,
        num_samples: int,
        columns: int = 1,
        *,
        fill: float = 0.0,
        device: str | None = None,
        storage: str | None = None,
    ) -> None:
        super().__init__()
        self.num_samples = check_whole(self, "num_samples", num_samples, low=1)
        self.columns = check_whole(self, "columns", columns, low=1)
        self.fill = check_number(self, "fill", fill)
        if storage is not None and device not in (None, "cpu"):
            raise ValueError(f"SampleTable: storage keeps the table on the CPU, got device={device!r}")
        if storage is not None and not Path(storage).is_dir():
            raise ValueError(f"SampleTable: storage must be an existing folder, got {storage!r}")
        self.pinned = device is not None or storage is not None
        self.begins: Tensor | None = None
        """``(num_samples, columns)`` to begin with instead of ``fill``, set by an owner."""
        if storage is None:
            self.rows = torch.full((num_samples, columns), self.fill, dtype=torch.float32, device=device)
        else:
            self.rows = _mapped(Path(storage), num_samples, columns)
            self._begin()

    def read(self, index: Tensor, owner: object | None = None) -> Tensor:
        """``(n, columns)`` float32 rows of ``index (n,)``, on the index's device."""
        at = index.to(self.rows.device)
        try:
            return self.rows.index_select(0, at).to(index.device)
        except (IndexError, RuntimeError) as error:
            raise self._explained(error, at, owner) from error

    def write(self, index: Tensor, rows: Tensor, owner: object | None = None) -> None:
        """Replace the rows of ``index (n,)``; equal indices must bring equal rows."""
        at = index.to(self.rows.device)
        try:
            self.rows.index_copy_(0, at, rows.to(self.rows))
        except (IndexError, RuntimeError) as error:
            raise self._explained(error, at, owner) from error

    def seen(self, rows: Tensor, owner: object | None = None) -> Seen:
        """What collected :func:`note` rows say, copies of a sample brought together.

        Which rows are copies is found through the table itself: every row's number goes to its sample's place, the one
        that stays there speaks for all copies, and then the place gets back what it held.
        """
        samples = rows[:, 0].long()
        before = self.read(samples, owner)
        if len(rows) > _EXACT or rows.is_meta:
            numbers = torch.searchsorted(samples.sort().values, samples)
        else:
            first, at = self.rows[:, 0], samples.to(self.rows.device)
            try:
                first.index_copy_(0, at, torch.arange(len(at), dtype=first.dtype, device=at.device))
                numbers = first.index_select(0, at).long().to(samples.device)
            finally:  # also where somebody interrupts
                first.index_copy_(0, at, before[:, 0].to(first))
        sums = torch.zeros_like(rows[:, 1:]).index_add_(0, numbers, rows[:, 1:]).index_select(0, numbers)
        times = sums[:, 0]
        return Seen(samples, times, sums[:, 1:] / times.clamp_min(_LEAST).unsqueeze(1), before)

    def _explained(self, error: Exception, at: Tensor, owner: object | None) -> Exception:
        if at.is_meta or not at.numel():
            return error
        low, high = int(at.min()), int(at.max())
        if low >= 0 and high < self.num_samples:
            return error
        return ValueError(
            f"{owner_name(self if owner is None else owner)}: index must be in [0, {self.num_samples}), the number of "
            f"samples declared, got {low if low < 0 else high}"
        )

    def reset(self) -> None:
        super().reset()
        self._begin()

    def _begin(self) -> None:
        if self.begins is None:
            self.rows.fill_(self.fill)
        else:
            self.rows.copy_(self.begins)

    # it travels like state, without being a buffer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dynamic:
        super()._apply(fn, recurse)
        if not self.pinned:
            device = fn(torch.zeros(0, device=self.rows.device)).device
            if device != self.rows.device:
                fresh = self.rows.is_meta
                self.rows = torch.empty_like(self.rows, device=device) if fresh else self.rows.to(device)
                if fresh:
                    self._begin()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "rows"] = self.rows.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "rows"
        saved = state_dict.pop(key, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if saved is None:
            warnings.warn(f"SampleTable: the checkpoint has no {key}; starting fresh", stacklevel=2)
            return
        state_dict[key] = saved
        if saved.shape != self.rows.shape:
            error_msgs.append(
                f"SampleTable: {key} in the checkpoint is {tuple(saved.shape)}, but {tuple(self.rows.shape)} "
                "(num_samples, columns) was declared"
            )
        elif self.rows.is_meta and local_metadata.get("assign_to_params_buffers", False):
            self.rows = saved.detach().to(torch.float32, copy=True)
        else:
            self.rows.copy_(saved)


def _mapped(folder: Path, num_samples: int, columns: int) -> Tensor:
    """Float32 numbers in a file that only this process knows."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".samples") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk says so now, not in the middle of training
            os.posix_fallocate(file.fileno(), 0, 4 * num_samples * columns)
        else:
            file.truncate(4 * num_samples * columns)
        held = torch.from_file(file.name, shared=True, size=num_samples * columns, dtype=torch.float32)
    return held.reshape(num_samples, columns)


def places(owner: object, terms: LossTerms) -> Tensor:
    """``(S[0],)`` index of each sample, 0 where nothing of the sample counts, whatever stands there."""
    index = terms.need("index", owner)
    if terms.mask is None and terms.multiplicity is None:
        return index
    return index.where(_by_sample(terms.counts() > 0).any(1), torch.zeros_like(index))


def note(owner: object, terms: LossTerms, *values: Tensor) -> Tensor:
    """Rows to collect: index, how often the sample counts, and that many times the mean of each value over its terms.

    ``values`` are ``(*S)`` or ``(S[0],)``. Samples without a valid term have count 0.
    """
    index = terms.need("index", owner)
    if terms.mask is None and terms.multiplicity is None and terms.share is None:
        means = [value.double() if value.ndim == 1 else _by_sample(value).double().mean(1) for value in values]
        return torch.stack([index.double(), torch.ones_like(index, dtype=torch.float64), *means], 1)
    counts = _by_sample(terms.counts().double())
    valid, mass = counts > 0, counts.sum(1)
    if terms.multiplicity is None or not counts.numel():
        times = (mass > 0).double()
    else:
        copies = terms.spread(terms.multiplicity).double().expand_as(terms.loss)
        times = torch.where(valid, _by_sample(copies), 0.0).amax(1)
    columns = [index.where(times > 0, torch.zeros_like(index)).double(), times]
    for value in values:
        mean = value.double()
        if value.ndim > 1:
            mean = torch.where(valid, counts * _by_sample(mean), 0.0).sum(1) / mass.clamp_min(_LEAST)
        columns.append(torch.where(times > 0, mean, 0.0) * times)
    return torch.stack(columns, 1)


def _by_sample(value: Tensor) -> Tensor:
    """``(*S)`` as ``(S[0], terms)``."""
    return value.flatten(1) if value.ndim > 1 else value.unsqueeze(1)
