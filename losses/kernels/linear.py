"""Softmax cross-entropy of ``hidden @ weight.T`` with no more than a few rows of logits in memory at a time.

Everything that a weighting may look at is a number per row (:class:`~reweigh.losses.kernels.rows.Rows`), so the
gradient of *any* function of those numbers is made of a scaled softmax row and a one-hot.
:func:`rows_of` gives the numbers with a backward that makes the logits anew: four matrix products.
:func:`in_one_pass` makes numbers and gradients of a chunk of rows together, where the derivatives of a chunk are known
as soon as its numbers are: three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .rows import Derivatives, Rows, Spec, numbers_in_place, plain_rows, slope_in_place, working_dtype

BUDGET = {"cpu": 44 * 2**20, "cuda": 2**29}
"""Bytes of logits held at a time, by kind of device: on a CPU what costs large matrix products next to nothing."""


@dataclass(frozen=True)
class Linear:
    """One problem: ``hidden (N, D)``, ``weight (V, D)``, ``bias (V,)``, all of one dtype, and ``target (N,)``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    kept: Tensor | None
    """``(M,)`` ascending numbers of the rows that count; ``None`` for all. Others are never computed."""
    spec: Spec

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias


def chunk_rows(problem: Linear) -> int:
    """Rows taken together."""
    if problem.spec.rows is not None:
        return problem.spec.rows
    wide = problem.weight.shape[0] * working_dtype(problem.hidden.dtype).itemsize
    budget = BUDGET["cpu" if problem.hidden.device.type == "cpu" else "cuda"]
    rows = max(1, budget // max(wide, 1))
    return rows - rows % 32 if rows > 64 else rows


# plain


def dense_rows(problem: Linear) -> Rows:
    """The same numbers in plain operations on whole logits: differentiable twice, traceable, and what tests go by."""
    logits = torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias)
    return plain_rows(logits.to(working_dtype(logits.dtype)), problem.target, problem.spec)


# a chunk


