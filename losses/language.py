"""Named objectives for language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from reweigh.weighting.config import readable
from reweigh.weighting.frequency import Normalization, Values
from reweigh.weighting.schedules import Schedule
from reweigh.weighting.token import TLDR, PowerLawDecay

from .criteria.base import _kind, expand_mask, is_index
from .criteria.language import CausalLM
from .objective import Objective
from .reductions import Reduction, ReductionName
from .registry import method


@method(
    "power_law_decay",
    paper="Power-Law Decay Loss for Large Language Model Finetuning: A Theory Perspective",
    venue="arXiv 2505.16900, 2025",
    official="shaojintian/power_law_decay@828db8e8 trainer.py",
    defaults={
        "alpha": ("1.0", "authors' code"),
        "eps": ("1.0", "ours, Laplace; the authors' is 1e-7"),
        "reduction": ("'weighted_mean'", "authors' code; the paper's formula is the plain sum"),
    },
    deviations=(
        "eps is 1 instead of 1e-7, so that an unseen token does not own the batch.",
        "All labels ignored gives 0 attached to the graph; the authors' constant leaves DDP waiting for a gradient.",
    ),
    neutral={"counts": [50, 20, 6, 1], "alpha": 0.0},
    examples=({"counts": [50, 20, 6, 1]}, {"counts": [50, 20, 6, 0], "alpha": 0.25, "shift": False}),
)
@final
class PowerLawDecayLoss(Objective):
    r"""Causal language-model loss that gives rare tokens more weight.

    .. math:: L = \frac{\sum_t w_t\,\mathrm{CE}_t}{\sum_t w_t}, \qquad w_t = (n_{y_t} + \epsilon)^{-\alpha}

    - :math:`n_v`: ``counts[v]``; :math:`\alpha`: ``alpha``; :math:`\epsilon`: ``eps``
    - :math:`\mathrm{CE}_t`: cross-entropy of label t

    Weights:
        Positive constants. ``alpha=0`` is neutral: the token mean.

    State and cadence:
        None, unless ``counts`` is ``None``: then the counts, set by the ``fit`` event.

    Use when:
        A causal language model whose text is dull is fine-tuned, and token counts are known; begin with a small alpha.
        Rare words gain in the language-model suite.
    Avoid when:
        You are judged by perplexity or by frequent words: the language-model suite shows both worse. Under gradient
        accumulation the batch's own denominator is not the global one.

    Deviations:
        ``eps`` defaults to 1. Under accumulation the batch's own denominator is not the global one: train through an
        :class:`~reweigh.losses.Accumulator`, or pass ``num_items=`` the global sum of :meth:`total_weight`.

    Args:
        counts: Occurrences per token ``(V,)``, counts (:func:`~reweigh.weighting.token_counts`) or frequencies;
            ``None`` to receive them by the ``fit`` event.
        alpha: Exponent, or a schedule. Default 1.0 (authors' code).
        eps: Added to the counts, > 0. Default 1.0 (ours).
        normalize: As in :class:`~reweigh.weighting.PowerLawDecay`. It cancels in ``"weighted_mean"`` and sets the scale
            of the other reductions. Default ``"none"`` (authors' code).
        num_classes: Width of the logits; shorter counts are continued by zeros.
        neutral: Ids that get the mean weight of the counted text: ``tokenizer.all_special_ids``. Default none.
        shift: Logits at t predict the label at t + 1.
        ignore_index: Labels with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`. Default ``"weighted_mean"`` (authors' code).

    Shapes:
        ``(logits (B, T, V), labels (B, T))``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> loss = PowerLawDecayLoss([90, 9, 1], alpha=0.5)
        >>> round(loss(torch.zeros(1, 3, 3), torch.tensor([[0, 1, 2]])).item(), 4)
        1.0986

    References:
        J. Shao, "Power-Law Decay Loss for Large Language Model Finetuning: A Theory Perspective", arXiv 2505.16900,
        2025.
    """

    def __init__(
        self,
        counts: Values | None = None,
        *,
        alpha: float | Schedule = 1.0,
        eps: float = 1.0,
        normalize: Normalization = "none",
        num_classes: int | None = None,
        neutral: Sequence[int] | Tensor = (),
        shift: bool = True,
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "weighted_mean",
    ) -> None:
        decay = PowerLawDecay(
            counts, alpha=alpha, eps=eps, normalize=normalize, num_classes=num_classes, neutral=neutral
        )
        super().__init__(CausalLM(shift=shift, ignore_index=ignore_index), decay, reduction)

    @torch.no_grad()
    def total_weight(self, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Sum of the weights of the labels that count, which needs no logits.

        .. math:: D = \sum_t w_{y_t}

        This is the denominator of ``"weighted_mean"``, so that ``num_items=`` is known before the first forward of a
        step: add it over micro-batches and ranks. Labels that are ignored, masked, or (under ``shift``) first in their
        sequence add nothing.

        Args:
            labels: ``(B, T)`` token ids, as in the call.
            mask: Bool, True = counts; ``(B, T)`` or ``(B,)``.

        Returns:
            0-d float64.

        Raises:
            TypeError: If ``labels`` are not integers.
            ValueError: If shapes do not fit, a label is out of range, or the counts are not known yet.

        Example:
            >>> import torch
            >>> PowerLawDecayLoss([3, 1], shift=False).total_weight(torch.tensor([[0, 1, -100]]))
            tensor(0.7500, dtype=torch.float64)
        """
        criterion, decay = self.criterion, self.weighting
        if not isinstance(criterion, CausalLM) or not isinstance(decay, PowerLawDecay):
            raise TypeError(
                f"PowerLawDecayLoss: total_weight needs its own criterion and weighting, got {criterion!r}, {decay!r}"
            )
        if not is_index(labels):
            raise TypeError(f"PowerLawDecayLoss: labels must be token indices, got {_kind(labels)}")
        if labels.ndim != 2:
            raise ValueError(f"PowerLawDecayLoss: labels must be (B, T), got {tuple(labels.shape)}")
        table = decay.table()
        valid = labels != criterion.ignore_index
        if mask is not None:
            valid = valid & expand_mask(self, mask, labels.shape)
        if criterion.shift:
            labels, valid = labels[:, 1:], valid[:, 1:]
        at = labels.long().masked_fill(~valid, 0)
        if readable(at) and at.numel():
            low, high = (int(edge) for edge in at.aminmax())
            if low < 0 or high >= table.numel():
                raise ValueError(
                    f"PowerLawDecayLoss: labels must be in [0, {table.numel()}) or "
                    f"ignore_index={criterion.ignore_index}, "
                    f"got {low if low < 0 else high}"
                )
        return table[at].masked_fill(~valid, 0.0).sum()


@method(
    "tldr",
    paper="TLDR: Token Loss Dynamic Reweighting for Reducing Repetitive Utterance Generation",
    venue="arXiv 2003.11963, 2020",
    official="ShaojieJiang/tldr@c878ed10 parlai/core/torch_generator_agent.py",
    defaults={"level": ("'token'", "authors' code"), "reduction": ("'mean'", "authors' code: tokens, not weights")},
    deviations=(
        "Padding is left out of sequence means.",
        "The same formula in training and evaluation; components() has the plain loss beside it.",
    ),
    examples=({}, {"level": "sequence"}, {"shift": False}),
)
@final
class TLDRLoss(Objective):
    r"""Causal language-model loss that turns down the tokens (or sequences) the model already knows.

    .. math:: L = \frac{1}{n} \sum_t (\cos(\pi p_t) + 1)\,\mathrm{CE}_t

    - :math:`p_t`: probability of label t, or its mean over the sequence; n: number of valid labels

    Weights:
        In [0, 2], differentiated (paper). No argument is neutral: a model that knows nothing only sees twice the loss.

    State and cadence:
        None.

    Use when:
        A dialogue model that repeats itself is trained, and tokens or whole sequences that it already knows should be
        turned down (the paper's setting).
    Avoid when:
        The task is general language modelling: no gain for rare words over cross-entropy in the language-model suite.
        Text is noisy: what the model gets wrong is favoured.

    Deviations:
        Padding is left out of sequence means; evaluation uses the same formula as training.

    Args:
        level: ``"token"`` or ``"sequence"``. Default "token" (authors' code).
        shift: Logits at t predict the label at t + 1.
        ignore_index: Labels with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`. Default ``"mean"`` (authors' code).

    Shapes:
        ``(logits (B, T, V), labels (B, T))``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> round(TLDRLoss()(torch.zeros(1, 2, 2), torch.tensor([[0, 1]])).item(), 4)
        0.6931

    References:
        S. Jiang, T. Wolf, C. Monz, M. de Rijke, "TLDR: Token Loss Dynamic Reweighting for Reducing Repetitive Utterance
        Generation", arXiv 2003.11963, 2020.
    """

    def __init__(
        self,
        *,
        level: Literal["token", "sequence"] = "token",
        shift: bool = True,
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        super().__init__(CausalLM(shift=shift, ignore_index=ignore_index), TLDR(level=level), reduction)
