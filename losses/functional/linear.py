"""Cross-entropy of hidden states under a vocabulary matrix in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reweigh.weighting.base import Weighting
from reweigh.weighting.frequency import Values

from ..criteria.linear import Implementation, LinearCausalLM, LinearCrossEntropy
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from .device import beside


def linear_cross_entropy(
    hidden: Tensor,
    vocab_weight: Tensor,
    target: Tensor,
    weighting: Weighting | None = None,
    *,
    bias: Tensor | None = None,
    weight: Values | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    impl: Implementation = "auto",
    chunk_rows: int | None = None,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Weighted cross-entropy without the logits; see :class:`~reweigh.losses.LinearCrossEntropy`.

    Example:
        >>> import torch
        >>> from reweigh.weighting import Focal
        >>> hidden, vocab_weight, target = torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([0, 3])
        >>> round(linear_cross_entropy(hidden, vocab_weight, target, Focal(2.0)).item(), 4)
        0.7798
    """
    criterion = LinearCrossEntropy(
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
        impl=impl,
        chunk_rows=chunk_rows,
    )
    objective = beside(hidden, Objective(criterion, weighting, reduction))
    return objective.forward(hidden, vocab_weight, target, bias=bias, **meta)


def linear_causal_lm_loss(
    hidden: Tensor,
    vocab_weight: Tensor,
    labels: Tensor,
    weighting: Weighting | None = None,
    *,
    bias: Tensor | None = None,
    shift: bool = True,
    weight: Values | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    impl: Implementation = "auto",
    chunk_rows: int | None = None,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    """Weighted next-token loss without the logits; see :class:`~reweigh.losses.LinearCausalLM`.

    Example:
        >>> import torch
        >>> from reweigh.weighting import TLDR
        >>> hidden, vocab_weight, labels = torch.zeros(1, 2, 8), torch.zeros(2, 8), torch.tensor([[0, 1]])
        >>> round(linear_causal_lm_loss(hidden, vocab_weight, labels, TLDR()).item(), 4)
        0.6931
    """
    criterion = LinearCausalLM(
        shift=shift,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
        impl=impl,
        chunk_rows=chunk_rows,
    )
    objective = beside(hidden, Objective(criterion, weighting, reduction))
    return objective.forward(hidden, vocab_weight, labels, bias=bias, **meta)
