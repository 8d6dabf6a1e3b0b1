"""Criteria with one loss per element: softmax and sigmoid cross-entropy, and any function of yours."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from reweigh.weighting.config import as_table, check_choice, check_number, readable
from reweigh.weighting.frequency import ClassTable, Values, class_table
from reweigh.weighting.schedules import Schedule, check_hyper, value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..kernels import eager, sided_logs
from ..logits import LogitTransform
from .base import Criterion, _kind, expand_mask, upcast


class _Element(Criterion):
    """Common part of the cross-entropies."""

    rowwise = True
    target_name = "target"

    def __init__(
        self,
        weight: Values | str | ClassTable | None,
        ignore_index: int,
        label_smoothing: float | Schedule,
        logits: LogitTransform | None,
        validate: bool | None,
    ) -> None:
        super().__init__()
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"{type(self).__name__}: ignore_index must be an integer, got {ignore_index!r}")
        if logits is not None and not isinstance(logits, LogitTransform):
            raise TypeError(f"{type(self).__name__}: logits must be a LogitTransform, got {type(logits).__name__}")
        self.weight = None if weight is None else class_table(self, "weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = check_hyper(self, "label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.logits = logits
        self.exact_gradient = logits is None or logits.exact_gradient
        self.validate = validate

    def _class_weight(self, num_classes: int, like: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        table = self.weight.table()
        if table.numel() != num_classes:
            raise ValueError(
                f"{type(self).__name__}: weight must have one entry per class ({num_classes}), got {table.numel()}"
            )
        return table.to(like.dtype)

    def _may_look(self, values: Tensor) -> bool:
        """Whether values are there to be checked, and may be."""
        return self.validate is not False and readable(values, wait=self.validate is True) and values.numel() > 0

    def _check_labels(self, target: Tensor, classes: int) -> None:
        if self._may_look(target):
            low, high = (int(edge) for edge in target.aminmax())
            if low < 0 or high >= classes:
                raise ValueError(
                    f"{type(self).__name__}: {self.target_name} must be in [0, {classes}) or "
                    f"ignore_index={self.ignore_index}, got {low if low < 0 else high}"
                )

    def _valid(self, target: Tensor, mask: Tensor | None) -> Tensor | None:
        """Where terms count; ``None`` where it is known, without asking a device, that all do."""
        kept = target != self.ignore_index
        return self._only_valid(kept if mask is None else kept & mask)

    def _only_valid(self, valid: Tensor) -> Tensor | None:
        return None if readable(valid) and bool(valid.all()) else valid


class SoftmaxCriterion(_Element):
    """Common part of the softmax criteria."""

    def _indexed(self, logits: Tensor, target: Tensor, mask: Tensor | None, dim: int) -> LossTerms:
        """Terms of index targets that have the logits' shape without dimension ``dim``."""
        classes = logits.shape[dim]
        target = target.long()
        valid = self._valid(target, mask)
        if valid is not None:
            target = target.masked_fill(~valid, 0)
            logits = logits.masked_fill(~valid.unsqueeze(dim), 0.0)
        self._check_labels(target, classes)
        if self.logits is not None:
            logits = self.logits(logits, target, dim=dim)
        weight, smoothing = self._class_weight(classes, logits), value_of(self.label_smoothing)
        smooth = isinstance(smoothing, Tensor) or smoothing > 0.0
        if weight is None and not smooth:
            loss = nn.functional.cross_entropy(logits, target, reduction="none")
            log_pt = -loss
        else:
            log_p = logits.log_softmax(dim)
            log_pt = log_p.gather(dim, target.unsqueeze(dim)).squeeze(dim)
            at_target = 1.0 if weight is None else weight[target]
            loss = -(1.0 - smoothing) * at_target * log_pt
            if smooth:
                share = smoothing / classes
                loss = loss - share * (log_p if weight is None else _times(_along(weight, log_p, dim), log_p)).sum(dim)
        log_qt: Tensor | None = None
        if classes == 2:
            margin = (logits.select(dim, 1) - logits.select(dim, 0)) * (2 * target - 1)
            log_pt, log_qt = logsigmoid(margin), logsigmoid(-margin)
            log_qt = mask_out(log_qt, valid, NEUTRAL_LOG_PT)
        return LossTerms(
            loss=mask_out(loss, valid, 0.0),
            mask=valid,
            log_pt=mask_out(log_pt, valid, NEUTRAL_LOG_PT),
            log_qt=log_qt,
            target=target,
            category=target,
            num_classes=classes,
            norm=None if weight is None else weight[target],
        )


