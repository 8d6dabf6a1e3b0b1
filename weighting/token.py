"""Weights of tokens: by how frequent they are, and by how well the model already knows them."""

from __future__ import annotations

import math
from typing import Literal, final

from torch import Tensor

from .algebra import sum_over
from .base import Scope, Weighting, method
from .config import check_choice, check_number
from .frequency import CountTable, Normalization, Values
from .functional import complement, power_law_decay_weight, tldr_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


@method(
    "power_law_decay",
    paper="Power-Law Decay Loss for Large Language Model Finetuning: A Theory Perspective",
    venue="arXiv 2505.16900, 2025",
    official="shaojintian/power_law_decay@828db8e8 trainer.py",
    defaults={
        "alpha": ("1.0", "authors' code"),
        "eps": ("1.0", "ours, Laplace; the authors' 1e-7 lets one unseen token own the batch"),
    },
    deviations=(
        "eps is 1, not 1e-7: a target that the counts have never seen then weighs 1, not 1e7 (alpha 1).",
        "A token beyond the table is a ValueError, not an IndexError.",
    ),
    neutral={"counts": [50, 20, 6, 1], "alpha": 0.0},
    examples=({"counts": [50, 20, 6, 0]}, {"counts": [50, 20, 6, 1], "alpha": 0.25, "normalize": "samples"}),
)
@final
class PowerLawDecay(CountTable):
    r"""Weigh tokens by a power of their inverse frequency, so that rare, informative ones are learned.

    .. math:: w_i = (n_{v_i} + \epsilon)^{-\alpha}

    - :math:`n_v`: ``counts[v]``, how often token v occurs (counts or frequencies)
    - :math:`v_i`: target token of term :math:`i`
    - :math:`\alpha`: ``alpha``; :math:`\epsilon`: ``eps``, in the unit of the counts

    Weights:
        Positive. Detached. ``alpha=0`` is neutral, and so are equal counts under ``weighted_mean``. Negative ``alpha``
        favours frequent tokens.

    State and cadence:
        With ``counts`` given: none. Without: ``counts`` is a buffer set by the ``fit`` event, equal on all ranks and
        saved.

    Use when:
        Generated text is dull: rare tokens and diversity matter more than perplexity.
    Avoid when:
        Perplexity is what you are judged by: frequent tokens are given up for rare ones. Small ``alpha`` is milder.

    Deviations:
        ``eps`` defaults to 1 (Laplace) instead of 1e-7.

    Args:
        counts: Occurrences per token, >= 0; ``None`` to receive them by the ``fit`` event.
        alpha: Exponent, finite, or a schedule. Default 1.0 (authors' code).
        eps: Added to the counts, > 0. Default 1.0 (ours).
        normalize: ``"none"`` (the authors' code, which divides by the sum of weights instead), ``"classes"``: the mean
            over tokens seen is 1, ``"samples"``: the mean over the counted text is 1.
        num_classes: Size of the vocabulary, checked against the counts where given.

    Shapes:
        Reads ``category`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> PowerLawDecay([99, 0], alpha=0.5).table()
        tensor([0.1000, 1.0000], dtype=torch.float64)

    References:
        "Power-Law Decay Loss for Large Language Model Finetuning: A Theory Perspective", arXiv 2505.16900, 2025.
    """

    def __init__(
        self,
        counts: Values | None = None,
        *,
        alpha: float | Schedule = 1.0,
        eps: float = 1.0,
        normalize: Normalization = "none",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(counts, normalize=normalize, num_classes=num_classes)
        self.alpha = check_hyper(self, "alpha", alpha, low=-math.inf)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)

    def raw(self, counts: Tensor) -> Tensor:
        return power_law_decay_weight(counts, value_of(self.alpha), self.eps)


@method(
    "tldr",
    paper="TLDR: Token Loss Dynamic Reweighting for Reducing Repetitive Utterance Generation",
    venue="arXiv 2003.11963, 2020",
    official="ShaojieJiang/tldr@c878ed10 parlai/core/torch_generator_agent.py",
    defaults={"level": ("'token'", "authors' code"), "detach": ("False", "authors' code: differentiated")},
    deviations=(
        "Computed as 2 sin^2(pi (1 - p) / 2), which equals cos(pi p) + 1 and does not cancel near p = 1.",
        "The sequence level averages p over real tokens only; the authors' sum also has the padding's.",
        "The same formula in training and evaluation; the authors evaluate with plain cross-entropy.",
    ),
    examples=({}, {"detach": True}, {"level": "sequence"}),
)
@final
class TLDR(Weighting):
    r"""Turn down the tokens that the model already knows, along a cosine.

    .. math:: w_i = \cos(\pi p_i) + 1 = 2 \sin^2\!\big(\tfrac{\pi}{2}(1 - p_i)\big)

    - :math:`p_i`: probability of the target token; at the sequence level its mean over the sequence's valid tokens

    Weights:
        In [0, 2], decreasing in p, 1 at p = 1/2. Differentiated (paper); ``detach=True`` uses them as constants.
        No argument is neutral: at the start of training, with p near 0, it only doubles the loss.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        Dialogue models repeat themselves (the paper's setting, encoder-decoder chit-chat).
    Avoid when:
        Terms are noisy: like focal, it favours what the model gets wrong.

    Deviations:
        Padding is left out of sequence means, and evaluation uses the same formula as training.

    Args:
        level: ``"token"`` or ``"sequence"``. Default "token" (authors' code).
        detach: Use the weights as constants. Default False (paper).

    Shapes:
        Reads ``log_pt`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), TLDR())
        >>> objective.weights(torch.tensor([[0.5, 0.5], [1.0, 3.0]]).log(), torch.tensor([0, 1]))
        tensor([1.0000, 0.2929])

    References:
        S. Jiang, T. Wolf, C. Monz, M. de Rijke, "TLDR: Token Loss Dynamic Reweighting for Reducing Repetitive Utterance
        Generation", arXiv 2003.11963, 2020.
    """

    needs = frozenset({"log_pt"})
    detached = False
    scope: Scope = "local"

    def __init__(self, *, level: Literal["token", "sequence"] = "token", detach: bool = False) -> None:
        super().__init__()
        self.level = check_choice(self, "level", level, ("token", "sequence"))
        self.detached = detach
        if level == "sequence":
            self.scope = "global"

    def weigh(self, terms: LossTerms) -> Tensor:
        log_pt = terms.need("log_pt", self)
        not_pt = complement(log_pt) if terms.log_qt is None else terms.log_qt.exp()
        if self.level == "sequence":
            counts = terms.counts()
            size = sum_over("sequence", counts, terms, self)
            not_pt = sum_over("sequence", counts * not_pt, terms, self) / size.clamp_min(1e-30)
            not_pt = not_pt.expand_as(terms.loss)
        weights = tldr_weight(not_pt)
        return weights.detach() if self.detached else weights
