"""Label-distributionally robust losses."""

from __future__ import annotations

from typing import final

from reweigh.weighting.schedules import Schedule

from ..criteria.label_dro import AdaptiveLabelDRO, LabelDRO, Scores
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method


@method(
    "ldr",
    paper="Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    venue="ICML 2023",
    official="Optimization-AI/ICML2023_LDR@732fc85d loss.py (LDRLoss_V1)",
    defaults={
        "temperature": ("1.0", "authors' class; their script tries 0.1, 1, 10"),
        "margin": ("0.0", "ours, so that the default is cross-entropy less ln K; the authors' class has 2, script 0.1"),
        "scores": ("'raw'", "paper's formula; the authors' code is 'softplus'"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=(
        "scores='softplus' works on logarithms: logits that are all below -745, where the authors' code is NaN, stay "
        "finite.",
    ),
    examples=(
        {},
        {"temperature": 10.0, "margin": 0.1, "scores": "softplus"},
        {"temperature": 0.3, "margin": 2.0, "scores": "abs"},
    ),
)
@final
class LDRLoss(Objective):
    r"""Classification loss against the worst distribution over labels near the uniform one (LDR-KL).

    .. math:: \ell_i = \lambda \ln \frac1K \sum_k \exp\frac{f_{ik} - f_{iy_i} + c\,[k \ne y_i]}{\lambda}

    - :math:`f`: the logits, or scores made of them; :math:`\lambda`: ``temperature``; :math:`c`: ``margin``
    - K: number of classes

    Weights:
        None: one criterion, whose gradient is exact. No argument is neutral: ``temperature=1, margin=0`` is
        cross-entropy less :math:`\ln K`, with its gradient; :math:`\lambda \to 0` is the hinge of Crammer and Singer,
        :math:`\lambda \to \infty` the mean over labels.

    State and cadence:
        None; ``temperature`` and ``margin`` may be schedules.

    Use when:
        Labels are noisy, and a margin and a temperature between cross-entropy and the multi-class hinge can be tuned.
        Accuracy rises in the noisy-label suite.
    Avoid when:
        The loss has to stay positive, or probabilities have to be calibrated: a margin or another temperature spoils
        them, as the noisy-label suite shows beside cross-entropy.

    Deviations:
        The logits are used as they are by default; ``scores="softplus"`` is the authors' code, and finite where that
        divides 0 by 0.

    Args:
        temperature: :math:`\lambda > 0`, or a schedule. Default 1.0 (authors' code).
        margin: :math:`c \ge 0`, or a schedule. Default 0.0 (ours; authors' class 2.0, script 0.1).
        scores: ``"raw"``, ``"softplus"`` or ``"abs"``, as in :class:`~reweigh.losses.LabelDRO`. Default "raw" (paper).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = LDRLoss(margin=1.0)
        >>> round(loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).item(), 4)
        -0.3799

    References:
        D. Zhu, Y. Ying, T. Yang, "Label Distributionally Robust Losses for Multi-class Classification: Consistency,
        Robustness and Adaptivity", ICML 2023.
    """

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        margin: float | Schedule = 0.0,
        scores: Scores = "raw",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(
            LabelDRO(temperature, margin=margin, scores=scores, ignore_index=ignore_index), None, reduction
        )


@method(
    "aldr",
    paper="Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    venue="ICML 2023",
    official="Optimization-AI/ICML2023_LDR@732fc85d loss.py (ALDRLoss_V1)",
    defaults={
        "temperature": ("1.0", "authors' class; script 10"),
        "alpha": ("1.0", "authors' class; script 2"),
        "margin": ("0.0", "ours; the authors' class has 1, script 0.1"),
        "scores": ("'raw'", "paper's formula; the authors' code is 'abs', with softplus before it for CIFAR-100"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=(
        "The table is written at the step, copies of a sample averaged; the authors' code writes it in every forward, "
        "in evaluation too, and the last copy wins.",
        "Temperatures are held at 1e-4 of the common one, which only alpha < 1 can reach.",
        "A row of zeros under scores='abs', NaN in the authors' code, stays as it is.",
    ),
    examples=(
        {"num_samples": 8},
        {"num_samples": 8, "temperature": 10.0, "alpha": 2.0, "margin": 0.1, "scores": "abs"},
        {"num_samples": 8, "temperature": 0.5, "alpha": 0.6, "margin": 1.0, "scores": "softplus"},
    ),
)
@final
class ALDRLoss(Objective):
    r"""LDR with a temperature for each training sample, which falls as the model gets sure of a label (ALDR-KL).

    .. math:: \ell_i = \lambda_i \ln \frac1K \sum_k \exp\frac{f_{ik} - f_{iy_i} + c\,[k \ne y_i]}{\lambda_i}
              - \frac{\alpha \ln K}{2\lambda_0}(\lambda_i - \lambda_0)^2, \qquad
              \lambda_i \leftarrow \lambda_0\Big(1 - \frac{\mathrm{KL}(p_i\,\|\,1/K)}{\alpha \ln K}\Big)

    - :math:`p_i = \mathrm{softmax}(f_i/\lambda_i)`, :math:`10^{-5}` added to each; :math:`f`: the logits, or scores
    - :math:`\lambda_0`: ``temperature``; :math:`\alpha`: ``alpha``; :math:`c`: ``margin``

    Weights:
        None: one criterion; temperatures are constants to the gradient. No argument is neutral: a large ``alpha`` is
        :class:`LDRLoss` at :math:`\lambda_0`.

    State and cadence:
        A table of ``num_samples`` float32 numbers, :math:`\lambda_i/\lambda_0`, read by ``index=``; ``update_on =
        "step"``. The loss uses the temperature after this forward's own fixed-point step, the table takes it over at
        the step, averaged over copies, micro-batches and ranks. Evaluation writes nothing, and needs no index: its
        samples start at :math:`\lambda_0`.

    Use when:
        Labels are noisy to an unknown degree and samples have a stable index: each gets a temperature that falls as the
        model grows sure. Accuracy rises in the noisy-label suite.
    Avoid when:
        Samples have no index or are seen once: one temperature for all says the same. Calibrated probabilities are
        needed: calibration is worse than by cross-entropy in that suite.

    Deviations:
        The table is written at the step, not in the forward; temperatures have a floor of :math:`10^{-4}\lambda_0`;
        rows of zeros are finite.

    Args:
        num_samples: Length of the training set.
        temperature: :math:`\lambda_0 > 0`, or a schedule. Default 1.0 (authors' code).
        alpha: How hard temperatures are to move, > 0; at 1 and above none reaches the floor. Default 1.0 (authors'
            code).
        margin: :math:`c \ge 0`, or a schedule. Default 0.0 (ours; authors' class 1.0, script 0.1).
        scores: As in :class:`~reweigh.losses.LabelDRO`. Default "raw" (paper).
        ignore_index: Targets with this value are removed.
        device: Where the table stays; ``None``: it moves with the module.
        storage: A folder for a memory-mapped table, as in :class:`~reweigh.weighting.SampleTable`.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C), target (N,))`` with ``index=`` ``(N,)``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = ALDRLoss(100, margin=1.0)
        >>> logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> first = loss(logits, target, index=torch.tensor([42])).item()
        >>> loss.update("step")
        >>> second = loss(logits, target, index=torch.tensor([42])).item()
        >>> round(first, 4), round(second, 4)
        (-0.3692, -0.3544)

    References:
        D. Zhu, Y. Ying, T. Yang, "Label Distributionally Robust Losses for Multi-class Classification: Consistency,
        Robustness and Adaptivity", ICML 2023.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        temperature: float | Schedule = 1.0,
        alpha: float = 1.0,
        margin: float | Schedule = 0.0,
        scores: Scores = "raw",
        ignore_index: int = -100,
        device: str | None = None,
        storage: str | None = None,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        criterion = AdaptiveLabelDRO(
            num_samples,
            temperature=temperature,
            alpha=alpha,
            margin=margin,
            scores=scores,
            ignore_index=ignore_index,
            device=device,
            storage=storage,
        )
        super().__init__(criterion, None, reduction)
