"""Log-probabilities of hard binary targets in few passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sided_logs(logits: Tensor, y: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""``log p_t`` and ``log(1 - p_t)`` of hard binary targets, in few passes over the data.

    :math:`p_t` is :math:`\sigma(x)` for positives and :math:`1 - \max(\sigma(x) - m, 0)` for negatives. Where the shift
    m swallows a negative, the second is minus infinity; neither has a gradient there.

    Args:
        logits: ``(*S)`` in float32 or float64.
        y: ``(*S)`` of the same dtype, 0 or 1.
        shift: The probability shift m, in [0, 1).
    """
    found: tuple[Tensor, Tensor] = _SidedLogs.apply(logits, y, shift)  # type: ignore[no-untyped-call]
    return found


class _SidedLogs(torch.autograd.Function):
    """Saves its inputs alone. ``where`` costs as much as five multiplications, so ``y`` tells sides apart."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, y)
        ctx.shift = shift
        ctx.set_materialize_grads(False)
        if not shift:
            return _log_sigmoids(logits * (2.0 * y - 1.0))
        log_p, log_not_p = _log_sigmoids(logits)
        over = (torch.sigmoid(logits) - shift).clamp_min_(0.0)
        # 1 - p_m is 1 - p + m: from the side on which it does not cancel
        log_q = torch.log1p(-over)
        if shift < 1e-2:
            log_q = torch.where(over < 0.5, log_q, torch.logaddexp(log_not_p, over.new_tensor(shift).log()))
        return torch.lerp(log_q, log_p, y), torch.where(y > 0, log_not_p, over.log_())

    @staticmethod
    def backward(ctx: Any, grad_pt: Tensor | None, grad_qt: Tensor | None) -> tuple[Tensor | None, None, None]:
        logits, y = ctx.saved_tensors
        if grad_pt is None and grad_qt is None:
            return None, None, None
        if torch.is_grad_enabled():
            return _slope(logits, y, ctx.shift, grad_pt, grad_qt), None, None
        if grad_qt is None and grad_pt is not None:
            return _slope_of_pt(logits, y, ctx.shift).mul_(grad_pt), None, None
        if ctx.shift or grad_pt is None or grad_qt is None:
            return _slope(logits, y, ctx.shift, grad_pt, grad_qt), None, None
        sign = y.mul(2.0).sub_(1.0)
        z = logits * sign
        slope = z.neg().sigmoid_().mul_(grad_pt).addcmul_(z.sigmoid_(), grad_qt, value=-1.0)
        return slope.mul_(sign), None, None


def _slope_of_pt(logits: Tensor, y: Tensor, shift: float) -> Tensor:
    """Derivative of ``log p_t`` alone, in place wherever that is possible."""
    if not shift:
        sign = y.mul(2.0).sub_(1.0)
        return (logits * sign).neg_().sigmoid_().mul_(sign)
    p, not_p = torch.sigmoid(logits), (-logits).sigmoid_()
    inside = p > shift
    negative = p.mul_(not_p).div_(not_p + shift).mul_(inside).neg_()
    return negative.lerp_(not_p, y)


def _slope(logits: Tensor, y: Tensor, shift: float, grad_pt: Tensor | None, grad_qt: Tensor | None) -> Tensor:
    """The same for both outputs, in operations that can be differentiated again."""
    sign = 2.0 * y - 1.0
    if not shift:
        z = logits * sign
        return (_sum(grad_pt, torch.sigmoid(-z)) - _sum(grad_qt, torch.sigmoid(z))) * sign
    p, not_p = torch.sigmoid(logits), torch.sigmoid(-logits)
    over = p - shift
    inside = over > 0
    steep = p * not_p
    positive = _sum(grad_pt, not_p) - _sum(grad_qt, p)
    negative = _sum(grad_qt, steep / torch.where(inside, over, 1.0)) - _sum(grad_pt, steep / (not_p + shift))
    return torch.where(y > 0, positive, negative * inside)


def _sum(grad: Tensor | None, factor: Tensor) -> Tensor:
    return torch.zeros_like(factor) if grad is None else grad * factor


def _log_sigmoids(z: Tensor) -> tuple[Tensor, Tensor]:
    """``log sigmoid(z)`` and ``log sigmoid(-z)``, which share the logarithm."""
    shared = z.abs().neg_().sigmoid_().neg_().log1p_()  # minus log(1 + exp(-|z|))
    return z.clamp_max(0.0).add_(shared), (-z).clamp_max_(0.0).add_(shared)