class Work:
    """Buffers of one loop over chunks, and what is computed in them."""

    def __init__(self, problem: Linear) -> None:
        self.problem = problem
        self.size = min(chunk_rows(problem), max(1, self._number()))
        like, classes = problem.hidden, problem.weight.shape[0]
        self.working = working_dtype(like.dtype)
        self.raw = torch.empty(self.size, classes, dtype=like.dtype, device=like.device)
        self.same = self.working == like.dtype
        self.plain = self.same and problem.spec.softcap is None and not problem.spec.compiled
        self.soft = self.raw if self.same else torch.empty_like(self.raw, dtype=self.working)
        self.bent = torch.empty_like(self.soft) if problem.spec.softcap is not None else None
        self.columns = problem.weight.detach().t()

    def _number(self) -> int:
        return self.problem.hidden.shape[0] if self.problem.kept is None else self.problem.kept.numel()

    def chunks(self, kept: Tensor | None) -> Iterator[Tensor | slice]:
        """Which rows each chunk has."""
        number = self.problem.hidden.shape[0] if kept is None else kept.numel()
        for start in range(0, number, self.size):
            stop = min(start + self.size, number)
            yield slice(start, stop) if kept is None else kept[start:stop]

    def forward(self, rows: Tensor | slice) -> tuple[Rows, Tensor, Tensor, Tensor]:
        """Numbers of a chunk; its softmax rows, still to be divided by their sums; its hidden rows and targets."""
        problem, spec = self.problem, self.problem.spec
        hidden, target = problem.hidden.detach()[rows], problem.target[rows]
        raw, soft = self.raw[: len(target)], self.soft[: len(target)]
        if problem.bias is None:
            torch.mm(hidden, self.columns, out=raw)
        else:
            torch.addmm(problem.bias.detach(), hidden, self.columns, out=raw)
        if not self.same:
            soft.copy_(raw)
        bent = None if self.bent is None else self.bent[: len(target)]
        numbers = _compiled(numbers_in_place) if spec.compiled else numbers_in_place
        found, total = numbers(soft, target, spec, bent)
        return found, total, hidden, target

    def backward(self, found: Rows, total: Tensor, by: Derivatives, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient on the logits ``(rows, V)``, in a buffer, and a factor of each row that it still lacks."""
        number = len(target)
        if self.plain and by[0] is not None and by[1] is None and by[2] is None:
            # scaling hidden rows instead of logits saves a pass over the buffer
            soft = self.soft[:number]
            soft.scatter_(1, target.unsqueeze(1), (total * torch.expm1(-found.ce)).unsqueeze(1))
            return soft, by[0] / total
        bent = None if self.bent is None else self.bent[:number]
        spec = self.problem.spec
        slope = _compiled(slope_in_place) if spec.compiled else slope_in_place
        made: Tensor = slope(self.soft[:number], total, found.ce, by, target, spec, bent)
        return (made if self.same else self.raw[:number].copy_(made)), None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


class Slopes:
    """Gradients on hidden states, weight and bias, added up chunk by chunk."""

    def __init__(self, problem: Linear, wanted: tuple[bool, bool, bool]) -> None:
        hidden, weight, bias = problem.tensors
        working = working_dtype(weight.dtype)
        self.problem, self.working = problem, working
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=working) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=working) if wanted[2] and bias is not None else None

    def add(self, rows: Tensor | slice, slope: Tensor, factor: Tensor | None, hidden: Tensor) -> None:
        """A chunk's gradient on logits, with what its rows still have to be multiplied by, and its hidden states."""
        if self.hidden is not None:
            weight = self.problem.weight.detach()
            if isinstance(rows, slice):
                made = torch.mm(slope, weight, out=self.hidden[rows])
                if factor is not None:
                    made.mul_(factor.unsqueeze(1))
            else:
                made = slope @ weight
                self.hidden.index_copy_(0, rows, made if factor is None else made.mul_(factor.unsqueeze(1)))
        if self.bias is not None:
            self.bias.add_(slope.sum(0, dtype=self.working) if factor is None else factor @ slope)
        if factor is not None:
            hidden = hidden * factor.unsqueeze(1)
        if self.weight is not None:
            if self.weight.dtype == slope.dtype:
                self.weight.addmm_(slope.t(), hidden)
            else:
                self.weight.add_(slope.t() @ hidden)

    def scaled(self, factor: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All times a number, in the inputs' dtypes. The buffers are given away."""
        found: list[Tensor | None] = []
        for value, like in zip((self.hidden, self.weight, self.bias), self.problem.tensors, strict=True):
            if value is None or like is None:
                found.append(None)
            else:
                found.append((value if factor is None else value.mul_(factor)).to(like.dtype))
        return found[0], found[1], found[2]


def _plain_autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, enabled=False)


# one pass


@torch.no_grad()
def in_one_pass(
    problem: Linear, wanted: tuple[bool, bool, bool], derivatives: Callable[[Tensor | slice, Rows], Derivatives]
) -> tuple[Rows, Slopes, Derivatives]:
    """The numbers of all rows, the gradients on hidden states, weight and bias (as far as wanted), and by what.

    ``derivatives`` tells them for the rows of a chunk from their numbers.
    """
    found, slopes = _nothing(problem), Slopes(problem, wanted)
    kept: list[Tensor | None] = [None, None, None]
    with _plain_autocast(problem.hidden.device):
        work = Work(problem)
        for rows in work.chunks(problem.kept):
            part, total, hidden, target = work.forward(rows)
            found.put(rows, part)
            by = derivatives(rows, part)
            for place, value in enumerate(by):
                if value is not None:
                    whole = kept[place] = _zeros_once(kept[place], found.ce)
                    whole[rows] = value
            slopes.add(rows, *work.backward(part, total, by, target), hidden)
    return found, slopes, (kept[0], kept[1], kept[2])


def _zeros_once(whole: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if whole is None else whole


@torch.no_grad()
def slopes_by(problem: Linear, wanted: tuple[bool, bool, bool], by: Derivatives) -> Slopes:
    """The gradients from derivatives of all rows, making logits of those rows alone that have one."""
    some = [slope != 0 for slope in by if slope is not None]
    slopes = Slopes(problem, wanted)
    if not some:
        return slopes
    kept = with_slope(torch.stack(some).any(0) if len(some) > 1 else some[0], problem.kept)
    plain = replace(problem, kept=kept, spec=problem.spec.without_offers())
    with _plain_autocast(problem.hidden.device):
        work = Work(plain)
        for rows in work.chunks(kept):
            found, total, hidden, target = work.forward(rows)
            here = tuple(None if slope is None else slope[rows] for slope in by)
            slopes.add(rows, *work.backward(found, total, here, target), hidden)  # type: ignore[arg-type]
    return slopes


# two passes


def rows_of(problem: Linear) -> Rows:
    """The numbers of all rows, with gradient. Rows whose derivatives are all 0 cost nothing in backward."""
    shares = problem.spec.shares
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in problem.tensors)
    if not wanted:
        with torch.no_grad():
            return _numbers(problem)
    ce, lse, away, entropy, top = _TwoPass.apply(  # type: ignore[no-untyped-call]
        problem.hidden, problem.weight, problem.bias, problem.target, problem.kept, problem.spec
    )
    return Rows(ce, lse, None if shares is None else away, entropy, top)


def _nothing(problem: Linear) -> Rows:
    like = problem.hidden.new_empty(0, dtype=working_dtype(problem.hidden.dtype))
    return Rows.nothing(like, problem.hidden.shape[0], problem.spec)


def _numbers(problem: Linear) -> Rows:
    found = _nothing(problem)
    with _plain_autocast(problem.hidden.device):
        work = Work(problem)
        for rows in work.chunks(problem.kept):
            found.put(rows, work.forward(rows)[0])
    return found


class _TwoPass(torch.autograd.Function):
    """Keeps its inputs alone; backward makes the logits anew, of the rows that have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        kept: Tensor | None,
        spec: Spec,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, weight, bias, target, kept)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        found = _numbers(Linear(hidden, weight, bias, target, kept, spec))
        ctx.mark_non_differentiable(*(v for v in (found.entropy, found.top_entropy) if v is not None))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise twice()
        hidden, weight, bias, target, kept = ctx.saved_tensors
        problem = Linear(hidden, weight, bias, target, kept, ctx.spec)
        return (*slopes_by(problem, ctx.needs_input_grad[:3], slopes[:3]).scaled(), None, None, None)  # type: ignore[arg-type]


def twice() -> RuntimeError:
    """What to say where a gradient is to be differentiated."""
    return RuntimeError(
        "the gradient of a chunked linear cross-entropy cannot be differentiated again; "
        'use impl="dense", which holds all logits'
    )


def with_slope(some: Tensor, kept: Tensor | None) -> Tensor | None:
    """The rows where something is True, or ``kept`` as it is where a device must not be asked."""
    return kept if unreadable(some) else _selected(some)


def _selected(some: Tensor) -> Tensor | None:
    found = some.nonzero().squeeze(1)
    return None if found.numel() == some.numel() else found


def unreadable(tensor: Tensor) -> bool:
    """Whether how many entries are True cannot be told now; telling costs one synchronisation on a device."""
    return tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def compact(valid: Tensor | None) -> Tensor | None:
    """Numbers of the rows that count, ``None`` where all do (or where it cannot be told)."""
    return None if valid is None or unreadable(valid) else _selected(valid)
