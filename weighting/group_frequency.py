"""Weights of groups of samples that follow how often they occur: reweighting and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from .base import Scope, Weighting, lookup, method
from .config import as_table, check_choice, check_number, check_whole
from .frequency import InverseFrequency, Normalization, Values
from .functional import inverse_frequency_weight
from .schedules import Schedule
from .terms import LossTerms


@method(
    "group_frequency",
    paper="none",
    venue="textbook",
    official="kohpangwei/group_DRO@cbbc1c5b (reweight_groups)",
    defaults={"power": ("1.0", "textbook"), "normalize": ("'samples'", "the mean over training samples is 1")},
    deviations=("A group with count 0 reads as the smallest positive count.",),
    neutral={"group_counts": [50, 20, 6], "power": 0.0},
    examples=({"group_counts": [50, 20, 6]}, {"group_counts": [50, 20, 6, 1], "power": 0.5, "by": "category"}),
)
@final
class GroupFrequency(Weighting):
    r"""Weigh each group by a power of its inverse frequency (group reweighting).

    .. math:: w_i \propto n_{g_i}^{-a}

    - :math:`n_g`: ``group_counts[g]``; :math:`a`: ``power``, 1 gives every group the same total weight

    Weights:
        Positive constants. ``power=0`` is neutral.

    State and cadence:
        None; the table is a constant, moves with the module and is not saved.

    Use when:
        Groups are known in training, small ones matter, and neither adversary nor state is wanted: the baseline of
        group DRO, with a gain of its own in the shortcut suite.
    Avoid when:
        A group has a handful of samples, which are learned by heart, or accuracy at training frequencies may not fall.
        Where groups are tiny, sampling by group has less noise.

    Deviations:
        Count 0 reads as the smallest positive count.

    Args:
        group_counts: Training samples per group, >= 0; :func:`class_counts` of all groups counts them.
        power: Exponent :math:`a` >= 0, or a schedule. Default 1.
        normalize: As in :class:`InverseFrequency`. Default ``"samples"``: the mean over training samples is 1.
        by: ``"group"`` (of the call) or ``"category"``.

    Shapes:
        Reads ``group`` ``(S[0],)``; returns weights that broadcast to ``(*S)``.

    Example:
        >>> GroupFrequency([90, 10]).table()
        tensor([0.5556, 5.0000], dtype=torch.float64)

    References:
        None (textbook).
    """

    detached = True
    scope: Scope = "local"

    def __init__(
        self,
        group_counts: Values,
        *,
        power: float | Schedule = 1.0,
        normalize: Normalization = "samples",
        by: Literal["group", "category"] = "group",
    ) -> None:
        super().__init__()
        self.by = check_choice(self, "by", by, ("group", "category"))
        self.needs = frozenset({by})
        self.frequency = InverseFrequency(
            as_table(self, "group_counts", group_counts), power=power, normalize=normalize
        )

    def table(self) -> Tensor:
        """``(G,)`` float64 group weights now."""
        return self.frequency.table()

    def weigh(self, terms: LossTerms) -> Tensor:
        return lookup(self, self.table(), terms, self.by)

    def summary(self) -> dict[str, Tensor]:
        return {"group_weight": self.table().clone()}


def group_index(label: Tensor, attribute: Tensor, num_attributes: int) -> Tensor:
    """One group per combination of class and attribute: ``label * num_attributes + attribute``.

    Args:
        label: Integers >= 0, any shape.
        attribute: Integers in ``[0, num_attributes)``, same shape.
        num_attributes: Number of attributes.

    Raises:
        TypeError: If one of them does not hold integers.
        ValueError: If shapes differ or a value is out of range.

    Example:
        >>> import torch
        >>> group_index(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), 2)
        tensor([1, 2, 3])
    """
    check_whole("group_index", "num_attributes", num_attributes, low=1)
    for name, value in (("label", label), ("attribute", attribute)):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            raise TypeError(
                f"group_index: {name} must be an integer tensor, got {getattr(value, 'dtype', type(value))}"
            )
    if label.shape != attribute.shape:
        raise ValueError(
            f"group_index: attribute must have the label's shape {tuple(label.shape)}, got {tuple(attribute.shape)}"
        )
    if attribute.numel() and not (int(attribute.min()) >= 0 and int(attribute.max()) < num_attributes):
        raise ValueError(
            f"group_index: attribute must be in [0, {num_attributes}), got {int(attribute.min())}.."
            f"{int(attribute.max())}"
        )
    if label.numel() and int(label.min()) < 0:
        raise ValueError(f"group_index: label must be >= 0, got {int(label.min())}")
    return label.long() * num_attributes + attribute.long()


def group_sampling_weights(
    group: Tensor | Sequence[int], *, num_groups: int | None = None, power: float = 1.0
) -> Tensor:
    r"""Weights per sample for torch's ``WeightedRandomSampler``: :math:`n_{g_i}^{-a}`, summing to 1.

    Args:
        group: ``(N,)`` group of each training sample, integers >= 0.
        num_groups: Checked against the groups where given.
        power: Exponent >= 0; 1 draws from every group equally often, 0 as often as it occurs.

    Returns:
        ``(N,)`` float64.

    Raises:
        TypeError: If the groups are not integers.
        ValueError: If there are none, or one is out of range.

    Example:
        >>> group_sampling_weights([0, 0, 0, 1])
        tensor([0.1667, 0.1667, 0.1667, 0.5000], dtype=torch.float64)
    """
    at = torch.as_tensor(group)
    if at.is_floating_point() or at.is_complex() or at.dtype == torch.bool:
        raise TypeError(f"group_sampling_weights: group must hold integers, got {at.dtype}")
    if at.ndim != 1 or not at.numel() or int(at.min()) < 0:
        found = tuple(at.shape) if at.ndim != 1 or not at.numel() else int(at.min())
        raise ValueError(f"group_sampling_weights: group must be a non-empty vector of integers >= 0, got {found}")
    if num_groups is not None:
        check_whole("group_sampling_weights", "num_groups", num_groups, low=1)
    if num_groups is not None and int(at.max()) >= num_groups:
        raise ValueError(f"group_sampling_weights: group must be in [0, {num_groups}), got {int(at.max())}")
    power = check_number("group_sampling_weights", "power", power, low=0.0)
    weights = inverse_frequency_weight(torch.bincount(at).double(), power)[at]
    return weights / weights.sum()
