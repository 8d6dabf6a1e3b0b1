"""How exact the losses are in low precision: ``python -m reweigh.benchmarks.speed.accuracy``.

Against float64 on the same inputs after rounding, so that only the arithmetic counts. The errors are the largest over
all terms: of the value relative to max(1, |value|), of the gradient absolute (its largest entry is about 1).
``nan``: at least one is not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from reweigh.losses import AsymmetricLoss, FocalLoss, SelfAdjustingDiceLoss, SigmoidFocalLoss

Loss = Callable[[Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (3.0, 30.0, 1e3, 1e4)


def losses(gamma: float) -> dict[str, tuple[Loss, Loss, bool]]:
    """Name: (loss under test, exact loss, whether it is a sigmoid loss). The textbook's forms stand beside ours."""
    softmax = FocalLoss(gamma, reduction="none")
    sigmoid = SigmoidFocalLoss(gamma, alpha=None, reduction="none")

    def by_exp(x: Tensor, y: Tensor) -> Tensor:
        loss = functional.cross_entropy(x, y, reduction="none")
        return (1.0 - torch.exp(-loss)) ** gamma * loss

    def by_probability(x: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(x)
        p_t = p * y + (1.0 - p) * (1.0 - y)
        return functional.binary_cross_entropy_with_logits(x, y, reduction="none") * (1.0 - p_t) ** gamma

    if gamma < 0.1:  # the exponent of the self-adjusting factor
        dice = SelfAdjustingDiceLoss(gamma, reduction="none")
        return {"SelfAdjustingDiceLoss": (dice, dice, False), "dice, probabilities": (_dice(gamma), dice, False)}
    asymmetric = AsymmetricLoss(gamma, gamma, detach=False, reduction="none")
    return {
        "FocalLoss": (softmax, softmax, False),
        "softmax, CE then exp": (by_exp, softmax, False),
        "SigmoidFocalLoss": (sigmoid, sigmoid, True),
        "sigmoid, probabilities": (by_probability, sigmoid, True),
        "AsymmetricLoss": (asymmetric, asymmetric, True),
        "asymmetric, probabilities": (_asymmetric(gamma), asymmetric, True),
    }


def _asymmetric(gamma: float, clip: float = 0.05, eps: float = 1e-8) -> Loss:
    """The usual way: probabilities, clamped before the logarithm."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(x)
        q = (1.0 - p + clip).clamp(max=1.0)
        p_t = p * y + q * (1.0 - y)
        return -torch.log(p_t.clamp(min=eps)) * (1.0 - p_t) ** gamma

    return loss


def _dice(alpha: float) -> Loss:
    """The usual way: powers of probabilities."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        p, y = torch.softmax(x, 1), functional.one_hot(target, x.shape[1]).to(x.dtype)
        q = (1.0 - p) ** alpha * p
        return (1.0 - (2.0 * q * y + 1.0) / (q**2 + y**2 + 1.0)).sum(1)

    return loss


def errors(loss: Loss, exact: Loss, logits: Tensor, target: Tensor) -> tuple[float, float]:
    """Largest error of value and gradient."""
    found, wanted = (_value_and_grad(fn, x, target) for fn, x in ((loss, logits), (exact, logits.double())))
    value = ((found[0] - wanted[0]).abs() / wanted[0].abs().clamp_min(1.0)).max()
    return float(value), float((found[1] - wanted[1]).abs().max())


def _value_and_grad(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    target = target.to(logits.dtype) if target.is_floating_point() else target
    value = loss(logits, target)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach().double(), grad.double()


def main() -> None:
    """Print the table in Markdown."""
    print("| loss | gamma | dtype | " + " | ".join(f"logits of ±{scale:g}" for scale in SCALES) + " |")
    print("|---" * (3 + len(SCALES)) + "|")
    for gamma in (2.0, 0.5, 0.01):
        for name, (loss, exact, binary) in losses(gamma).items():
            for dtype in DTYPES:
                cells = []
                for scale in SCALES:
                    generator = torch.Generator().manual_seed(0)
                    logits = (torch.randn(4096, 10, generator=generator) * scale / 2).clamp(-scale, scale).to(dtype)
                    target = torch.randint(10, (4096,), generator=generator)
                    if binary:
                        target = functional.one_hot(target, 10).to(torch.float64)
                    value, grad = errors(loss, exact, logits, target)
                    cells.append(f"{value:.0e}, {grad:.0e}".replace("e-0", "e-").replace("e+00", ""))
                print(f"| {name} | {gamma:g} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