@final
class CrossEntropy(SoftmaxCriterion):
    r"""Softmax cross-entropy, one term per target.

    .. math:: \ell_i = -\sum_c v_c\, y_{ic} \log p_{ic}, \qquad p_i = \mathrm{softmax}(z_i)

    - :math:`z`: ``logits``, class dimension 1 (dimension 0 where unbatched)
    - :math:`y`: one-hot of an index target, or the given probabilities; smoothed to :math:`(1-s)y + s/C`
    - :math:`v`: ``weight``, with torch's meaning: with index targets the mean divides by the sum of
      :math:`v_{y_i}`, with probabilities by the number of terms

    Provides ``loss``, ``log_pt``, ``target``, ``category``; ``log_qt`` exactly for two classes. With probabilities
    :math:`p_t = \sum_c y_c p_c`, so a one-hot target equals its index, and ``target`` / ``category`` are their largest
    class.

    Args:
        weight: Per-class weights: a sequence or tensor, ``"balanced"``, ``"sqrt"`` or ``"effective"`` (counts from the
            ``fit`` event), or a class table. torch's ``weight``.
        ignore_index: Targets with this value are removed.
        label_smoothing: Share s of the uniform target, in [0, 1], or a schedule.
        logits: A transform applied to the logits first (:class:`~reweigh.losses.LogitAdjustment`, ...).
        validate: Whether values are checked: ``None`` where that costs no waiting (on the CPU), ``True`` on a device
            too, ``False`` never. Shapes and dtypes always are.

    Shapes:
        ``logits (N, C, d1, ...)`` with ``target (N, d1, ...)`` integers or ``(N, C, d1, ...)`` probabilities; terms
        ``(N, d1, ...)``. Unbatched ``(C,)`` with ``()``. float16 and bfloat16 logits are computed in float32.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` neither integer nor floating-point.
        ValueError: If shapes do not fit or a label is out of range.

    Example:
        >>> import torch
        >>> CrossEntropy().terms(torch.zeros(2, 4), torch.tensor([3, -100])).loss
        tensor([1.3863, 0.0000])
    """

    provides = frozenset({"loss", "log_pt", "target", "category"})

    def __init__(
        self,
        *,
        weight: Values | str | ClassTable | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        logits: LogitTransform | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, label_smoothing, logits, validate)

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        if len(inputs) != 2:
            raise TypeError(f"CrossEntropy: takes (logits, target), got {len(inputs)} inputs")
        logits, target = upcast(self, "logits", inputs[0]), inputs[1]
        if not isinstance(target, Tensor) or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"CrossEntropy: target must be class indices or probabilities, got {_kind(target)}")
        if logits.ndim == 0:
            raise ValueError("CrossEntropy: logits must have a class dimension, got a scalar")
        dim = 1 if logits.ndim > 1 else 0
        shape = logits.shape[:dim] + logits.shape[dim + 1 :]
        if logits.shape[dim] == 0:
            raise ValueError(f"CrossEntropy: logits must have at least one class, got shape {tuple(logits.shape)}")
        if mask is not None:
            mask = expand_mask(self, mask, shape)
        if target.is_floating_point():
            return self._soft(logits, target, mask, dim)
        if target.shape != shape:
            raise ValueError(
                f"CrossEntropy: target must have shape {tuple(shape)} (or {tuple(logits.shape)} as probabilities) "
                f"for logits {tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        return self._indexed(logits, target, mask, dim)

    def _soft(self, logits: Tensor, target: Tensor, mask: Tensor | None, dim: int) -> LossTerms:
        classes = logits.shape[dim]
        if target.shape != logits.shape:
            raise ValueError(
                f"CrossEntropy: probability targets must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        target = target.to(logits.dtype)
        valid = None if mask is None else self._only_valid(mask)
        if valid is not None:
            away = ~valid.unsqueeze(dim)
            logits, target = logits.masked_fill(away, 0.0), target.masked_fill(away, 1.0 / classes)
        if self._may_look(target):
            low, high = (float(edge) for edge in target.detach().aminmax())
            if not (low >= 0.0 and high < math.inf):
                raise ValueError(
                    f"CrossEntropy: probability targets must be finite and >= 0, got {high if low >= 0.0 else low:g}"
                )
        hard = target.argmax(dim)
        if self.logits is not None:
            logits = self.logits(logits, hard, dim=dim)
        log_p = logits.log_softmax(dim)
        smoothing = value_of(self.label_smoothing)
        smooth = target * (1.0 - smoothing) + smoothing / classes
        weight = self._class_weight(classes, logits)
        weighted = smooth if weight is None else smooth * _along(weight, log_p, dim)
        present = target > 0
        loss = -_times(weighted, log_p).sum(dim)
        log_y = torch.where(present, target, torch.ones_like(target)).log()
        log_pt = torch.where(present, log_p + log_y, torch.full_like(log_p, -torch.inf))
        log_pt = torch.where(present.any(dim, keepdim=True), log_pt, torch.zeros_like(log_p)).logsumexp(dim)
        return LossTerms(
            loss=mask_out(loss, valid, 0.0),
            mask=valid,
            log_pt=mask_out(log_pt.clamp_max(0.0), valid, NEUTRAL_LOG_PT),
            target=hard,
            category=hard,
            num_classes=classes,
        )

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 4, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(4, (batch,), generator=generator)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Any, ...]] = {}
        for shape in ((4,), (5, 4), (3, 4, 2), (2, 4, 2, 2)):
            dim = min(len(shape) - 1, 1)
            logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
            target = torch.randint(4, shape[:dim] + shape[dim + 1 :], generator=generator)
            soft = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(dim).to(dtype)
            ignored = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.4, self.ignore_index)
            found |= {
                f"{shape}, classes": (logits, target),
                f"{shape}, probabilities": (logits, soft),
                f"{shape}, some ignored": (logits, ignored),
            }
        return found


