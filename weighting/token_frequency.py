"""Weights of tokens by how frequent they are, beside the power law: two that are older."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from .base import method
from .config import check_number
from .frequency import CountTable, Normalization, Values
from .token import VocabularyCounts


@method(
    "frequency_aware",
    paper="Improving Neural Response Diversity with Frequency-Aware Cross-Entropy Loss",
    venue="WWW 2019",
    official="ShaojieJiang/FACE@88505bf4 face/face.py (loss_weight)",
    defaults={"normalize": ("'classes'", "paper: weights are rescaled to mean 1")},
    deviations=(
        "Frequencies are those of counts given once; the authors count in training, the model's outputs or the labels.",
        "The mean that is made 1 is over tokens that occur; the authors' is over the whole vocabulary.",
        "Counts that are all equal are an error, not 0 / 0.",
    ),
    neutral=None,
    examples=({"counts": [50, 20, 6, 1]}, {"counts": [50, 20, 6, 0], "normalize": "samples"}),
)
@final
class FrequencyAware(CountTable):
    r"""Weigh tokens by how far they are from being the most frequent one (FACE).

    .. math:: w_i \propto 1 - \frac{n_{v_i}}{\max_v n_v}

    - :math:`n_v`: ``counts[v]``; :math:`v_i`: target token of term i

    Weights:
        >= 0, linear in the frequency: 0 for the most frequent token, nearly equal for all rare ones. Detached.
        No argument is neutral.

    State and cadence:
        With ``counts`` given: none. Without: ``counts`` is a buffer set by the ``fit`` event, equal on all ranks and
        saved.

    Use when:
        Answers of a dialogue model are dull because frequent tokens dominate, and token counts are known; weights of
        the rarest tokens stay bounded, unlike those of a power law.
    Avoid when:
        The most frequent token has to be learned, such as an end of text: its weight is 0. Where one token leads by
        far, all others weigh nearly the same and little changes.

    Deviations:
        Counts are given, not gathered in training. Tokens that never occur take no part in the mean.

    Args:
        counts: Occurrences per token, >= 0; ``None`` to receive them by the ``fit`` event.
        normalize: ``"classes"``: the mean over tokens seen is 1 (paper), ``"samples"``: the mean over the counted text
            is 1, ``"none"``.
        num_classes: Width of the logits; shorter counts are continued by zeros.

    Shapes:
        Reads ``category`` of shape ``(*S)``; returns ``(*S)``.

    Raises:
        ValueError: If all tokens that occur are equally frequent: all would weigh 0.

    Example:
        >>> FrequencyAware([80, 40, 0], normalize="none").table()
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)

    References:
        S. Jiang, P. Ren, C. Monz, M. de Rijke, "Improving Neural Response Diversity with Frequency-Aware Cross-Entropy
        Loss", WWW 2019.
    """

    def __init__(
        self,
        counts: Values | None = None,
        *,
        normalize: Normalization = "classes",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(None, normalize=normalize, num_classes=num_classes)
        self.counts = _UnequalCounts(counts, num_classes, owner=type(self).__name__)
        self.update_on = "fit" if counts is None else "never"

    def raw(self, counts: Tensor) -> Tensor:
        return 1.0 - counts / counts.max()


class _UnequalCounts(VocabularyCounts):
    """Counts of which some that are not 0 differ."""

    def _checked(self, name: str, counts: Values) -> Tensor:
        table = super()._checked(name, counts)
        seen = table[table > 0]
        if seen.numel() and bool((seen == seen.max()).all()):
            raise ValueError(
                f"{self.owner}: {name} must hold tokens of different frequency, because the most frequent ones weigh "
                f"0, got all {float(seen.max()):g}"
            )
        return table


@method(
    "inverse_document_frequency",
    paper="A Statistical Interpretation of Term Specificity and Its Application in Retrieval",
    venue="Journal of Documentation 1972",
    official="scikit-learn TfidfTransformer (smooth_idf)",
    defaults={"normalize": ("'classes'", "ours")},
    deviations=(),
    neutral={"document_counts": [7, 7, 7, 7], "documents": 7},
    examples=(
        {"document_counts": [50, 20, 6, 1], "documents": 60},
        {"document_counts": [50, 20, 6, 0], "documents": 50, "normalize": "none"},
    ),
)
@final
class InverseDocumentFrequency(CountTable):
    r"""Weigh tokens by how few documents they occur in.

    .. math:: w_i \propto \ln\frac{1 + N}{1 + d_{v_i}} + 1

    - :math:`d_v`: ``document_counts[v]``, documents with token v; N: ``documents``

    Weights:
        Positive, at least 1 before rescaling. Detached. Neutral where all tokens occur in equally many documents.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        Words that tell documents apart matter more than common ones, as in summaries, queries or reports, and it is
        known in how many documents each token occurs.
    Avoid when:
        Documents are few, or the corpus is one long text: document counts then say little, and token counts under a
        power law say more.

    Deviations:
        None from scikit-learn's smooth form.

    Args:
        document_counts: Documents per token, in [0, documents].
        documents: N > 0.
        normalize: ``"classes"``: the mean over tokens seen is 1; ``"samples"``: the mean weighted by document counts
            is 1; ``"none"``. Default ``"classes"``.
        num_classes: Width of the logits; shorter counts are continued by zeros.

    Shapes:
        Reads ``category`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> InverseDocumentFrequency([3, 1], 3, normalize="none").table()
        tensor([1.0000, 1.6931], dtype=torch.float64)

    References:
        K. Sparck Jones, "A Statistical Interpretation of Term Specificity and Its Application in Retrieval", Journal of
        Documentation 28, 1972.
    """

    def __init__(
        self,
        document_counts: Sequence[float] | Tensor,
        documents: float,
        *,
        normalize: Normalization = "classes",
        num_classes: int | None = None,
    ) -> None:
        super().__init__([1.0], normalize=normalize)
        self.documents = check_number(self, "documents", documents, low=0.0, open_low=True)
        self.counts = VocabularyCounts(document_counts, num_classes, owner=type(self).__name__)
        most = float(torch.as_tensor(document_counts, dtype=torch.float64).max())
        if most > self.documents:
            raise ValueError(
                f"InverseDocumentFrequency: document_counts must be at most documents={self.documents:g}, got {most:g}"
            )

    def raw(self, counts: Tensor) -> Tensor:
        return torch.log((1.0 + self.documents) / (1.0 + counts)) + 1.0
