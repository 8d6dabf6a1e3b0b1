"""Named objectives for labels that passed through a known noise."""

from __future__ import annotations

from typing import final

from reweigh.weighting.base import Weighting
from reweigh.weighting.noise import TransitionWeight

from ..criteria.transition import NoisyCrossEntropy, Transition
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method

_CLEAN = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
_FLIPS = [[0.7, 0.1, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.0, 0.5, 0.25], [0.1, 0.1, 0.1, 0.7]]


@method(
    "forward_correction",
    paper="Making Deep Neural Networks Robust to Label Noise: A Loss Correction Approach",
    venue="CVPR 2017",
    official="giorgiop/loss-correction (forward); BaeHeeSun/RENT@d40f3c4 DWS/library/Forward.py",
    defaults={"reduction": ("'mean'", "paper: the mean over samples")},
    deviations=(
        "Computed from log-probabilities: no clipping of probabilities and no added 1e-12, so that gradients do not "
        "vanish on labels that the model holds impossible.",
        "The orientation is fixed and checked: T[k, j] = P(label j | clean k), rows sum to 1.",
    ),
    neutral={"transition": _CLEAN},
    examples=({"transition": _FLIPS}, {"transition": _CLEAN, "reduction": "sum"}),
)
@final
class ForwardCorrectionLoss(Objective):
    r"""Fit the labels given by what the noise makes of the model's probabilities of the clean ones.

    .. math:: \ell_i = -\log \big(T^\top f(x_i)\big)_{y_i} = -\log \sum_k f_k(x_i)\, T_{k, y_i}

    - :math:`f`: softmax probabilities; :math:`y_i`: the label given
    - :math:`T_{k,j}`: ``transition[k][j]``, probability that class k is labelled j

    Weights:
        1. A transition matrix that changes no label is neutral: cross-entropy.

    State and cadence:
        None.

    Use when:
        Label noise depends on the class alone and its transition matrix is known or well estimated: the minimiser over
        all functions is then the classifier of clean labels.
    Avoid when:
        The matrix is nearly singular or a guess, or noise depends on the sample: errors become bias. The noisy-label
        suite shows no certain gain over cross-entropy.

    Deviations:
        No clipping; the orientation of T is checked.

    Args:
        transition: ``(C, C)`` numbers, nested sequences or a tensor; rows sum to 1.
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = ForwardCorrectionLoss([[0.8, 0.2], [0.0, 1.0]])
        >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).exp().item(), 4)  # 1 / (0.5 * 0.2 + 0.5 * 1.0)
        1.6667

    References:
        G. Patrini, A. Rozza, A. K. Menon, R. Nock, L. Qu, "Making Deep Neural Networks Robust to Label Noise: A Loss
        Correction Approach", CVPR 2017.
    """

    def __init__(
        self, transition: Transition, *, ignore_index: int = -100, reduction: Reduction | ReductionName = "mean"
    ) -> None:
        super().__init__(NoisyCrossEntropy(transition, corrected=True, ignore_index=ignore_index), None, reduction)


@method(
    "transition_reweighted",
    paper="Classification with Noisy Labels by Importance Reweighting",
    venue="IEEE TPAMI 38(3), 2016",
    official="BaeHeeSun/RENT@d40f3c4 DWS/library/method_utils.py (reweight_loss, without its Dirichlet draws)",
    defaults={
        "gather": ("True", "ours: weights of the joined batch of all ranks"),
        "reduction": ("'mean'", "with weights of mean 1: the authors' weighted sum with weights of sum 1"),
    },
    deviations=(
        "Weights have mean 1 where the authors' have sum 1, under a mean over the batch: the same value.",
        "The label's column of T, where the DWS code takes its row: the same for symmetric T only.",
    ),
    neutral={"transition": _CLEAN},
    examples=({"transition": _FLIPS}, {"transition": _CLEAN}),
)
@final
class TransitionReweightedLoss(Objective):
    r"""Cross-entropy on noisy labels, each weighed by how likely it is to be the clean one.

    .. math:: L = \sum_i \bar w_i\,\big(-\log f_{y_i}(x_i)\big), \qquad
              \bar w_i \propto \frac{f_{y_i}(x_i)}{\sum_k f_k(x_i)\, T_{k, y_i}}, \quad \sum_i \bar w_i = 1

    - :math:`f`: softmax probabilities, constant in the weights; :math:`y_i`: the label given
    - :math:`T_{k,j}`: ``transition[k][j]``, probability that class k is labelled j

    Weights:
        >= 0, mean 1 over the batch. Detached. A transition matrix that changes no label is neutral: cross-entropy.

    State and cadence:
        None.

    Use when:
        Class-dependent label noise with a known or estimated transition matrix, and a model that has learned something
        but has not yet fitted the wrong labels.
    Avoid when:
        The model is untrained, when weights are those of the matrix alone, or has fitted the wrong labels. Forward
        correction needs no such care.

    Deviations:
        Mean 1 under a mean; the column of T.

    Args:
        transition: ``(C, C)`` numbers, nested sequences or a tensor; rows sum to 1.
        ignore_index: Targets with this value are removed.
        gather: Weigh the joined batch of all ranks, in training. Default True.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = TransitionReweightedLoss([[0.8, 0.2], [0.0, 1.0]])
        >>> loss.weights(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([1.2000, 0.8000])

    References:
        T. Liu, D. Tao, "Classification with Noisy Labels by Importance Reweighting", IEEE TPAMI 38(3), 2016. H. Bae, S.
        Shin, B. Na, I.-C. Moon, "Dirichlet-based Per-Sample Weighting by Transition Matrix for Noisy Label Learning",
        ICLR 2024.
    """

    def __init__(
        self,
        transition: Transition,
        *,
        ignore_index: int = -100,
        gather: bool = True,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        weighting: Weighting = TransitionWeight()
        super().__init__(
            NoisyCrossEntropy(transition, ignore_index=ignore_index),
            weighting.gathered() if gather else weighting,
            reduction,
        )
