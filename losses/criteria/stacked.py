"""Several given losses of each sample side by side, for weightings that decide between them."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from reweigh.weighting.config import check_whole
from reweigh.weighting.terms import LossTerms, mask_out

from .base import Criterion, expand_mask, upcast


@final
class StackedLosses(Criterion):
    r"""``num_losses`` losses of every sample as terms ``(N, num_losses)``.

    .. math:: \ell_{ik} = \text{the k-th input's entry } i

    Provides ``loss`` and ``category`` (the column). Samples are rows: under ``reduction="batch_mean"`` the weighted
    losses of a sample add up, and samples are averaged.

    Args:
        num_losses: How many tensors a call brings.

    Shapes:
        ``num_losses`` tensors ``(N,)``, unreduced, with gradient; terms ``(N, num_losses)``.

    Raises:
        TypeError: If there are more or fewer tensors, or one is not floating-point.
        ValueError: If one is not a vector, or they differ in length.

    Example:
        >>> import torch
        >>> StackedLosses(2).terms(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])).loss
        tensor([[1.0000, 0.5000],
                [2.0000, 0.0000]])
    """

    provides = frozenset({"loss", "category"})
    rowwise = True

    def __init__(self, num_losses: int = 2) -> None:
        super().__init__()
        self.num_losses = check_whole(self, "num_losses", num_losses, low=1)

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        if len(inputs) != self.num_losses:
            raise TypeError(f"StackedLosses: takes {self.num_losses} tensors of losses, got {len(inputs)} inputs")
        columns = [upcast(self, f"input {place}", value) for place, value in enumerate(inputs)]
        for place, column in enumerate(columns):
            if column.ndim != 1 or column.shape != columns[0].shape:
                raise ValueError(
                    f"StackedLosses: input {place} must hold one loss per sample, {tuple(columns[0].shape[:1])}, got "
                    f"{tuple(column.shape)}"
                )
        loss = torch.stack(columns, 1)
        if mask is not None:
            mask = expand_mask(self, mask, loss.shape)
        category = torch.arange(self.num_losses, device=loss.device).expand(loss.shape)
        return LossTerms(
            loss=mask_out(loss, mask, 0.0),
            mask=mask,
            category=category if mask is None else category.masked_fill(~mask, 0),
            num_classes=self.num_losses,
        )

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        made = 3.0 * torch.rand(self.num_losses, batch, generator=generator, dtype=torch.float64)
        return tuple(made.to(dtype).unbind(0))