@final
class BinaryCrossEntropy(_Element):
    r"""Sigmoid cross-entropy, one term per logit.

    .. math:: \ell_i = -v_c \big[ u_c\, y_i \log p_i + (1-y_i) \log(1-p_i) \big], \qquad p_i = \sigma(x_i)

    - :math:`x`: ``logits`` of any shape; labels along dimension 1 where there is one (else dimension 0 is the batch)
    - :math:`y`: targets in [0, 1], hard, soft or multi-hot; smoothed to :math:`(1-s)y + s/2`
    - :math:`v`: ``weight`` per label; it only multiplies (torch's meaning). :math:`u`: ``pos_weight`` per label

    Under a probability shift m (``shift``) the negative side reads :math:`p_m = \max(p - m, 0)` in place of p, so that
    negatives below m have no loss and no gradient.

    Provides ``loss``, ``log_pt``, ``log_qt`` (both exact), ``target`` and ``category`` (the label's column).

    Args:
        weight: Per-label weights, as in :class:`CrossEntropy`.
        pos_weight: Weight of positives: a number, or one per label.
        ignore_index: Targets with this value are removed.
        label_smoothing: Share s of the target 1/2, in [0, 1], or a schedule.
        logits: A transform applied to the logits first.
        shift: Probability shift m of the negatives, in [0, 1), or a schedule (the asymmetric loss).
        soft: What a soft target is to a weighting. ``"mixed"``: one term with :math:`p_t = y p + (1-y)(1-p)`.
            ``"sides"``: two terms, positive with share y and negative with share 1 - y, each weighed for itself.
        validate: Whether values are checked: ``None`` where that costs no waiting (on the CPU), ``True`` on a device
            too, ``False`` never. Shapes and dtypes always are.

    Shapes:
        ``logits`` and ``target`` of the same shape; terms of that shape, with a last dimension of two under ``"sides"``
        unless all targets are known to be 0 or 1 (integers on a device are). A mask may cover whole samples ``(N,)``.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` is complex.
        ValueError: If shapes differ or a target is outside [0, 1].

    Example:
        >>> import torch
        >>> BinaryCrossEntropy().terms(torch.zeros(1, 2), torch.tensor([[1, -100]])).loss
        tensor([[0.6931, 0.0000]])
    """

    provides = frozenset({"loss", "log_pt", "log_qt", "target", "category"})

    def __init__(
        self,
        *,
        weight: Values | str | ClassTable | None = None,
        pos_weight: float | Values | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        logits: LogitTransform | None = None,
        shift: float | Schedule = 0.0,
        soft: Literal["mixed", "sides"] = "mixed",
        validate: bool | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, label_smoothing, logits, validate)
        self.shift = check_hyper(self, "shift", shift, low=0.0, high=1.0, open_high=True)
        self.soft = check_choice(self, "soft", soft, ("mixed", "sides"))
        if pos_weight is not None:
            single = isinstance(pos_weight, (int, float)) or (isinstance(pos_weight, Tensor) and pos_weight.ndim == 0)
            table = [check_number(self, "pos_weight", pos_weight, low=0.0)] if single else pos_weight
            self.add_table("pos_weight", as_table(self, "pos_weight", table))
        else:
            self.pos_weight = None

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        if len(inputs) != 2:
            raise TypeError(f"BinaryCrossEntropy: takes (logits, target), got {len(inputs)} inputs")
        logits, target = upcast(self, "logits", inputs[0]), inputs[1]
        if not isinstance(target, Tensor) or target.is_complex():
            raise TypeError(f"BinaryCrossEntropy: target must be a real tensor, got {_kind(target)}")
        if target.shape != logits.shape:
            raise ValueError(
                f"BinaryCrossEntropy: target must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        y = target.to(logits.dtype)
        plain = mask is None and self.ignore_index not in (0, 1) and _zeros_and_ones(y)
        valid = None
        if not plain:
            valid = self._valid(target, None if mask is None else expand_mask(self, mask, logits.shape))
        if valid is not None:
            logits, y = logits.masked_fill(~valid, 0.0), y.masked_fill(~valid, 0.0)
        # integers on a device count as hard unseen; floating targets there may be soft
        hard = plain or _zeros_and_ones(y) or not (target.is_floating_point() or self._may_look(y))
        if not plain and self._may_look(y):
            low, high = (float(edge) for edge in y.detach().aminmax())
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(
                    f"BinaryCrossEntropy: target must be in [0, 1] or ignore_index={self.ignore_index}, "
                    f"got {high if low >= 0.0 else low:g}"
                )
        dim = 1 if logits.ndim > 1 else 0
        labels = logits.shape[1] if logits.ndim > 1 else 1
        place = torch.arange(labels, device=logits.device).reshape((1, -1) + (1,) * (logits.ndim - 2))
        place = place.expand(logits.shape) if logits.ndim > 1 else torch.zeros_like(logits, dtype=torch.int64)
        if self.logits is not None:
            logits = self.logits(logits, y, dim=dim)
        smoothing, shift = value_of(self.label_smoothing), value_of(self.shift)
        shifted = isinstance(shift, Tensor) or shift > 0.0
        weight = self._class_weight(labels, logits)
        if hard and not isinstance(smoothing, Tensor) and smoothing == 0.0:
            if eager() and not isinstance(shift, Tensor):
                log_pt, log_qt = sided_logs(logits, y, shift)
            elif shifted:
                positive = y > 0
                log_q, log_not_q = _shifted(logits, shift)
                log_pt = torch.where(positive, logsigmoid(logits), log_q)
                log_qt = torch.where(positive, logsigmoid(-logits), log_not_q)
            else:
                margin = logits * (2.0 * y - 1.0)
                log_pt, log_qt = logsigmoid(margin), logsigmoid(-margin)
            loss = -log_pt
            if self.pos_weight is not None:
                loss = loss * torch.where(y > 0, self._pos_weight(labels, logits), 1.0)
        else:
            log_p, log_not_p = logsigmoid(logits), logsigmoid(-logits)
            log_q, log_not_q = _shifted(logits, shift) if shifted else (log_not_p, log_p)
            smooth = y * (1.0 - smoothing) + 0.5 * smoothing
            times = torch.ones_like(log_p) if self.pos_weight is None else self._pos_weight(labels, logits)
            if self.soft == "sides":
                share = torch.stack((smooth, 1.0 - smooth), -1)
                present = share > 0 if valid is None else (share > 0) & valid.unsqueeze(-1)
                loss = -torch.stack((_times(times.expand_as(log_p), log_p), log_q), -1)
                return LossTerms(
                    loss=mask_out(loss if weight is None else loss * weight[place].unsqueeze(-1), present, 0.0),
                    mask=present,
                    log_pt=mask_out(torch.stack((log_p, log_q), -1), present, NEUTRAL_LOG_PT),
                    log_qt=mask_out(torch.stack((log_not_p, log_not_q), -1), present, NEUTRAL_LOG_PT),
                    target=logits.new_tensor((1.0, 0.0)).expand_as(share),
                    category=place.unsqueeze(-1).expand_as(share),
                    num_classes=labels,
                    share=share,
                )
            loss = -_times(smooth * times, log_p) - _times(1.0 - smooth, log_q)
            log_pt, log_qt = _mixed(y, log_p, log_not_p, log_q, log_not_q)
        if weight is not None:
            loss = loss * weight[place]
        return LossTerms(
            loss=mask_out(loss, valid, 0.0),
            mask=valid,
            log_pt=mask_out(log_pt, valid, NEUTRAL_LOG_PT),
            log_qt=mask_out(log_qt, valid, NEUTRAL_LOG_PT),
            target=y,
            category=place,
            num_classes=labels,
        )

    def _pos_weight(self, labels: int, like: Tensor) -> Tensor:
        table = self.get_buffer("pos_weight").to(like.dtype)
        if table.numel() not in (1, labels):
            raise ValueError(
                f"BinaryCrossEntropy: pos_weight must be one number or one per label ({labels}), got {table.numel()}"
            )
        return _along(table, like, 1) if table.numel() > 1 else table.reshape(())

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 4, generator=generator, dtype=torch.float64) * 2
        target = torch.randint(2, (batch, 4), generator=generator).to(dtype)
        if self.soft == "sides":  # every other sample has soft labels
            blurred = torch.rand(batch, 4, generator=generator, dtype=torch.float64).to(dtype)
            target = torch.where((torch.arange(batch) % 2 == 0).unsqueeze(1), target, blurred)
        return logits.to(dtype), target

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Any, ...]] = {}
        for shape in ((5,), (5, 4), (3, 4, 2), (2, 4, 2, 2)):
            if self.weight is not None and len(shape) == 1:
                continue  # a table of four labels needs four columns
            logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
            target = torch.randint(2, shape, generator=generator)
            soft = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
            away = torch.rand(shape, generator=generator) < 0.4
            found |= {
                f"{shape}, integers": (logits, target),
                f"{shape}, soft": (logits, soft),
                f"{shape}, some ignored": (logits, target.to(dtype).masked_fill(away, self.ignore_index)),
                f"{shape}, some soft, some ignored": (logits, soft.masked_fill(away, self.ignore_index)),
            }
        return found


