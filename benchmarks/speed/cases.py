"""What is measured: a floor that everybody knows, and what this library does on the same input."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reweigh.losses import (
    AsymmetricLoss,
    BalancedSoftmax,
    BinaryCrossEntropy,
    CausalLM,
    CircleLoss,
    CrossEntropy,
    DiceLoss,
    FocalLoss,
    Objective,
    SigmoidFocalLoss,
    TLDRLoss,
)
from reweigh.weighting import TLDR, Focal, InverseFrequency, PowerLawDecay

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
            losses |= _peer("MONAI DiceLoss", "monai.losses", "DiceLoss", softmax=True, to_onehot_y=True, column=True)
        made.append(Case(name, logits, target, losses))
    for rows in (8192, 131072):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(rows, 80, generator=generator)
        target = (torch.rand(rows, 80, generator=generator) < 0.03).float()
        binary: dict[str, Loss] = {
            "F.bce_with_logits": functional.binary_cross_entropy_with_logits,
            "Objective(BinaryCrossEntropy())": Objective(BinaryCrossEntropy()),
            "SigmoidFocalLoss()": SigmoidFocalLoss(),
            "AsymmetricLoss()": AsymmetricLoss(),
        }
        made.append(Case(f"sigmoid ({rows}, 80)", logits, target, binary))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 512, 32000, generator=generator)
    labels = torch.randint(32000, (4, 512), generator=generator)
    counts = [1e6 / (v + 1) for v in range(32000)]
    token: dict[str, Loss] = {
        "F.cross_entropy": _next_token,
        "Objective(CausalLM())": Objective(CausalLM()),
        "TLDRLoss()": TLDRLoss(),
        "(decay x TLDR).clip": Objective(CausalLM(), (PowerLawDecay(counts, alpha=0.25) * TLDR()).clip(max=5.0)),
    }
    made.append(Case("tokens (4, 512, 32000)", logits, labels, token))
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
        metric |= _peer("pytorch-metric-learning CircleLoss", "pytorch_metric_learning.losses", "CircleLoss")
        made.append(Case(f"pairs ({size}, 128)", embeddings, labels, metric))
    return made


def _peer(label: str, module: str, name: str, *, column: bool = False, **options: Any) -> dict[str, Loss]:
    """Another library's loss, where it is installed (``PYTHONPATH=.venv/peers`` after ``make peers``)."""
    try:
        loss = getattr(importlib.import_module(module), name)(**options)
    except ImportError:
        return {}
    return {label: (lambda logits, target: loss(logits, target.unsqueeze(1))) if column else loss}


def _next_token(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _similarities(embeddings: Tensor, labels: Tensor) -> Tensor:
    """What any loss on all pairs costs at least, if it holds them: their similarities and a softmax over them."""
    unit = functional.normalize(embeddings)
    return functional.cross_entropy(10.0 * unit @ unit.T, labels)


def _focal_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    """The textbook's way: plain, and without masks, checks or exactness at saturation."""
    loss = functional.cross_entropy(logits, target, reduction="none")
    return ((1.0 - torch.exp(-loss)) ** 2 * loss).mean()
