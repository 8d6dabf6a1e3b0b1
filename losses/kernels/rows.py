"""Numbers of whole softmax rows that weightings look at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOP = 20
"""Entries of a row that :func:`top_entropy` looks at."""


def entropy(logits: Tensor, dim: int = -1) -> Tensor:
    r""":math:`-\sum_c p_c \ln p_c` of the softmax along a dimension."""
    log_p = logits.log_softmax(dim)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim)


def top_entropy(logits: Tensor, dim: int = -1) -> Tensor:
    """The entropy of the softmax over the :data:`TOP` largest logits alone (all, where there are fewer)."""
    return entropy(logits.topk(min(TOP, logits.shape[dim]), dim).values, dim)


ROW_STATISTICS: dict[str, Callable[[Tensor, int], Tensor]] = {"entropy": entropy, "top_entropy": top_entropy}
"""By the names under which criteria offer them."""
