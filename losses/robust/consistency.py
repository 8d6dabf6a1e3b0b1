"""Named objectives that decide between the losses of a sample."""

from __future__ import annotations

from typing import final

from reweigh.weighting.remembered import AdaWAC
from reweigh.weighting.schedules import Schedule

from ..criteria.stacked import StackedLosses
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method


@method(
    "adawac",
    paper=(
        "Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization under Concept Shift"
    ),
    venue="ICML 2023",
    acts_on="stacked",
    official="gail-yxie/adawac@7d1b79e2 models.py",
    defaults={"lr": ("1.0", "authors' code (lr_w)"), "reduction": ("'batch_mean'", "authors' code: sum / B")},
    deviations=("See the weighting AdaWAC. The authors' dice term is added outside: dice_ratio * dice + ...",),
    examples=({"num_samples": 16}, {"num_samples": 64, "lr": 0.2}),
)
@final
class AdaWACLoss(Objective):
    r"""Supervised and consistency loss of each sample, weighted against each other by what the sample has shown.

    .. math:: L = \frac1B \sum_i \big(\sigma(a_i)\,\ell_{i0} + (1 - \sigma(a_i))\,\ell_{i1}\big), \qquad
              a_i \leftarrow a_i + \eta\,(\ell_{i0} - \ell_{i1})

    - :math:`\ell_{i0}, \ell_{i1}`: the two inputs; :math:`\eta`: ``lr``

    Weights:
        :class:`~reweigh.weighting.AdaWAC`'s, detached. No argument is neutral.

    State and cadence:
        One number per sample, written at every ``update("step")``.

    Use when:
        Segmentation under concept shift with a consistency loss between augmented views: the loss learns for each
        sample whether its label or its consistency leads.
    Avoid when:
        Samples carry no index or are seldom seen again, or the second view is too dear: supervised loss plus a constant
        times consistency is enough.

    Deviations:
        See :class:`~reweigh.weighting.AdaWAC`.

    Args:
        num_samples: Length of the data set; ``index=`` of the call is in [0, num_samples).
        lr: Step >= 0, or a schedule. Default 1.0 (authors' code).
        device: As in :class:`~reweigh.weighting.SampleTable`.
        storage: As in :class:`~reweigh.weighting.SampleTable`.
        reduction: See :mod:`reweigh.losses.reductions`. Default ``"batch_mean"``.

    Shapes:
        ``(supervised (N,), consistency (N,), index=(N,))``, unreduced losses; scalar unless ``"none"``, which is
        ``(N, 2)``.

    Example:
        >>> import torch
        >>> loss = AdaWACLoss(100)
        >>> round(loss(torch.tensor([1.0]), torch.tensor([0.0]), index=torch.tensor([42])).item(), 4)
        0.7311

    References:
        Y. Dong, Y. Xie, R. Ward, "Adaptively Weighted Data Augmentation Consistency Regularization for Robust
        Optimization under Concept Shift", ICML 2023.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        lr: float | Schedule = 1.0,
        device: str | None = None,
        storage: str | None = None,
        reduction: Reduction | ReductionName = "batch_mean",
    ) -> None:
        super().__init__(StackedLosses(2), AdaWAC(num_samples, lr=lr, device=device, storage=storage), reduction)
