"""Named objectives for weak groups."""

from __future__ import annotations

from typing import Literal, final

from reweigh.weighting.frequency import Values
from reweigh.weighting.group import Balance, By, Cadence, GroupDRO
from reweigh.weighting.schedules import Schedule

from ..classification import PerClass
from ..criteria.element import CrossEntropy
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method


@method(
    "group_dro",
    paper=(
        "Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization for Worst-Case "
        "Generalization"
    ),
    venue="ICLR 2020",
    official="kohpangwei/group_DRO@cbbc1c5b loss.py",
    defaults={
        "step_size": ("0.01", "authors' code"),
        "adjustment": ("0.0", "authors' code"),
        "cadence": ("'step'", "ours; the authors' order is 'forward'"),
        "gather": ("True", "ours: the loss of one process on the joined batch"),
    },
    deviations=("See the weighting GroupDRO.",),
    examples=(
        {"num_groups": 3, "step_size": 0.5},
        {"num_groups": 3, "step_size": 0.5, "adjustment": 2.0, "group_counts": [9, 5, 1], "weight": [1, 2, 0.5, 3]},
    ),
)
@final
class GroupDROLoss(Objective):
    r"""Cross-entropy of the worst group: :math:`\sum_g q_g L_g` with q moved by an adversary.

    .. math::
        L = \sum_g q_g L_g, \qquad q_g \propto q_g \exp\Big(\eta\big(L_g + C_g/\sqrt{n_g}\big)\Big)

    - :math:`L_g`: mean cross-entropy of group g in the batch; :math:`\eta`: ``step_size``; :math:`C`: ``adjustment``

    Weights:
        :class:`~reweigh.weighting.GroupDRO`'s, detached. No argument is neutral; one group is plain training.

    State and cadence:
        q and running group losses, saved and equal on all ranks; they move with ``update("step")``.

    Use when:
        A drop-in for cross-entropy with groups known in training and the worst of them as the measure; with small
        groups, use the adjustment. It gains in the shortcut suite.
    Avoid when:
        A group cannot be learned, or average accuracy at training frequencies counts. Try group weights and resampling
        first: the form without adjustment is no better than group weights there.

    Deviations:
        See :class:`~reweigh.weighting.GroupDRO`; the value does not contain the adjustment.

    Args:
        num_groups: Number of groups G; ``group=`` of the call is in [0, G).
        step_size: Default 0.01 (authors' code).
        adjustment: Generalisation adjustment C, one number or one per group. Default 0.
        group_counts: Training samples per group; needed by ``adjustment`` and ``balance="counts"``.
        normalize_losses: As in :class:`~reweigh.weighting.GroupDRO`.
        absent: As in :class:`~reweigh.weighting.GroupDRO`.
        smoothing: As in :class:`~reweigh.weighting.GroupDRO`.
        by: As in :class:`~reweigh.weighting.GroupDRO`.
        balance: As in :class:`~reweigh.weighting.GroupDRO`.
        cadence: As in :class:`~reweigh.weighting.GroupDRO`.
        gather: Take group means over the joined batch of all ranks (:class:`~reweigh.weighting.Gathered`).
        weight: Per-class weights with torch's meaning and denominator.
        ignore_index: Targets with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...), group=(N,))``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = GroupDROLoss(2, step_size=1.0)
        >>> logits, target, group = torch.zeros(3, 2), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])
        >>> round(loss(logits, target, group=group).item(), 4)
        0.6931

    References:
        S. Sagawa, P. W. Koh, T. B. Hashimoto, P. Liang, "Distributionally Robust Neural Networks for Group Shifts: On
        the Importance of Regularization for Worst-Case Generalization", ICLR 2020.
    """

    def __init__(
        self,
        num_groups: int,
        *,
        step_size: float | Schedule = 0.01,
        adjustment: float | Values = 0.0,
        group_counts: Values | None = None,
        normalize_losses: bool = False,
        absent: Literal["keep", "decay"] = "keep",
        smoothing: float | Schedule = 0.1,
        by: By = "group",
        balance: Balance = "batch",
        cadence: Cadence = "step",
        gather: bool = True,
        weight: PerClass | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        groups = GroupDRO(
            num_groups,
            step_size=step_size,
            adjustment=adjustment,
            group_counts=group_counts,
            normalize_losses=normalize_losses,
            absent=absent,
            smoothing=smoothing,
            by=by,
            balance=balance,
            cadence=cadence,
        )
        super().__init__(
            CrossEntropy(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing),
            groups.gathered() if gather and balance == "batch" else groups,
            reduction,
        )
