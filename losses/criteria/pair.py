"""Criteria that relate the samples of a batch to each other: terms of pairs, and log-sum-exps over them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reweigh.weighting.algebra import is_node
from reweigh.weighting.base import Weighting
from reweigh.weighting.config import check_choice, check_whole, readable
from reweigh.weighting.dynamics import communicates, dynamics
from reweigh.weighting.pair import CirclePacing
from reweigh.weighting.ranks import Shard
from reweigh.weighting.schedules import Schedule, check_hyper, value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..gather import join, join_samples
from .base import Criterion, _kind, expand_mask, is_index, upcast
from .tiles import Choice, Law, full_precision, masked_logsumexp, pair_terms, row_sums

Pairs = Sequence[Tensor]
"""Pairs by number: ``(anchor, positive, anchor, negative)`` as miners give them, ``(anchor, positive, negative)``, or
two bool matrices ``(positive, negative)`` with a row per anchor. A pair counts once however often it is listed."""

_PAIR_STATISTICS = frozenset({"loss", "score", "target"})


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero and has no gradient. Neither overflows nor underflows."""
    if vectors.shape[-1] == 0:
        return vectors
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    near_one = vectors / torch.where(largest > 0, largest, torch.ones_like(largest))
    squares = near_one.square().sum(-1, keepdim=True)
    nothing = squares == 0
    return (near_one * squares.masked_fill(nothing, 1.0).rsqrt()).masked_fill(nothing, 0.0)


