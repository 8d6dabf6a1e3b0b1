"""Any loss function of yours as a criterion."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from reweigh.weighting.terms import LossTerms, mask_out

from .base import Criterion, expand_mask, upcast


@final
class FromLoss(Criterion):
    """Any loss function of yours with ``reduction="none"``, as a criterion.

    Args:
        fn: A module or function called as ``fn(*inputs)``, or its dotted path (for YAML). It must return one loss per
            element.

    Shapes:
        Terms have the shape that ``fn`` returns; the last input, if it has that shape, is provided as ``target``.
        ``fn`` sees float16 and bfloat16 inputs as float32, and at masked places 1 (0 for integers) instead of what
        stands there.

    Raises:
        TypeError: If ``fn`` cannot be called.
        ValueError: If it returns a scalar: the loss must not be reduced yet.

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective
        >>> objective = Objective(FromLoss(torch.nn.L1Loss(reduction="none")))
        >>> objective(torch.tensor([1.0, 5.0]), torch.zeros(2), sample_weight=torch.tensor([3.0, 1.0]))
        tensor(2.)
    """

    provides = frozenset({"loss"})

    def __init__(self, fn: nn.Module | Callable[..., Tensor] | str) -> None:
        super().__init__()
        if isinstance(fn, str):
            path, _, name = fn.rpartition(".")
            try:
                fn = getattr(importlib.import_module(path), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"FromLoss: fn must be importable, got {fn!r} ({error})") from error
        if not callable(fn):
            raise TypeError(f"FromLoss: fn must be callable or a dotted path, got {type(fn).__name__}")
        self.fn = fn

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        inputs = tuple(
            value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
            for value in inputs
        )
        if mask is not None:
            inputs = tuple(_cover(value, mask) for value in inputs)
        loss = self.fn(*inputs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"FromLoss: fn must return a tensor, got {type(loss).__name__}")
        if loss.ndim == 0:
            raise ValueError('FromLoss: fn must return one loss per element (reduction="none"), got a scalar')
        loss = upcast(self, "loss", loss)
        if mask is not None:
            mask = expand_mask(self, mask, loss.shape)
        last = inputs[-1] if inputs else None
        target = last if isinstance(last, Tensor) and last.shape == loss.shape else None
        return LossTerms(loss=mask_out(loss, mask, 0.0), mask=mask, target=target)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        pair = torch.randn(2, batch, generator=generator, dtype=torch.float64)
        return pair[0].to(dtype), pair[1].to(dtype)


def _cover(value: Any, mask: Tensor) -> Any:
    """An input with harmless values at masked places, where its shape shows which those are."""
    if not isinstance(value, Tensor) or value.is_complex() or value.ndim < mask.ndim:
        return value
    if value.shape[: mask.ndim] == mask.shape:
        away = ~mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
    elif value.ndim == mask.ndim + 1 and value.shape[:1] + value.shape[2:] == mask.shape:
        away = ~mask.unsqueeze(1)
    else:
        return value
    return value.masked_fill(away, 1 if value.is_floating_point() else 0)
