"""Log-probabilities of targets: what criteria of every kind compute, without cancellation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reweigh.weighting.config import readable


def times(weight: Tensor, log_p: Tensor) -> Tensor:
    """``weight * log_p`` where 0 times minus infinity is 0: a class of weight 0 leaves the sum."""
    return weight * log_p.masked_fill((weight == 0) & log_p.isneginf(), 0.0)


def along(table: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector as a view that broadcasts along one dimension."""
    shape = [1] * like.ndim
    shape[dim] = -1
    return table.reshape(shape)


def zeros_and_ones(y: Tensor) -> bool:
    """Whether all targets are known to be 0 or 1, which has a leaner form. Asks the values, but not a device."""
    if not readable(y) or y.requires_grad or not y.numel():
        return not y.numel() and not y.requires_grad
    low, high = (float(edge) for edge in y.aminmax())
    return low >= 0.0 and high <= 1.0 and float((y - y * y).sum()) == 0.0  # in [0, 1] no summand is negative


def shifted(logits: Tensor, shift: float | Tensor) -> tuple[Tensor, Tensor]:
    """``log(1 - p_m)`` and ``log p_m`` for ``p_m = max(sigmoid(x) - shift, 0)``; 0 and minus infinity at p_m = 0."""
    shift = torch.as_tensor(shift, dtype=logits.dtype, device=logits.device)
    p = torch.sigmoid(logits)
    inside = p > shift
    over = torch.where(inside, p - shift, 0.25)
    # 1 - p_m is 1 - p + m: from the side on which it does not cancel
    log_rest = torch.where(
        over < 0.5, torch.log1p(-over.clamp_max(0.5)), torch.logaddexp(logsigmoid(-logits), shift.log())
    )
    return torch.where(inside, log_rest, 0.0), torch.where(inside, over.log(), -torch.inf)


def mixed(y: Tensor, log_p: Tensor, log_not_p: Tensor, log_q: Tensor, log_not_q: Tensor) -> tuple[Tensor, Tensor]:
    """``log p_t`` and ``log(1 - p_t)`` for ``p_t = y p + (1 - y) q``, exact for hard targets."""
    mixed = (y > 0) & (y < 1)
    inner = torch.where(mixed, y, torch.full_like(y, 0.5))
    log_y, log_not_y = inner.log(), torch.log1p(-inner)

    def mix(positive: Tensor, negative: Tensor) -> Tensor:
        both = torch.logaddexp(log_y + positive, log_not_y + negative)
        return torch.where(mixed, both, torch.where(y > 0, positive, negative))

    return mix(log_p, log_q), mix(log_not_p, log_not_q)


def expected(y: Tensor, log_p: Tensor, dim: int) -> Tensor:
    """``log(sum_c y_c p_c)`` along a dimension, 0 where there is no y."""
    present = y > 0
    log_y = torch.where(present, y, torch.ones_like(y)).log()
    each = torch.where(present, log_p + log_y, torch.full_like(log_p, -torch.inf))
    return torch.where(present.any(dim, keepdim=True), each, torch.zeros_like(each)).logsumexp(dim).clamp_max(0.0)


def log_complement(log_p: Tensor, dim: int = 1) -> Tensor:
    """``log(1 - p_c)`` of every class of a softmax, from its ``log_softmax``, without cancellation.

    Only the largest class can have p so near 1 that ``1 - p`` cancels; for it the probabilities of the others are
    added up. A class that is alone gets the lowest finite number.
    """
    lowest = torch.finfo(log_p.dtype).min
    large = log_p > -0.5  # p > 0.6: at most one class, whatever the rounding
    others = log_p.masked_fill(large, lowest).logsumexp(dim, keepdim=True)
    return torch.where(large, others, torch.log1p(-log_p.masked_fill(large, lowest).exp()))