@final
class FromLoss(Criterion):
    """Any loss function of yours with ``reduction="none"``, as a criterion.

    Args:
        fn: A module or function called as ``fn(*inputs)``, or its dotted path (for YAML). It must return one loss per
            element.

    Shapes:
        Terms have the shape that ``fn`` returns; the last input, if it has that shape, is provided as ``target``.
        ``fn`` sees float16 and bfloat16 inputs as float32, and at masked places 1 (0 for integers) instead of what
        stands there.

    Raises:
        TypeError: If ``fn`` cannot be called.
        ValueError: If it returns a scalar: the loss must not be reduced yet.

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective
        >>> objective = Objective(FromLoss(torch.nn.L1Loss(reduction="none")))
        >>> objective(torch.tensor([1.0, 5.0]), torch.zeros(2), sample_weight=torch.tensor([3.0, 1.0]))
        tensor(2.)
    """

    provides = frozenset({"loss"})

    def __init__(self, fn: nn.Module | Callable[..., Tensor] | str) -> None:
        super().__init__()
        if isinstance(fn, str):
            path, _, name = fn.rpartition(".")
            try:
                fn = getattr(importlib.import_module(path), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"FromLoss: fn must be importable, got {fn!r} ({error})") from error
        if not callable(fn):
            raise TypeError(f"FromLoss: fn must be callable or a dotted path, got {type(fn).__name__}")
        self.fn = fn

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        inputs = tuple(
            value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
            for value in inputs
        )
        if mask is not None:
            inputs = tuple(_cover(value, mask) for value in inputs)
        loss = self.fn(*inputs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"FromLoss: fn must return a tensor, got {type(loss).__name__}")
        if loss.ndim == 0:
            raise ValueError('FromLoss: fn must return one loss per element (reduction="none"), got a scalar')
        loss = upcast(self, "loss", loss)
        if mask is not None:
            mask = expand_mask(self, mask, loss.shape)
        last = inputs[-1] if inputs else None
        target = last if isinstance(last, Tensor) and last.shape == loss.shape else None
        return LossTerms(loss=mask_out(loss, mask, 0.0), mask=mask, target=target)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        pair = torch.randn(2, batch, generator=generator, dtype=torch.float64)
        return pair[0].to(dtype), pair[1].to(dtype)


