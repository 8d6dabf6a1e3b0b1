"""What a mean over tokens hides: rare tokens, and text that repeats itself. torchmetrics metrics, like the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from reweigh.weighting.config import as_table, check_choice, check_number, check_whole, owner_name


def frequency_bins(token_counts: Sequence[float] | Tensor, bins: int, by: str = "mass") -> Tensor:
    r"""Which bin each token of the vocabulary is in, from 0, the rarest, to ``bins - 1``, the most frequent; (V,).

    Args:
        token_counts: How often each token occurs, such as :func:`reweigh.weighting.token_counts` gives.
        bins: Number of bins, >= 1.
        by: ``"mass"``: bins of equal shares of the running text, as far as single tokens allow; ``"types"``: of equal
            numbers of tokens that occur. A token that never occurs is in bin 0.

    Raises:
        TypeError, ValueError: If an argument is out of its range.

    Example:
        >>> frequency_bins([50, 30, 10, 5, 5, 0], 2)
        tensor([1, 0, 0, 0, 0, 0])
        >>> frequency_bins([50, 30, 10, 5, 5, 0], 2, by="types")
        tensor([1, 1, 0, 0, 0, 0])
    """
    counts = as_table("frequency_bins", "token_counts", token_counts)
    number = check_whole("frequency_bins", "bins", bins, low=1)
    by = check_choice("frequency_bins", "by", by, ("mass", "types"))
    order = counts.argsort(stable=True)
    size = counts[order] if by == "mass" else (counts[order] > 0).to(counts.dtype)
    total = size.sum()
    if not total > 0:
        raise ValueError("frequency_bins: token_counts must count some token, got all 0")
    middle = (size.cumsum(0) - 0.5 * size) / total
    placed = torch.empty(len(counts), dtype=torch.long, device=counts.device)
    placed[order] = (middle * number).floor().long().clamp(0, number - 1)
    return torch.where(counts > 0, placed, 0)


@final
class TokenFrequencyLoss(Metric):
    r"""Mean loss of rare and of frequent tokens apart, ``(bins,)``: the first bin has the rarest.

    .. math:: \bar\ell_b = \frac{\sum_i n_i\,[\,v_i \in b\,]\,\ell_i}{\sum_i n_i\,[\,v_i \in b\,]}

    - :math:`\ell_i`: loss of label :math:`v_i`; :math:`n_i`: how many it stands for, 0 where it does not count

    Unweighted losses of a causal model, with the first label of a row, which nothing predicts, left out:
    ``terms = CausalLM().terms(logits, labels)``, then ``metric.update(terms.loss, labels, terms.counts())``.

    A mean over all tokens is mostly a mean over frequent ones, and hides how much is lost on the others. nan for a bin
    that was not seen. ``bin_of`` tells the bin of each token.

    State and cadence:
        Two sums per bin in float64, over batches and ranks.

    Args:
        token_counts: How often each token occurs in the training text, ``(V,)``.
        bins: Number of bins, >= 1. Default 5.
        by: What bins have equal shares of: ``"mass"``, the running text, or ``"types"``, tokens that occur. Default
            ``"mass"``.
        ignore_index: Labels with this value are left out. Default -100.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(loss, target, counts=None)``: all ``(*S)``, labels beside their losses; counts bool or numbers.

    Example:
        >>> metric = TokenFrequencyLoss([50, 30, 10, 5, 5], bins=2)
        >>> metric.update(torch.tensor([0.1, 0.3, 2.0, 4.0]), torch.tensor([0, 0, 3, 4]))
        >>> metric.compute()
        tensor([3.0000, 0.2000])

    References:
        A. Pinto, T. Galanti, R. Balestriero, "The Fair Language Model Paradox", arXiv 2410.11985, 2024.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    seen: Tensor
    bin_of: Tensor

    def __init__(
        self,
        token_counts: Sequence[float] | Tensor,
        bins: int = 5,
        *,
        by: str = "mass",
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.register_buffer("bin_of", frequency_bins(token_counts, bins, by), persistent=False)
        self.ignore_index = ignore_index
        for name in ("total", "seen"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, target: Tensor, counts: Tensor | None = None) -> None:
        """Add a batch."""
        if loss.shape != target.shape or (counts is not None and counts.shape != target.shape):
            found = [tuple(v.shape) for v in (loss, target, counts) if v is not None]
            raise ValueError(f"TokenFrequencyLoss: loss, target and counts must have one shape, got {found}")
        valid = target != self.ignore_index
        number = valid.double() if counts is None else valid * counts.double()
        valid = number > 0
        at = self.bin_of[_ids(self, target, valid, len(self.bin_of))].reshape(-1)
        weighted = number * torch.where(valid, loss.detach().double(), 0.0)
        self.total = self.total.index_add(0, at, weighted.reshape(-1))
        self.seen = self.seen.index_add(0, at, number.reshape(-1))

    def compute(self) -> Tensor:
        """``(bins,)`` mean losses, from rare to frequent."""
        return (self.total / self.seen).float()


@final
class RareTokenAccuracy(Metric):
    r"""Share of rare labels that the model finds most likely; nan where no rare label was seen.

    .. math:: \frac{\sum_i [\,n_{v_i} \le r\,]\,[\,\hat v_i = v_i\,]}{\sum_i [\,n_{v_i} \le r\,]}

    - :math:`n_v`: ``token_counts[v]``; r: ``at_most``

    State and cadence:
        Two counts, over batches and ranks.

    Args:
        token_counts: How often each token occurs in the training text, ``(V,)``.
        at_most: r >= 0: tokens that occur more often are not rare. Default 20.
        shift: Scores at t predict the label at t + 1, as in :class:`~reweigh.losses.CausalLM`. Default True.
        ignore_index: Labels with this value are left out. Default -100.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(preds, target)``: scores ``(B, T, V)`` or token ids ``(B, T)``, labels ``(B, T)``.

    Example:
        >>> metric = RareTokenAccuracy([900, 12, 3], shift=False)
        >>> metric.update(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 1, 2, 0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    right: Tensor
    seen: Tensor
    rare: Tensor

    def __init__(
        self,
        token_counts: Sequence[float] | Tensor,
        at_most: float = 20,
        *,
        shift: bool = True,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        counts = as_table(self, "token_counts", token_counts)
        rare = counts <= check_number(self, "at_most", at_most, low=0.0)
        self.register_buffer("rare", rare, persistent=False)
        self.shift, self.ignore_index = shift, ignore_index
        for name in ("right", "seen"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        if preds.ndim == target.ndim + 1 and preds.shape[:-1] == target.shape:
            preds = preds.argmax(-1)
        if preds.shape != target.shape or preds.is_floating_point():
            raise ValueError(
                "RareTokenAccuracy: preds must be scores (B, T, V) or token ids (B, T) for labels (B, T), got "
                f"{tuple(preds.shape)} ({preds.dtype}) and {tuple(target.shape)}"
            )
        if self.shift:
            preds, target = preds[..., :-1], target[..., 1:]
        valid = target != self.ignore_index
        asked = valid & self.rare[_ids(self, target, valid, len(self.rare))]
        self.right = self.right + (asked & (preds == target)).sum()
        self.seen = self.seen + asked.sum()

    def compute(self) -> Tensor:
        """The share."""
        return (self.right.double() / self.seen.double()).float()


class _NGrams(Metric):
    """What looks at the n-grams of token sequences."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, n: int, ignore_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = check_whole(self, "n", n, low=1)
        self.ignore_index = ignore_index

    def _grams(self, ids: Tensor) -> list[Tensor]:
        """``(K, n)`` n-grams of each sequence, without those that hold an ignored place."""
        if ids.ndim == 1:
            ids = ids.unsqueeze(0)
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"{owner_name(self)}: ids must be token ids (B, T) or (T,), got {tuple(ids.shape)} ({ids.dtype})"
            )
        if ids.shape[1] < self.n:
            return [ids.new_empty(0, self.n) for _ in ids]
        windows = ids.unfold(1, self.n, 1)
        return [row[(row != self.ignore_index).all(1)] for row in windows]


