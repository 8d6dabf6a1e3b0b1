"""Where a twin's objective has to live."""

from __future__ import annotations

from torch import Tensor

from ..objective import Objective


def beside(logits: Tensor, loss: Objective) -> Objective:
    """The loss on the logits' device; what is not a tensor is left for the loss itself to refuse."""
    return loss.to(logits.device) if isinstance(logits, Tensor) else loss
