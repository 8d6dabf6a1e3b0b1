"""Softmax cross-entropy taken apart into its classes."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from reweigh.weighting.schedules import Schedule, value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..logits import LogitTransform
from .base import _kind, expand_mask, is_index, upcast
from .labels import _Element
from .probability import log_complement


@final
class ClasswiseCrossEntropy(_Element):
    r"""Softmax cross-entropy with label smoothing, one term per class, so that a weighting can treat them differently.

    .. math:: \ell_{ic} = -\log p_{ic} \quad\text{with share}\quad y_{ic} = (1-s)\,[c = y_i] + s/C

    The terms of a label add up to its cross-entropy by share. The target's class is the positive one: there
    :math:`p_t = p_c`, elsewhere :math:`p_t = 1 - p_c`. A class without a share has no term.

    Provides ``loss``, ``log_pt``, ``log_qt`` (both exact), ``target`` (1 for the target's class, 0 for others) and
    ``category`` (the class).

    Args:
        ignore_index: Targets with this value are removed.
        label_smoothing: Share s of the uniform target, in [0, 1], or a schedule.
        logits: A transform applied to the logits first.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``logits (N, C, d1, ...)``, ``target (N, d1, ...)`` integers; terms ``(N, d1, ..., C)``. Unbatched ``(C,)`` with
        ``()``.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` not integer.
        ValueError: If shapes do not fit or a label is out of range.

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective
        >>> objective = Objective(ClasswiseCrossEntropy(label_smoothing=0.1))
        >>> objective(torch.zeros(1, 4), torch.tensor([2]))
        tensor(1.3863)
    """

    provides = frozenset({"loss", "log_pt", "log_qt", "target", "category"})
    elementwise = True

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        logits: LogitTransform | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(None, ignore_index, label_smoothing, logits, validate)

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        if len(inputs) != 2:
            raise TypeError(f"ClasswiseCrossEntropy: takes (logits, target), got {len(inputs)} inputs")
        logits, target = upcast(self, "logits", inputs[0]), inputs[1]
        if not is_index(target):
            raise TypeError(f"ClasswiseCrossEntropy: target must be class indices, got {_kind(target)}")
        if logits.ndim == 0 or logits.shape[dim := 1 if logits.ndim > 1 else 0] == 0:
            raise ValueError(
                f"ClasswiseCrossEntropy: logits must have at least one class, got shape {tuple(logits.shape)}"
            )
        shape = logits.shape[:dim] + logits.shape[dim + 1 :]
        if target.shape != shape:
            raise ValueError(
                f"ClasswiseCrossEntropy: target must have shape {tuple(shape)} for logits {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        classes = logits.shape[dim]
        target = target.long()
        valid = self._valid(target, None if mask is None else expand_mask(self, mask, shape))
        if valid is not None:
            target = target.masked_fill(~valid, 0)
            logits = logits.masked_fill(~valid.unsqueeze(dim), 0.0)
        self._check_labels(target, classes)
        if self.logits is not None:
            logits = self.logits(logits, target, dim=dim)
        logits = logits.movedim(dim, -1)
        smoothing = value_of(self.label_smoothing)
        category = torch.arange(classes, device=logits.device).expand(logits.shape)
        positive = category == target.unsqueeze(-1)
        y = positive.to(logits.dtype)
        share = y * (1.0 - smoothing) + smoothing / classes
        present = share > 0 if valid is None else (share > 0) & valid.unsqueeze(-1)
        log_p = logits.log_softmax(-1)
        log_not_p = log_complement(log_p, -1)
        return LossTerms(
            loss=mask_out(-log_p, present, 0.0),
            mask=present,
            log_pt=mask_out(torch.where(positive, log_p, log_not_p), present, NEUTRAL_LOG_PT),
            log_qt=mask_out(torch.where(positive, log_not_p, log_p), present, NEUTRAL_LOG_PT),
            target=y,
            category=category,
            num_classes=classes,
            share=share,
        )

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 4, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(4, (batch,), generator=generator)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Any, ...]] = {}
        for shape in ((4,), (5, 4), (3, 4, 2)):
            logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
            target = torch.randint(4, shape[: len(shape) > 1] + shape[2:], generator=generator)
            ignored = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.4, self.ignore_index)
            found |= {f"{shape}, classes": (logits, target), f"{shape}, some ignored": (logits, ignored)}
        return found
