"""Criteria about sets: how well the predicted region of each class overlaps its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reweigh.weighting.base import Weighting
from reweigh.weighting.config import check_choice, check_number, readable, watched
from reweigh.weighting.schedules import Schedule, check_hyper, value_of
from reweigh.weighting.terms import LossTerms, mask_out

from .base import Criterion, _kind, upcast
from .probability import log_complement

Activation = Literal["softmax", "sigmoid", "none"]
Over = Literal["sample", "batch"]
Absent = Literal["skip", "keep", "zero", "one"]


class RegionCriterion(Criterion):
    """Common part of the dice criteria: shapes, label checks, and the (self-adjusted) probabilities."""

    def __init__(
        self,
        activation: Activation,
        focus_name: str,
        focus: float | Schedule,
        square: bool,
        ignore_index: int,
        validate: bool | None,
    ) -> None:
        super().__init__()
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"{type(self).__name__}: ignore_index must be an integer, got {ignore_index!r}")
        if not isinstance(square, bool):
            raise TypeError(f"{type(self).__name__}: square must be True or False, got {square!r}")
        self.activation = check_choice(self, "activation", activation, ("softmax", "sigmoid", "none"))
        self.focus = check_hyper(self, focus_name, focus, low=0.0)
        self.square = square
        self.ignore_index = ignore_index
        self.validate = validate

    def _may_look(self, values: Tensor) -> bool:
        return self.validate is not False and readable(values, wait=self.validate is True) and values.numel() > 0

    def _pair(self, inputs: Sequence[Any]) -> tuple[Tensor, Tensor, bool]:
        """Logits ``(N, C, ...)``, target, and whether the target has an entry for every logit."""
        name = type(self).__name__
        if len(inputs) != 2:
            raise TypeError(f"{name}: takes (logits, target), got {len(inputs)} inputs")
        logits, target = upcast(self, "logits", inputs[0]), inputs[1]
        if not isinstance(target, Tensor) or target.is_complex():
            raise TypeError(f"{name}: target must be a real tensor, got {_kind(target)}")
        if logits.ndim < 2 or logits.shape[1] == 0:
            raise ValueError(f"{name}: logits must be (N, C, ...) with C >= 1, got shape {tuple(logits.shape)}")
        places = logits.shape[:1] + logits.shape[2:]
        if target.shape == logits.shape:
            return logits, target, True
        if target.shape != places:
            raise ValueError(
                f"{name}: target must have shape {tuple(places)} or {tuple(logits.shape)} for logits "
                f"{tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        if logits.shape[1] == 1 and self.activation != "softmax":
            return logits, target.unsqueeze(1), True  # one column: the target says yes or no
        if target.is_floating_point() or target.dtype == torch.bool:
            raise TypeError(f"{name}: target of shape {tuple(places)} must hold class indices, got {target.dtype}")
        return logits, target.long(), False

    def _check_values(self, logits: Tensor, target: Tensor, dense: bool) -> None:
        name = type(self).__name__
        if self.activation == "none" and self._may_look(logits):
            low, high = (float(edge) for edge in logits.detach().aminmax())
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(
                    f"{name}: probabilities must be in [0, 1] with activation='none', got "
                    f"{high if low >= 0.0 else low:g}"
                )
        if not self._may_look(target):
            return
        low, high = (float(edge) for edge in target.detach().aminmax())
        if dense and not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"{name}: target must be in [0, 1] or ignore_index={self.ignore_index}, "
                f"got {high if low >= 0.0 else low:g}"
            )
        if not dense and (low < 0 or high >= logits.shape[1]):
            raise ValueError(
                f"{name}: target must be in [0, {logits.shape[1]}) or ignore_index={self.ignore_index}, "
                f"got {int(low if low < 0 else high)}"
            )

    def _known(self, target: Tensor, dense: bool) -> Tensor | None:
        """Where the target is not ignored, broadcastable to the logits; a softmax needs all entries of a place."""
        if target.dtype == torch.bool:
            return None
        known = target != self.ignore_index
        if not dense:
            return known.unsqueeze(1)
        return known.all(1, keepdim=True) if self.activation == "softmax" else known

    @property
    def _focused(self) -> bool:
        return isinstance(self.focus, Schedule) or self.focus > 0.0

    def _log_pair(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """``log p`` and ``log(1 - p)`` of every class, both exact."""
        if self.activation == "softmax":
            log_p = logits.log_softmax(1)
            return log_p, log_complement(log_p)
        if self.activation == "sigmoid":
            return logsigmoid(logits), logsigmoid(-logits)
        tiny = torch.finfo(logits.dtype).tiny
        return logits.clamp_min(tiny).log(), (1.0 - logits).clamp_min(tiny).log()

    def _probability(self, logits: Tensor) -> Tensor:
        """``(1 - p)**focus * p``, from its logarithm: finite with a finite gradient for every finite logit."""
        if not self._focused:
            if self.activation == "none":
                return logits
            return logits.softmax(1) if self.activation == "softmax" else logits.sigmoid()
        log_p, log_q = self._log_pair(logits)
        return self._adjust(logits, log_p, log_q)

    def _adjust(self, logits: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        focus = value_of(self.focus)
        held = torch.finfo(log_q.dtype)
        if self.activation == "none":
            return logits * torch.exp(focus * log_q)  # p itself has a slope at 0, where its clamped logarithm has none
        return torch.exp(focus * log_q.clamp_min(held.min) + log_p)


@final
class Overlap(RegionCriterion):
    r"""One minus the overlap (Tversky index) of predicted and target region: a term per class and set.

    .. math::
        \ell_c = 1 - \frac{I_c + s_n}{I_c + \alpha\,(P_c - I_c) + \beta\,(T_c - I_c) + s_d}, \qquad
        I = \sum_i u_i q_i y_i, \quad P = \sum_i u_i q_i, \quad T = \sum_i u_i y_i

    - :math:`q`: predicted probability p, or :math:`(1-p)^{f} p` with ``focus`` f; squared in P (and y in T) with
      ``square``
    - :math:`y`: target in [0, 1]; :math:`u`: 0 where masked or ignored, else the weight of the element
    - :math:`\alpha` weighs false positives, :math:`\beta` false negatives: 1/2 and 1/2 is dice, with half of dice's
      smoothing, :math:`1 - (2I+s)/(P+T+s)`; 1 and 1 is Jaccard

    A set is one sample (``over="sample"``: terms ``(N, C)``) or the whole batch (``over="batch"``: ``(1, C)``). The
    two are different objectives as soon as samples differ in size.

    Args:
        activation: What makes probabilities of the logits: ``"softmax"`` over dimension 1, ``"sigmoid"``, or ``"none"``
            where they are probabilities already.
        over: What a set is.
        alpha: Weight of false positives, >= 0.
        beta: Weight of false negatives, >= 0. ``alpha + beta`` > 0.
        square: Squares in the denominator. Needs ``alpha <= beta``: else the loss is least away from the target.
        focus: Exponent of the self-adjusting factor, >= 0, or a schedule. 0 for plain probabilities.
        smooth_nr: Added to the numerator, in [0, ``smooth_dr``].
        smooth_dr: Added to the denominator. Where it is 0, nothing predicted and nothing there has loss 0.
        include_background: Whether class 0 has a term. Classes keep their numbers.
        empty: What happens to a class without a target element in its set: ``"skip"`` leaves the term out, ``"keep"``
            takes the formula as it is (near 1 for any prediction), ``"zero"`` and ``"one"`` are its loss, without
            gradient, and count in means.
        ignore_index: Elements (columns of a multi-hot target) with this value are removed.
        elements: A weighting of single elements, over their cross-entropy (one term per element for softmax, one per
            logit for sigmoid). It multiplies p and y inside the sums, as hard-example selection has to.
        validate: Whether values are checked: ``None`` where that costs no waiting (on the CPU), ``True`` on a device
            too, ``False`` never. Shapes and dtypes always are.

    Shapes:
        ``logits (N, C, d1, ...)`` with any number of further dimensions; ``target (N, d1, ...)`` class indices or
        ``(N, C, d1, ...)`` probabilities or multi-hot. With one column and no softmax, ``target (N, d1, ...)`` is that
        column, and logits may be ``(N,)``. ``mask`` and ``sample_weight``: ``(N,)`` or ``(N, d1, ...)``, without
        softmax also ``(N, C, d1, ...)``. ``sample_weight`` of samples counts whole terms where a set is a sample;
        otherwise it counts elements inside the sums.

    Provides ``loss``, ``category`` (the class), and the extras ``target_volume`` T and ``predicted_volume`` P.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If shapes do not fit or a value is out of range.

    Example:
        >>> import torch
        >>> p = torch.tensor([[[0.8, 0.6, 0.1]]])
        >>> Overlap(activation="none", smooth_nr=0.0, smooth_dr=0.0).terms(p, torch.tensor([[[1, 1, 0]]])).loss
        tensor([[0.2000]])
    """

    provides = frozenset({"loss", "category", "target_volume", "predicted_volume"})
    counts_inside = True

    def __init__(
        self,
        *,
        activation: Activation = "softmax",
        over: Over = "sample",
        alpha: float = 0.5,
        beta: float = 0.5,
        square: bool = False,
        focus: float | Schedule = 0.0,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        include_background: bool = True,
        empty: Absent = "skip",
        ignore_index: int = -100,
        elements: Weighting | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(activation, "focus", focus, square, ignore_index, validate)
        self.over = check_choice(self, "over", over, ("sample", "batch"))
        self.alpha = check_number(self, "alpha", alpha, low=0.0)
        self.beta = check_number(self, "beta", beta, low=0.0)
        if self.alpha + self.beta == 0.0:
            raise ValueError("Overlap: alpha + beta must be > 0, got 0")
        if square and self.alpha > self.beta:
            raise ValueError(
                f"Overlap: alpha must be <= beta with square=True, got alpha={self.alpha:g}, beta={self.beta:g}"
            )
        self.smooth_dr = check_number(self, "smooth_dr", smooth_dr, low=0.0)
        self.smooth_nr = check_number(self, "smooth_nr", smooth_nr, low=0.0)
        if self.smooth_nr > self.smooth_dr:
            raise ValueError(f"Overlap: smooth_nr must be <= smooth_dr ({self.smooth_dr:g}), got {self.smooth_nr:g}")
        self.include_background = bool(include_background)
        self.empty = check_choice(self, "empty", empty, ("skip", "keep", "zero", "one"))
        self.elements = self._of_elements(elements)
        local = elements is None or elements.scope == "local"
        self.pools = over == "batch"
        self.independent = over == "sample" and local
        self.exact_gradient = elements is None or (elements.exact_gradient and not elements.detached)

    def _of_elements(self, elements: Weighting | None) -> Any:
        """The element-level cross-entropy and its weighting, as an objective of its own."""
        if elements is None:
            return None
        if not isinstance(elements, Weighting):
            raise TypeError(f"Overlap: elements must be a Weighting or None, got {type(elements).__name__}")
        if self.activation == "none":
            raise ValueError("Overlap: elements must be None with activation='none', which has no cross-entropy")
        from ..objective import Objective
        from .binary import BinaryCrossEntropy
        from .element import CrossEntropy

        made = CrossEntropy if self.activation == "softmax" else BinaryCrossEntropy
        return Objective(made(ignore_index=self.ignore_index, validate=False), elements, "none")

    def measure(self, *inputs: Any, mask: Tensor | None, sample_weight: Tensor | None = None) -> LossTerms:
        inputs = self._columns(inputs)
        logits, target, dense = self._pair(inputs)
        samples, classes = logits.shape[:2]
        if not self.include_background and classes == 1:
            raise ValueError("Overlap: include_background=False needs at least two classes, got 1")
        valid = self._valid(logits, target, dense, mask, sample_weight)
        if valid is not None:
            logits = logits.masked_fill(~valid, 0.0)
            target = target.masked_fill(~(valid if dense else valid.squeeze(1)), 0)
        self._check_values(logits, target, dense)
        if dense:
            target = target.to(logits.dtype)

        per_sample = self.over == "sample" and sample_weight is not None and sample_weight.ndim == 1
        inside = (
            None if sample_weight is None or per_sample else self._at_elements("sample_weight", sample_weight, logits)
        )
        factor = None if valid is None else valid.to(logits.dtype)
        if inside is not None:
            inside = inside.to(logits.dtype)
            factor = inside if factor is None else factor * inside
        if self.elements is not None:
            weights = self._element_weights(logits, target, dense, valid, sample_weight)
            factor = weights if inside is None else weights * inside

        size = logits.shape[2:].numel()
        x = logits.reshape(samples, classes, size)
        y = target.reshape(samples, classes, size) if dense else target.reshape(samples, size)
        u = None if factor is None else factor.reshape(samples, factor.shape[1], size)
        common, predicted, present = self._sums(x, y, u, dense)
        counted = self._counted_sets(valid, x)
        if self.over == "batch":
            common, predicted, present = (part.sum(0, keepdim=True) for part in (common, predicted, present))
            counted = None if counted is None else counted.any(0, keepdim=True)
            if counted is None and samples == 0:
                counted = torch.zeros(1, 1, dtype=torch.bool, device=x.device)
        return self._terms(common, predicted, present, counted, logits.dtype, sample_weight if per_sample else None)

    def _columns(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Logits and target of shape ``(N,)`` as ``(N, 1)``: a batch of single yes-or-no answers."""
        if self.activation != "softmax" and len(inputs) == 2 and all(isinstance(v, Tensor) for v in inputs):
            logits, target = inputs
            if logits.ndim == 1 and target.shape == logits.shape:
                return logits.unsqueeze(1), target.unsqueeze(1)
        return tuple(inputs)

    def _at_elements(self, name: str, value: Tensor, logits: Tensor) -> Tensor:
        """What was given per sample, element or logit, in a shape that broadcasts to the logits."""
        shape = logits.shape
        places = shape[:1] + shape[2:]
        if self.activation != "softmax" and value.shape == shape:
            return value
        if value.shape == places:
            return value.unsqueeze(1)
        if value.shape == shape[:1]:
            return value.reshape((-1,) + (1,) * (len(shape) - 1)).expand((*shape[:1], 1, *shape[2:]))
        allowed = [tuple(shape[:1]), tuple(places)] + ([tuple(shape)] if self.activation != "softmax" else [])
        raise ValueError(
            f"Overlap: {name} must have shape {' or '.join(map(str, dict.fromkeys(allowed)))}, got {tuple(value.shape)}"
        )

    def _valid(
        self, logits: Tensor, target: Tensor, dense: bool, mask: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor | None:
        """What counts, ``(N, 1, ...)`` or ``(N, C, ...)``; ``None`` where it is known, without waiting, that all do."""
        parts = [self._known(target, dense)]
        parts.append(None if mask is None else self._at_elements("mask", mask, logits))
        parts.append(None if sample_weight is None else self._at_elements("sample_weight", sample_weight, logits) != 0)
        valid: Tensor | None = None
        for part in parts:
            if part is not None and not (readable(part) and bool(part.all())):
                valid = part if valid is None else valid & part
        return valid

    def _element_weights(
        self, logits: Tensor, target: Tensor, dense: bool, valid: Tensor | None, sample_weight: Tensor | None
    ) -> Tensor:
        """``(N, 1, ...)`` or ``(N, C, ...)`` weights of the elements, 0 where masked."""
        inner = self.elements
        softmax = self.activation == "softmax"
        if not dense and not softmax:
            classes = torch.arange(logits.shape[1], device=logits.device).reshape((-1,) + (1,) * (logits.ndim - 2))
            target = (target.unsqueeze(1) == classes).to(logits.dtype)
        weight = sample_weight
        if weight is not None and weight.ndim > 1:
            weight = self._at_elements("sample_weight", weight, logits)
            weight = weight.squeeze(1) if softmax else weight.expand(logits.shape)
        if valid is not None:
            valid = valid.squeeze(1) if softmax else valid.expand(logits.shape)
        terms = inner.criterion.terms(logits, target, mask=valid, sample_weight=weight)
        _, weights = inner._weigh(terms, learn=inner.training and torch.is_grad_enabled())
        found: Tensor = weights.unsqueeze(1) if softmax else weights
        return found

    def _sums(self, x: Tensor, y: Tensor, u: Tensor | None, dense: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Overlap, predicted volume and target volume of each sample and class, ``(N, C)`` float64."""
        if not dense and u is not None and u.shape[1] != 1:
            y = torch.zeros_like(x).scatter(1, y.unsqueeze(1), 1.0)  # each column has weights of its own
            dense = True
        if dense:
            q = self._probability(x)
            volume, target = (q.square(), y.square()) if self.square else (q, y)
            parts = (q * y, volume, target.expand_as(q))
            common, predicted, present = (part if u is None else part * u for part in parts)
            return common.sum(-1).double(), predicted.sum(-1).double(), present.sum(-1).double()
        counts = torch.ones_like(y, dtype=x.dtype) if u is None else u.squeeze(1)
        present = _bins(counts, y, x.shape[1])
        fixed = u is None or not u.requires_grad
        if self.activation == "softmax" and not self._focused and not self.square and fixed and not watched():
            common, predicted = _SoftmaxSums.apply(x, y, u)  # type: ignore[no-untyped-call]
            return common, predicted, present
        q = self._probability(x)
        at_target = q.gather(1, y.unsqueeze(1)).squeeze(1)
        volume = q.square() if self.square else q
        if u is not None:
            at_target, volume = at_target * u.squeeze(1), volume * u
        return _bins(at_target, y, x.shape[1]), volume.sum(-1).double(), present

    def _counted_sets(self, valid: Tensor | None, x: Tensor) -> Tensor | None:
        """Which sets hold anything that counts; ``None`` for all."""
        if valid is not None:
            return valid.flatten(2).any(-1) if valid.ndim > 2 else valid
        return None if x.shape[2] else torch.zeros(x.shape[0], 1, dtype=torch.bool, device=x.device)

    def _terms(
        self,
        common: Tensor,
        predicted: Tensor,
        present: Tensor,
        counted: Tensor | None,
        dtype: torch.dtype,
        multiplicity: Tensor | None,
    ) -> LossTerms:
        classes = present.shape[1]
        first = 0 if self.include_background else 1
        common, predicted, present = common[:, first:], predicted[:, first:], present[:, first:]
        if counted is not None:
            counted = (counted if counted.shape[1] == 1 else counted[:, first:]).expand(present.shape)
        miss = self.alpha * (predicted - common) + self.beta * (present - common)
        size = common + miss + self.smooth_dr
        some = size > torch.finfo(dtype).tiny
        loss = (miss + (self.smooth_dr - self.smooth_nr)) / torch.where(some, size, torch.ones_like(size))
        loss = loss.masked_fill(~some, 0.0)
        if self.empty in ("zero", "one"):
            loss = loss.masked_fill(present == 0, 0.0 if self.empty == "zero" else 1.0)
        elif self.empty == "skip":
            there = present > 0
            counted = there if counted is None else counted & there
        if counted is not None and readable(counted) and bool(counted.all()):
            counted = None
        return LossTerms(
            loss=mask_out(loss, counted, 0.0).to(dtype),
            mask=counted,
            category=torch.arange(first, classes, device=loss.device).expand(loss.shape),
            num_classes=classes,
            multiplicity=None if multiplicity is None else multiplicity.to(dtype),
            extras={
                "target_volume": mask_out(present, counted, 0.0).to(dtype),
                "predicted_volume": mask_out(predicted, counted, 0.0).to(dtype),
            },
        )

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        return example(self.activation, batch, seed, dtype)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        return variants(self.activation, self.ignore_index, seed, dtype)


class _SoftmaxSums(torch.autograd.Function):
    """Overlap and predicted volume of a softmax against index targets, holding one buffer of the logits' size.

    The probabilities become the gradient in place. A second backward through the same graph computes them again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        p = x.softmax(1)
        at_target = p.gather(1, y.unsqueeze(1))
        ctx.save_for_backward(x, y, u, at_target)
        ctx.p = p if ctx.needs_input_grad[0] else None
        if u is None:
            return _bins(at_target.squeeze(1), y, x.shape[1]), p.sum(-1).double()
        volume = torch.cat([(part * u).sum(-1) for part in p.chunk(_CHUNKS, 1)], 1)
        return _bins((at_target * u).squeeze(1), y, x.shape[1]), volume.double()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        # dx_c = u p_c (g_c - sum_k p_k g_k) with g_c = slope of the volume, plus that of the overlap at the target
        x, y, u, at_target = ctx.saved_tensors
        common, volume = (slope.to(x.dtype) for slope in slopes)
        place, slope = y.unsqueeze(1), volume.unsqueeze(-1)
        bonus = common.gather(1, y).unsqueeze(1)
        if torch.is_grad_enabled():  # for a second derivative: from x, and nothing in place
            p = x.softmax(1)
            pull = p.gather(1, place) * bonus
            mean = (p * slope).sum(1, keepdim=True) + pull
            grad = (p * (slope - mean)).scatter_add(1, place, pull)
            return grad if u is None else grad * u, None, None
        p, ctx.p = x.softmax(1) if ctx.p is None else ctx.p, None
        pull = at_target * bonus
        kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        with torch.autocast(kind, enabled=False):
            mean = torch.bmm(volume.unsqueeze(1), p) + pull
        for part, row in zip(p.chunk(_CHUNKS, 1), slope.chunk(_CHUNKS, 1), strict=True):
            part.mul_(row - mean)
        p.scatter_add_(1, place, pull)
        return p if u is None else p.mul_(u), None, None


_CHUNKS = 4
"""Groups of classes that are worked on at a time where a temporary would have the logits' size."""


def _bins(value: Tensor, slot: Tensor, size: int) -> Tensor:
    """``(N, size)`` float64 sums of ``value (N, D)`` by ``slot (N, D)``."""
    zeros = torch.zeros(value.shape[0], size, dtype=torch.float64, device=value.device)
    return zeros.scatter_add(1, slot, value.double())


def variants(activation: str, ignore_index: int, seed: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Any number of further dimensions; indices, dense targets and ignored ones."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[Any, ...]] = {}
    for shape in ((5, 4), (5, 4, 3), (3, 4, 2, 2), (3, 4, 2, 1, 2)):
        places = shape[:1] + shape[2:]
        logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
        logits = (logits.softmax(1) if activation == "none" else logits).to(dtype)
        target = torch.randint(4, places, generator=generator)
        dense = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
        away = torch.rand(places, generator=generator) < 0.4
        found |= {
            f"{shape}, classes": (logits, target),
            f"{shape}, dense": (logits, dense),
            f"{shape}, some ignored": (logits, target.masked_fill(away, ignore_index)),
            f"{shape}, dense, some ignored": (logits, dense.masked_fill(away.unsqueeze(1), ignore_index)),
        }
    return found


def example(activation: str, batch: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images of six pixels and four classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, 4, 3, 2, generator=generator, dtype=torch.float64) * 2
    if activation == "sigmoid":
        return logits.to(dtype), torch.randint(2, logits.shape, generator=generator).to(dtype)
    target = torch.randint(4, (batch, 3, 2), generator=generator)
    return (logits if activation == "softmax" else logits.softmax(1)).to(dtype), target
