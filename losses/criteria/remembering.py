"""What criteria with numbers per training sample have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reweigh.weighting.dynamics import Event
from reweigh.weighting.sample import SampleTable, note
from reweigh.weighting.terms import LossTerms

from .base import _kind
from .element import SoftmaxCriterion


class Remembering(SoftmaxCriterion):
    """A softmax criterion with a row of numbers per training sample, read by ``index=`` and written at the step.

    A training forward uses what the table will say once this forward is in it; the table itself changes at the
    ``step`` event, by all micro-batches and ranks, copies of a sample averaged. Calls that learn nothing (evaluation,
    no gradient) may leave the index out: their samples are new.
    """

    update_on: Event = "step"
    rowwise = False
    accepts = frozenset({"index"})

    def __init__(
        self,
        num_samples: int,
        columns: int,
        fill: float,
        ignore_index: int,
        validate: bool | None,
        device: str | None,
        storage: str | None,
    ) -> None:
        super().__init__(None, ignore_index, 0.0, None, validate)
        self.exact_gradient = False
        self.table = SampleTable(num_samples, columns, fill=fill, device=device, storage=storage)
        self.add_rows("visits", 2 + columns)

    def _recall(self, index: Tensor | None, valid: Tensor | None, like: Tensor) -> Tensor:
        """``(N, columns)`` rows of the samples of ``like (N, ...)``, in its dtype; those of new samples without index.

        Raises:
            TypeError: If ``index`` does not hold integers.
            ValueError: If it has the wrong shape or range, or is missing in training.
        """
        if index is None:
            if self.training and torch.is_grad_enabled():
                raise ValueError(
                    f"{type(self).__name__}: 'index' is missing; pass index= when calling the objective in training"
                )
            return like.new_full((like.shape[0], self.table.columns), self.table.fill)
        index = self._per_sample("index", index, like.shape[:1])
        if valid is not None:
            index = index.masked_fill(~valid, 0)
        return self.table.read(index, self).to(like.dtype)

    def _constant(self, name: str, value: Any, shape: torch.Size, like: Tensor) -> Tensor:
        """A constant per sample that came with the call."""
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{type(self).__name__}: {name} must be a real tensor, got {_kind(value)}")
        if value.shape != shape:
            raise ValueError(f"{type(self).__name__}: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        return value.detach().to(like.dtype)

    def _remember(self, terms: LossTerms, values: Tensor) -> None:
        """Collect ``values (N, columns)`` for the table, those of samples that count."""
        if terms.index is None:
            return
        rows = note(self, terms)
        times = rows[:, 1:]
        self.collect("visits", torch.cat([rows, torch.where(times > 0, values.double(), 0.0) * times], 1))

    def commit(self, sums: dict[str, Tensor]) -> None:
        found = self.table.seen(sums["visits"], self)
        before = found.before
        learned = (found.times > 0) & found.means.isfinite().all(1)
        self.table.write(found.samples, torch.where(learned.unsqueeze(1), found.means.to(before), before), self)