class _Embedded(Criterion):
    """Common part: embeddings, labels or pairs, and who counts."""

    independent = False
    counts_inside = True
    accepts = frozenset({"pairs"})

    def __init__(self, m: float | Schedule, normalize: bool, ignore_index: int) -> None:
        super().__init__()
        self.m = check_hyper(self, "m", m, low=0.0, high=1.0)
        self.normalize = normalize
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"{type(self).__name__}: ignore_index must be an integer, got {ignore_index!r}")
        self.ignore_index = ignore_index
        self._warned = False

    def _embedded(self, inputs: tuple[Any, ...], pairs: Pairs | None) -> tuple[Tensor, Tensor | None, Pairs | None]:
        """Embeddings in at least float32, labels and pairs, checked."""
        name = type(self).__name__
        if not 1 <= len(inputs) <= 3 or (len(inputs) == 3 and pairs is not None):
            raise TypeError(f"{name}: takes (embeddings, labels) and pairs, got {len(inputs)} inputs")
        embeddings = upcast(self, "embeddings", inputs[0])
        label = inputs[1] if len(inputs) > 1 else None
        pairs = inputs[2] if len(inputs) > 2 else pairs
        if embeddings.ndim != 2:
            raise ValueError(f"{name}: embeddings must be (N, D), got {tuple(embeddings.shape)}")
        if label is None:
            if pairs is None:
                raise TypeError(f"{name}: needs labels or pairs, got neither")
            return embeddings, None, pairs
        if not is_index(label):
            raise TypeError(f"{name}: labels must be an integer tensor, got {_kind(label)}")
        if label.shape != embeddings.shape[:1]:
            raise ValueError(f"{name}: labels must have shape {tuple(embeddings.shape[:1])}, got {tuple(label.shape)}")
        return embeddings, label, pairs

    def _points(self, embeddings: Tensor, valid: Tensor | None) -> Tensor:
        """What inner products are taken of; 0 for samples that do not count."""
        points = embeddings if valid is None else embeddings.masked_fill(~valid.unsqueeze(1), 0.0)
        if self.normalize:
            return unit(points)
        if not self._warned and readable(points) and points.numel():
            norms = points.detach().square().sum(1).sqrt()
            low, high = (float(edge) for edge in (norms if valid is None else norms[valid]).aminmax())
            if low < 0.9 or high > 1.1:
                self._warned = True
                warnings.warn(
                    f"{type(self).__name__}: normalize=False expects embeddings of length 1, got lengths "
                    f"{low:.3g}..{high:.3g}; exponents grow with their square",
                    stacklevel=6,
                )
        return points

    def _valid(self, size: int, label: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """``(N,)`` samples that count; ``None`` where it is known that all do."""
        if mask is not None and mask.shape != (size,):
            raise ValueError(f"{type(self).__name__}: mask must have shape {(size,)}, got {tuple(mask.shape)}")
        valid = mask
        if label is not None:
            kept = label != self.ignore_index
            valid = kept if mask is None else kept & mask
        return None if valid is None or (readable(valid) and bool(valid.all())) else valid

    def _times(self, size: int, sample_weight: Tensor | None, like: Tensor) -> Tensor | None:
        if sample_weight is not None and sample_weight.shape != (size,):
            raise ValueError(
                f"{type(self).__name__}: sample_weight must have shape {(size,)}, got {tuple(sample_weight.shape)}"
            )
        return None if sample_weight is None else sample_weight.detach().to(like.dtype)

    def _choice(
        self, size: int, label: Tensor | None, pairs: Pairs | None, valid: Tensor | None, times: Tensor | None
    ) -> Choice:
        if pairs is None:
            return Choice(label=label, valid=valid, times=times)
        return Choice(valid=valid, times=times, listed=self._listed(size, pairs))

    def _listed(self, size: int, pairs: Pairs) -> tuple[Tensor, ...]:
        name = type(self).__name__
        if not isinstance(pairs, (tuple, list)) or not all(isinstance(part, Tensor) for part in pairs):
            raise TypeError(f"{name}: pairs must be a tuple of tensors, got {type(pairs).__name__}")
        if len(pairs) == 2:
            for part in pairs:
                if part.dtype != torch.bool:
                    raise TypeError(f"{name}: two pairs tensors must be bool matrices, got {part.dtype}")
                if part.shape != (size, size):
                    raise ValueError(f"{name}: pairs matrices must be {(size, size)}, got {tuple(part.shape)}")
            return tuple(pairs)
        if len(pairs) == 3:
            pairs = (pairs[0], pairs[1], pairs[0], pairs[2])
        if len(pairs) != 4:
            raise ValueError(
                f"{name}: pairs must be (anchor, positive, anchor, negative), (anchor, positive, negative) or two bool "
                f"matrices, got {len(pairs)} tensors"
            )
        for part in pairs:
            if not is_index(part):
                raise TypeError(f"{name}: pairs must hold integers, got {part.dtype}")
        for one, other in (pairs[:2], pairs[2:]):
            if one.ndim != 1 or one.shape != other.shape:
                raise ValueError(
                    f"{name}: pairs must be vectors of one length per side, got {tuple(one.shape)} and "
                    f"{tuple(other.shape)}"
                )
        for part in pairs:
            if readable(part) and part.numel():
                low, high = (int(edge) for edge in part.aminmax())
                if low < 0 or high >= size:
                    raise ValueError(f"{name}: pairs must be in [0, {size}), got {low if low < 0 else high}")
        return tuple(part.long() for part in pairs)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        centers = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        # every sample has another one of its class, whichever third of the batch is taken away
        labels = (torch.arange(batch) // 3) % 4
        noise = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
        return (centers[labels] + 0.7 * noise).to(dtype), labels

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        embeddings, labels = self.example_inputs(9, seed=seed, dtype=dtype)
        one, other = (part.flatten() for part in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
        same, different = labels[one] == labels[other], labels[one] != labels[other]
        listed = (one[same], other[same], one[different], other[different])
        return {
            "labels": (embeddings, labels),
            "some ignored": (embeddings, labels.masked_fill(labels == 1, self.ignore_index)),
            "one class": (embeddings, torch.zeros_like(labels)),
            "no two alike": (embeddings, torch.arange(9)),
            "one sample": (embeddings[:1], labels[:1]),
            "pairs": (embeddings, None, listed),
            "matrices": (embeddings, labels, (labels[:, None] == labels, labels[:, None] != labels)),
        }


@final
class PairSimilarity(_Embedded):
    r"""Every ordered pair of a batch is a term: how far its similarity is from a margin.

    .. math:: \ell_{ij} = \begin{cases} (1 - m) - s_{ij} & y_i = y_j \\ s_{ij} - m & y_i \ne y_j \end{cases}, \qquad
              s_{ij} = \frac{\langle x_i, x_j\rangle}{|x_i||x_j|}

    The signed margin is negative for pairs that are better than they have to be. Pairs of a sample with itself, and
    those of masked samples, are masked. Holds the ``(N, N)`` matrix; :class:`PairLogSumExp` does not.

    Provides ``loss``, ``score`` (the similarity) and ``target`` (1.0 for positive, 0.0 for negative pairs).

    Args:
        m: Margin in [0, 1], or a schedule.
        normalize: Bring embeddings to length 1. False where they have it already.
        ignore_index: Samples with this label are removed.

    Shapes:
        ``embeddings (N, D)``, ``labels (N,)``; terms ``(N, N)``, a row per anchor. ``pairs=`` says which pairs count
        instead of the labels, see :data:`Pairs`. A mask may be ``(N,)``, of samples, or ``(N, N)``, of pairs.
        ``sample_weight (N,)`` means copies: a pair counts the product of both, and a sample of several copies meets
        itself as a positive. Under sample weights use ``mean``, ``weighted_mean``, ``sum``, ``none`` or
        ``group_mean``: ``batch_mean`` and ``sequence_mean`` do not know how many copies an anchor stands for.

    Raises:
        TypeError: If a tensor has the wrong dtype, or neither labels nor pairs are given.
        ValueError: If a shape does not fit or a pair is out of range.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> PairSimilarity(0.25).terms(embeddings, torch.tensor([0, 0, 1])).loss
        tensor([[ 0.0000,  0.7500, -0.2500],
                [ 0.7500,  0.0000,  0.7500],
                [-0.2500,  0.7500,  0.0000]])
    """

    provides = frozenset({"loss", "score", "target"})

    def __init__(self, m: float | Schedule = 0.25, *, normalize: bool = True, ignore_index: int = -100) -> None:
        super().__init__(m, normalize, ignore_index)

    def measure(
        self, *inputs: Any, mask: Tensor | None, sample_weight: Tensor | None = None, pairs: Pairs | None = None
    ) -> LossTerms:
        embeddings, label, pairs = self._embedded(inputs, pairs)
        size = embeddings.shape[0]
        of_pairs = None
        if mask is not None and mask.ndim == 2:
            of_pairs, mask = expand_mask(self, mask, torch.Size((size, size))), None
        of_weights = sample_weight if sample_weight is not None and sample_weight.ndim == 2 else None
        valid = self._valid(size, label, mask)
        points = self._points(embeddings, valid)
        times = self._times(size, None if of_weights is not None else sample_weight, points)
        positive, negative, _ = self._choice(size, label, pairs, valid, times).rows(0, size, size)
        kept = positive | negative
        if valid is not None:
            kept = kept & valid.unsqueeze(1)
        if of_pairs is not None:
            kept = kept & of_pairs
        with full_precision(points):
            score = points @ points.T
        score = mask_out(score, kept, 0.0)
        terms = pair_terms(score, positive, value_of(self.m))
        multiplicity = of_weights
        if of_weights is not None:
            if of_weights.shape != (size, size):
                raise ValueError(
                    f"PairSimilarity: sample_weight must have shape {(size,)} or {(size, size)}, "
                    f"got {tuple(of_weights.shape)}"
                )
            multiplicity = of_weights.to(score.dtype)
        elif times is not None:
            others = times - torch.eye(size, dtype=times.dtype, device=times.device)
            multiplicity = times.unsqueeze(1) * others.clamp_min(0.0)
        return LossTerms(
            loss=mask_out(terms.loss, kept, 0.0),
            mask=kept,
            target=terms.target,
            score=score,
            multiplicity=None if multiplicity is None else mask_out(multiplicity, kept, 0.0),
        )


@final
class PairLogSumExp(_Embedded):
    r"""Every anchor's positive pairs against its negative ones, each side as one log-sum-exp.

    .. math::
        \ell_i = \log\Big(1 + \sum_{j:\,y_j \ne y_i} e^{\gamma w_{ij} (s_{ij} - m)}
                 \sum_{k \ne i:\,y_k = y_i} e^{-\gamma w_{ik} (s_{ik} - 1 + m)}\Big)

    - :math:`s`: cosine similarity; :math:`m`: ``m``; :math:`\gamma`: ``gamma``
    - :math:`w`: what ``pacing`` says of a pair; 1 without. With
      :class:`~reweigh.weighting.CirclePacing` this is circle loss.

    ``over="anchor"`` gives a term per sample. Anchors without a positive or without a negative are masked, and so are
    those whose loss has underflowed to 0, so that a mean is over the anchors that still have something to learn.
    ``over="batch"`` gives one term: both sums run over all unordered pairs of the batch.

    Under a pacing that reaches 0 for negatives (circle loss at similarities below -m) such a pair still adds
    :math:`e^0 = 1` to its sum, which keeps the loss from 0 and has no gradient. ``drop_satisfied`` leaves it out.

    Provides ``loss``, ``log_pt`` and ``log_qt`` (of the probability that the positive side wins,
    :math:`-\log p = \ell`) and, where labels are given, ``category``.

    Memory and time:
        Rows are taken in tiles and computed again in backward: memory grows with N, not with its square, and time by
        one matrix product more. Under ``torch.compile``, ``torch.func`` and double backward all pairs are held.

    Several processes:
        With ``gather=True`` each rank's anchors meet the samples of all ranks; embeddings are gathered in rank order
        with their gradients, and so is everything given per sample. Every rank returns the loss of the joined batch.
        Backward adds up over ranks, so that gradients *averaged* over ranks, as
        ``DistributedDataParallel`` does, are those of the joined batch. All ranks must call forward and backward;
        their shards may be uneven or empty. With one process nothing changes. A stateful weighting sees the joined
        batch on every rank.

    Args:
        pacing: Weighting of pairs with scope ``"local"`` that reads ``score``, ``target`` or ``loss``; ``None`` for 1.
        m: Margin in [0, 1], or a schedule.
        gamma: Scale >= 0, or a schedule.
        over: ``"anchor"`` or ``"batch"``.
        drop_satisfied: Leave out negatives of weight 0.
        normalize: Bring embeddings to length 1. False where they have it already.
        tile: Rows that are held at once; ``None`` chooses by the size of the batch.
        gather: Join the batches of all ranks of ``torch.distributed``.
        ignore_index: Samples with this label are removed.

    Shapes:
        ``embeddings (N, D)``, ``labels (N,)``; terms ``(N,)``, or ``(1,)`` over the batch. ``pairs=`` says which pairs
        count instead of the labels, see :data:`Pairs`. ``sample_weight (N,)``, held constant, means copies: a sample
        counts that often as an anchor and in every sum, and one of several copies meets the others as positives.

    Raises:
        TypeError: If a tensor has the wrong dtype, the pacing reads what pairs do not have, or neither labels nor
            pairs are given.
        ValueError: If a shape does not fit, a pair is out of range, or pairs are given under ``gather``.

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> PairLogSumExp(m=0.25, gamma=4.0).terms(embeddings, torch.tensor([0, 0, 1])).loss
        tensor([2.1269, 6.0025, 0.0000])
    """

    provides = frozenset({"loss", "log_pt", "log_qt", "category"})

    def __init__(
        self,
        pacing: Weighting | None = None,
        *,
        m: float | Schedule = 0.25,
        gamma: float | Schedule = 256.0,
        over: Literal["anchor", "batch"] = "anchor",
        drop_satisfied: bool = False,
        normalize: bool = True,
        tile: int | None = None,
        gather: bool = False,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(m, normalize, ignore_index)
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)
        self.pacing = None if pacing is None else check_pacing(self, pacing)
        self.over = check_choice(self, "over", over, ("anchor", "batch"))
        if over == "batch":
            self.pools, self.provides = True, self.provides - {"category"}
        self.drop_satisfied = drop_satisfied
        self.tile = None if tile is None else check_whole(self, "tile", tile, low=1)
        self.gather = gather
        if pacing is not None:
            held = pacing.detached and bool(pacing.needs & {"loss", "score"})
            self.exact_gradient = pacing.exact_gradient and not held

    def law(self) -> Law:
        """What a pair adds to its side, now."""
        pacing, m = self.pacing, value_of(self.m)
        own = isinstance(pacing, CirclePacing) and pacing.detached and _equal(pacing.m, self.m)
        return Law(pacing, m, value_of(self.gamma), self.drop_satisfied, closed=own)

    def terms(
        self,
        *inputs: Any,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        **stats: Any,
    ) -> LossTerms:
        meta = {"mask": mask, "sample_weight": sample_weight, "group": group, "index": index}
        if self.gather:
            embeddings, label, pairs = self._embedded(inputs, stats.get("pairs"))
            if pairs is not None and communicates("auto"):
                raise ValueError("PairLogSumExp: pairs are numbers within one rank's batch; use gather=False with them")
            given = {"labels": label, **meta, **{key: stats[key] for key in sorted(stats) if key != "pairs"}}
            joined = join_samples(self, embeddings, given)
            if joined is not None:
                embeddings, given, shard = joined
                inputs = (embeddings, given.pop("labels"), None, shard)
                meta = {name: given.pop(name) for name in meta}
                stats = given
        return super().terms(*inputs, **meta, **stats)

    def measure(
        self, *inputs: Any, mask: Tensor | None, sample_weight: Tensor | None = None, pairs: Pairs | None = None
    ) -> LossTerms:
        shard = inputs[3] if len(inputs) == 4 and isinstance(inputs[3], Shard) else None
        embeddings, label, pairs = self._embedded(inputs if shard is None else inputs[:3], pairs)
        size = embeddings.shape[0]
        valid = self._valid(size, label, mask)
        points = self._points(embeddings, valid)
        times = self._times(size, sample_weight, points)
        choice = self._choice(size, label, pairs, valid, times)
        if self.over == "batch":
            choice = choice._replace(listed=_both_ways(choice.listed))
        rows = None if shard is None else shard.rows
        near, far = row_sums(points, self.law(), choice, rows=rows, tile=self.tile)
        if shard is not None:
            near, far = join(torch.stack((near, far), 1), shard).unbind(1)
        if self.over == "batch":
            return _pooled(near, far, valid, times)
        terms = contrast(near, far, valid)
        learns = terms.loss != 0
        return terms._replace(
            mask=learns,
            log_pt=mask_out(terms.need("log_pt"), learns, NEUTRAL_LOG_PT),
            log_qt=mask_out(terms.need("log_qt"), learns, NEUTRAL_LOG_PT),
            category=None if label is None else label.long().masked_fill(~learns, 0),
            multiplicity=None if times is None else mask_out(times, learns, 0.0),
        )


def contrast(near: Tensor, far: Tensor, valid: Tensor | None = None) -> LossTerms:
    """``softplus(near + far)`` of two log-sum-exps, masked where one of them is empty."""
    both = (near != -torch.inf) & (far != -torch.inf)  # what is not a number stays visible
    both = both if valid is None else both & valid
    total = torch.where(both, near + far, torch.zeros_like(near))
    log_pt = logsigmoid(-total)
    return LossTerms(
        loss=mask_out(-log_pt, both, 0.0),
        mask=both,
        log_pt=mask_out(log_pt, both, NEUTRAL_LOG_PT),
        log_qt=mask_out(logsigmoid(total), both, NEUTRAL_LOG_PT),
    )


def _pooled(near: Tensor, far: Tensor, valid: Tensor | None, times: Tensor | None) -> LossTerms:
    """One term of all pairs; the rows hold every unordered pair twice."""
    sides = []
    for side in (near, far):
        kept = side != -torch.inf if valid is None else (side != -torch.inf) & valid
        if times is not None:
            side = side + times.clamp_min(torch.finfo(side.dtype).tiny).log()
        sides.append(masked_logsumexp(side, kept, 0).reshape(1) - math.log(2.0))
    return contrast(*sides)


def _both_ways(listed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Listed pairs without a direction."""
    if len(listed) == 2:
        return tuple(matrix | matrix.T for matrix in listed)
    sides = [(listed[at], listed[at + 1]) for at in range(0, len(listed), 2)]
    return tuple(torch.cat(pair) for one, other in sides for pair in ((one, other), (other, one)))


def check_pacing(owner: object, pacing: Weighting) -> Weighting:
    """A weighting that can look at one pair at a time, or an error that says why it cannot."""
    name = type(owner).__name__
    if not isinstance(pacing, Weighting):
        raise TypeError(f"{name}: pacing must be a Weighting or None, got {type(pacing).__name__}")
    foreign = sorted(pacing.needs - _PAIR_STATISTICS)
    if foreign:
        raise TypeError(
            f"{name}: pacing {type(pacing).__name__} needs {', '.join(map(repr, foreign))}, which pairs do not have "
            f"(they have {', '.join(map(repr, sorted(_PAIR_STATISTICS)))})"
        )
    if pacing.scope != "local":
        raise ValueError(f"{name}: pacing must have scope 'local', got {pacing.scope!r} ({pacing!r})")
    if any(part._pending for part in dynamics(pacing)):
        raise ValueError(f"{name}: pacing must not learn from what it sees, because pairs are not observed: {pacing!r}")
    for part in pacing.modules():
        if isinstance(part, Weighting) and not is_node(part) and type(part).penalty is not Weighting.penalty:
            raise ValueError(f"{name}: pacing must not have a penalty, which would be lost here: {pacing!r}")
    return pacing


def _equal(one: float | Schedule, other: float | Schedule) -> bool:
    return one is other or (not isinstance(one, Schedule) and not isinstance(other, Schedule) and one == other)
