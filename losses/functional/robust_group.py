"""Twin of the named objective for weak groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reweigh.weighting.config import as_table
from reweigh.weighting.group import By

from ..classification import PerClass
from ..reductions import Reduction, ReductionName
from ..robust.group import GroupDROLoss
from .device import beside


def group_dro_loss(
    logits: Tensor,
    target: Tensor,
    shares: Tensor,
    *,
    by: By = "group",
    weight: PerClass | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction | ReductionName = "mean",
    **meta: Any,
) -> Tensor:
    r"""Cross-entropy :math:`\sum_g q_g L_g` for given ``shares`` q ``(G,)``; see :class:`~reweigh.losses.GroupDROLoss`.

    The caller keeps and moves q. ``meta`` takes ``group``, ``sample_weight``, ``mask``, ...

    Example:
        >>> import torch
        >>> logits, target = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> loss = group_dro_loss(logits, target, torch.tensor([0.2, 0.8]), group=torch.tensor([0, 1]))
        >>> round(loss.item(), 4)
        1.7269
    """
    table = as_table("group_dro_loss", "shares", shares)
    loss = GroupDROLoss(
        len(table),
        by=by,
        gather=False,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    ).eval()
    if loss.weighting is not None:
        loss.weighting.get_buffer("log_q").copy_(table.log())
    return beside(logits, loss).forward(logits, target, **meta)
