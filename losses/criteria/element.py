"""Softmax cross-entropy, one loss per element, and what the cross-entropies have in common."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from reweigh.weighting.frequency import ClassTable, Values
from reweigh.weighting.schedules import Schedule, value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..kernels.dense import lean, rows_of_logits
from ..kernels.rows import ROW_STATISTICS, Rows, Spec, working_dtype
from ..kernels.sharded import class_shard, rows_of_shard, sharded
from ..logits import LogitTransform
from .base import _kind, expand_mask, floating, is_index, upcast
from .probability import along, expected, times
from .rows import RowTerms


class SoftmaxCriterion(RowTerms):
    """Common part of the softmax criteria."""

    def _offered(
        self, logits: Tensor, valid: Tensor | None, dim: int, offered: frozenset[str]
    ) -> dict[str, Tensor] | None:
        """Statistics of whole rows that a weighting has asked for, 0 where masked; constants."""
        made = {name: ROW_STATISTICS[name](logits.detach(), dim) for name in sorted(offered)}
        return {name: mask_out(value, valid, 0.0) for name, value in made.items()} or None

    def _lean(
        self,
        logits: Tensor,
        target: Tensor,
        counted: Tensor | None,
        shape: torch.Size,
        valid: Tensor | None,
        first: int,
        offered: frozenset[str],
    ) -> LossTerms:
        """Terms ``(*S)`` of many classes: ``logits (N, C)``, ``target (N,)`` and which rows count; see kernels."""
        classes, like = logits.shape[1], logits.new_empty(0, dtype=working_dtype(logits.dtype))
        spec = Spec(shares=self._shares(classes, like), offered=offered)
        terms = self._laid_out(target, classes, like, shape, valid, first)
        found = self._over_ranks(logits, target, counted, spec)
        if found is None:
            found = rows_of_logits(logits, target, counted, spec)
        return self._placed(terms, self._assembled(found, target, classes), first)

    def _over_ranks(self, logits: Tensor, target: Tensor, counted: Tensor | None, spec: Spec) -> Rows | None:
        """The numbers of rows whose classes are spread over ranks (DTensor), ``None`` for other logits."""
        part = class_shard(logits, 1)
        if part is None:
            return None
        if "top_entropy" in spec.offered:
            raise ValueError(f"{type(self).__name__}: top_entropy needs whole rows of logits, got sharded classes")
        local, begin, group = part
        shares = None if spec.shares is None else spec.shares[begin : begin + local.shape[1]]
        return rows_of_shard(local, target, counted, replace(spec, shares=shares), begin, group)

    def _indexed(
        self,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        dim: int,
        offered: frozenset[str] = frozenset(),
    ) -> LossTerms:
        """Terms of index targets that have the logits' shape without dimension ``dim``."""
        classes = logits.shape[dim]
        target = target.long()
        valid = self._valid(target, mask)
        if valid is not None:
            target = target.masked_fill(~valid, 0)
        self._check_labels(target, classes)
        if self.logits is None and logits.ndim == 2 and (lean(logits) or sharded(logits)):
            return self._lean(logits, target, valid, target.shape, valid, 0, offered)
        logits = upcast(self, "logits", logits)
        if valid is not None:
            logits = logits.masked_fill(~valid.unsqueeze(dim), 0.0)
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
                loss = loss - share * (log_p if weight is None else times(along(weight, log_p, dim), log_p)).sum(dim)
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
            extras=self._offered(logits, valid, dim, offered),
        )


@final
class CrossEntropy(SoftmaxCriterion):
    r"""Softmax cross-entropy, one term per target.

    .. math:: \ell_i = -\sum_c v_c\, y_{ic} \log p_{ic}, \qquad p_i = \mathrm{softmax}(z_i)

    - :math:`z`: ``logits``, class dimension 1 (dimension 0 where unbatched)
    - :math:`y`: one-hot of an index target, or the given probabilities; smoothed to :math:`(1-s)y + s/C`
    - :math:`v`: ``weight``, with torch's meaning: with index targets the mean divides by the sum of
      :math:`v_{y_i}`, with probabilities by the number of terms

    Provides ``loss``, ``log_pt``, ``target``, ``category``; ``log_qt`` exactly for two classes; ``entropy`` and
    ``top_entropy`` (of the 20 largest logits) as constants where a weighting needs them. With probabilities
    :math:`p_t = \sum_c y_c p_c`, so a one-hot target equals its index, and ``target`` / ``category`` are their largest
    class.

    Args:
        weight: Per-class weights: a sequence or tensor, ``"balanced"``, ``"sqrt"`` or ``"effective"`` (counts from the
            ``fit`` event), or a class table. torch's ``weight``.
        ignore_index: Targets with this value are removed; with probabilities, places marked by a negative one.
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
    offers = frozenset(ROW_STATISTICS)
    accepts = frozenset({"offered"})

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

    def lean(self, *inputs: Any) -> bool:
        logits, target = inputs
        return self.logits is None and is_index(target) and logits.ndim == 2 and lean(logits)

    def measure(self, *inputs: Any, mask: Tensor | None, offered: frozenset[str] = frozenset()) -> LossTerms:
        if len(inputs) != 2:
            raise TypeError(f"CrossEntropy: takes (logits, target), got {len(inputs)} inputs")
        logits, target = floating(self, "logits", inputs[0]), inputs[1]
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
            return self._soft(upcast(self, "logits", logits), target, mask, dim, offered)
        if target.shape != shape:
            raise ValueError(
                f"CrossEntropy: target must have shape {tuple(shape)} (or {tuple(logits.shape)} as probabilities) "
                f"for logits {tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        return self._indexed(logits, target, mask, dim, offered)

    def _soft(
        self, logits: Tensor, target: Tensor, mask: Tensor | None, dim: int, offered: frozenset[str]
    ) -> LossTerms:
        classes = logits.shape[dim]
        if target.shape != logits.shape:
            raise ValueError(
                f"CrossEntropy: probability targets must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        target = target.to(logits.dtype)
        if self.ignore_index < 0:  # no probability: a place marked by it is removed
            known = (target != self.ignore_index).all(dim)
            mask = known if mask is None else known & mask
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
        weighted = smooth if weight is None else smooth * along(weight, log_p, dim)
        loss = -times(weighted, log_p).sum(dim)
        return LossTerms(
            loss=mask_out(loss, valid, 0.0),
            mask=valid,
            log_pt=mask_out(expected(target, log_p, dim), valid, NEUTRAL_LOG_PT),
            target=hard,
            category=hard,
            num_classes=classes,
            extras=self._offered(logits, valid, dim, offered),
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
