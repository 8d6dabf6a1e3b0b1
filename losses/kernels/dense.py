"""Softmax cross-entropy of given logits, holding one array of their size instead of three.

As in :mod:`reweigh.losses.kernels.linear`, what a weighting looks at are numbers per row, and the gradient of any
function of them is a scaled softmax row minus a one-hot. So the softmax is kept, and backward turns it into the
gradient where it stands. Half-precision logits keep nothing: backward makes the softmax anew, a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reweigh.weighting.config import watched

from .rows import Rows, Spec, numbers_in_place, plain_rows, slope_in_place, working_dtype

FEWEST = 256
"""Classes from which it pays."""
SMALL = 2**17
"""Logits below which plain operations are as fast."""
_BLOCK = 2**19  # elements taken together on the CPU: what its caches hold


def lean(logits: Tensor) -> bool:
    """Whether these logits, ``(N, C)`` or ``(..., C)``, are worth it, and nobody looks on."""
    return (
        logits.numel() > SMALL
        and logits.shape[-1] >= FEWEST
        and type(logits) in (Tensor, torch.nn.Parameter)
        and not (logits.is_meta or watched() or forward_ad._current_level >= 0)
    )


def rows_of_logits(logits: Tensor, target: Tensor, valid: Tensor | None, spec: Spec) -> Rows:
    """The numbers of ``logits (N, C)`` at ``target (N,)``, with gradient. Rows that are not valid may hold anything."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        with torch.no_grad():
            return _numbers(logits, target, spec, None)
    ce, lse, away, entropy, top = _DenseRows.apply(logits, target, valid, spec)  # type: ignore[no-untyped-call]
    return Rows(ce, lse, away, entropy, top)


def _blocks(logits: Tensor) -> Iterator[slice]:
    number, classes = logits.shape
    size = max(1, _BLOCK // classes) if logits.device.type == "cpu" else max(1, number)
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))


def _numbers(logits: Tensor, target: Tensor, spec: Spec, kept: tuple[Tensor, Tensor] | None) -> Rows:
    """The numbers of all rows; exponentials go to ``kept``'s first, their sums to its second."""
    dtype = working_dtype(logits.dtype)
    found = Rows.nothing(logits.new_empty(0, dtype=dtype), len(logits), spec)
    scratch: Tensor | None = None
    for rows in _blocks(logits):
        part = logits[rows]
        if kept is not None:
            out = kept[0][rows]
        else:
            scratch = torch.empty_like(part, dtype=dtype) if scratch is None else scratch
            out = scratch[: len(part)]
        out.copy_(part)
        numbers, total = numbers_in_place(out, target[rows], spec)
        found.put(rows, numbers)
        if kept is not None:
            kept[1][rows] = total
    return found


class _DenseRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, valid: Tensor | None, spec: Spec
    ) -> tuple[Tensor | None, ...]:
        kept = None
        if logits.dtype == working_dtype(logits.dtype):
            kept = torch.empty_like(logits, memory_format=torch.contiguous_format), logits.new_empty(len(logits))
        found = _numbers(logits, target, spec, kept)
        ctx.save_for_backward(logits, target, valid, found.ce)  # an output: as an attribute it would be a cycle
        ctx.spec, ctx.kept = spec, kept
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for v in (found.entropy, found.top_entropy) if v is not None))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        logits, target, valid, ce = ctx.saved_tensors
        by = slopes[:3]
        if all(slope is None for slope in by):
            return None, None, None, None
        if torch.is_grad_enabled():
            return _differentiable(logits, target, valid, ctx.spec, by), None, None, None
        kept, ctx.kept = ctx.kept, None
        slope = torch.empty_like(logits) if kept is None else kept[0]
        scratch: Tensor | None = None
        for rows in _blocks(logits):
            labels = target[rows]
            here = tuple(None if value is None else value[rows] for value in by)
            if kept is not None:
                slope_in_place(slope[rows], kept[1][rows], ce[rows], here, labels, ctx.spec)
                continue
            part = logits[rows]
            scratch = torch.empty_like(part, dtype=working_dtype(part.dtype)) if scratch is None else scratch
            out = scratch[: len(part)]
            out.copy_(part)
            _, total = numbers_in_place(out, labels, ctx.spec.without_offers())
            slope[rows] = slope_in_place(out, total, ce[rows], here, labels, ctx.spec)
        if valid is not None:
            slope.masked_fill_(~valid.unsqueeze(1), 0.0) if logits.is_cuda else _clear(slope, valid)
        return slope, None, None, None


def _clear(slope: Tensor, valid: Tensor) -> None:
    slope.index_fill_(0, (~valid).nonzero().squeeze(1), 0.0)


def _differentiable(
    logits: Tensor, target: Tensor, valid: Tensor | None, spec: Spec, by: tuple[Tensor | None, ...]
) -> Tensor:
    with torch.enable_grad():
        clean = logits if valid is None else logits.masked_fill(~valid.unsqueeze(1), 0.0)
        found = plain_rows(clean.to(working_dtype(clean.dtype)), target, spec.without_offers())
        asked = [(value, slope) for value, slope in zip(found[:3], by, strict=True) if slope is not None]
        values, slopes = zip(*asked, strict=True)
        (slope,) = torch.autograd.grad(values, logits, slopes, create_graph=True)
    return slope