def _cover(value: Any, mask: Tensor) -> Any:
    """An input with harmless values at masked places, where its shape shows which those are."""
    if not isinstance(value, Tensor) or value.is_complex() or value.ndim < mask.ndim:
        return value
    if value.shape[: mask.ndim] == mask.shape:
        away = ~mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
    elif value.ndim == mask.ndim + 1 and value.shape[:1] + value.shape[2:] == mask.shape:
        away = ~mask.unsqueeze(1)
    else:
        return value
    return value.masked_fill(away, 1 if value.is_floating_point() else 0)


def _times(weight: Tensor, log_p: Tensor) -> Tensor:
    """``weight * log_p`` where 0 times minus infinity is 0: a class of weight 0 leaves the sum."""
    return weight * log_p.masked_fill((weight == 0) & log_p.isneginf(), 0.0)


def _along(table: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.ndim
    shape[dim] = -1
    return table.reshape(shape)


def _zeros_and_ones(y: Tensor) -> bool:
    """Whether all targets are known to be 0 or 1, which has a leaner form. Asks the values, but not a device."""
    if not readable(y) or y.requires_grad or not y.numel():
        return not y.numel() and not y.requires_grad
    low, high = (float(edge) for edge in y.aminmax())
    return low >= 0.0 and high <= 1.0 and float((y - y * y).sum()) == 0.0  # in [0, 1] no summand is negative


def _shifted(logits: Tensor, shift: float | Tensor) -> tuple[Tensor, Tensor]:
    """``log(1 - p_m)`` and ``log p_m`` for ``p_m = max(sigmoid(x) - shift, 0)``; 0 and minus infinity at p_m = 0."""
    shift = torch.as_tensor(shift, dtype=logits.dtype, device=logits.device)
    p = torch.sigmoid(logits)
    inside = p > shift
    over = torch.where(inside, p - shift, 0.25)
    # 1 - p_m is 1 - p + m: from the side on which it does not cancel
    log_rest = torch.where(
        over < 0.5, torch.log1p(-over.clamp_max(0.5)), torch.logaddexp(logsigmoid(-logits), shift.log())
    )
    return torch.where(inside, log_rest, 0.0), torch.where(inside, over.log(), -torch.inf)


def _mixed(y: Tensor, log_p: Tensor, log_not_p: Tensor, log_q: Tensor, log_not_q: Tensor) -> tuple[Tensor, Tensor]:
    """``log p_t`` and ``log(1 - p_t)`` for ``p_t = y p + (1 - y) q``, exact for hard targets."""
    mixed = (y > 0) & (y < 1)
    inner = torch.where(mixed, y, torch.full_like(y, 0.5))
    log_y, log_not_y = inner.log(), torch.log1p(-inner)

    def mix(positive: Tensor, negative: Tensor) -> Tensor:
        both = torch.logaddexp(log_y + positive, log_not_y + negative)
        return torch.where(mixed, both, torch.where(y > 0, positive, negative))

    return mix(log_p, log_q), mix(log_not_p, log_not_q)
