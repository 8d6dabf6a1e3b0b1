"""What is measured: a floor that everybody knows, and what this library does on the same input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from reweigh.losses import (
    AsymmetricLoss,
    BalancedSoftmax,
    BinaryCrossEntropy,
    CircleLoss,
    CrossEntropy,
    DiceLoss,
    FocalLoss,
    Objective,
    SigmoidFocalLoss,
)
from reweigh.weighting import Focal, InverseFrequency

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One input, its floor, and the losses measured against it. The first entry of ``losses`` is the floor."""

    name: str
    logits: Tensor
    target: Tensor
    losses: dict[str, Loss]


def cases() -> list[Case]:
    """All cases, on the CPU in float32."""
    made = []
    for name, shape in {
        "softmax (32, 10)": (32, 10),
        "softmax (65536, 21)": (65536, 21),
        "segmentation (4, 19, 256, 256)": (4, 19, 256, 256),
    }.items():
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(shape, generator=generator)
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
        counts = [1000.0 / (c + 1) for c in range(shape[1])]
        composed = (InverseFrequency(counts) * Focal(2.0)).clip(max=5.0)
        losses: dict[str, Loss] = {
            "F.cross_entropy": functional.cross_entropy,
            "focal by hand": _focal_by_hand,
            "Objective(CrossEntropy())": Objective(CrossEntropy()),
            "FocalLoss(2)": FocalLoss(2.0),
            "balanced softmax": Objective(CrossEntropy(logits=BalancedSoftmax(counts))),
            "(inverse x focal).clip": Objective(CrossEntropy(), composed),
        }
        if len(shape) > 2:
            losses |= {"DiceLoss()": DiceLoss(), 'DiceLoss(over="batch")': DiceLoss(over="batch")}
        made.append(Case(name, logits, target, losses))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8192, 80, generator=generator)
    binary: dict[str, Loss] = {
        "F.bce_with_logits": functional.binary_cross_entropy_with_logits,
        "Objective(BinaryCrossEntropy())": Objective(BinaryCrossEntropy()),
        "SigmoidFocalLoss()": SigmoidFocalLoss(),
        "AsymmetricLoss()": AsymmetricLoss(),
    }
    made.append(Case("sigmoid (8192, 80)", logits, (torch.rand(8192, 80, generator=generator) < 0.03).float(), binary))
    for size in (512, 4096):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(size) // 4
        centers = torch.randn(size // 4, 128, generator=generator)
        embeddings = centers[labels] + torch.randn(size, 128, generator=generator)
        metric: dict[str, Loss] = {
            "CE of all similarities": _similarities,
            "CircleLoss()": CircleLoss(),
            "CircleLoss(over='batch')": CircleLoss(over="batch"),
            "CircleLoss(drop_satisfied=True)": CircleLoss(drop_satisfied=True),
        }
        made.append(Case(f"pairs ({size}, 128)", embeddings, labels, metric))
    return made


def _similarities(embeddings: Tensor, labels: Tensor) -> Tensor:
    """What any loss on all pairs costs at least, if it holds them: their similarities and a softmax over them."""
    unit = functional.normalize(embeddings)
    return functional.cross_entropy(10.0 * unit @ unit.T, labels)


def _focal_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    """The textbook's way: plain, and without masks, checks or exactness at saturation."""
    loss = functional.cross_entropy(logits, target, reduction="none")
    return ((1.0 - torch.exp(-loss)) ** 2 * loss).mean()
