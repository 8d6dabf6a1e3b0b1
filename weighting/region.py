"""Weights of set-level terms (dice and its relatives), from the sets' losses and volumes."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from .base import Scope, Weighting, method
from .config import check_choice, check_number
from .functional import loss_power_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


@method(
    "loss_power",
    paper="A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion Segmentation",
    venue="ISBI 2019",
    acts_on="region",
    official="nabsabraham/focal-tversky-unet losses.py",
    defaults={"gamma": ("0.75", "authors' code: exponent 0.75 of the loss (paper: 1 / (4/3))")},
    deviations=(
        "The loss is held from below at its dtype's eps inside the weight, so the slope at loss 0 is finite; the "
        "authors' power has an infinite one.",
    ),
    neutral={"gamma": 1.0},
    examples=({}, {"gamma": 1.0}, {"gamma": 2.0}),
)
@final
class LossPower(Weighting):
    r"""Raise the loss to a power: below 1 what is nearly right gains, above 1 it loses.

    .. math:: w_i = \max(\ell_i, \epsilon)^{\gamma - 1}, \qquad w_i\,\ell_i = \ell_i^\gamma

    - :math:`\ell_i`: loss of term :math:`i`; :math:`\epsilon`: the dtype's eps (1.2e-7 in float32), where it is held
    - :math:`\gamma`: ``gamma``

    Weights:
        Positive: above 1 for losses below 1 where ``gamma < 1``, at most :math:`\epsilon^{\gamma-1}`. Differentiated,
        so the gradient is that of the power. ``gamma=1`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``gamma`` may be a schedule.

    Use when:
        Dice or Tversky terms of small structures stop improving: a power below 1 keeps a slope where the loss is
        already small.
    Avoid when:
        Losses are not bounded by 1, as cross-entropy is not: the power mostly rescales them. Power 1 is the plain
        region loss, which is the one to compare with.

    Deviations:
        Held at eps; below it the slope is constant.

    Args:
        gamma: Exponent of the loss, >= 0, or a schedule. Default 0.75 (authors' code).

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> LossPower(0.5).weigh(LossTerms(torch.tensor([0.25, 1.0])))
        tensor([2., 1.])

    References:
        N. Abraham, N. M. Khan, "A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion
        Segmentation", ISBI 2019.
    """

    detached = False
    scope: Scope = "local"

    def __init__(self, gamma: float | Schedule = 0.75) -> None:
        super().__init__()
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        return loss_power_weight(terms.loss, value_of(self.gamma))


@method(
    "volume_balance",
    paper="Generalised Dice Overlap as a Deep Learning Loss Function for Highly Unbalanced Segmentations",
    venue="DLMIA 2017",
    acts_on="region",
    official="NifTK/NiftyNet@v0.6.0 niftynet/layer/loss_segmentation.py",
    defaults={
        "power": ("2.0", "paper: one over the squared volume"),
        "smooth": ("0.0", "paper"),
        "absent": ("'max'", "authors' code: an absent class counts as the rarest present one"),
        "detach": ("False", "paper: the predicted volume is differentiated"),
    },
    deviations=(
        "A set without any target element has factor 1 for all classes; the authors' code gives it none, so that "
        "predicting something there costs nothing.",
    ),
    examples=({}, {"power": 1.0, "smooth": 0.5}, {"detach": True}),
)
@final
class VolumeBalance(Weighting):
    r"""Weigh each class's dice by its volumes, so that their weighted mean is generalised dice.

    .. math:: w_c = \frac{P_c + T_c + s}{T_c^{\,a}}, \qquad \frac{\sum_c w_c \ell_c}{\sum_c w_c}
              = 1 - \frac{\sum_c T_c^{-a}\,(2 I_c + s)}{\sum_c T_c^{-a}\,(P_c+T_c+s)}

    - :math:`P_c`, :math:`T_c`: predicted and target volume of class c in its set (``Overlap`` provides both)
    - :math:`\ell_c`: dice of class c with smoothing s; :math:`I_c`: its overlap
    - :math:`a`: ``power``; :math:`s`: ``smooth``, what the criterion adds to dice's denominator

    Weights:
        Positive. Differentiated through the predicted volume (paper): held constant, their weighted mean has the value
        of generalised dice but not its gradient. No argument is neutral: ``power=0`` still weighs by volume.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        Region losses per class are averaged in each set and classes differ in volume by orders of magnitude: with these
        weights dice becomes generalised dice.
    Avoid when:
        Structures of a few elements come and go: the inverse square of the volume makes one of them own the loss. An
        unweighted mean over classes is steadier.

    Deviations:
        Where no class has a target element, all factors are 1.

    Args:
        power: Exponent of the target volume, >= 0. Default 2.0 (paper).
        smooth: Dice's ``smooth_dr``, >= 0. Default 0.
        absent: Factor of a class that its set lacks: ``"max"``, the largest among the present ones (authors' code), or
            ``"zero"``.
        detach: Use the weights as constants. Default False (paper).

    Shapes:
        Reads ``target_volume`` and ``predicted_volume`` of shape ``(*S)``; the last dimension lists the classes of a
        set. Returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> volumes = {"target_volume": torch.tensor([1.0, 4.0]), "predicted_volume": torch.tensor([2.0, 4.0])}
        >>> VolumeBalance().weigh(LossTerms(torch.ones(2), extras=volumes))
        tensor([3.0000, 0.5000])

    References:
        C. H. Sudre, W. Li, T. Vercauteren, S. Ourselin, M. J. Cardoso, "Generalised Dice Overlap as a Deep Learning
        Loss Function for Highly Unbalanced Segmentations", DLMIA 2017.
    """

    needs = frozenset({"target_volume", "predicted_volume"})
    detached = False

    def __init__(
        self,
        power: float = 2.0,
        *,
        smooth: float = 0.0,
        absent: Literal["max", "zero"] = "max",
        detach: bool = False,
    ) -> None:
        super().__init__()
        self.power = check_number(self, "power", power, low=0.0)
        self.smooth = check_number(self, "smooth", smooth, low=0.0)
        self.absent = check_choice(self, "absent", absent, ("max", "zero"))
        self.detached = detach

    def weigh(self, terms: LossTerms) -> Tensor:
        target, predicted = terms.need("target_volume", self), terms.need("predicted_volume", self)
        present = (target > 0) & (terms.counts() > 0)
        factor = torch.where(target > 0, target, torch.ones_like(target)).pow(-self.power)
        spare = torch.zeros_like(factor)
        if self.absent == "max" and factor.numel() and factor.ndim:
            known = factor.masked_fill(~present, 0.0).amax(-1, keepdim=True)
            spare = torch.where(known > 0, known, torch.ones_like(known)).expand_as(factor)
        weights = torch.where(target > 0, factor, spare) * (predicted + target + self.smooth)
        return weights.detach() if self.detached else weights
