"""Cross-entropy of hidden states under a vocabulary matrix, without ever holding all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reweigh.weighting.config import check_choice, check_number, check_whole, watched
from reweigh.weighting.frequency import ClassTable, Values
from reweigh.weighting.schedules import Schedule
from reweigh.weighting.terms import LossTerms

from ..kernels.foreign import FOREIGN, foreign_rows
from ..kernels.linear import Linear, compact, dense_rows, rows_of
from ..kernels.rows import ROW_STATISTICS, Rows, Spec, working_dtype
from .base import _kind, expand_mask, is_index
from .rows import RowTerms, moved_up, packed

Implementation = Literal["auto", "chunked", "compiled", "dense", "torch", "liger", "cut_cross_entropy"]

SMALL = 2**20
"""Logits up to which a batch is small enough to hold them all, with graph."""


@dataclass(frozen=True)
class Deferred:
    """A batch whose terms are laid out, and whose losses are still to be computed."""

    owner: LinearCrossEntropy | LinearCausalLM
    problem: Linear
    first: int
    """1 where the row at t is the term at t + 1 (the causal shift), else 0."""

    def rows(self) -> Rows:
        """The numbers of all rows, with gradient."""
        return rows_of(self.problem)

    def flat(self, value: Tensor, terms: LossTerms) -> Tensor:
        """One number per term ``(*S)`` or sample ``(S[0],)`` as one number per row ``(N,)``."""
        whole = terms.spread(value).expand(terms.loss.shape)
        if self.first:
            whole = torch.cat([whole[:, 1:], whole[:, :1]], 1)
        return whole.reshape(-1)

    def assembled(self, found: Rows, rows: Tensor | slice = slice(None)) -> LossTerms:
        """The terms ``(rows,)`` of some rows, from their numbers."""
        return self.owner._assembled(found, self.problem.target[rows], self.problem.weight.shape[0])

    def filled(self, terms: LossTerms, found: Rows) -> LossTerms:
        """The terms ``(*S)`` with the numbers of all rows in their places."""
        return self.owner._placed(terms, self.assembled(found), self.first)


class _LinearSoftmax(RowTerms):
    """Common part of the criteria on hidden states."""

    provides = frozenset({"loss", "log_pt", "target", "category"})
    offers = frozenset(ROW_STATISTICS)
    accepts = frozenset({"bias", "defer", "offered"})
    rowwise = False
    defers = True
    whole = frozenset({1})
    rounds = True

    def __init__(
        self,
        weight: Values | str | ClassTable | None,
        ignore_index: int,
        label_smoothing: float | Schedule,
        softcap: float | None,
        z_loss: float,
        impl: Implementation,
        chunk_rows: int | None,
        validate: bool | None,
    ) -> None:
        super().__init__(weight, ignore_index, label_smoothing, None, validate)
        self.softcap = None if softcap is None else check_number(self, "softcap", softcap, low=0.0, open_low=True)
        self.z_loss = check_number(self, "z_loss", z_loss, low=0.0)
        self.impl = check_choice(self, "impl", impl, get_args(Implementation))
        self.chunk_rows = None if chunk_rows is None else check_whole(self, "chunk_rows", chunk_rows, low=1)

    def _checked_inputs(self, inputs: tuple[Any, ...], bias: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        name, kind = self.target_name, type(self).__name__
        if len(inputs) != 3:
            raise TypeError(f"{kind}: takes (hidden, vocab_weight, {name}), got {len(inputs)} inputs")
        hidden, weight, target = inputs
        for label, value in (("hidden", hidden), ("vocab_weight", weight), ("bias", bias)):
            if label == "bias" and value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"{kind}: {label} must be a floating-point tensor, got {_kind(value)}")
        if not is_index(target):
            raise TypeError(f"{kind}: {name} must be integers, got {_kind(target)}")
        if weight.ndim != 2 or weight.shape[0] == 0:
            raise ValueError(f"{kind}: vocab_weight must be (V, D), got {tuple(weight.shape)}")
        if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"{kind}: hidden must be (*S, {weight.shape[1]}) for vocab_weight {tuple(weight.shape)} and {name} "
                f"(*S), got {tuple(hidden.shape)} and {tuple(target.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{kind}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
        return hidden, weight, bias, target.long()

    def _deferred(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        valid: Tensor | None,
        offered: frozenset[str],
        first: int,
    ) -> Deferred:
        """The problem of flat rows: what counts, in one dtype."""
        hidden, weight, bias = _one_dtype(hidden, weight, bias)
        if valid is not None:
            target = target.masked_fill(~valid, 0)
        self._check_labels(target, weight.shape[0])
        kept = None
        if self._in_parts(hidden, weight, target):
            kept = compact(valid)
        if valid is not None and kept is None:  # rows that do not count are computed: nothing they hold may spread
            hidden = hidden.masked_fill(~valid.unsqueeze(1), 0.0)
        shares = self._shares(weight.shape[0], weight.new_empty((), dtype=working_dtype(weight.dtype)))
        spec = Spec(self.softcap, shares, offered, self.chunk_rows, self.impl == "compiled")
        return Deferred(self, Linear(hidden, weight, bias, target, kept, spec), first)  # type: ignore[arg-type]

    def _in_parts(self, hidden: Tensor, weight: Tensor, target: Tensor) -> bool:
        """Whether logits are not held: neither asked for, nor needed by whoever looks on."""
        plain = hidden.is_meta or watched() or forward_ad._current_level >= 0
        if plain or any(type(t) not in (Tensor, torch.nn.Parameter) for t in (hidden, weight)):
            return False
        return self.impl != "dense" and (self.impl != "auto" or target.numel() * weight.shape[0] > SMALL)

    def _chunked(self, problem: Linear) -> bool:
        return self.impl not in FOREIGN and self._in_parts(problem.hidden, problem.weight, problem.target)

    def _row_numbers(self, deferred: Deferred) -> Rows:
        problem = deferred.problem
        if self._chunked(problem):
            return deferred.rows()
        if self._in_parts(problem.hidden, problem.weight, problem.target):
            return foreign_rows(self, self.impl, problem, self.z_loss)
        return dense_rows(problem)

    def _finished(
        self, deferred: Deferred, shape: torch.Size, valid: Tensor | None, defer: list[Deferred] | None
    ) -> LossTerms:
        problem = deferred.problem
        like = problem.hidden.new_empty(0, dtype=working_dtype(problem.hidden.dtype))
        terms = self._laid_out(problem.target, problem.weight.shape[0], like, shape, valid, deferred.first)
        if defer is not None and self._chunked(problem):
            defer.append(deferred)
            return terms
        return self._placed(terms, deferred.assembled(self._row_numbers(deferred)), deferred.first)


def _one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        dtype = dtype if bias is None else torch.promote_types(dtype, bias.dtype)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


@final
class LinearCrossEntropy(_LinearSoftmax):
    r"""Softmax cross-entropy of ``hidden @ vocab_weight.T``, one term per target, made a few rows at a time.

    .. math:: x_i = c \tanh\!\big((W h_i + b)/c\big), \qquad
        \ell_i = -\sum_c v_c\, y_{ic} \log \mathrm{softmax}(x_i)_c + \zeta \big(\ln \textstyle\sum_c e^{x_{ic}}\big)^2

    - :math:`h`: ``hidden``; :math:`W`: ``vocab_weight``; :math:`b`: ``bias=`` at the call, if any
    - :math:`y`: one-hot of the target, smoothed to :math:`(1-s)y + s/V`
    - :math:`v`: ``weight``, with torch's meaning and denominator
    - c: ``softcap`` (none: :math:`x = W h + b`); :math:`\zeta`: ``z_loss``

    Logits of the batch are never held. Under an objective whose weights look at their own term alone (class tables,
    focal, TLDR, power-law decay, stored state, and what is composed of them) the gradient is made with the value: three
    matrix products. Under any other (selection, softmax over losses, ``normalize``) logits are made a second time in
    backward, of the rows whose weight is not 0. Rows that are ignored or masked are never computed.

    Provides ``loss``, ``log_pt``, ``target``, ``category``, and where a weighting needs them ``entropy`` and
    ``top_entropy`` (of the 20 largest logits), as constants.

    Args:
        weight: Per-class weights; see :class:`~reweigh.losses.CrossEntropy`.
        ignore_index: Targets with this value are removed.
        label_smoothing: Share s of the uniform target, in [0, 1], or a schedule.
        softcap: c > 0, or ``None``.
        z_loss: Factor > 0 of the squared log-partition; 0 for none. Not multiplied by ``weight``.
        impl: ``"chunked"``: as told above. ``"compiled"``: the same, with a chunk's softmax and gradient compiled by
            ``torch.compile``, which takes half a minute at first and pays on devices. ``"dense"``: all logits, in plain
            operations; can be differentiated twice. ``"torch"`` (``torch.nn.functional.linear_cross_entropy``, torch
            2.13), ``"liger"`` (Liger-Kernel) and ``"cut_cross_entropy"`` make the rows' losses with another library's
            operation, which makes logits again in backward: four products under any weighting. ``"auto"``: chunked for
            more than a million logits; dense below. Whatever is asked for, logits are held under ``torch.compile``,
            ``torch.func``, forward-mode differentiation and for tensor subclasses (DTensor).
        chunk_rows: Rows of logits held at a time; ``None`` for what fits 44 MiB (CPU) or 512 MiB (device).
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Memory:
        ``chunk_rows`` x V numbers, the gradients themselves, and a few numbers per row. float16 and bfloat16 products
        are made in that dtype; softmax and the sum of the gradient on ``vocab_weight`` in float32. Inputs of different
        dtypes are promoted; under autocast its dtype is taken. A device is asked once per forward (and once per
        two-pass backward) which rows count, unless it is recording a graph.

    Shapes:
        ``hidden (*S, D)``, ``vocab_weight (V, D)``, ``target (*S)``, ``bias (V,)``; terms ``(*S)``.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes do not fit or a label is out of range.
        RuntimeError: In backward, if the gradient of a chunked loss is to be differentiated (``create_graph=True``).

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective
        >>> from reweigh.weighting import Focal
        >>> objective = Objective(LinearCrossEntropy(), Focal(2.0))
        >>> hidden, vocab_weight = torch.zeros(3, 8), torch.zeros(4, 8)
        >>> objective(hidden, vocab_weight, torch.tensor([0, 3, -100]))
        tensor(0.7798)
    """

    def __init__(
        self,
        *,
        weight: Values | str | ClassTable | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        impl: Implementation = "auto",
        chunk_rows: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, label_smoothing, softcap, z_loss, impl, chunk_rows, validate)

    def measure(
        self,
        *inputs: Any,
        mask: Tensor | None,
        bias: Tensor | None = None,
        defer: list[Deferred] | None = None,
        offered: frozenset[str] = frozenset(),
    ) -> LossTerms:
        hidden, weight, bias, target = self._checked_inputs(inputs, bias)
        shape = target.shape
        valid = self._valid(target, None if mask is None else expand_mask(self, mask, shape))
        deferred = self._deferred(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            target.reshape(-1),
            None if valid is None else valid.reshape(-1),
            offered,
            0,
        )
        return self._finished(deferred, shape, valid, defer)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
        weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return hidden.to(dtype), weight.to(dtype), torch.randint(4, (batch,), generator=generator)


@final
class LinearCausalLM(_LinearSoftmax):
    r"""Next-token cross-entropy from hidden states and the vocabulary matrix, with the causal shift inside.

    .. math:: \ell_{bt} = -\log \mathrm{softmax}(W h_{b,t-1})_{y_{bt}}

    :class:`LinearCrossEntropy` with the places of :class:`~reweigh.losses.CausalLM`: terms stand where their labels
    stand, ``(B, T)``, the first of each sequence masked under ``shift``; masks, sample weights and statistics given at
    the call are aligned with the labels.

    Packed rows:
        ``position_ids=`` at the call, ``(B, T)`` counting from 0 in each sequence, tells where sequences begin: no
        label is predicted across a border, sequence means and weights (:class:`~reweigh.losses.SequenceMean`,
        ``pooled()``, ``TLDR(level="sequence")``) take each sequence for itself, and ``batch_mean`` divides by their
        number.
        :func:`packed_position_ids` makes them from ``cu_seqlens``.

    Args:
        shift: The hidden state at t predicts the label at t + 1 (labels as the tokenizer gives them). False where the
            labels are shifted already.
        weight: Per-token weights with torch's meaning and denominator.
        ignore_index: Labels with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        softcap: As in :class:`LinearCrossEntropy`, like all that follows.
        z_loss: As there.
        impl: As there.
        chunk_rows: As there.
        validate: As there.

    Shapes:
        ``hidden (B, T, D)``, ``vocab_weight (V, D)``, ``labels (B, T)``, ``bias (V,)``; terms ``(B, T)``.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If shapes do not fit or a label is out of range.
        RuntimeError: As in :class:`LinearCrossEntropy`.

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective
        >>> from reweigh.weighting import TLDR, PowerLawDecay
        >>> objective = Objective(LinearCausalLM(), (PowerLawDecay([9, 5, 3, 1]) * TLDR()).clip(max=5.0))
        >>> hidden, vocab_weight = torch.zeros(1, 3, 8), torch.zeros(4, 8)
        >>> round(objective(hidden, vocab_weight, torch.tensor([[0, 1, 2]])).item(), 4)
        0.493
    """

    accepts = frozenset({"bias", "defer", "offered", "position_ids"})
    target_name = "labels"

    def __init__(
        self,
        *,
        shift: bool = True,
        weight: Values | str | ClassTable | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        impl: Implementation = "auto",
        chunk_rows: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, label_smoothing, softcap, z_loss, impl, chunk_rows, validate)
        self.shift = shift

    def measure(
        self,
        *inputs: Any,
        mask: Tensor | None,
        bias: Tensor | None = None,
        position_ids: Tensor | None = None,
        defer: list[Deferred] | None = None,
        offered: frozenset[str] = frozenset(),
    ) -> LossTerms:
        hidden, weight, bias, labels = self._checked_inputs(inputs, bias)
        shape = labels.shape
        if labels.ndim != 2:
            raise ValueError(f"LinearCausalLM: labels must be (B, T), got {tuple(shape)}")
        mask = None if mask is None else expand_mask(self, mask, shape)
        places: dict[str, Tensor] = {}
        if position_ids is not None:
            kept, places = packed(self, position_ids, shape, shift=self.shift)
            mask = kept if mask is None else mask & kept
        valid = self._valid(labels, mask)
        first = int(self.shift and shape[1] > 0)
        counted = valid
        if first:
            labels, counted, valid = moved_up(labels, valid)
        deferred = self._deferred(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            labels.reshape(-1),
            None if counted is None else counted.reshape(-1),
            offered,
            first,
        )
        terms = self._finished(deferred, shape, valid, defer)
        return terms._replace(extras={**places, **(terms.extras or {})}) if places else terms

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(batch, 3, 3, generator=generator, dtype=torch.float64)
        weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return hidden.to(dtype), weight.to(dtype), torch.randint(4, (batch, 3), generator=generator)
