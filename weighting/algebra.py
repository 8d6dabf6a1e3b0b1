"""Named nodes that weightings are composed with. Every operator of :class:`Weighting` is sugar for one of these.

Scopes compose as follows (``local`` < ``scaled`` < ``global``): a product takes the widest of its factors; a power, a
constant factor and a detach keep the scope; sums, clips, conditions and mixes of a scaled operand become global,
because the batch's number no longer factors out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from .base import Scope, Weighting, lookup, tally, widest
from .config import check_choice, check_whole
from .dynamics import communicates
from .ranks import collect, shards
from .schedules import By, Linear, Schedule, check_hyper, value_of
from .terms import STATISTICS, LossTerms


def as_weighting(value: Weighting | float) -> Weighting:
    """A weighting as it is; a number as :class:`Constant`; anything else is a ``TypeError``."""
    if isinstance(value, nn.Module) and not isinstance(value, Weighting | Schedule):
        raise TypeError(
            f"a factor or summand must be a Weighting, a number or a schedule, got {type(value).__name__}; what "
            "changes logits goes into the criterion: CrossEntropy(logits=...)"
        )
    return value if isinstance(value, Weighting) else Constant(value)


def _entangled(scopes: Sequence[Scope]) -> Scope:
    scope = widest(scopes)
    return "global" if scope == "scaled" else scope


_FROM_INPUTS = frozenset({"loss", "log_pt", "log_qt", "score", "predicted_volume"})
"""Statistics through which gradient can reach the model."""


class _Node(Weighting):
    """Common part: operands, what they need together, and passing on what is observed."""

    def __init__(self, operands: Sequence[Weighting]) -> None:
        super().__init__()
        self.needs = frozenset[str]().union(*(operand.needs for operand in operands))
        self.rows = frozenset[str]().union(*(operand.rows for operand in operands))
        self.detached = all(operand.detached for operand in operands)
        constant = any(operand.detached and operand.needs & _FROM_INPUTS for operand in operands)
        self.exact_gradient = all(operand.exact_gradient for operand in operands) and (self.detached or not constant)
        self.feeds = frozenset().union(*(operand.feeds for operand in operands))
        self.operands = torch.nn.ModuleList(operands)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts():
            found |= part.example_stats(batch, seed=seed, dtype=dtype)
        return found

    def parts(self) -> list[Weighting]:
        """The operands, typed."""
        return [operand for operand in self.operands if isinstance(operand, Weighting)]

    @property
    def base(self) -> Weighting:
        """The first operand."""
        return self.parts()[0]

    def observe(self, terms: LossTerms) -> None:
        for part in self._unique(set()):
            if isinstance(part, _Node):
                part.record(terms)
            else:
                part.observe(terms)

    def observe_validation(self, terms: LossTerms) -> None:
        for part in self._unique(set()):
            if not isinstance(part, _Node):
                part.observe_validation(terms)

    def observe_after(self, terms: LossTerms) -> None:
        for part in self._unique(set()):
            if not isinstance(part, _Node):
                part.observe_after(terms)

    def record(self, terms: LossTerms) -> None:
        """What the node itself adds up, beside its operands."""

    def _unique(self, seen: set[int]) -> Iterator[Weighting]:
        """This node and all below it, each once, however often the expression names it."""
        if id(self) in seen:
            return
        seen.add(id(self))
        yield self
        for operand in () if self.opaque else self.parts():
            if isinstance(operand, _Node):
                yield from operand._unique(seen)
            elif id(operand) not in seen:
                seen.add(id(operand))
                yield operand

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for operand in self.parts():
            part = operand.penalty(terms, weights)
            total = part if total is None else total if part is None else total + part
        return total


@final
class Constant(Weighting):
    """The same weight everywhere."""

    scope: Scope = "local"

    def __init__(self, value: float | Schedule = 1.0) -> None:
        super().__init__()
        self.value = check_hyper(self, "value", value, low=0.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        return torch.ones_like(terms.loss) * value_of(self.value)


@final
class Product(_Node):
    """``a * b``: weights multiplied. ``operands`` are further factors, for YAML, which has no ``*args``."""

    def __init__(self, *factors: Weighting | float, operands: Sequence[Weighting | float] = ()) -> None:
        super().__init__([as_weighting(factor) for factor in (*factors, *operands)])
        if not self.operands:
            raise ValueError("Product: needs at least one factor, got none")
        self.scope = widest([factor.scope for factor in self.parts()])

    def weigh(self, terms: LossTerms) -> Tensor:
        first, *rest = self.parts()
        weights = first.weigh(terms)
        for factor in rest:
            weights = weights * factor.weigh(terms)
        return weights


@final
class Sum(_Node):
    """``a + b``: weights added. ``operands`` are further summands, for YAML, which has no ``*args``."""

    def __init__(self, *summands: Weighting | float, operands: Sequence[Weighting | float] = ()) -> None:
        super().__init__([as_weighting(summand) for summand in (*summands, *operands)])
        if not self.operands:
            raise ValueError("Sum: needs at least one summand, got none")
        self.scope = _entangled([summand.scope for summand in self.parts()])

    def weigh(self, terms: LossTerms) -> Tensor:
        first, *rest = self.parts()
        weights = first.weigh(terms)
        for summand in rest:
            weights = weights + summand.weigh(terms)
        return weights


@final
class Power(_Node):
    """``a ** p``: weights to a power, with a finite gradient at weight 0."""

    def __init__(self, base: Weighting | float, exponent: float | Schedule) -> None:
        super().__init__([as_weighting(base)])
        self.exponent = check_hyper(self, "exponent", exponent, low=0.0)
        self.scope = self.base.scope

    def weigh(self, terms: LossTerms) -> Tensor:
        weights, exponent = self.base.weigh(terms), value_of(self.exponent)
        held = weights.clamp_min(torch.finfo(weights.dtype).tiny)
        raised = torch.exp(exponent * held.log())
        # 0 ** 0 is 1, and 0 to any other power is 0
        return torch.where(weights > 0, raised, torch.zeros_like(raised) ** exponent)


@final
class Clip(_Node):
    """``a.clip(min, max)``: weights held in a range; no gradient beyond it."""

    def __init__(
        self,
        base: Weighting | float,
        *,
        min: float | Schedule | None = None,
        max: float | Schedule | None = None,
    ) -> None:
        super().__init__([as_weighting(base)])
        self.min = None if min is None else check_hyper(self, "min", min, low=0.0)
        self.max = None if max is None else check_hyper(self, "max", max, low=0.0)
        if isinstance(self.min, float) and isinstance(self.max, float) and self.min > self.max:
            raise ValueError(f"Clip: min must be <= max, got min={min!r}, max={max!r}")
        if self.min is None and self.max is None:
            raise ValueError("Clip: at least one of min and max must be given, got neither")
        self.scope = _entangled([self.base.scope])

    def weigh(self, terms: LossTerms) -> Tensor:
        weights = self.base.weigh(terms)
        if self.min is not None:
            weights = weights.clamp_min(value_of(self.min))
        if self.max is not None:
            weights = weights.clamp_max(value_of(self.max))
        return weights


@final
class Normalize(_Node):
    """``a.normalize(over, to)``: weights rescaled so that their mean, sum or maximum is 1.

    Masked terms are left out and ``multiplicity`` (``sample_weight``) counts. Where all weights are 0 they stay 0.

    Args:
        base: Weights to rescale.
        over: ``"batch"`` all terms together, ``"sample"`` each ``terms.loss[n]`` on its own (a sequence), ``"class"``
            each category, ``"group"`` each group.
        to: What becomes 1: the ``"mean"``, ``"sum"`` or ``"max"`` of the weights. ``"max"`` needs ``over="batch"`` or
            ``"sample"``.
        detach: Treat the normaliser as a constant.
    """

    def __init__(
        self,
        base: Weighting | float,
        *,
        over: Literal["batch", "sample", "class", "group"] = "batch",
        to: Literal["mean", "sum", "max"] = "mean",
        detach: bool = True,
    ) -> None:
        super().__init__([as_weighting(base)])
        self.over = check_choice(self, "over", over, ("batch", "sample", "class", "group"))
        self.statistic = check_choice(self, "to", to, ("mean", "sum", "max"))
        if to == "max" and over in ("class", "group"):
            raise ValueError(f"Normalize: to='max' works over 'batch' or 'sample', got over={over!r}")
        self.detach_normalizer = detach
        self.exact_gradient = self.base.exact_gradient and (self.base.detached or not detach)
        self.needs = self.needs | _keys(self.over)
        together = over == "batch" and detach and self.base.scope != "global"
        self.scope = "scaled" if together else "global"

    def weigh(self, terms: LossTerms) -> Tensor:
        weights = self.base.weigh(terms).expand_as(terms.loss)
        counts = terms.counts()
        if self.statistic == "max":
            present = torch.where(counts > 0, weights, torch.zeros_like(weights))
            if not present.numel():
                return weights
            dims = tuple(range(0 if self.over == "batch" else 1, present.ndim))
            total = present.amax(dims, keepdim=True) if dims else present
        else:
            total = sum_over(self.over, counts * weights, terms, self)
            if self.statistic == "mean":
                size = sum_over(self.over, counts, terms, self)
                total = total / torch.where(size > 0, size, torch.ones_like(size))
        total = torch.where(total > 0, total, torch.ones_like(total))
        return weights / (total.detach() if self.detach_normalizer else total)


@final
class Detach(_Node):
    """``a.detach()``: the same weights as constants."""

    def __init__(self, base: Weighting | float) -> None:
        super().__init__([as_weighting(base)])
        self.detached, self.exact_gradient = True, True
        self.scope = self.base.scope

    def weigh(self, terms: LossTerms) -> Tensor:
        return self.base.weigh(terms.detach()).detach()


@final
class Where(_Node):
    """``a.where(condition, otherwise)``: one weighting where a condition is positive, another elsewhere."""

    def __init__(self, base: Weighting | float, condition: Weighting, *, otherwise: Weighting | float = 1.0) -> None:
        if not isinstance(condition, Weighting):
            raise TypeError(f"Where: condition must be a weighting, got {type(condition).__name__}")
        super().__init__([as_weighting(base), condition, as_weighting(otherwise)])
        first, test, other = self.parts()
        self.detached = first.detached and other.detached
        self.scope = _entangled([first.scope, test.scope, other.scope])

    def weigh(self, terms: LossTerms) -> Tensor:
        first, test, other = self.parts()
        return torch.where(test.weigh(terms.detach()) > 0, first.weigh(terms), other.weigh(terms))


@final
class InClasses(Weighting):
    """1 for terms whose category is listed, 0 for others: a condition for :class:`Where`."""

    needs = frozenset({"category"})
    scope: Scope = "local"

    def __init__(self, classes: Sequence[int]) -> None:
        super().__init__()
        self.classes = tuple(check_whole(self, "classes", c) for c in classes)
        if not self.classes:
            raise ValueError("InClasses: classes must not be empty")
        self.add_table("listed", torch.tensor(self.classes))

    def weigh(self, terms: LossTerms) -> Tensor:
        category = terms.need("category", self)
        return (category.unsqueeze(-1) == self.get_buffer("listed")).any(-1).to(terms.loss.dtype)


@final
class Between(Weighting):
    """1 where ``low <= statistic <= high``, 0 elsewhere: a condition for :class:`Where`."""

    scope: Scope = "local"

    def __init__(
        self, statistic: str, *, low: float | Schedule | None = None, high: float | Schedule | None = None
    ) -> None:
        super().__init__()
        if not isinstance(statistic, str):
            raise TypeError(f"Between: statistic must be a name, got {statistic!r} ({type(statistic).__name__})")
        self.statistic = statistic
        self.needs = frozenset({statistic})
        if low is None and high is None:
            raise ValueError("Between: at least one of low and high must be given, got neither")
        self.low = None if low is None else check_hyper(self, "low", low)
        self.high = None if high is None else check_hyper(self, "high", high)

    def weigh(self, terms: LossTerms) -> Tensor:
        value = terms.spread(terms.need(self.statistic, self))
        inside = torch.ones_like(value, dtype=torch.bool)
        if self.low is not None:
            inside = inside & (value >= value_of(self.low))
        if self.high is not None:
            inside = inside & (value <= value_of(self.high))
        return inside.to(terms.loss.dtype)


@final
class Warmup(_Node):
    """``a.warmup(duration)``: weights fade in from 1, ``(1 - t) + t w`` with ``t`` growing from 0 to 1."""

    def __init__(self, base: Weighting | float, duration: int, *, delay: int = 0, by: By = "step") -> None:
        super().__init__([as_weighting(base)])
        self.share = Linear(0.0, 1.0, duration=duration, delay=delay, by=by)
        self.scope = _entangled([self.base.scope])

    def weigh(self, terms: LossTerms) -> Tensor:
        weights, share = self.base.weigh(terms), self.share()
        mixed: Tensor = (1.0 - share) + share * weights
        return mixed

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        part = super().penalty(terms, weights)
        return None if part is None else self.share() * part


@final
class Pooled(_Node):
    """``a.pooled(over)``: all valid terms of a sequence (batch, class, group) get their mean weight."""

    def __init__(
        self, base: Weighting | float, *, over: Literal["sequence", "batch", "class", "group"] = "sequence"
    ) -> None:
        super().__init__([as_weighting(base)])
        self.over = check_choice(self, "over", over, ("sequence", "batch", "class", "group"))
        self.needs = self.needs | _keys(self.over)
        self.scope = "global"

    def weigh(self, terms: LossTerms) -> Tensor:
        weights, counts = self.base.weigh(terms).expand_as(terms.loss), terms.counts()
        size = sum_over(self.over, counts, terms, self)
        mean = sum_over(self.over, counts * weights, terms, self) / torch.where(size > 0, size, torch.ones_like(size))
        return mean.expand_as(terms.loss)


@final
class EMA(_Node):
    r"""``a.ema(beta, num_slots)``: weights replaced by their running mean per class, group or position.

    :math:`m_k \leftarrow \beta m_k + (1-\beta)\,\bar w_k` at every step, over the terms of slot k that
    were seen; a slot starts at its first mean and an unseen slot keeps its value (1 before it was ever seen). The
    weight of a term is :math:`m_k`, a constant.

    State: ``mean`` and ``seen``, ``(num_slots,)`` float64, added over ranks at every step.
    """

    update_on = "step"

    def __init__(
        self,
        base: Weighting | float,
        beta: float | Schedule,
        *,
        num_slots: int,
        by: Literal["category", "group", "position"] = "category",
    ) -> None:
        super().__init__([as_weighting(base)])
        self.beta = check_hyper(self, "beta", beta, low=0.0, high=1.0, open_high=True)
        self.num_slots = check_whole(self, "num_slots", num_slots, low=1)
        self.by = check_choice(self, "by", by, ("category", "group", "position"))
        self.detached, self.exact_gradient = True, True
        self.scope = "local"
        if by != "position":
            self.needs = self.needs | {by}
        self.add_state("mean", torch.ones(num_slots, dtype=torch.float64))
        self.add_state("seen", torch.zeros(num_slots, dtype=torch.float64))
        self.add_pending("total", num_slots)
        self.add_pending("count", num_slots)

    def _slots(self, terms: LossTerms) -> LossTerms:
        if self.by != "position" or terms.find("position") is not None:
            return terms
        place = torch.arange(terms.loss.shape[-1], device=terms.loss.device).expand(terms.loss.shape)
        return terms._replace(extras={**(terms.extras or {}), "position": place})

    def weigh(self, terms: LossTerms) -> Tensor:
        return lookup(self, self.get_buffer("mean"), self._slots(terms), self.by)

    def record(self, terms: LossTerms) -> None:
        counts, placed = terms.counts().double(), self._slots(terms)
        weights = self.base.weigh(terms).double().expand_as(counts)
        self.accumulate("total", tally(self, counts * weights, placed, self.num_slots, self.by))
        self.accumulate("count", tally(self, counts, placed, self.num_slots, self.by))

    def commit(self, sums: dict[str, Tensor]) -> None:
        mean, seen = self.get_buffer("mean"), self.get_buffer("seen")
        new = sums["total"] / sums["count"].clamp_min(torch.finfo(torch.float64).tiny)
        mixed = torch.where(seen > 0, value_of(self.beta) * (mean - new) + new, new)
        moved = (sums["count"] > 0) & new.isfinite()
        mean.copy_(torch.where(moved, mixed, mean))
        seen.add_(moved.double())

    def reset(self) -> None:
        super().reset()
        self.get_buffer("mean").fill_(1.0)
        self.get_buffer("seen").zero_()

    def summary(self) -> dict[str, Tensor]:
        return {"mean": self.get_buffer("mean").clone()}


@final
class Gathered(_Node):
    """``a.gathered()``: weights that the joined batch of all ranks gets, for weightings that compare terms.

    With several processes, a softmax over losses, a quantile or a mean over a group is then that of the whole batch,
    and the averaged gradient is that of one process on it (with equal numbers of terms; otherwise pass ``num_items=``
    or use an :class:`~reweigh.losses.Accumulator`). Two messages per training forward; every rank must take part in
    each, an empty batch included. Elsewhere (one process, evaluation, without gradient) it is the base itself.

    Args:
        base: Weights without gradient.

    Raises:
        TypeError: If the base's weights carry gradient.
        ValueError: On every rank, if terms of ranks differ in what they hold or in more than their number of samples.
    """

    def __init__(self, base: Weighting | float) -> None:
        super().__init__([as_weighting(base)])
        if not self.base.detached:
            raise TypeError(f"Gathered: base must be detached, because gradient stays on its rank; got {self.base!r}")
        self.scope = "global"

    def weigh(self, terms: LossTerms) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and communicates("auto")) or terms.loss.ndim == 0:
            return self.base.weigh(terms)
        joined, (start, stop) = joined_terms(self, terms)
        return self.base.weigh(joined).expand_as(joined.loss)[start:stop]


def joined_terms(owner: object, terms: LossTerms) -> tuple[LossTerms, tuple[int, int]]:
    """The terms of all ranks in rank order, as constants, and where this rank's are. Every rank must call it."""
    terms = terms.detach()
    if terms.mask is None:  # whether all of a rank's terms count must not decide what it sends
        terms = terms._replace(mask=torch.ones_like(terms.loss, dtype=torch.bool))
    size, extras = terms.loss.shape[0], dict(terms.extras or {})
    named = {name: value for name in sorted(STATISTICS) if (value := terms.find(name)) is not None}
    parts = [*named.values(), *(extras[name] for name in sorted(extras))]
    kinds = [*named, *sorted(extras)]
    about = ", ".join(f"{kind} {tuple(part.shape[1:])} {part.dtype}" for kind, part in zip(kinds, parts, strict=True))
    (shard,) = shards(owner, [size], about.replace("torch.", ""), terms.loss.device)
    flat = torch.cat([part.reshape(size, part.shape[1:].numel()).double() for part in parts], 1)
    whole = collect(flat, shard)
    found: list[Tensor] = []
    widths = [part.shape[1:].numel() for part in parts]
    for part, piece in zip(parts, torch.split(whole, widths, 1), strict=True):
        found.append(piece.reshape(len(whole), *part.shape[1:]).to(part.dtype))
    fields: dict[str, Any] = dict(zip(named, found, strict=False))
    more = dict(zip(sorted(extras), found[len(named) :], strict=True)) or None
    return terms._replace(**fields, extras=more), shard.rows