@final
class DistinctN(_NGrams):
    r"""Distinct n-grams of all text as a share of its n-grams: how varied it is; nan where there is none.

    .. math:: \frac{|\{\text{n-grams}\}|}{\#\text{n-grams}}

    State and cadence:
        The distinct n-grams and their number; ranks' are joined, and one that two ranks have counts once. Memory grows
        with the number of distinct n-grams.

    Args:
        n: Length, >= 1. Default 2.
        ignore_index: N-grams with this id are left out (padding). Default -100.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(ids)``: token ids ``(B, T)`` or ``(T,)``, generated text usually.

    Example:
        >>> metric = DistinctN(2)
        >>> metric.update(torch.tensor([[5, 6, 5, 6]]))  # (5 6) (6 5) (5 6)
        >>> metric.compute()
        tensor(0.6667)

    References:
        J. Li, M. Galley, C. Brockett, J. Gao, B. Dolan, "A Diversity-Promoting Objective Function for Neural
        Conversation Models", NAACL 2016.
    """

    higher_is_better = True
    distinct: list[Tensor]
    number: Tensor

    def __init__(self, n: int = 2, *, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(n, ignore_index, **kwargs)
        self.add_state("distinct", [], dist_reduce_fx="cat")
        self.add_state("number", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ids: Tensor) -> None:
        """Add a batch of text."""
        grams = torch.cat([torch.empty(0, self.n, dtype=ids.dtype, device=ids.device), *self._grams(ids)])
        self.number = self.number + len(grams)
        self.distinct.append(torch.unique(grams, dim=0) if len(grams) else grams)

    def compute(self) -> Tensor:
        """The share."""
        parts = [self.distinct] if isinstance(self.distinct, Tensor) else self.distinct
        found = torch.cat(parts) if parts else self.number.new_empty(0, self.n)
        share = len(torch.unique(found, dim=0)) / int(self.number) if len(found) else torch.nan
        return torch.tensor(share, device=found.device)


@final
class Repetition(_NGrams):
    r"""Mean over sequences of the share of n-grams that have occurred before in their sequence (seq-rep-n).

    .. math:: \frac{1}{S} \sum_s \left(1 - \frac{|\{\text{n-grams of } s\}|}{\#\text{n-grams of } s}\right)

    0 where nothing repeats, near 1 for text that goes in circles. Sequences without an n-gram are left out; nan where
    all are.

    State and cadence:
        A sum and a count, over batches and ranks.

    Args:
        n: Length, >= 1. Default 4.
        ignore_index: N-grams with this id are left out (padding). Default -100.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(ids)``: token ids ``(B, T)`` or ``(T,)``.

    Example:
        >>> metric = Repetition(1)
        >>> metric.update(torch.tensor([[5, 6, 5, 6], [1, 2, 3, 4]]))
        >>> metric.compute()
        tensor(0.2500)

    References:
        S. Welleck, I. Kulikov, S. Roller, E. Dinan, K. Cho, J. Weston, "Neural Text Generation with Unlikelihood
        Training", ICLR 2020.
    """

    higher_is_better = False
    total: Tensor
    sequences: Tensor

    def __init__(self, n: int = 4, *, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(n, ignore_index, **kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ids: Tensor) -> None:
        """Add a batch of text."""
        for grams in self._grams(ids):
            if len(grams):
                self.total = self.total + 1.0 - len(torch.unique(grams, dim=0)) / len(grams)
                self.sequences = self.sequences + 1

    def compute(self) -> Tensor:
        """The mean share."""
        return (self.total / self.sequences).float()


def _ids(owner: object, target: Tensor, valid: Tensor, size: int) -> Tensor:
    """Token ids that index a table, 0 where they do not count."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{owner_name(owner)}: target must hold token ids, got {target.dtype}")
    ids = torch.where(valid, target, 0).long()
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"{owner_name(owner)}: target must hold ids in [0, {size}), got {low if low < 0 else high}"
            )
    return ids
