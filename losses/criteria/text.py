"""Criteria for language models that look at more than the label: numbers, and words that were said before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from reweigh.weighting.config import check_choice, check_number, owner_name
from reweigh.weighting.terms import LossTerms, mask_out

from .base import _kind, expand_mask, is_index, upcast
from .labels import _Element
from .rows import packed

NumberLoss = Literal["was", "mse", "abs_diff"]


class _NextToken(_Element):
    """Criteria on logits ``(B, T, V)`` and labels ``(B, T)``, with the causal shift inside."""

    provides = frozenset({"loss", "target", "category"})
    accepts = frozenset({"position_ids"})
    target_name = "labels"

    def __init__(self, shift: bool, ignore_index: int, validate: bool | None) -> None:
        super().__init__(None, ignore_index, 0.0, None, validate)
        self.shift = shift

    def measure(self, *inputs: Any, mask: Tensor | None, position_ids: Tensor | None = None) -> LossTerms:
        name = type(self).__name__
        if len(inputs) != 2:
            raise TypeError(f"{name}: takes (logits, labels), got {len(inputs)} inputs")
        logits, labels = upcast(self, "logits", inputs[0]), inputs[1]
        if not is_index(labels):
            raise TypeError(f"{name}: labels must be token indices, got {_kind(labels)}")
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"{name}: logits must be (B, T, V) and labels (B, T), got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        mask = None if mask is None else expand_mask(self, mask, labels.shape)
        places: dict[str, Tensor] = {}
        if position_ids is not None:
            kept, places = packed(self, position_ids, labels.shape, shift=self.shift)
            mask = kept if mask is None else mask & kept
        labels = labels.long()
        known = labels != self.ignore_index
        valid = known if mask is None else known & mask
        labels = labels.masked_fill(~known, 0)
        self._check_labels(labels, logits.shape[-1])
        first = int(self.shift and labels.shape[1] > 0)
        if first:
            logits = logits[:, :-1]
            valid = torch.cat([torch.zeros_like(valid[:, :1]), valid[:, 1:]], 1)
        counted, loss = self._losses(logits, labels, known, valid, places.get("sequence"), first)
        target = labels.masked_fill(~counted, 0)
        return LossTerms(
            loss=mask_out(loss, counted, 0.0),
            mask=counted,
            target=target,
            category=target,
            num_classes=logits.shape[-1],
            extras=places or None,
        )

    def _losses(
        self, logits: Tensor, labels: Tensor, known: Tensor, valid: Tensor, sequence: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        """Which terms ``(B, T)`` count, and their losses; ``logits (B, T - first, V)`` stand one place earlier."""
        raise NotImplementedError

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 5, 4, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(4, (batch, 5), generator=generator)


@final
class NumberTokens(_NextToken):
    r"""How far the number that a model predicts is from the right one: a miss by 1 costs less than a miss by 7.

    .. math::
        \text{was: } \ell = \sum_j p_j\,|v_j - v^*|, \qquad
        \text{mse: } \ell = \Big(\sum_j p_j v_j - v^*\Big)^2, \qquad
        \text{abs\_diff: } \ell = \Big|\sum_j p_j v_j - v^*\Big|

    - :math:`v_j`: ``values`` of the tokens that are numbers; p: softmax over those tokens alone
    - :math:`v^*`: value of the label; only labels that are numbers are terms

    Added to cross-entropy: ``Objective(CausalLM()) + 0.3 * Objective(NumberTokens(values))`` (authors' weight).

    Deviations:
        ``"was"`` is in the unit of the values: the authors' ``AbsDiffNumberTokenLoss``, which equals their Wasserstein
        class where numbers lie 1 apart. ``"mse"`` and ``"abs_diff"`` are their ``NumberTokenLoss`` with a squared and
        an absolute error. Ignored labels do not become token 0, and without numbers the loss is 0, not nan.

    Provides ``loss``, ``target`` and ``category`` (the token).

    Args:
        values: The number that each token of the vocabulary stands for, ``(V,)``; ``None`` or nan for tokens that are
            none.
        kind: ``"was"`` (Wasserstein distance to the label), ``"mse"`` or ``"abs_diff"``. Default ``"was"`` (authors).
        shift: As in :class:`~reweigh.losses.CausalLM`.
        ignore_index: Labels with this value are removed.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``logits (B, T, V)``, ``labels (B, T)``; terms ``(B, T)``. ``position_ids=`` as in
        :class:`~reweigh.losses.CausalLM`.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``labels`` not integer, or ``values`` holds anything but
            numbers and ``None``.
        ValueError: If shapes do not fit, a label is out of range, or no value is a number.

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective
        >>> numbers = NumberTokens([None, 0.0, 1.0, 2.0], shift=False)
        >>> Objective(numbers)(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]))  # the mean of 2, 1 and 0
        tensor(1.)

    References:
        J. Zausinger et al., "Regress, Don't Guess: A Regression-like Loss on Number Tokens for Language Models", ICML
        2025; tum-ai/number-token-loss.
    """

    def __init__(
        self,
        values: Sequence[float | None] | Tensor,
        kind: NumberLoss = "was",
        *,
        shift: bool = True,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(shift, ignore_index, validate)
        table = self._table(values)
        if table.ndim != 1 or not bool(table.isfinite().any()) or bool(table.isinf().any()):
            raise ValueError(
                f"{owner_name(self)}: values must be (V,) numbers, None for tokens that are none, with at least one "
                f"number; got shape {tuple(table.shape)} with {int(table.isfinite().sum())} numbers"
            )
        self.kind = check_choice(self, "kind", kind, ("was", "mse", "abs_diff"))
        self.add_table("values", table)
        self.add_table("numbers", table.isfinite().nonzero().squeeze(1))

    def _table(self, values: Sequence[float | None] | Tensor) -> Tensor:
        try:
            numbers = values if isinstance(values, Tensor) else [math.nan if v is None else v for v in values]
            if isinstance(numbers, Tensor) and numbers.is_complex():
                raise TypeError(f"dtype {numbers.dtype}")
            return torch.as_tensor(numbers, dtype=torch.float64).detach().clone()
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{owner_name(self)}: values must be a sequence of numbers, None for tokens that are none, got "
                f"{type(values).__name__} ({error})"
            ) from error

    def _losses(
        self, logits: Tensor, labels: Tensor, known: Tensor, valid: Tensor, sequence: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        table, numbers = self.get_buffer("values"), self.get_buffer("numbers")
        if len(table) != logits.shape[-1]:
            raise ValueError(
                f"NumberTokens: values must have one entry per token ({logits.shape[-1]}), got {len(table)}"
            )
        right = table[labels]
        counted = valid & right.isfinite()
        right = right.masked_fill(~counted, 0.0).to(logits.dtype)
        rows = logits.index_select(-1, numbers)
        if first:
            rows = pad(rows, (0, 0, 1, 0))
        value = table[numbers].to(logits.dtype)
        p = rows.masked_fill(~counted.unsqueeze(-1), 0.0).softmax(-1)
        if self.kind == "was":
            return counted, (p * (value - right.unsqueeze(-1)).abs()).sum(-1)
        off = p @ value - right
        return counted, off.square() if self.kind == "mse" else off.abs()


@final
class Unlikelihood(_NextToken):
    r"""What it costs to find likely again what was said already: text that repeats itself.

    .. math:: \ell_t = -\sum_{c \in C_t} \ln\big(1 - p_t(c)\big), \qquad
              C_t = \{y_1, \dots, y_{t-1}\} \setminus \{y_t\}

    - :math:`p_t`: prediction for label :math:`y_t`; :math:`C_t`: the different labels before it in its sequence

    Added to cross-entropy: ``Objective(CausalLM()) + Objective(Unlikelihood())`` (authors' weight 1). A label without
    predecessors costs 0.

    Deviations:
        Each sequence has its own predecessors; the authors' code makes one sequence of a batch. Padding is nobody's.

    Provides ``loss``, ``target`` and ``category`` (the token).

    Args:
        shift: As in :class:`~reweigh.losses.CausalLM`.
        floor: Smallest :math:`1 - p`, in (0, 1); below it there is no gradient. Default 1e-5 (authors).
        ignore_index: Labels with this value are removed, and nobody's predecessors.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``logits (B, T, V)``, ``labels (B, T)``; terms ``(B, T)``. ``position_ids=`` keeps packed sequences apart.
        Memory ``(B, T, T)``.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``labels`` not integer.
        ValueError: If shapes do not fit or a label is out of range.

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective
        >>> unlikely = Objective(Unlikelihood(shift=False), None, "none")
        >>> unlikely(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 0]]))  # -ln(1 - 1/4) once for each word before
        tensor([[0.0000, 0.2877, 0.2877]])

    References:
        S. Welleck, I. Kulikov, S. Roller, E. Dinan, K. Cho, J. Weston, "Neural Text Generation with Unlikelihood
        Training", ICLR 2020; facebookresearch/unlikelihood_training@72374717 custom/candidate_penalty_ce_loss.py.
    """

    def __init__(
        self,
        *,
        shift: bool = True,
        floor: float = 1e-5,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(shift, ignore_index, validate)
        self.floor = check_number(self, "floor", floor, low=0.0, high=1.0, open_low=True, open_high=True)

    def _losses(
        self, logits: Tensor, labels: Tensor, known: Tensor, valid: Tensor, sequence: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        size = labels.shape[1]
        same = labels.unsqueeze(2) == labels.unsqueeze(1)  # (B, t, s)
        before = known.unsqueeze(1) & torch.ones(size, size, dtype=torch.bool, device=labels.device).tril(-1)
        if sequence is not None:
            before = before & (sequence.unsqueeze(2) == sequence.unsqueeze(1))
        again = (same & before).any(2)  # this label was said before, in its sequence
        candidates = before & ~same & ~again.unsqueeze(1) & valid.unsqueeze(2)
        rows = pad(logits, (0, 0, 1, 0)) if first else logits
        log_p = rows.masked_fill(~valid.unsqueeze(-1), 0.0).log_softmax(-1)
        at = log_p.gather(2, labels.unsqueeze(1).expand(-1, size, -1))
        each = -(-torch.expm1(at)).clamp_min(self.floor).log()
        return valid, torch.where(candidates, each, 0.0).sum(2)
