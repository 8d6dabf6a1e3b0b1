"""Twin of the named objective that decides between two losses of a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..criteria.stacked import StackedLosses
from ..objective import Objective
from ..reductions import Reduction, ReductionName


def adawac_loss(
    supervised: Tensor,
    consistency: Tensor,
    logits: Tensor,
    *,
    reduction: Reduction | ReductionName = "batch_mean",
    **meta: Any,
) -> Tensor:
    """Both losses under given ``logits (N,)`` a, those after this visit; see :class:`~reweigh.losses.AdaWACLoss`.

    The caller keeps a, and adds ``lr * (supervised - consistency)`` before the call.

    Example:
        >>> import torch
        >>> adawac_loss(torch.tensor([1.0]), torch.tensor([3.0]), torch.zeros(1))
        tensor(2.)
    """
    weights = torch.stack([logits, -logits], 1).detach().sigmoid()
    criterion = Objective(StackedLosses(2), None, "none")
    terms = criterion.terms(supervised, consistency, **meta)
    weighted = terms.loss * weights.to(terms.loss.dtype)
    outer = Objective(StackedLosses(2), None, reduction)
    return outer.reduction(weighted, weights, terms)
