"""Dice of single examples."""

from __future__ import annotations

import warnings
from typing import Any, final

import torch
from torch import Tensor

from reweigh.weighting.config import check_number, readable
from reweigh.weighting.schedules import Schedule
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from .base import expand_mask
from .probability import expected, mixed
from .region import Activation, RegionCriterion, example, variants


@final
class SelfAdjustingDice(RegionCriterion):
    r"""Dice of single examples, for imbalanced classification of texts, tokens or pixels.

    .. math:: \ell_i = \sum_c \Big[ 1 - \frac{2 q_{ic} y_{ic} + s}{q_{ic}^2 + y_{ic}^2 + s} \Big], \qquad
              q = (1-p)^\alpha\, p

    - :math:`p`: predicted probability; the factor :math:`(1-p)^\alpha` turns down what is already right
    - :math:`y`: one-hot of an index target, or the given probabilities; :math:`s`: ``smooth``
    - with ``square=False`` the denominator is :math:`q + y + s`

    Computed as :math:`(q-y)^2 / (q^2+y^2+s)`, which does not cancel. With ``activation="sigmoid"`` each logit is a
    binary example of its own, so there is one term per logit and no sum over classes.

    Args:
        alpha: Exponent of the factor, >= 0, or a schedule; 0 is plain dice. Above 0.1 it warns: q falls again beyond
            p = 1 / (1 + alpha), so the loss is least there and not at p = 1.
        smooth: Added to numerator and denominator, >= 0.
        square: Squares in the denominator.
        activation: ``"softmax"`` over dimension 1, ``"sigmoid"``, or ``"none"`` for probabilities along dimension 1.
        ignore_index: Targets with this value are removed.
        validate: As in :class:`Overlap`.

    Shapes:
        ``logits (N, C, d1, ...)`` with ``target (N, d1, ...)`` class indices or ``(N, C, d1, ...)`` probabilities;
        terms ``(N, d1, ...)``, for sigmoid ``(N, C, d1, ...)``. A mask has the terms' shape or its first dimensions.

    Provides ``loss``, ``log_pt``, ``target`` and ``category`` as a cross-entropy does, and ``log_qt`` with index
    targets, so that class weights, ``Focal`` and ``HardNegatives`` compose with it.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If shapes do not fit or a value is out of range.

    Example:
        >>> import torch
        >>> criterion = SelfAdjustingDice(0.0, smooth=0.0)
        >>> criterion.terms(torch.zeros(1, 2), torch.tensor([1])).loss
        tensor([1.2000])
    """

    provides = frozenset({"loss", "log_pt", "target", "category"})
    rowwise = True

    def __init__(
        self,
        alpha: float | Schedule = 0.01,
        *,
        smooth: float = 1.0,
        square: bool = True,
        activation: Activation = "softmax",
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(activation, "alpha", alpha, square, ignore_index, validate)
        self.smooth = check_number(self, "smooth", smooth, low=0.0)
        largest = alpha.bounds()[1] if isinstance(alpha, Schedule) else float(alpha)
        if largest > 0.1:
            warnings.warn(
                f"SelfAdjustingDice: with alpha={largest:g} the loss is least at p = {1.0 / (1.0 + largest):.3g}, not "
                "at p = 1; its authors use 0.1 and less",
                stacklevel=2,
            )

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        logits, target, dense = self._pair(inputs)
        columns = self.activation == "sigmoid"
        shape = logits.shape if columns else logits.shape[:1] + logits.shape[2:]
        valid = self._known(target, dense)
        if valid is not None and columns:
            valid = valid.expand(shape)
        elif valid is not None:
            valid = valid.all(1)
        if mask is not None:
            mask = expand_mask(self, mask, shape)
            valid = mask if valid is None else valid & mask
        if valid is not None and readable(valid) and bool(valid.all()):
            valid = None
        if valid is not None:
            away = ~valid if columns else ~valid.unsqueeze(1)
            logits = logits.masked_fill(away, 0.0)
            target = target.masked_fill(away if dense else (away.any(1) if columns else ~valid), 0)
        self._check_values(logits, target, dense)

        terms = self._per_logit(logits, target, dense) if columns else self._per_place(logits, target, dense)
        return terms._replace(
            loss=mask_out(terms.loss, valid, 0.0),
            mask=valid,
            log_pt=mask_out(terms.need("log_pt"), valid, NEUTRAL_LOG_PT),
            log_qt=None if terms.log_qt is None else mask_out(terms.log_qt, valid, NEUTRAL_LOG_PT),
        )

    def _per_place(self, logits: Tensor, target: Tensor, dense: bool) -> LossTerms:
        """One term per place: the dice of its classes, summed."""
        log_p, log_q = self._log_pair(logits)
        q = self._adjust(logits, log_p, log_q) if self._focused else self._probability(logits)
        if dense:
            y = target.to(q.dtype)
            loss, log_pt, log_qt, label = self._dice(q, y).sum(1), expected(y, log_p, 1), None, y.argmax(1)
        else:
            at = target.unsqueeze(1)
            on_target = self._dice(q.gather(1, at), 1.0).squeeze(1)
            loss = on_target + self._dice(q.scatter(1, at, 0.0), 0.0).sum(1)
            log_pt, log_qt, label = log_p.gather(1, at).squeeze(1), log_q.gather(1, at).squeeze(1), target
        return LossTerms(
            loss=loss, log_pt=log_pt, log_qt=log_qt, target=label, category=label, num_classes=logits.shape[1]
        )

    def _per_logit(self, logits: Tensor, target: Tensor, dense: bool) -> LossTerms:
        """One term per logit: each is a binary example."""
        place = torch.arange(logits.shape[1], device=logits.device).reshape((1, -1) + (1,) * (logits.ndim - 2))
        y = (target if dense else target.unsqueeze(1) == place).to(logits.dtype)
        log_p, log_q = self._log_pair(logits)
        log_pt, log_qt = mixed(y, log_p, log_q, log_q, log_p)
        return LossTerms(
            loss=self._dice(self._probability(logits), y),
            log_pt=log_pt,
            log_qt=log_qt,
            target=y,
            category=place.expand(logits.shape),
            num_classes=logits.shape[1],
        )

    def _dice(self, q: Tensor, y: Tensor | float) -> Tensor:
        """``1 - (2 q y + s) / (q^2 + y^2 + s)`` without cancellation; 0 where all of it is 0."""
        if self.square:
            above, size = (q - y).square(), q.square() + (y * y + self.smooth)
        else:
            above, size = q + y - 2.0 * y * q, q + (y + self.smooth)
        if self.smooth > 0.0:
            return above / size
        some = size > torch.finfo(size.dtype).tiny
        return (above / torch.where(some, size, torch.ones_like(size))).masked_fill(~some, 0.0)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        return example(self.activation, batch, seed, dtype)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        return variants(self.activation, self.ignore_index, seed, dtype)
