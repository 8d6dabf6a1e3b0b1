"""Weights that treat positives and negatives of binary labels differently."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from .base import Scope, Weighting, method
from .config import check_number
from .dynamics import Event
from .functional import Hyper, focal_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


def _binary(owner: Weighting, terms: LossTerms) -> Tensor:
    target = terms.need("target", owner)
    if not target.is_floating_point():
        raise TypeError(
            f"{type(owner).__name__}: needs binary targets as BinaryCrossEntropy provides them, got class numbers "
            f"({target.dtype})"
        )
    return target


def _focus(owner: Weighting, terms: LossTerms, gamma_neg: Hyper, gamma_pos: Hyper) -> Tensor:
    y = _binary(owner, terms)
    gamma = y * (gamma_pos - gamma_neg) + gamma_neg
    return focal_weight(terms.need("log_pt", owner), gamma, terms.log_complement())


@method(
    "asymmetric_focal",
    paper="Asymmetric Loss For Multi-Label Classification",
    venue="ICCV 2021",
    acts_on="binary",
    official="Alibaba-MIIL/ASL@8c9e0bd8 src/loss_functions/losses.py",
    defaults={
        "gamma_neg": ("4.0", "paper"),
        "gamma_pos": ("1.0", "authors' code; the paper recommends 0"),
        "detach": ("True", "authors' AsymmetricLoss; their optimized class differentiates"),
    },
    deviations=(
        "Powers are taken in log space: finite gradients for exponents between 0 and 1, where the authors' are NaN.",
        "The grad mode is left alone; the authors' detach switch turns recording back on inside no_grad.",
    ),
    neutral={"gamma_neg": 0.0, "gamma_pos": 0.0},
    examples=({}, {"gamma_neg": 2.0, "gamma_pos": 0.5, "detach": False}),
)
@final
class AsymmetricFocal(Weighting):
    r"""Focus harder on the negatives than on the positives, so that many easy negatives do not drown few positives.

    .. math:: w_i = (1 - p_{t,i})^{\gamma_i}, \qquad \gamma_i = y_i\,\gamma_+ + (1 - y_i)\,\gamma_-

    - :math:`p_t`: probability given to the target side; for negatives under a probability shift
      :math:`1 - p_t = \max(p - m, 0)`
    - :math:`y`: binary target; :math:`\gamma_+`: ``gamma_pos``; :math:`\gamma_-`: ``gamma_neg``

    Weights:
        In [0, 1]. Detached by default (the authors' main class); ``detach=False`` differentiates them (their optimized
        class, and the paper's gradient analysis). ``gamma_neg=0, gamma_pos=0`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. Both exponents may be schedules.

    Use when:
        A sigmoid criterion on multi-label data with few positives and very many negatives per sample, where asymmetric
        focusing is to be combined with other weights.
    Avoid when:
        Positives and negatives are about as many: it is then focal loss. The multi-label suite shows no gain of the
        asymmetric loss over binary cross-entropy, and much worse calibration.

    Deviations:
        Values equal the authors'; gradients are finite where theirs are NaN.

    Args:
        gamma_neg: Exponent on negatives, finite and >= 0, or a schedule. Default 4.0 (paper).
        gamma_pos: Exponent on positives, finite and >= 0, or a schedule. Default 1.0 (authors' code).
        detach: Use the weights as constants. Default True (authors' main class).

    Shapes:
        Reads ``log_pt``, ``target`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import BinaryCrossEntropy, Objective
        >>> objective = Objective(BinaryCrossEntropy(), AsymmetricFocal(2.0, 1.0))
        >>> objective.weights(torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor([0.2500, 0.5000])

    References:
        T. Ridnik, E. Ben-Baruch, N. Zamir, A. Noy, I. Friedman, M. Protter, L. Zelnik-Manor, "Asymmetric Loss For
        Multi-Label Classification", ICCV 2021.
    """

    needs = frozenset({"log_pt", "target"})
    scope: Scope = "local"

    def __init__(
        self, gamma_neg: float | Schedule = 4.0, gamma_pos: float | Schedule = 1.0, *, detach: bool = True
    ) -> None:
        super().__init__()
        self.gamma_neg = check_hyper(self, "gamma_neg", gamma_neg, low=0.0)
        self.gamma_pos = check_hyper(self, "gamma_pos", gamma_pos, low=0.0)
        self.detached = detach

    def weigh(self, terms: LossTerms) -> Tensor:
        weights = _focus(self, terms, value_of(self.gamma_neg), value_of(self.gamma_pos))
        return weights.detach() if self.detached else weights


@method(
    "adaptive_asymmetric_focal",
    paper="Asymmetric Loss For Multi-Label Classification",
    venue="ICCV 2021",
    acts_on="binary",
    official="none: the paper's adaptive asymmetry is not in the authors' code",
    defaults={
        "gamma_neg": ("4.0", "paper: the fixed exponent, here the start"),
        "gamma_pos": ("1.0", "authors' code"),
        "target_gap": ("0.0", "ours: positives as confident as negatives"),
        "step_size": ("0.01", "ours; the paper's lambda has no published value"),
        "max_gamma_neg": ("10.0", "ours: keeps the exponent in a range where weights are not all 0"),
    },
    deviations=(
        "Committed once per optimizer step over all micro-batches and ranks, not per batch.",
        "A step without a positive or without a negative changes nothing.",
    ),
    neutral={"gamma_neg": 0.0, "gamma_pos": 0.0, "step_size": 0.0},
    examples=({"step_size": 0.5}, {"gamma_neg": 1.0, "target_gap": 0.2, "step_size": 0.5, "detach": False}),
)
@final
class AdaptiveAsymmetricFocal(Weighting):
    r"""Asymmetric focusing whose exponent on negatives follows the gap between positive and negative probabilities.

    .. math::
        \gamma_- \leftarrow \mathrm{clip}\big(\gamma_- + \lambda\,(\Delta^\ast - \Delta p)\big), \qquad
        \Delta p = \operatorname*{mean}_{y=1} p_t - \operatorname*{mean}_{y=0} p_t

    - :math:`p_t`: probability given to the target side, as in :class:`AsymmetricFocal`, whose weights these are
    - :math:`\Delta^\ast`: ``target_gap``; :math:`\lambda`: ``step_size``; the clip is to [0, ``max_gamma_neg``]

    While positives are less confident than they should be (:math:`\Delta p < \Delta^\ast`), negatives are turned down
    further, which drives the gap to its target.

    Weights:
        In [0, 1]. Detached by default. ``step_size=0`` is :class:`AsymmetricFocal`; exponents of 0 with it are neutral.

    State and cadence:
        ``gamma_neg`` and ``gap``: float64 numbers, equal on all ranks and saved. Observes probabilities of training
        forwards into pending sums, adds them over ranks and commits at every optimizer step.

    Use when:
        Multi-label data with very many negatives per sample, where the exponent on negatives should follow the gap
        between positive and negative probabilities instead of being tuned.
    Avoid when:
        Many positives are unlabelled: they keep the gap from closing, and the exponent rises to its bound. Where a few
        runs can be paid for, a fixed asymmetric exponent is simpler.

    Deviations:
        Once per optimizer step. The sign is the one that closes the gap.

    Args:
        gamma_neg: Exponent on negatives at the start, finite and >= 0. Default 4.0 (paper's fixed value).
        gamma_pos: Exponent on positives, finite and >= 0, or a schedule. Default 1.0 (authors' code).
        target_gap: Wanted probability gap, in [-1, 1], or a schedule. Default 0.0 (ours).
        step_size: The paper's lambda, finite and >= 0, or a schedule. Default 0.01 (ours).
        max_gamma_neg: Upper end of the exponent, finite and > 0. Default 10.0 (ours).
        detach: Use the weights as constants. Default True.

    Shapes:
        Reads ``log_pt``, ``target`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import BinaryCrossEntropy, Objective
        >>> weighting = AdaptiveAsymmetricFocal(2.0, step_size=1.0)
        >>> objective = Objective(BinaryCrossEntropy(shift=0.05, soft="sides"), weighting)
        >>> _ = objective(torch.tensor([-3.0, -3.0]), torch.tensor([1.0, 0.0]))
        >>> objective.update("step")
        >>> weighting.summary()["gamma_neg"]
        tensor(2.9526, dtype=torch.float64)

    References:
        T. Ridnik, E. Ben-Baruch, N. Zamir, A. Noy, I. Friedman, M. Protter, L. Zelnik-Manor, "Asymmetric Loss For
        Multi-Label Classification", ICCV 2021 (section on adaptive asymmetry).
    """

    needs = frozenset({"log_pt", "target"})
    scope: Scope = "local"
    update_on: Event = "step"

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float | Schedule = 1.0,
        *,
        target_gap: float | Schedule = 0.0,
        step_size: float | Schedule = 0.01,
        max_gamma_neg: float = 10.0,
        detach: bool = True,
    ) -> None:
        super().__init__()
        self.max_gamma_neg = check_number(self, "max_gamma_neg", max_gamma_neg, low=0.0, open_low=True)
        self.start = check_number(self, "gamma_neg", gamma_neg, low=0.0, high=self.max_gamma_neg)
        self.gamma_pos = check_hyper(self, "gamma_pos", gamma_pos, low=0.0)
        self.target_gap = check_hyper(self, "target_gap", target_gap, low=-1.0, high=1.0)
        self.step_size = check_hyper(self, "step_size", step_size, low=0.0)
        self.detached = detach
        self.add_state("gamma_neg", torch.tensor(self.start, dtype=torch.float64))
        self.add_state("gap", torch.tensor(0.0, dtype=torch.float64))
        self.add_pending("probability", 2)
        self.add_pending("count", 2)

    def weigh(self, terms: LossTerms) -> Tensor:
        gamma_neg = self.get_buffer("gamma_neg").to(terms.loss.dtype)
        weights = _focus(self, terms, gamma_neg, value_of(self.gamma_pos))
        return weights.detach() if self.detached else weights

    def observe(self, terms: LossTerms) -> None:
        counts, y = terms.counts().double(), _binary(self, terms).double()
        p = terms.need("log_pt", self).double().exp()
        sides = torch.stack((counts * y, counts * (1.0 - y))).flatten(1)
        self.accumulate("probability", (sides * p.flatten()).sum(1))
        self.accumulate("count", sides.sum(1))

    def commit(self, sums: dict[str, Tensor]) -> None:
        count, gamma_neg, gap = sums["count"], self.get_buffer("gamma_neg"), self.get_buffer("gap")
        mean = sums["probability"] / count.clamp_min(torch.finfo(torch.float64).tiny)
        found = mean[0] - mean[1]
        both = (count > 0).all() & found.isfinite()
        moved = (gamma_neg + value_of(self.step_size) * (value_of(self.target_gap) - found)).clamp(
            0.0, self.max_gamma_neg
        )
        gamma_neg.copy_(torch.where(both, moved, gamma_neg))
        gap.copy_(torch.where(both, found, gap))

    def reset(self) -> None:
        super().reset()
        self.get_buffer("gamma_neg").fill_(self.start)
        self.get_buffer("gap").zero_()

    def summary(self) -> dict[str, Tensor]:
        return {"gamma_neg": self.get_buffer("gamma_neg").clone(), "gap": self.get_buffer("gap").clone()}
