"""Shared by the tests of losses of the target's probability."""

import torch
from torch.nn.functional import cross_entropy


def slope(objective, logits, target, **meta):
    first = logits.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(first, target, **meta).sum(), first)
    return grad


def data(classes=4, size=64, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randint(classes, (size,), generator=generator)


def same(first, second, classes=4, scale=3.0, value=True, plus=0.0, tol=1e-12):
    logits, target = data(classes, scale=scale)
    if value:
        torch.testing.assert_close(first(logits, target), second(logits, target) + plus, rtol=tol, atol=tol)
    grads = slope(first, logits, target), slope(second, logits, target)
    torch.testing.assert_close(*grads, rtol=tol, atol=tol)
    assert bool((grads[0] != 0).any())


class Torch:
    """Cross-entropy of torch."""

    def __call__(self, logits, target):
        return cross_entropy(logits, target)
