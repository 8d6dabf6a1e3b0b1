"""Log-sum-exps over the pairs of each sample, without ever holding all pairs at once.

What a pair adds to the sum of its side is the exponential of ``gamma * weight * (distance - m)``, where the distance is
1 - similarity for positive pairs and the similarity itself for negative ones, so that both sides are pulled below m.
Rows of the similarity matrix are taken in tiles: forward keeps two numbers per row, backward computes each tile again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reweigh.weighting.base import Weighting
from reweigh.weighting.config import watched
from reweigh.weighting.functional import Hyper
from reweigh.weighting.terms import LossTerms

SMALL = 128
"""Rows of a tile on a CPU, and the batch up to which a tile holds everything."""
TILE_NUMBERS = {"cpu": 3 * 2**17}
"""Similarities in a tile, by kind of device: on a CPU they should stay in its cache."""
MANY = 2**25
"""The same on other devices, which need large tiles to be busy."""


def pair_terms(score: Tensor, positive: Tensor, m: Hyper) -> LossTerms:
    """What a weighting of pairs looks at: the signed margin as the loss, ``score``, and ``target`` 1 or 0."""
    margin = torch.where(positive, 1.0 - score, score) - m
    return LossTerms(loss=margin, score=score, target=positive.to(score.dtype))


class Law(NamedTuple):
    """What a pair adds to the exponent of its side."""

    pacing: Weighting | None
    m: Hyper
    gamma: Hyper
    drop_satisfied: bool = False
    closed: bool = False
    """Whether the pacing is circle loss's own, detached and with the same m: then ``gamma * weight * (distance - m)``
    is ``gamma * (max(distance, -m)**2 - m**2)``, and backward has a closed form."""

    def exponents(self, score: Tensor, positive: Tensor) -> tuple[Tensor, Tensor | None]:
        """``gamma * weight * (distance - m)``, and which pairs to keep (``None``: all)."""
        terms = pair_terms(score, positive, self.m)
        if self.pacing is None:
            return self.gamma * terms.loss, None
        weights = self.pacing.weigh(terms).to(score.dtype).expand_as(score)
        return self.gamma * weights * terms.loss, (weights > 0) | positive if self.drop_satisfied else None


class Choice(NamedTuple):
    """Which pairs count, and how many times."""

    label: Tensor | None = None
    """``(N,)`` pairs of equal labels are positive, all others negative."""
    valid: Tensor | None = None
    """``(N,)`` samples that count; ``None`` for all."""
    times: Tensor | None = None
    """``(N,)`` how many copies each sample stands for; ``None`` for one."""
    listed: tuple[Tensor, ...] = ()
    """Instead of labels: anchors and positives, anchors and negatives; or two bool matrices."""

    def rows(self, start: int, stop: int, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Masks ``(stop - start, size)`` of positive and negative pairs, and the logarithm of how many each is."""
        first = self.listed[0] if self.label is None else self.label
        places = torch.arange(size, device=first.device)
        same = places[start:stop, None] == places
        if self.label is not None:
            positive = self.label[start:stop, None] == self.label
            negative = ~positive
        elif len(self.listed) == 2:
            positive, negative = (matrix[start:stop] for matrix in self.listed)
        else:
            anchor, near, other, far = self.listed
            positive = _placed(anchor, near, start, stop, size)
            negative = _placed(other, far, start, stop, size)
        if self.valid is not None:
            positive, negative = positive & self.valid, negative & self.valid
        if self.times is None:
            return positive & ~same, negative & ~same, None
        # a sample of several copies meets the other ones
        copies = self.times[start:stop, None] - 1.0
        times = torch.where(same, copies, self.times).clamp_min(torch.finfo(self.times.dtype).tiny)
        return positive & (~same | (copies > 0)), negative & ~same, times.log()


def _placed(row: Tensor, column: Tensor, start: int, stop: int, size: int) -> Tensor:
    """True at the listed places of some rows; what lies in other rows goes to a slot that is cut off."""
    inside = (row >= start) & (row < stop)
    at = torch.where(inside, (row - start) * size + column, (stop - start) * size)
    table = torch.zeros((stop - start) * size + 1, dtype=torch.bool, device=row.device).index_fill(0, at, True)
    return table[:-1].reshape(stop - start, size)


