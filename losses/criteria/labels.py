"""What criteria with class labels have in common: options, and which labels count."""

from __future__ import annotations

from torch import Tensor

from reweigh.weighting.config import readable
from reweigh.weighting.frequency import ClassTable, Values, class_table
from reweigh.weighting.schedules import Schedule, check_hyper

from ..logits import LogitTransform
from .base import Criterion


class _Element(Criterion):
    """Common part of the cross-entropies."""

    rowwise = True
    target_name = "target"

    def __init__(
        self,
        weight: Values | str | ClassTable | None,
        ignore_index: int,
        label_smoothing: float | Schedule,
        logits: LogitTransform | None,
        validate: bool | None,
    ) -> None:
        super().__init__()
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"{type(self).__name__}: ignore_index must be an integer, got {ignore_index!r}")
        if logits is not None and not isinstance(logits, LogitTransform):
            raise TypeError(f"{type(self).__name__}: logits must be a LogitTransform, got {type(logits).__name__}")
        self.weight = None if weight is None else class_table(self, "weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = check_hyper(self, "label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.logits = logits
        self.exact_gradient = logits is None or logits.exact_gradient
        self.validate = validate

    def _class_weight(self, num_classes: int, like: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        table = self.weight.table()
        if table.numel() != num_classes:
            raise ValueError(
                f"{type(self).__name__}: weight must have one entry per class ({num_classes}), got {table.numel()}"
            )
        return table.to(like.dtype)

    def _may_look(self, values: Tensor) -> bool:
        """Whether values are there to be checked, and may be."""
        return self.validate is not False and readable(values, wait=self.validate is True) and values.numel() > 0

    def _check_labels(self, target: Tensor, classes: int) -> None:
        if self._may_look(target):
            low, high = (int(edge) for edge in target.aminmax())
            if low < 0 or high >= classes:
                raise ValueError(
                    f"{type(self).__name__}: {self.target_name} must be in [0, {classes}) or "
                    f"ignore_index={self.ignore_index}, got {low if low < 0 else high}"
                )

    def _valid(self, target: Tensor, mask: Tensor | None) -> Tensor | None:
        """Where terms count; ``None`` where it is known, without asking a device, that all do."""
        kept = target != self.ignore_index
        return self._only_valid(kept if mask is None else kept & mask)

    def _only_valid(self, valid: Tensor) -> Tensor | None:
        return None if readable(valid) and bool(valid.all()) else valid
