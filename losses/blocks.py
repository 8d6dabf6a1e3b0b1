"""Large batches on the CPU, a few rows at a time: the gradient is made with the value, and nothing else is kept.

Where each row's terms depend on that row alone and each weight on its own term, the reduced loss is a ratio of sums
over rows, and so is its gradient. Rows that fit the processor's cache are taken through criterion, weighting, reduction
*and backward* before the next ones; beside the gradient no tensor of the batch's size ever exists. Any composition of
local weightings takes part; everything else takes the plain way, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reweigh.weighting.algebra import is_node
from reweigh.weighting.base import Weighting
from reweigh.weighting.config import watched

if TYPE_CHECKING:
    from .objective import Objective

LEAST = {False: 2**21, True: 2**20}
"""Elements below which a batch is small enough as a whole, for row-wise and for element-wise criteria."""
BLOCK = {False: 2**18, True: 2**16}
"""Elements taken together: what fits a core's cache times the number of passes."""
_MANY_COLUMNS = 2**19  # rows so long that BLOCK holds but a few are taken by this number instead, 16 at most

REDUCTIONS = frozenset({"mean", "weighted_mean", "sum", "batch_mean", "sequence_mean"})
"""Reductions that are ratios of sums over samples."""


def in_blocks(
    objective: Objective, inputs: tuple[Any, ...], meta: dict[str, Any], num_items: float | Tensor | None
) -> Tensor | None:
    """The objective's value with its gradient attached, or ``None`` where it has to go the plain way."""
    first = inputs[0] if inputs else None
    kind = objective.criterion.elementwise
    if not isinstance(first, Tensor) or first.numel() < LEAST[kind] or not _suits(objective, first):
        return None
    if objective.criterion.lean(*inputs):
        return None
    meta = {name: value for name, value in meta.items() if value is not None}
    others = [*inputs[1:], *meta.values()]
    if not all(isinstance(v, Tensor) and v.ndim and v.shape[0] == first.shape[0] for v in others):
        return None
    if any(v.requires_grad for v in others) or any(p.requires_grad for p in objective.parameters()):
        return None
    if objective.reduction.name == "sum" and num_items is not None:
        return None
    try:
        return _value(objective, first, inputs[1:], meta, num_items)
    except (TypeError, ValueError):
        return None  # the plain way says what is wrong, with the shapes of the whole


def _suits(objective: Objective, first: Tensor) -> bool:
    criterion, weighting, reduction = objective.criterion, objective.weighting, objective.reduction
    if not (criterion.rowwise and first.ndim > 1 and first.device.type == "cpu") or watched():
        return False
    if first.dtype not in (torch.float32, torch.float64) or forward_ad._current_level >= 0:
        return False
    if reduction.name not in REDUCTIONS or objective._watchers:
        return False
    if weighting is None:
        return True
    if (
        weighting.scope != "local"
        or objective._learns
        or (reduction.name == "weighted_mean" and not weighting.detached)
    ):
        return False
    return without_penalty(weighting)


def without_penalty(weighting: Weighting) -> bool:
    """Whether no part of a weighting adds anything to the loss."""
    return all(
        is_node(part) or type(part).penalty is Weighting.penalty
        for part in weighting.modules()
        if isinstance(part, Weighting)
    )


def _value(
    objective: Objective, first: Tensor, rest: tuple[Any, ...], meta: dict[str, Any], num_items: float | Tensor | None
) -> Tensor:
    wanted = first.requires_grad and torch.is_grad_enabled()
    source = first.detach()
    slope = torch.empty_like(source) if wanted else None
    numerator = torch.zeros((), dtype=torch.float64)
    denominator: Tensor | float = 0.0
    classes = (0, 0, 0)
    for rows in _rows(first, BLOCK[objective.criterion.elementwise]):
        piece = source[rows].requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            terms = objective._measured((piece, *(v[rows] for v in rest)), {name: v[rows] for name, v in meta.items()})
            weighted, weights = objective._weigh(terms, learn=False)
            above, below = objective.reduction.summed(weighted, weights, terms)
        if num_items is None:
            classes = objective._more_classes(classes, terms)
        if slope is not None:
            (part,) = torch.autograd.grad(above, piece)
            slope[rows] = part
        numerator += above.detach()
        denominator = denominator + (below.detach().double() if isinstance(below, Tensor) else below)
    objective._warn_where_weights_cancel(classes)
    if isinstance(denominator, Tensor):
        denominator = denominator.to(source.dtype)
    finish = objective.reduction.finish
    value = finish(numerator.to(source.dtype), denominator, num_items)
    if slope is None:
        return value
    scale = finish(torch.ones_like(value), denominator, num_items)

    def again(x: Tensor) -> Tensor:
        return objective._plainly((x, *rest), meta, num_items)

    found: Tensor = _Attached.apply(first, value, slope, scale, again)  # type: ignore[no-untyped-call]
    return found


def _rows(first: Tensor, block: int) -> list[slice]:
    row = first[0].numel()
    many = block // row
    if many < 16:
        many = max(1, min(16, _MANY_COLUMNS // row))
    return [slice(start, start + many) for start in range(0, first.shape[0], many)]


class _Attached(torch.autograd.Function):
    """A value whose gradient is known. It is handed out once; whoever asks again, or differentiates it, pays anew."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, value: Tensor, slope: Tensor, scale: Tensor, again: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(first)
        ctx.slope, ctx.scale, ctx.again = slope, scale, again
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, ctx.slope = ctx.slope, None
        if slope is not None and not torch.is_grad_enabled():
            return slope.mul_(grad * ctx.scale), None, None, None, None
        (first,) = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            source = first if twice else first.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.again(source), source, grad, create_graph=twice)
        return found, None, None, None, None
