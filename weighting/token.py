"""Weights of tokens: by how frequent they are, and by how well the model already knows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from .algebra import sum_over
from .base import Scope, Weighting, method
from .config import as_table, check_choice, check_number, owner_name
from .frequency import ClassCounts, CountTable, Normalization, Values
from .functional import complement, power_law_decay_weight, tldr_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


class VocabularyCounts(ClassCounts):
    """Token counts that may be shorter than the vocabulary: what lies beyond them has never been seen.

    Args:
        counts: Occurrences per token; ``None`` to wait for the ``fit`` event.
        num_classes: Size of the vocabulary; shorter counts are continued by zeros. ``None`` takes counts as they are.
        neutral: ids ``(K,)`` of tokens outside the statistics; some other token must have been counted.
        owner: Name used in error messages.
    """

    def __init__(
        self, counts: Values | None, num_classes: int | None = None, *, neutral: Tensor | None = None, owner: str
    ) -> None:
        self.apart = [] if neutral is None else [int(i) for i in neutral]
        super().__init__(counts, num_classes, owner=owner)

    def _checked(self, name: str, counts: Values) -> Tensor:
        table = as_table(self.owner, name, counts)
        if self.num_classes is not None and table.numel() < self.num_classes:
            table = torch.cat([table, table.new_zeros(self.num_classes - table.numel())])
        table = super()._checked(name, table)
        beyond = [i for i in self.apart if i >= table.numel()]
        if beyond:
            raise ValueError(f"{self.owner}: neutral must hold ids in [0, {table.numel()}), got {beyond[0]}")
        if self.apart:
            rest = table.clone()
            rest[self.apart] = 0.0
            if not bool((rest > 0).any()):
                raise ValueError(f"{self.owner}: {name} must count a token that is not neutral, got none")
        return table


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
        "neutral= gives tokens outside the counted text (special tokens) the mean weight of that text.",
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
        favours frequent tokens. A token with count 0 has the largest weight, :math:`\epsilon^{-\alpha}`: that is meant
        for rare words, not for special tokens that a text without them was counted on; name those ``neutral``.

    State and cadence:
        With ``counts`` given: none. Without: ``counts`` is a buffer set by the ``fit`` event, equal on all ranks and
        saved.

    Use when:
        Generated text is dull, rare tokens matter more than perplexity, and token counts are known. The language-model
        suite shows rare words predicted better.
    Avoid when:
        Perplexity or frequent words count: both get worse there, the more the larger alpha is. Plain cross-entropy
        keeps them.

    Deviations:
        ``eps`` defaults to 1 (Laplace) instead of 1e-7. ``neutral`` is ours.

    Args:
        counts: Occurrences per token, >= 0, such as :func:`~reweigh.weighting.token_counts` gives; ``None`` to receive
            them by the ``fit`` event.
        alpha: Exponent, finite, or a schedule. Default 1.0 (authors' code), which makes frequent words very light:
            begin with 0.25.
        eps: Added to the counts, > 0. Default 1.0 (ours).
        normalize: ``"none"`` (the authors' code, which divides by the sum of weights instead), ``"classes"``: the mean
            over tokens seen is 1, ``"samples"``: the mean over the counted text is 1.
        num_classes: Width of the logits. Shorter counts are continued by zeros (a vocabulary padded to a round number,
            added tokens); longer ones are an error.
        neutral: Ids that get the mean weight of the counted text, whatever their own count, which takes no part in the
            statistics: ``tokenizer.all_special_ids``. Default none.

    Shapes:
        Reads ``category`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> PowerLawDecay([99, 0], alpha=0.5).table()
        tensor([0.1000, 1.0000], dtype=torch.float64)

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
    ) -> None:
        super().__init__(None, normalize=normalize, num_classes=num_classes)
        self.alpha = check_hyper(self, "alpha", alpha, low=-math.inf)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        apart = _token_ids(self, "neutral", neutral)
        if apart is not None:
            self.add_table("neutral", apart)
        self._has_neutral = apart is not None
        self.counts = VocabularyCounts(counts, num_classes, neutral=apart, owner=type(self).__name__)
        self.update_on = "fit" if counts is None else "never"

    def raw(self, counts: Tensor) -> Tensor:
        return power_law_decay_weight(counts, value_of(self.alpha), self.eps)

    def _formula(self, counts: Tensor) -> Tensor:
        if not self._has_neutral:
            return super()._formula(counts)
        ids = self.get_buffer("neutral")
        counted = counts.index_fill(0, ids, 0.0)
        table = super()._formula(counted)
        return table.index_fill(0, ids, (counted * table).sum() / counted.sum())


def _token_ids(owner: object, name: str, ids: Sequence[int] | Tensor) -> Tensor | None:
    """Different ids as an int64 vector in ascending order, or ``None`` where there are none."""
    values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{owner_name(owner)}: {name} must hold token ids, got {value!r} ({type(value).__name__})")
        if value < 0:
            raise ValueError(f"{owner_name(owner)}: {name} must hold ids >= 0, got {int(value)}")
    return torch.tensor(sorted({int(value) for value in values})) if values else None


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
        An encoder-decoder dialogue model repeats itself (the paper's setting), and known tokens should be turned down
        along a cosine in a product with other weights.
    Avoid when:
        Terms are noisy: what the model gets wrong is favoured. The language-model suite shows no gain for rare words
        over plain cross-entropy.

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