def masked_logsumexp(value: Tensor, kept: Tensor, dim: int) -> Tensor:
    """``logsumexp`` of what is kept, minus infinity where that is nothing, with a finite gradient."""
    low = torch.finfo(value.dtype).min
    total = value.masked_fill(~kept, low).logsumexp(dim)
    return total.masked_fill(total < low / 2, -torch.inf)


def side_sums(score: Tensor, law: Law, choice: Choice, start: int) -> tuple[Tensor, Tensor]:
    """Positive and negative log-sum-exp of some rows of similarities, in plain differentiable operations."""
    positive, negative, times = choice.rows(start, start + score.shape[0], score.shape[1])
    if choice.label is None:  # a pair may be listed on both sides
        near, _ = law.exponents(score, torch.ones_like(positive))
        far, kept = law.exponents(score, torch.zeros_like(positive))
    else:
        near, kept = law.exponents(score, positive)
        far = near
    if kept is not None:
        negative = negative & kept
    if times is not None:
        near, far = near + times, far + times
    return masked_logsumexp(near, positive, 1), masked_logsumexp(far, negative, 1)


def row_sums(
    points: Tensor, law: Law, choice: Choice, *, rows: tuple[int, int] | None = None, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """Positive and negative log-sum-exp of each row (minus infinity where it has no such pair).

    Args:
        points: ``(N, D)``; similarities are their inner products.
        law: What a pair adds.
        choice: Which pairs count.
        rows: First and one past the last row wanted; all by default.
        tile: Rows that are held at once; ``None`` chooses.
    """
    size = points.shape[0]
    start, stop = (0, size) if rows is None else rows
    many = _tile(points, tile)
    with full_precision(points):
        if watched() or (many >= stop - start and not law.closed):
            return side_sums(points[start:stop] @ points.T, law, choice, start)
        learned = [] if law.pacing is None else [p for p in law.pacing.parameters() if p.requires_grad]
        found: tuple[Tensor, Tensor] = _Rows.apply(law, choice, start, stop, many, points, *learned)  # type: ignore[no-untyped-call]
        return found


def _tile(points: Tensor, tile: int | None) -> int:
    if tile is not None:
        return tile
    size, kind = max(points.shape[0], 1), points.device.type
    if kind in TILE_NUMBERS:
        return max(32, min(SMALL, TILE_NUMBERS[kind] // size))
    return max(SMALL, MANY // size)


def full_precision(points: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside: similarities are multiplied by up to hundreds and exponentiated."""
    kind = points.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


class _Rows(torch.autograd.Function):
    """:func:`side_sums` of many rows, tile by tile, computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, law: Law, choice: Choice, start: int, stop: int, tile: int, points: Tensor, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums = points.new_empty(2, stop - start)
        quick = _Circle(points, law, choice) if law.closed and choice.label is not None else None
        for first, last in _spans(start, stop, tile):
            if quick is None:
                pair = side_sums(points[first:last] @ points.T, law, choice, first)
            else:
                pair = quick.sums(first, last)
            for into, value in zip(sums[:, first - start : last - start], pair, strict=True):
                into.copy_(value)
        near, far = sums[0].clone(), sums[1].clone()
        ctx.save_for_backward(points, near, far, *learned)
        ctx.call = law, choice, start, stop, tile
        return near, far

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        points, near, far, *learned = ctx.saved_tensors
        law, choice, start, stop, tile = ctx.call
        blank = (None,) * 5
        with full_precision(points):
            if torch.is_grad_enabled():  # somebody wants the gradient's gradient: all at once, in plain operations
                sums = side_sums(points[start:stop] @ points.T, law, choice, start)
                wanted = [value for value in (points, *learned) if value.requires_grad]
                found = iter(torch.autograd.grad(sums, wanted, slopes, create_graph=True, allow_unused=True))
                return (*blank, *(next(found) if value.requires_grad else None for value in (points, *learned)))
            if law.closed and choice.label is not None:
                return (*blank, _Circle(points, law, choice).slope(start, stop, tile, near, far, *slopes))
            total = torch.zeros_like(points)
            extra = [torch.zeros_like(parameter) for parameter in learned]
            for first, last in _spans(start, stop, tile):
                part = slice(first - start, last - start)
                with torch.enable_grad():
                    left, right = points[first:last].detach().requires_grad_(), points.detach().requires_grad_()
                    sums = side_sums(left @ right.T, law, choice, first)
                    by_left, by_right, *by_learned = torch.autograd.grad(
                        sums, (left, right, *learned), [slope[part] for slope in slopes], allow_unused=True
                    )
                total[first:last] += by_left
                total += by_right
                for into, value in zip(extra, by_learned, strict=True):
                    if value is not None:
                        into += value
            return (*blank, total, *extra)


def _spans(start: int, stop: int, tile: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, tile):
        yield first, min(first + tile, stop)


class _Circle:
    """The closed form for circle loss's own detached weights, with few passes over each tile."""

    def __init__(self, points: Tensor, law: Law, choice: Choice) -> None:
        if choice.label is None:
            raise ValueError("the closed form takes pairs from labels")
        self.points, self.label, self.drop = points, choice.label, law.drop_satisfied
        # the square root of gamma goes into the matrix product, unless similarities are compared with -m
        self.root: Hyper = 1.0 if self.drop else law.gamma**0.5
        self.edge = law.m * self.root
        self.scaled = points if self.drop else points * self.root
        self.gain = law.gamma if self.drop else 1.0
        self.constant = self.gain * self.edge * self.edge
        tiny = torch.finfo(points.dtype).tiny
        # logarithm of how often each column counts, and of how many copies of itself a row meets
        self.columns: Tensor | None = None
        self.copies: Tensor | None = None
        if choice.times is not None:
            self.columns = choice.times.clamp_min(tiny).log()
            more = choice.times - 1.0
            self.copies = more.clamp_min(tiny).log().masked_fill(more <= 0.0, -torch.inf)
        if choice.valid is not None:
            none = torch.zeros_like(points[:, 0]) if self.columns is None else self.columns
            self.columns = none.masked_fill(~choice.valid, -torch.inf)
            if self.copies is not None:
                self.copies = self.copies.masked_fill(~choice.valid, -torch.inf)

    def _tile(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Square roots of the exponents (up to a constant), and which pairs have equal labels."""
        score = self.scaled[first:last] @ self.points.T
        same = self.label[first:last, None] == self.label
        return torch.where(same, self.root - score, score).clamp_min_(-self.edge), same

    def _count(self, exponent: Tensor, first: int, last: int) -> Tensor:
        """Exponents plus the logarithm of how many pairs each stands for."""
        own = exponent[:, first:last].diagonal()
        if self.copies is None:
            if self.columns is not None:
                exponent += self.columns
            own.fill_(-torch.inf)
            return exponent
        kept = own + self.copies[first:last]
        if self.columns is not None:
            exponent += self.columns
        own.copy_(kept)
        return exponent

    def sums(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        root, same = self._tile(first, last)
        gone = same | (root <= -self.edge) if self.drop else same
        exponent = root.mul_(root)
        exponent = self._count(exponent.mul_(self.gain) if self.drop else exponent, first, last)
        far = exponent.masked_fill(gone, -torch.inf).logsumexp(1)
        near = exponent.masked_fill_(same.logical_not_(), -torch.inf).logsumexp(1)
        return near - self.constant, far - self.constant

    def slope(self, start: int, stop: int, tile: int, near: Tensor, far: Tensor, *slopes: Tensor) -> Tensor:
        """Gradient with respect to the points."""
        total = torch.zeros_like(self.points)
        sums = [(side + self.constant).masked_fill(side == -torch.inf, torch.inf)[:, None] for side in (near, far)]
        signed = [-slopes[0][:, None], slopes[1][:, None]]
        scaled = self.scaled * self.gain if self.drop else self.scaled
        for first, last in _spans(start, stop, tile):
            part = slice(first - start, last - start)
            root, same = self._tile(first, last)
            share = root * root
            share = self._count(share.mul_(self.gain) if self.drop else share, first, last)
            share -= torch.where(same, sums[0][part], sums[1][part])
            if self.drop:  # pairs that are left out of the sum may exceed it; their weight is 0
                share.clamp_max_(0.0)
            share.exp_().mul_(root.add_(self.edge))
            share *= torch.where(same, signed[0][part], signed[1][part])
            total[first:last].addmm_(share, scaled)
            total.addmm_(share.T, scaled[first:last])
        return total
