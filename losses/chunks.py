"""Objectives on hidden states and a vocabulary matrix in one pass: the gradient is made with the value.

Where each weight depends on its own term, constants and stored state alone, the derivative of the reduced loss by a
row's cross-entropy is known, up to one number of the batch, as soon as that row is. So a chunk of logits is made,
weighed, turned into its gradient and forgotten: three matrix products instead of four, and never more than a chunk of
logits. Whatever looks at other terms takes the plain way through the criterion, which makes the logits twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reweigh.weighting.terms import LossTerms, mask_out

from .blocks import without_penalty
from .criteria.linear import Deferred
from .kernels.linear import Linear, Slopes, in_one_pass, slopes_by, twice
from .kernels.rows import Derivatives, Rows
from .reductions import SequenceMean

if TYPE_CHECKING:
    from .objective import Objective

REDUCTIONS = frozenset({"mean", "weighted_mean", "sum", "batch_mean", "sequence_mean", "group_mean"})
"""Reductions that are a sum of terms times what masks and sample weights say, over one number of the batch."""


def in_chunks(
    objective: Objective, inputs: tuple[Any, ...], meta: dict[str, Any], num_items: float | Tensor | None
) -> Tensor | None:
    """The objective's value with its gradient attached, or ``None`` where it has to go the plain way."""
    if not (objective.criterion.defers and torch.is_grad_enabled() and _suits(objective)):
        return None
    box: list[Deferred] = []
    terms = objective._measured(inputs, {**meta, "defer": box})
    given = (terms.multiplicity, *(terms.extras or {}).values())
    if not box:
        return objective._reduced(terms, num_items)
    (deferred,) = box
    if any(value is not None and value.requires_grad for value in given):
        return objective._reduced(deferred.filled(terms, deferred.rows()), num_items)
    return _value(objective, terms, deferred, num_items)


def _suits(objective: Objective) -> bool:
    weighting, reduction = objective.weighting, objective.reduction
    if reduction.name not in REDUCTIONS or forward_ad._current_level >= 0:
        return False
    if weighting is None:
        return True
    if weighting.scope != "local" or weighting.rows or objective._per_forward:
        return False
    divides_by_weights = reduction.name == "weighted_mean" or (
        isinstance(reduction, SequenceMean) and reduction.weighted
    )
    if divides_by_weights and (isinstance(reduction, SequenceMean) or not weighting.detached):
        return False
    return without_penalty(weighting)


def _value(objective: Objective, terms: LossTerms, deferred: Deferred, num_items: float | Tensor | None) -> Tensor:
    problem = deferred.problem
    share = deferred.flat(_share(objective, terms), terms)
    flat = _Flat(terms, deferred)
    learned = [p for p in (() if objective.weighting is None else objective.weighting.parameters()) if p.requires_grad]
    totals = [torch.zeros_like(p) for p in learned]

    def derivatives(rows: Tensor | slice, found: Rows) -> Derivatives:
        with torch.enable_grad():
            asked = [v for v in found[:3] if v is not None]
            leaves = [v.detach().requires_grad_() for v in asked]
            there = iter(leaves)
            own = found._replace(ce=next(there), lse=next(there), away=None if found.away is None else next(there))
            piece = flat.at(rows, own)
            loss = piece.loss if objective.weighting is None else piece.loss * objective._weights(piece)
            slopes = torch.autograd.grad((share[rows] * loss).sum(), [*leaves, *learned], allow_unused=True)
        for total, slope in zip(totals, slopes[len(leaves) :], strict=True):
            if slope is not None:
                total.add_(slope)
        return slopes[0], slopes[1], slopes[2] if len(leaves) > 2 else None

    wanted = tuple(t is not None and t.requires_grad for t in problem.tensors)
    found, slopes, by = in_one_pass(problem, wanted, derivatives)  # type: ignore[arg-type]
    with torch.no_grad():
        full = deferred.filled(terms, found)
    learn = objective.training
    with torch.no_grad():
        weighted, weights = objective._weigh(full, learn=learn)
        if num_items is None:
            objective._warn_where_weights_cancel(objective._more_classes((0, 0, 0), full))
        above, below = objective.reduction.summed(weighted, weights, full)
        value = objective.reduction.finish(above, below, num_items)
        factor = objective.reduction.finish(torch.ones_like(above), below, num_items)
    if not any(wanted) and not learned:
        return value
    attached: Tensor = _Attached.apply(  # type: ignore[no-untyped-call]
        value, factor, (slopes, by), totals, problem, *problem.tensors, *learned
    )
    return attached


def _share(objective: Objective, terms: LossTerms) -> Tensor:
    """What each weighted term adds to the reduction's numerator: known before any loss is."""
    with torch.enable_grad():
        probe = torch.zeros_like(terms.loss).requires_grad_()
        above, _ = objective.reduction.summed(probe, None, terms)
        (share,) = torch.autograd.grad(above, probe, allow_unused=True)
    return torch.zeros_like(probe) if share is None else mask_out(share, terms.mask, 0.0)


class _Flat:
    """What is known of terms beside their losses, by row of the problem."""

    def __init__(self, terms: LossTerms, deferred: Deferred) -> None:
        self.deferred, self.terms = deferred, terms
        given = {"group": terms.group, "index": terms.index, "multiplicity": terms.multiplicity}
        self.given = {name: deferred.flat(value, terms) for name, value in given.items() if value is not None}
        self.extras = {name: deferred.flat(value, terms) for name, value in (terms.extras or {}).items()}
        if terms.loss.ndim > 1:  # along the last dimension, which rows of the problem no longer show
            place = torch.arange(terms.loss.shape[-1], device=terms.loss.device).expand(terms.loss.shape)
            self.extras.setdefault("position", deferred.flat(place, terms))

    def at(self, rows: Tensor | slice, found: Rows) -> LossTerms:
        """The terms of some rows, all of which count."""
        terms = self.deferred.assembled(found, rows)
        extras = {name: value[rows] for name, value in self.extras.items()}
        given: dict[str, Any] = {name: value[rows] for name, value in self.given.items()}
        return terms._replace(**given, extras={**extras, **(terms.extras or {})})


class _Attached(torch.autograd.Function):
    """A value whose gradients are known. They are handed out once; whoever asks again waits for them to be made."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        factor: Tensor,
        found: tuple[Slopes, Derivatives],
        totals: list[Tensor],
        problem: Linear,
        *inputs: Tensor | None,  # noqa: ARG004 - what the gradient goes to
    ) -> Tensor:
        ctx.save_for_backward(*problem.tensors, problem.target, problem.kept)
        ctx.slopes, ctx.by = found
        ctx.factor, ctx.totals, ctx.spec = factor, totals, problem.spec
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise twice()
        slopes, ctx.slopes = ctx.slopes, None
        if slopes is None:
            hidden, weight, bias, target, kept = ctx.saved_tensors
            again = Linear(hidden, weight, bias, target, kept, ctx.spec)
            slopes = slopes_by(again, ctx.needs_input_grad[5:8], ctx.by)
        factor = grad * ctx.factor
        learned = (total * factor.to(total.dtype) for total in ctx.totals)
        return (None, None, None, None, None, *slopes.scaled(factor), *learned)
