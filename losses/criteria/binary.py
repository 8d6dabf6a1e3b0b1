"""Sigmoid cross-entropy, one loss per logit."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from reweigh.weighting.config import as_table, check_choice, check_number, watched
from reweigh.weighting.frequency import ClassTable, Values
from reweigh.weighting.schedules import Schedule, check_hyper, value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..kernels.binary import sided_logs
from ..logits import LogitTransform
from .base import _kind, expand_mask, upcast
from .labels import _Element
from .probability import along, mixed, shifted, times, zeros_and_ones


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
    elementwise = True

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
        plain = mask is None and self.ignore_index not in (0, 1) and zeros_and_ones(y)
        valid = None
        if not plain:
            valid = self._valid(target, None if mask is None else expand_mask(self, mask, logits.shape))
        if valid is not None:
            logits, y = logits.masked_fill(~valid, 0.0), y.masked_fill(~valid, 0.0)
        # integers on a device count as hard unseen; floating targets there may be soft
        hard = plain or zeros_and_ones(y) or not (target.is_floating_point() or self._may_look(y))
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
        shifts = isinstance(shift, Tensor) or shift > 0.0
        weight = self._class_weight(labels, logits)
        if hard and not isinstance(smoothing, Tensor) and smoothing == 0.0:
            if not watched() and not isinstance(shift, Tensor):
                log_pt, log_qt = sided_logs(logits, y, shift)
            elif shifts:
                positive = y > 0
                log_q, log_not_q = shifted(logits, shift)
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
            log_q, log_not_q = shifted(logits, shift) if shifts else (log_not_p, log_p)
            smooth = y * (1.0 - smoothing) + 0.5 * smoothing
            factor = torch.ones_like(log_p) if self.pos_weight is None else self._pos_weight(labels, logits)
            if self.soft == "sides":
                share = torch.stack((smooth, 1.0 - smooth), -1)
                present = share > 0 if valid is None else (share > 0) & valid.unsqueeze(-1)
                loss = -torch.stack((times(factor.expand_as(log_p), log_p), log_q), -1)
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
            loss = -times(smooth * factor, log_p) - times(1.0 - smooth, log_q)
            log_pt, log_qt = mixed(y, log_p, log_not_p, log_q, log_not_q)
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
        return along(table, like, 1) if table.numel() > 1 else table.reshape(())

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