@final
class Frozen(_Node):
    """``a.frozen()``: the same weights, but no event reaches them and nothing is learned any more."""

    opaque = True

    def __init__(self, base: Weighting | float) -> None:
        super().__init__([as_weighting(base)])
        self.detached, self.exact_gradient = True, True
        self.scope = self.base.scope
        self.feeds = frozenset()
        self.requires_grad_(False)

    def weigh(self, terms: LossTerms) -> Tensor:
        return self.base.weigh(terms.detach()).detach()

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        return None


def is_node(module: object) -> bool:
    """Whether a weighting only passes on what its operands see (an ``EMA`` also records)."""
    return isinstance(module, _Node)


def _keys(over: str) -> frozenset[str]:
    return {"class": frozenset({"category"}), "group": frozenset({"group"})}.get(over, frozenset())


def sum_over(over: str, value: Tensor, terms: LossTerms, owner: object) -> Tensor:
    """Sums of ``value`` (``*S``) over the batch, each sample, each class or each group, broadcastable to ``*S``.

    A sequence is a sample, or where rows are packed what the statistic ``sequence`` numbers alike.

    Classes and groups may have any integer names: equal ones are brought together by sorting, so no shape depends on
    the data.
    """
    if over == "batch" or value.ndim == 0:
        return value.sum()
    if over == "sequence" and (packed := terms.find("sequence")) is not None:
        return segment_sum(value.reshape(-1), packed.expand_as(value).reshape(-1)).reshape(value.shape)
    if over in ("sample", "sequence"):
        return value.sum(tuple(range(1, value.ndim)), keepdim=True) if value.ndim > 1 else value
    key = terms.spread(terms.need("category" if over == "class" else "group", owner))
    return segment_sum(value.reshape(-1), key.expand_as(value).reshape(-1)).reshape(value.shape)


def segment_sum(value: Tensor, key: Tensor) -> Tensor:
    """For each row the sum of ``value (N, ...)`` over the rows with the same ``key (N,)``; keys are any integers."""
    first = torch.searchsorted(key.sort().values, key.contiguous())  # one slot per distinct key
    slots = torch.zeros_like(value).index_add(0, first, value)
    return slots[first]
