"""Other libraries' linear cross-entropy, as the first half of ours: one loss per row, which any weighting may weigh."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear import Linear
from .rows import Rows, working_dtype


@dataclass(frozen=True)
class Foreign:
    """A library's operation."""

    package: str
    """What is imported, and how to get it if it is not there."""
    install: str
    call: Callable[[Any, Tensor, Tensor, Tensor | None, Tensor, float | None], Tensor]
    """From the module, hidden, weight, bias, target and softcap to cross-entropies ``(N,)``."""
    lacks: frozenset[str]
    """Which of ``softcap`` and ``bias`` it has not."""


def _torch(module: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, _: float | None) -> Tensor:
    options = module.nn.LinearCrossEntropyOptions()
    found: Tensor = module.nn.functional.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, reduction="none", options=options
    )
    return found


def _liger(
    module: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None
) -> Tensor:
    found: Tensor = module.LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=softcap)(
        weight, hidden, target, bias
    )
    return found


def _cut(
    module: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001 - refused before
    target: Tensor,
    softcap: float | None,
) -> Tensor:
    # its filter drops small gradients after they have been weighed, so that weights would decide what is dropped
    found: Tensor = module.linear_cross_entropy(
        hidden, weight, target, softcap=softcap, reduction="none", filter_eps=None
    )
    return found


FOREIGN = {
    "torch": Foreign("torch", "torch 2.13", _torch, frozenset({"softcap"})),
    "liger": Foreign("liger_kernel.transformers", "the package liger-kernel", _liger, frozenset()),
    "cut_cross_entropy": Foreign("cut_cross_entropy", "the package cut-cross-entropy", _cut, frozenset({"bias"})),
}


def foreign_rows(owner: object, impl: str, problem: Linear, z_loss: float) -> Rows:
    """The rows' cross-entropies from another library, where it has all that is asked for."""
    other, spec, name = FOREIGN[impl], problem.spec, type(owner).__name__
    asked = {
        "softcap": spec.softcap is not None and "softcap" in other.lacks,
        "bias": problem.bias is not None and "bias" in other.lacks,
        "label_smoothing": spec.shares is not None,
        "z_loss": z_loss > 0.0,
        "weighting by entropy": bool(spec.offered),
    }
    for option, wanted in asked.items():
        if wanted:
            raise ValueError(f"{name}: impl={impl!r} has no {option}; use impl='auto'")
    try:
        module = importlib.import_module(other.package)
    except ImportError as error:
        raise ValueError(f"{name}: impl={impl!r} needs {other.install}, which cannot be imported ({error})") from error
    if impl == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ValueError(f"{name}: impl='torch' needs {other.install}, got torch {torch.__version__}")
    hidden, target = problem.hidden, problem.target
    if problem.kept is not None:
        hidden, target = hidden.index_select(0, problem.kept), target[problem.kept]
    ce = other.call(module, hidden, problem.weight, problem.bias, target, spec.softcap)
    ce = ce.to(working_dtype(ce.dtype))
    if problem.kept is not None:
        ce = ce.new_zeros(len(problem.target)).index_copy(0, problem.kept, ce)
    return Rows(ce, torch.zeros_like(ce))
