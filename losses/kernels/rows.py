"""Softmax rows: the numbers that weightings look at, and the gradient of any function of those numbers.

With d the derivatives by a row's numbers, p its softmax and U the sum of the shares u::

    d_logits = (d_ce + d_lse + U d_away) p - d_ce onehot(target) - d_away u
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What is known of each row, ``(N,)`` each in float32 or float64; 0 for rows that are left out."""

    ce: Tensor
    """Cross-entropy, minus the target's log-probability."""
    lse: Tensor
    """Logarithm of the sum of the exponentials of the logits."""
    away: Tensor | None = None
    r"""Cross-entropy against a row of shares u, :math:`\sum_c u_c (\mathrm{lse} - x_c)`, where shares are given."""
    entropy: Tensor | None = None
    """Entropy of the whole row (without gradient)."""
    top_entropy: Tensor | None = None
    """Entropy of its largest entries alone, renormalised (without gradient)."""

    @classmethod
    def nothing(cls, like: Tensor, number: int, spec: Spec) -> Rows:
        """All numbers of ``number`` rows 0, of ``like``'s dtype and device."""
        wanted = (True, True, spec.shares is not None, "entropy" in spec.offered, "top_entropy" in spec.offered)
        return cls(*(like.new_zeros(number) if want else None for want in wanted))  # type: ignore[arg-type]

    def put(self, rows: Tensor | slice, part: Rows) -> None:
        """Write the numbers of some rows into those of all."""
        for whole, piece in zip(self, part, strict=True):
            if whole is not None and piece is not None:
                whole[rows] = piece


@dataclass(frozen=True)
class Spec:
    """How rows become logits, and what is wanted of them."""

    softcap: float | None = None
    """c: logits x become c tanh(x / c)."""
    shares: Tensor | None = None
    """``(V,)`` u of :attr:`Rows.away`."""
    offered: frozenset[str] = frozenset()
    """``"entropy"``, ``"top_entropy"`` or both."""
    rows: int | None = None
    """Rows of a chunk; ``None`` for what fits a budget."""
    compiled: bool = False
    """Whether ``torch.compile`` makes the passes over a chunk."""

    def without_offers(self) -> Spec:
        """The same without the statistics that are asked for."""
        return replace(self, offered=frozenset())


TOP = 20
"""Entries of a row that :func:`top_entropy` looks at."""


def entropy(logits: Tensor, dim: int = -1) -> Tensor:
    r""":math:`-\sum_c p_c \ln p_c` of the softmax along a dimension."""
    log_p = logits.log_softmax(dim)
    return 0.0 - (log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim)  # 0, not -0, where it is sure


def top_entropy(logits: Tensor, dim: int = -1) -> Tensor:
    """The entropy of the softmax over the :data:`TOP` largest logits alone (all, where there are fewer)."""
    return entropy(logits.topk(min(TOP, logits.shape[dim]), dim).values, dim)


ROW_STATISTICS: dict[str, Callable[[Tensor, int], Tensor]] = {"entropy": entropy, "top_entropy": top_entropy}
"""By the names under which criteria offer them."""


Derivatives = tuple[Tensor | None, Tensor | None, Tensor | None]
"""By ``ce``, ``lse`` and ``away`` of some rows or of all."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax rows are computed in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def plain_rows(logits: Tensor, target: Tensor, spec: Spec) -> Rows:
    """The numbers of ``logits (N, C)`` in plain operations: differentiable twice, traceable, and what tests go by."""
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    away = None if spec.shares is None else -(logits.log_softmax(-1) * spec.shares).sum(-1)
    offered = {name: ROW_STATISTICS[name](logits.detach(), -1) for name in sorted(spec.offered)}
    return Rows(ce, logits.logsumexp(-1), away, **offered)


def numbers_in_place(logits: Tensor, target: Tensor, spec: Spec, bent: Tensor | None = None) -> tuple[Rows, Tensor]:
    r"""The numbers of rows; turns the logits into softmax rows that are still to be divided by the sums returned.

    ``bent`` receives :math:`\tanh(x / c)` under a softcap.
    """
    soft = logits
    if bent is not None and spec.softcap is not None:
        torch.tanh(soft.div_(spec.softcap), out=bent)
        torch.mul(bent, spec.softcap, out=soft)
    high = soft.amax(1, keepdim=True)
    soft.sub_(torch.where(high.isfinite(), high, 0.0))
    at = soft.gather(1, target.unsqueeze(1)).squeeze(1)
    mean = None if spec.shares is None else soft @ spec.shares
    top = top_entropy(soft) if "top_entropy" in spec.offered else None
    if "entropy" in spec.offered:
        shifted = soft.clone()
        total = soft.exp_().sum(1)
        whole = total.log() - shifted.mul_(soft).nan_to_num_(nan=0.0).sum(1) / total
    else:
        total, whole = soft.exp_().sum(1), None
    log_total = total.log()
    away = None if mean is None or spec.shares is None else spec.shares.sum() * log_total - mean
    return Rows(log_total - at, high.squeeze(1) + log_total, away, whole, top), total


def slope_in_place(
    soft: Tensor,
    total: Tensor,
    cross_entropy: Tensor,
    by: tuple[Tensor | None, ...],
    target: Tensor,
    spec: Spec,
    bent: Tensor | None = None,
) -> Tensor:
    """Turns softmax rows (and ``bent``) of :func:`numbers_in_place` into the gradient on the logits."""
    by_ce, by_lse, by_away = by
    other = by_lse
    if by_away is not None and spec.shares is not None:
        whole = by_away * spec.shares.sum()
        other = whole if other is None else other + whole
    ce = torch.zeros_like(total) if by_ce is None else by_ce
    at = ce * torch.expm1(-cross_entropy)  # p - 1 would cancel where p is near 1
    if other is not None:
        at = at + other * torch.exp(-cross_entropy)
    everywhere = ce if other is None else ce + other
    soft.mul_((everywhere / total).unsqueeze(1))
    soft.scatter_(1, target.unsqueeze(1), at.unsqueeze(1))
    if by_away is not None and spec.shares is not None:
        soft.addr_(by_away, spec.shares, alpha=-1.0)
    if bent is not None:
        soft.mul_(bent.square_().neg_().add_(1.0))
    return soft
