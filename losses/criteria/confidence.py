"""Losses that are a function of the target's probability, in closed form, alone or over the sum of all classes'."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from reweigh.weighting.confidence import Confidence
from reweigh.weighting.schedules import Schedule, check_hyper, value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..logits import LogitTransform
from .base import Criterion, _kind, expand_mask, is_index, upcast
from .binary import BinaryCrossEntropy
from .element import CrossEntropy, SoftmaxCriterion
from .probability import log_complement, zeros_and_ones


def _confidence(owner: object, name: str, value: Confidence, *, positive: bool = False) -> Confidence:
    if not isinstance(value, Confidence):
        raise TypeError(
            f"{type(owner).__name__}: {name} must be a Confidence weighting (GeneralizedCrossEntropy, Poly, ...), "
            f"got {type(value).__name__}"
        )
    if positive and not value.positive:
        raise ValueError(
            f"{type(owner).__name__}: {name} must have a positive loss, since it is divided by its sum over classes, "
            f"got {value!r}"
        )
    return value


@final
class ClosedForm(Criterion):
    r"""The terms of a cross-entropy with its loss replaced by a function of the target's probability.

    .. math:: \ell_i = \varphi(p_i) \quad\text{in place of}\quad -\log p_i

    - :math:`p_i`: probability of the target, as the criterion has it; :math:`\varphi`: ``confidence.value``

    ``Objective(ClosedForm(c))`` and ``Objective(CrossEntropy(), c)`` have the same gradient: the second is the value of
    weighted cross-entropy, the first the loss itself. Everything else stays the criterion's: statistics, masks, ignored
    targets, groups, torch's class ``weight`` (which multiplies, and enters the mean's denominator).

    What is not a function of one probability is refused: label smoothing, ``pos_weight`` and the ``weight`` of a
    sigmoid criterion (multiply by a :class:`~reweigh.weighting.ClassWeight` instead), and soft targets. Softmax
    criteria take class indices only. For soft binary targets use ``BinaryCrossEntropy(soft="sides")``, which has a term
    for either side; under ``"mixed"`` targets must be 0 or 1, which is checked where looking costs no waiting.

    Args:
        confidence: The loss: a :class:`~reweigh.weighting.Confidence`.
        criterion: Any whose loss is :math:`-\log p_t`: :class:`CrossEntropy` (the default), :class:`ExactCrossEntropy`,
            :class:`CausalLM`, :class:`BinaryCrossEntropy`, :class:`NoisyCrossEntropy`, or a plugin's.

    Shapes:
        Those of the criterion.

    Raises:
        TypeError: If an argument is of another kind, the criterion has no ``log_pt``, or softmax targets are
            probabilities.
        ValueError: If the criterion has what is named above.

    Example:
        >>> import torch
        >>> from reweigh.weighting import GeneralizedCrossEntropy
        >>> ClosedForm(GeneralizedCrossEntropy(1.0)).terms(torch.zeros(1, 4), torch.tensor([2])).loss
        tensor([0.7500])
    """

    def __init__(self, confidence: Confidence, criterion: Criterion | None = None) -> None:
        from ..objective import Objective

        super().__init__()
        criterion = CrossEntropy() if criterion is None else criterion
        if not isinstance(criterion, Criterion) or isinstance(criterion, Objective):
            raise TypeError(f"ClosedForm: criterion must be a plain Criterion, got {type(criterion).__name__}")
        if "log_pt" not in criterion.provides:
            raise TypeError(f"ClosedForm needs 'log_pt', which {type(criterion).__name__} does not provide")
        smoothing = getattr(criterion, "label_smoothing", 0.0)
        if smoothing != 0.0:
            raise ValueError(f"ClosedForm: criterion must have label_smoothing=0, got {smoothing!r}")
        for name in ("pos_weight", "weight"):
            given = getattr(criterion, name, None)
            if given is not None and not (name == "weight" and isinstance(criterion, SoftmaxCriterion)):
                raise ValueError(
                    f"ClosedForm: {name} of {type(criterion).__name__} is no part of a closed form; weigh the terms "
                    "with a ClassWeight or PositiveBalance instead"
                )
        self.confidence = _confidence(self, "confidence", confidence)
        self.criterion = criterion
        for name in ("provides", "accepts", "independent", "rowwise", "elementwise", "pools", "slots"):
            setattr(self, name, getattr(criterion, name))
        self.counts_inside = criterion.counts_inside
        self.exact_gradient = criterion.exact_gradient

    def measure(self, *inputs: Any, mask: Tensor | None, **given: Any) -> LossTerms:
        self._check_target(*inputs[1:2])
        terms = self.criterion.measure(*inputs, mask=mask, **given)
        self._check_sides(terms)
        loss = self.confidence.value(terms.need("log_pt", self), terms.log_qt)
        if terms.norm is not None:
            loss = loss * terms.norm
        return terms._replace(loss=mask_out(loss, terms.mask, 0.0))

    def _check_target(self, target: Any = None) -> None:
        if isinstance(self.criterion, CrossEntropy) and isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(
                "ClosedForm: target must be class indices, since the loss is a function of one probability, "
                f"got {target.dtype}"
            )

    def _check_sides(self, terms: LossTerms) -> None:
        criterion = self.criterion
        if not isinstance(criterion, BinaryCrossEntropy) or criterion.soft != "mixed":
            return
        target = terms.need("target", self)
        if criterion._may_look(target) and not zeros_and_ones(target.detach()):
            raise ValueError("ClosedForm: soft binary targets have two sides, use BinaryCrossEntropy(soft='sides')")

    def observe(self, terms: LossTerms) -> None:
        self.criterion.observe(terms)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        return self.criterion.example_inputs(batch, seed=seed, dtype=dtype)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        for kind, inputs in self.criterion.example_variants(seed=seed, dtype=dtype).items():
            soft = isinstance(self.criterion, CrossEntropy) and inputs[1].is_floating_point()
            if isinstance(self.criterion, BinaryCrossEntropy) and self.criterion.soft == "mixed":
                soft = "soft" in kind
            if not soft:
                found[kind] = inputs
        return found


class _OverClasses(SoftmaxCriterion):
    """Common part of the criteria that look at the probability of every class."""

    provides = frozenset({"loss", "log_pt", "log_qt", "target", "category"})

    @abstractmethod
    def _loss(self, log_pt: Tensor, log_qt: Tensor, log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
        """Losses from ``log p`` and ``log(1 - p)`` of the targets, and those of all classes along ``dim``."""

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        name = type(self).__name__
        if len(inputs) != 2:
            raise TypeError(f"{name}: takes (logits, target), got {len(inputs)} inputs")
        logits, target = upcast(self, "logits", inputs[0]), inputs[1]
        if not is_index(target):
            raise TypeError(f"{name}: target must be class indices, got {_kind(target)}")
        dim = 1 if logits.ndim > 1 else 0
        if logits.ndim == 0 or logits.shape[dim] < 2:
            raise ValueError(f"{name}: logits must have at least two classes, got shape {tuple(logits.shape)}")
        shape = logits.shape[:dim] + logits.shape[dim + 1 :]
        if target.shape != shape:
            raise ValueError(
                f"{name}: target must have shape {tuple(shape)} for logits {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        target = target.long()
        valid = self._valid(target, None if mask is None else expand_mask(self, mask, shape))
        if valid is not None:
            target = target.masked_fill(~valid, 0)
            logits = logits.masked_fill(~valid.unsqueeze(dim), 0.0)
        self._check_labels(target, logits.shape[dim])
        if self.logits is not None:
            logits = self.logits(logits, target, dim=dim)
        at, log_p = target.unsqueeze(dim), logits.log_softmax(dim)
        log_q = log_complement(log_p, dim)
        log_pt, log_qt = log_p.gather(dim, at).squeeze(dim), log_q.gather(dim, at).squeeze(dim)
        sure = log_qt < -0.7  # log p has cancelled there, and log(1 - p) has not
        log_pt = torch.where(sure, torch.log1p(-torch.where(sure, log_qt, -1.0).exp()), log_pt)
        return LossTerms(
            loss=mask_out(self._loss(log_pt, log_qt, log_p, log_q, dim), valid, 0.0),
            mask=valid,
            log_pt=mask_out(log_pt, valid, NEUTRAL_LOG_PT),
            log_qt=mask_out(log_qt, valid, NEUTRAL_LOG_PT),
            target=target,
            category=target,
            num_classes=logits.shape[dim],
        )

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 4, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(4, (batch,), generator=generator)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Any, ...]] = {}
        for shape in ((4,), (5, 4), (3, 2), (3, 4, 2), (2, 4, 2, 2)):
            if shape == (3, 2) and self.logits is not None:
                continue  # which may hold a table of four classes
            dim = min(len(shape) - 1, 1)
            logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
            target = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=generator)
            ignored = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.4, self.ignore_index)
            found |= {f"{shape}": (logits, target), f"{shape}, some ignored": (logits, ignored)}
        return found


@final
class ExactCrossEntropy(_OverClasses):
    r"""Softmax cross-entropy that knows the target's probability and its complement to the last digits.

    .. math:: \ell_i = -\log p_i

    :class:`CrossEntropy` has :math:`\log(1 - p)` exactly for two classes only; from its :math:`\log p` no more of
    :math:`1 - p` can be had than rounding left, and its gradient :math:`p - 1` cancels likewise. Here the other
    classes' probabilities are added up, a few passes more over the logits. Worth it under weights that grow without
    bound as p goes to 1 (:class:`~reweigh.weighting.Encouraging`), and for losses of nearly certain terms in float32.

    Provides ``loss``, ``log_pt``, ``log_qt`` (both exact), ``target``, ``category``.

    Args:
        ignore_index: Targets with this value are removed.
        logits: A transform applied to the logits first.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        As :class:`NormalizedClosedForm`.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` not integer.
        ValueError: If shapes do not fit or a label is out of range.

    Example:
        >>> import torch
        >>> ExactCrossEntropy().terms(torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([0])).loss
        tensor([8.4967e-18])
    """

    def __init__(
        self, *, ignore_index: int = -100, logits: LogitTransform | None = None, validate: bool | None = None
    ) -> None:
        super().__init__(None, ignore_index, 0.0, logits, validate)

    def _loss(self, log_pt: Tensor, log_qt: Tensor, log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
        return -log_pt


@final
class NormalizedClosedForm(_OverClasses):
    r"""A loss of the target's probability over the sum of the same loss for every class.

    .. math:: \ell_i = \frac{\varphi(p_{iy_i})}{\sum_c \varphi(p_{ic})}

    - :math:`p`: softmax of the logits, class dimension 1 (dimension 0 where unbatched)
    - :math:`\varphi`: ``confidence.value``

    Between 0 and 1, and 1 in the sum over all labels, whatever the logits: that sum being constant is what makes a loss
    robust to symmetric label noise. ``GeneralizedCrossEntropy(0.0)`` gives normalised cross-entropy (NCE),
    ``FocalSlope(0.5)`` normalised focal loss (NFL), ``GeneralizedCrossEntropy(q)`` NGCE, ``DFT()`` the normalised mean
    absolute error :math:`(1-p)/(C-1)`, which reverse cross-entropy normalised is too.

    It is no function of the target's probability alone, so it has no form as a detached weight.

    Provides ``loss``, ``log_pt``, ``log_qt`` (both exact), ``target``, ``category``.

    Args:
        confidence: The loss: a :class:`~reweigh.weighting.Confidence` that is positive (not ``Encouraging``).
        ignore_index: Targets with this value are removed.
        logits: A transform applied to the logits first.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``logits (N, C, d1, ...)``, C at least 2, with integer ``target (N, d1, ...)``; terms ``(N, d1, ...)``.
        Unbatched ``(C,)`` with ``()``. Probabilities as targets are refused.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` not integer.
        ValueError: If shapes do not fit, a label is out of range, or the loss may be negative.

    Example:
        >>> import torch
        >>> from reweigh.weighting import GeneralizedCrossEntropy
        >>> NormalizedClosedForm(GeneralizedCrossEntropy(0.7)).terms(torch.zeros(1, 4), torch.tensor([2])).loss
        tensor([0.2500])
    """

    def __init__(
        self,
        confidence: Confidence,
        *,
        ignore_index: int = -100,
        logits: LogitTransform | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(None, ignore_index, 0.0, logits, validate)
        self.confidence = _confidence(self, "confidence", confidence, positive=True)

    def _loss(self, log_pt: Tensor, log_qt: Tensor, log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
        return self.confidence.value(log_pt, log_qt) / self.confidence.value(log_p, log_q).sum(dim)


@final
class ActivePassive(_OverClasses):
    r"""A normalised loss that pulls the target's probability up, plus one that pushes all others down.

    .. math:: \ell_i = \alpha\,\frac{\varphi(p_{iy_i})}{\sum_c \varphi(p_{ic})} + \beta\,\psi(p_{iy_i})

    - :math:`\varphi`: ``active.value``; :math:`\psi`: ``passive.value``

    One criterion on one softmax, so weights, masks and every reduction act on the sum, term by term.

    Provides ``loss``, ``log_pt``, ``log_qt`` (both exact), ``target``, ``category``.

    Args:
        active: A :class:`~reweigh.weighting.Confidence` that is positive; it is normalised.
        passive: A :class:`~reweigh.weighting.Confidence`; robust where it is linear in p, as ``DFT()`` (the mean
            absolute error) and ``SymmetricCrossEntropy(0.0)`` (reverse cross-entropy) are.
        alpha: Factor of the active loss, >= 0, or a schedule.
        beta: Factor of the passive loss, >= 0, or a schedule.
        ignore_index: Targets with this value are removed.
        logits: A transform applied to the logits first.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        As :class:`NormalizedClosedForm`.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` not integer.
        ValueError: If shapes do not fit, a label is out of range, or the active loss may be negative.

    Example:
        >>> import torch
        >>> from reweigh.weighting import DFT, GeneralizedCrossEntropy
        >>> criterion = ActivePassive(GeneralizedCrossEntropy(0.0), DFT())
        >>> criterion.terms(torch.zeros(1, 4), torch.tensor([2])).loss
        tensor([1.])
    """

    def __init__(
        self,
        active: Confidence,
        passive: Confidence,
        *,
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 1.0,
        ignore_index: int = -100,
        logits: LogitTransform | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(None, ignore_index, 0.0, logits, validate)
        self.active = _confidence(self, "active", active, positive=True)
        self.passive = _confidence(self, "passive", passive)
        self.alpha = check_hyper(self, "alpha", alpha, low=0.0)
        self.beta = check_hyper(self, "beta", beta, low=0.0)

    def _loss(self, log_pt: Tensor, log_qt: Tensor, log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
        active = self.active.value(log_pt, log_qt) / self.active.value(log_p, log_q).sum(dim)
        return value_of(self.alpha) * active + value_of(self.beta) * self.passive.value(log_pt, log_qt)
