"""Values with all their gradients, their agreement, and the memory that a call holds at most."""

import torch

from reweigh.benchmarks.speed.memory import held_at_most


def slopes(objective, inputs, more=(), **meta):
    value = objective(*inputs, **meta)
    at = [t for t in (*inputs, *meta.values(), *more) if isinstance(t, torch.Tensor) and t.requires_grad]
    return value, torch.autograd.grad(value.sum(), at)


def agree(one, other, tol):
    for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=True):
        assert a.dtype == b.dtype
        scale = max(1e-30, a.detach().abs().max().item()) if a.numel() else 1.0
        torch.testing.assert_close(b, a, rtol=0.0, atol=tol * scale)


def peak(call):
    return held_at_most(call)
