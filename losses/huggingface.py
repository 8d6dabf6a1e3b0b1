"""Objectives in Hugging Face's ``Trainer`` and in what derives from it (TRL's ``SFTTrainer``).

- :func:`reweighed` makes a trainer class that takes ``objective=``: it computes the loss, hands extra columns to it,
  divides by what counts over a whole optimizer step, drives its weighting events, trains and saves what it learns.
- :func:`as_compute_loss_func` is the smaller way in: the ``compute_loss_func=`` of any ``Trainer``.
- :func:`fuse` makes a ``*ForCausalLM`` compute its loss from hidden states, without logits.

``transformers`` is imported only where a trainer is made (extra ``hf``).
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reweigh.weighting.base import learned_parameters
from reweigh.weighting.dynamics import dynamics
from reweigh.weighting.frequency import ClassTable

from .accumulation import Accumulator
from .blocks import without_penalty
from .criteria.language import CausalLM
from .criteria.linear import LinearCausalLM
from .objective import Objective

STATE = "reweigh_objective.pt"
"""Name of the file beside a checkpoint that holds an objective's state."""

IGNORED = -100
"""What the Trainer leaves out when it counts labels."""


def _checked(where: str, objective: object) -> Objective:
    if not isinstance(objective, Objective):
        raise TypeError(f"{where}: objective must be an Objective, got {type(objective).__name__}")
    if objective.reduction.name == "none":
        raise ValueError(f"{where}: objective must have a scalar reduction, got 'none'")
    return objective


def _logits(outputs: Any) -> Tensor:
    """Of a model output, a mapping, or a tuple whose first entry they are."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"the model's outputs must hold logits, got {type(outputs).__name__}")
    return found


def _innermost(objective: Objective) -> Any:
    inner: Any = objective
    while isinstance(inner, Objective):
        inner = inner.criterion
    return inner


def _not_a_count(objective: Objective) -> str | None:
    """Why the number of labels is not the denominator, or ``None`` where it is."""
    level: Any = objective
    while isinstance(level, Objective):
        if level.reduction.name != ("mean" if level is objective else "none"):
            return f"reduction {level.reduction.name!r}"
        if level.weighting is not None and not without_penalty(level.weighting):
            return f"a weighting with a penalty, {level.weighting!r}"
        level = level.criterion
    if isinstance(getattr(level, "weight", None), ClassTable):
        return f"class weights in the criterion, {type(level).__name__}"
    if getattr(level, "ignore_index", IGNORED) != IGNORED:
        return f"ignore_index={level.ignore_index}"
    return None


def _must_count(where: str, objective: Objective) -> None:
    why = _not_a_count(objective)
    if why is not None:
        raise ValueError(
            f"{where}: num_items_in_batch counts labels, which is the denominator of reduction 'mean' alone, "
            f"got {why}; use 'mean' (with weights of mean 1), or the trainer class of reweighed(), which finds others"
        )


def _beside(objective: Objective, tensor: Tensor) -> None:
    """Move an objective to where its inputs are."""
    own = next(chain(objective.buffers(), objective.parameters()), None)
    if own is not None and own.device != tensor.device:
        objective.to(tensor.device)


# the function


@final
class ComputeLoss:
    """What :func:`as_compute_loss_func` returns: ``(outputs, labels, num_items_in_batch=None)`` to a loss."""

    def __init__(self, objective: Objective) -> None:
        self.objective = _checked("as_compute_loss_func", objective)
        if isinstance(_innermost(objective), LinearCausalLM):
            raise TypeError(
                "as_compute_loss_func: the criterion must take logits, got LinearCausalLM; use fuse() or reweighed()"
            )

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: float | Tensor | None = None, **columns: Any
    ) -> Tensor:
        if labels is None:
            raise ValueError("as_compute_loss_func: labels must be in the batch, got None")
        if self.objective.reduction.name == "sum":
            num_items_in_batch = None
        if num_items_in_batch is not None:
            _must_count("as_compute_loss_func", self.objective)
        logits = _logits(outputs)
        _beside(self.objective, logits)
        self.objective.train(torch.is_grad_enabled())
        columns = _placed(columns, logits.device)
        return self.objective.forward(logits, labels.to(logits.device), num_items=num_items_in_batch, **columns)


def as_compute_loss_func(objective: Objective) -> ComputeLoss:
    """An objective on ``(logits, labels)`` as the ``compute_loss_func=`` of ``transformers.Trainer``.

    The causal shift is the criterion's own. ``num_items_in_batch`` is the number of labels that are not -100 over all
    micro-batches (and, with ``average_tokens_across_devices``, all ranks), without the first of each row where the
    model's own loss shifts them; it replaces the denominator. In evaluation it may be missing. Events need
    ``WeightingTrainerCallback``; columns beside the labels do not come this way, see :func:`reweighed`.

    Args:
        objective: With reduction ``"mean"`` (or ``"sum"``): other denominators are not what the Trainer counts.

    Raises:
        TypeError: If it is no objective, or one on hidden states.
        ValueError: If its reduction is ``"none"``; when called, if there are no labels, or ``num_items_in_batch`` comes
            where it is not the denominator: another reduction than ``"mean"``, class weights in the criterion, a
            penalty, an ``ignore_index`` other than -100.

    Example:
        >>> from reweigh.losses import CausalLM, Objective
        >>> from reweigh.weighting import TLDR
        >>> compute = as_compute_loss_func(Objective(CausalLM(), TLDR()))
        >>> round(compute({"logits": torch.zeros(1, 3, 2)}, torch.tensor([[0, 1, 1]]), num_items_in_batch=4).item(), 4)
        0.3466
    """
    return ComputeLoss(objective)


# columns


@final
class WithColumns:
    """A data collator that takes columns of its own along: weights, spans, groups, indices, reference losses.

    Args:
        collator: Collates everything else.
        columns: Names of the columns. One number per sample becomes ``(B,)``; one per token, a list as long as the
            sample's labels (or input ids), is padded to ``(B, T)`` on the side where the labels are. Where the collator
            joins samples in one row (padding-free), both become ``(1, T)``.
        padding: What is padded with, by name; 0 where nothing is said.

    Raises:
        ValueError: If a sample lacks a column, a list has another length than the sample, or the collator cuts samples.

    Example:
        >>> def collate(rows):
        ...     return {"labels": torch.tensor([row["labels"] + [-100] * (3 - len(row["labels"])) for row in rows])}
        >>> rows = [{"labels": [5, 6, 7], "w": 2.0}, {"labels": [8, 9], "w": 1.0}]
        >>> WithColumns(collate, ["w"])(rows)["w"]
        tensor([2., 1.])
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        columns: Sequence[str],
        *,
        padding: Mapping[str, float] | None = None,
    ) -> None:
        self.collator, self.columns, self.padding = collator, tuple(columns), dict(padding or {})

    def __call__(self, features: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        for name in self.columns:
            if any(name not in row for row in features):
                raise ValueError(f"WithColumns: every sample must have the column {name!r}")
        rest = [{key: value for key, value in row.items() if key not in self.columns} for row in features]
        batch = self.collator(rest, *args, **kwargs)
        for name in self.columns:
            batch[name] = self._collated(name, [row[name] for row in features], rest, batch)
        return batch

    def _collated(self, name: str, values: list[Any], rows: list[dict[str, Any]], batch: dict[str, Any]) -> Tensor:
        tensors = [torch.as_tensor(value) for value in values]
        whole = batch["labels"] if "labels" in batch else batch["input_ids"]
        sizes = [len(row["labels"] if "labels" in row else row["input_ids"]) for row in rows]
        joined = len(rows) > 1 and tuple(whole.shape) == (1, sum(sizes))
        if all(value.ndim == 0 for value in tensors) and not joined:
            return torch.stack(tensors)
        pieces = []
        for value, size in zip(tensors, sizes, strict=True):
            if value.ndim > 1 or (value.ndim == 1 and len(value) != size):
                raise ValueError(
                    f"WithColumns: {name} must be a number or a list as long as the sample ({size}), got "
                    f"{tuple(value.shape)}"
                )
            pieces.append(value.expand(size))
        if joined:
            return torch.cat(pieces).unsqueeze(0)
        if len(whole) != len(pieces) or max(sizes) > whole.shape[1]:
            raise ValueError(
                f"WithColumns: the collator must keep samples whole, one to a row, got {tuple(whole.shape)} for "
                f"samples of lengths {sizes}"
            )
        dtype = functools.reduce(torch.promote_types, (piece.dtype for piece in pieces))
        made = torch.full(whole.shape, self.padding.get(name, 0), dtype=dtype)
        for place, piece in enumerate(pieces):
            first = whole.shape[1] - len(piece) if _padded_left(batch, place) else 0
            made[place, first : first + len(piece)] = piece
        return made


def _padded_left(batch: dict[str, Any], place: int) -> bool:
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask[place, -1]) and not bool(mask[place, 0])


# hidden states


@dataclass
class _Fused:
    """What a fused model remembers."""

    objective: Objective | None
    """``None``: the forward is the model's own again, but others have wrapped this one."""
    evaluate_logits: bool
    names: tuple[str, ...]
    """Of the positional arguments."""
    before: dict[str, Any]
    """What the instance had of its own under the names that are set."""
    own: Any = None
    """The instance's ``forward`` as it was set."""
    call: Callable[..., Tensor] | None = None
    """What a trainer computes in the place of the objective's call."""


def fuse(model: Any, objective: Objective, *, evaluate_logits: bool = True) -> Any:
    """Make a ``*ForCausalLM`` compute its loss from hidden states, without logits.

    Wherever ``labels`` are given the model's ``loss`` is the objective's on the last hidden states and the matrix of
    the output embeddings (tied or not, with bias or without). In training ``logits`` are ``None``; in evaluation
    they are made as ever, those of ``logits_to_keep`` where it is given. Without labels nothing changes. Columns
    that the objective's call takes (``sample_weight``, ``span``, ...) go to the objective; so does
    ``num_items_in_batch``, where it is the denominator, and ``position_ids`` of the labels' shape, which start
    again at 0 with every sequence of a packed row: what follows another sequence is not predicted from it. What the
    objective learns is not part of the model: give its parameters to the optimizer, or use the trainer class of
    :func:`reweighed`.

    Copies of the model (``copy.deepcopy``) are fused with a copy of the objective.

    Args:
        model: With ``get_output_embeddings()``: GPT-2, Llama, Qwen, Mistral, Gemma, ...; one inside a PEFT model.
        objective: On :class:`~reweigh.losses.LinearCausalLM`.
        evaluate_logits: False where evaluation can do without logits as well.

    Returns:
        The model itself.

    Raises:
        TypeError: If the model or the criterion is of another kind.
        ValueError: If the model's logits are not its output embeddings of the last hidden states under the criterion's
            ``softcap``, which is looked at once on two tokens; if the output embeddings have an adapter, the model an
            auxiliary loss, or it is fused already. When called: if labels come shifted, or ``num_items_in_batch`` is
            not the denominator.

    Example:
        >>> model = fuse(LlamaForCausalLM(config), Objective(LinearCausalLM(), TLDR()))  # doctest: +SKIP
        >>> model(input_ids=ids, labels=ids).loss.backward()  # doctest: +SKIP
    """
    _checked("fuse", objective)
    criterion = _innermost(objective)
    if not isinstance(criterion, LinearCausalLM):
        raise TypeError(f"fuse: objective must have the criterion LinearCausalLM, got {type(criterion).__name__}")
    bare = _bare(model)
    found = _fused_state(bare)
    if found is not None and found.objective is not None:
        raise ValueError("fuse: the model is fused already; call unfuse(model) first")
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(f"fuse: model must have output embeddings (a *ForCausalLM), got {type(bare).__name__}")
    if hasattr(head, "base_layer"):
        raise ValueError("fuse: the output embeddings must have no adapter, which their matrix does not show")
    _must_be_alone("fuse", bare)
    _check_head(bare, head, criterion)
    if found is not None:
        found.objective, found.evaluate_logits = objective, bool(evaluate_logits)
    else:
        names = tuple(inspect.signature(bare.forward).parameters)
        own = {name: bare.__dict__[name] for name in ("forward", "accepts_loss_kwargs") if name in bare.__dict__}
        bare._reweigh_fused = _Fused(objective, bool(evaluate_logits), names, own)

        @functools.wraps(type(bare).forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _fused_forward(self, self._reweigh_fused, args, kwargs)

        bare.forward = types.MethodType(forward, bare)  # bound, so that a copy of the model has a copy of it
        bare._reweigh_fused.own = bare.forward
    # whether the Trainer hands over num_items_in_batch and leaves the division to the model
    bare.accepts_loss_kwargs = objective.reduction.name == "sum" or _not_a_count(objective) is None
    return model


def unfuse(model: Any) -> Any:
    """Undo :func:`fuse`; returns the model.

    Raises:
        ValueError: If the model is not fused.
    """
    bare = _bare(model)
    found = _fused_state(bare)
    if found is None or found.objective is None:
        raise ValueError("unfuse: the model is not fused")
    del bare.accepts_loss_kwargs
    if bare.__dict__.get("forward") == found.own:
        del bare.forward, bare._reweigh_fused
        bare.__dict__.update(found.before)
    else:  # under somebody's wrapper
        found.objective = None
        bare.__dict__.update({k: v for k, v in found.before.items() if k != "forward"})
    return model


@contextmanager
def fused(model: Any, objective: Objective, *, evaluate_logits: bool = True) -> Iterator[Any]:
    """Fuse a model for as long as a ``with`` block lasts; arguments and errors as for :func:`fuse`."""
    fuse(model, objective, evaluate_logits=evaluate_logits)
    try:
        yield model
    finally:
        unfuse(model)


def _bare(model: Any) -> Any:
    """The model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _fused_state(model: Any) -> _Fused | None:
    found = getattr(model, "_reweigh_fused", None)
    return found if isinstance(found, _Fused) else None


def _must_be_alone(where: str, model: Any) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{where}: the model must have no loss of its own, got config.output_router_logits=True, whose auxiliary "
            "loss an objective does not have"
        )


def _fused_forward(model: Any, found: _Fused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    whole = found.before.get("forward") or types.MethodType(type(model).forward, model)
    objective = found.objective
    if objective is None:
        return whole(*args, **kwargs)
    kwargs = {**dict(zip(found.names, args, strict=False)), **kwargs}
    columns = {name: kwargs.pop(name) for name in columns_of(objective) if name in kwargs}
    labels, items = kwargs.pop("labels", None), kwargs.pop("num_items_in_batch", None)
    if labels is None:
        return whole(**kwargs)
    if kwargs.pop("shift_labels", None) is not None:
        raise ValueError("fuse: labels must not be shifted (shift_labels); give labels alone")
    if objective.reduction.name == "sum":
        items = None
    if items is not None:
        _must_count("fuse", objective)
        if not columns.keys().isdisjoint(("sample_weight", "mask")):
            raise ValueError(
                "fuse: num_items_in_batch counts labels, neither sample_weight nor mask; use the trainer class of "
                "reweighed()"
            )
    keep, return_dict = kwargs.pop("logits_to_keep", 0), kwargs.pop("return_dict", None)
    head = model.get_output_embeddings()
    with _recorded(head) as seen:
        outputs = whole(**kwargs, return_dict=True)
    hidden = _only(seen)
    _beside(objective, hidden)
    if found.call is None:
        objective.train(model.training)
    columns |= _packing(objective, kwargs, labels)
    loss = (found.call or functools.partial(objective.forward, num_items=items))(
        hidden,
        head.weight,
        labels.to(hidden.device),
        bias=getattr(head, "bias", None),
        **_placed(columns, hidden.device),
    )
    logits = None
    if found.evaluate_logits and not model.training:
        places = slice(-keep if keep else None, None) if isinstance(keep, int) else keep
        logits = _capped(head(hidden[:, places]), _innermost(objective).softcap)
    rest = {name: value for name, value in outputs.items() if name not in ("loss", "logits")}
    outputs = type(outputs)(loss=loss, logits=logits, **rest)
    return outputs.to_tuple() if return_dict is False else outputs


@contextmanager
def _recorded(head: Any) -> Iterator[list[Tensor]]:
    """What the output embeddings are given, which meanwhile give logits of no classes."""
    seen: list[Tensor] = []

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.new_empty((*hidden.shape[:-1], 0))

    own = head.__dict__.get("forward")
    head.forward = record
    try:
        yield seen
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _only(seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise ValueError(f"fuse: the model must call its output embeddings once in a forward, got {len(seen)} calls")
    return seen[0]


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@torch.no_grad()
def _check_head(model: Any, head: Any, criterion: LinearCausalLM) -> None:
    """Whether logits are what is going to be computed, on two tokens."""
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    if cap != criterion.softcap:
        raise ValueError(
            f"fuse: the criterion must have the softcap of the model, whose config has final_logit_softcapping={cap}, "
            f"got softcap={criterion.softcap}"
        )
    if head.weight.is_meta:
        return
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        found = _logits(model(input_ids=ids))
        with _recorded(head) as seen:
            model(input_ids=ids)
        wanted = nn.functional.linear(_only(seen), head.weight, getattr(head, "bias", None))
    finally:
        for part, training in modes:
            part.training = training
    wanted, found = _capped(wanted, criterion.softcap).float(), found.float()
    if found.shape != wanted.shape or bool((found - wanted).abs().max() > 1e-2 * found.abs().max()):
        raise ValueError(
            f"fuse: the logits of {type(model).__name__} must be its output embeddings of the last hidden states, "
            "but it does more to them"
        )


def columns_of(objective: Objective) -> frozenset[str]:
    """Names of what a call may bring beside inputs and labels, for this objective."""
    found = {"sample_weight", "mask", "group", "index"}
    for part in objective.modules():
        if isinstance(part, Objective) and part.weighting is not None:
            found |= part.weighting.needs - part.criterion.provides - part.criterion.offers
    return frozenset(found)


def _packing(objective: Objective, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """Where sequences begin in packed rows, for a criterion that asks; positions of another shape tell nothing."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != labels.shape:
        return {}
    return {"position_ids": positions} if "position_ids" in _innermost(objective).accepts else {}


def _placed(columns: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in columns.items()}


# the trainer


def reweighed(trainer_class: type[Any]) -> type[Any]:
    """A trainer class that takes ``objective=`` beside the arguments it has.

    - The loss is the objective's. On a :class:`~reweigh.losses.LinearCausalLM` the model is fused (:func:`fuse`).
    - Columns that its weighting needs (``sample_weight``, ``span``, ``group``, ``index``, ``reference_loss``, ...) are
      kept in the data set and taken out of the batch. Where the collator pads, wrap it in :class:`WithColumns`.
    - Gradient accumulation and several processes: the loss and its gradient are those of all micro-batches of all
      ranks as one batch, whatever ``average_tokens_across_devices`` says. With reduction ``"mean"`` what counts is
      counted before the step, by ``sample_weight`` and ``mask`` too; with others, or with class weights in the
      criterion, an :class:`~reweigh.losses.Accumulator` divides the gradients after the last micro-batch. What neither
      can do (``"group_mean"``, penalties, differentiated weights in a ``"weighted_mean"``) is a mean over calls.
    - Packed rows (``position_ids`` that start again at 0): no sequence is predicted from the one before it, and
      ``"sequence_mean"`` counts each of them.
    - In evaluation the loss is the objective's on each batch.
    - ``WeightingTrainerCallback`` is attached, if it is not among ``callbacks=``: events, state, resume.
    - What the objective learns joins the optimizer, without weight decay; its gradients are averaged over ranks, and
      not clipped with the model's.
    - Metrics that the class itself computes with its loss (``SFTTrainer``: entropy, token accuracy) are not computed.

    Args:
        trainer_class: ``transformers.Trainer`` or a class derived from it, such as ``trl.SFTTrainer``.

    Raises:
        TypeError: If it is no such class.
        ValueError: When a trainer is made, under ``DataParallel``, with ``label_smoothing_factor`` (the criterion has
            it), for a model with an auxiliary loss, or if gradients are to be divided afterwards under DeepSpeed; and
            as :func:`fuse` does. In training, if labels are missing, or the collator drops ``sample_weight``.

    Example:
        >>> reweighed(Trainer)(objective=objective, model=model, args=args)  # doctest: +SKIP
    """
    from transformers import Trainer

    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"reweighed: trainer_class must derive from transformers.Trainer, got {trainer_class!r}")

    class Reweighed(trainer_class):  # type: ignore[misc]
        loss_is_scaled_for_ga = True  # what compute_loss returns is divided already

        def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
            self.objective = _checked("reweighed", objective)
            self._columns = columns_of(objective)
            self._counts = _not_a_count(objective) is None and isinstance(
                objective.criterion, (CausalLM, LinearCausalLM)
            )
            self._accumulate = None if self._counts else _accumulator(objective)
            self._waiting = 0
            super().__init__(*args, **kwargs)
            if self.args.n_gpu > 1:
                raise ValueError("reweighed: one process must have one device (torchrun), got DataParallel")
            if self.args.label_smoothing_factor:
                raise ValueError(
                    "reweighed: label_smoothing_factor must be 0 in the arguments, the criterion has label_smoothing=; "
                    f"got {self.args.label_smoothing_factor}"
                )
            if self._accumulate is not None and getattr(self, "is_deepspeed_enabled", False):
                raise ValueError(
                    "reweighed: under DeepSpeed gradients cannot be divided after the last micro-batch; use reduction "
                    f"'mean' without class weights in the criterion, got {objective!r}"
                )
            self._fuse(self.model)
            self.model_accepts_loss_kwargs = True  # versions without loss_is_scaled_for_ga: no second division
            kind = _callback_class()
            given = [c for c in self.callback_handler.callbacks if isinstance(c, kind) and c.objective is objective]
            self._weighting = given[0] if given else kind(objective)
            if not given:
                self.add_callback(self._weighting)

        def _fuse(self, model: Any) -> None:
            _must_be_alone("reweighed", _bare(model))
            found = _fused_state(_bare(model))
            if found is not None and found.objective is not None:
                if found.objective is not self.objective:
                    raise ValueError("reweighed: the model must be fused with the trainer's objective, got another")
            elif isinstance(_innermost(self.objective), LinearCausalLM):
                fuse(model, self.objective)

        def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
            model = super().call_model_init(*args, **kwargs)
            self._fuse(model)
            return model

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += sorted(self._columns - set(self._signature_columns))

        def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
            self._weighting.source = resume_from_checkpoint
            super()._load_from_checkpoint(resume_from_checkpoint, model)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            self._waiting = len(batches)
            has = set(getattr(self.train_dataset, "column_names", None) or ())
            if batches and "sample_weight" in has and "sample_weight" not in batches[0]:
                raise ValueError(
                    "reweighed: the data set has a column 'sample_weight' that the collator leaves out; wrap it in "
                    "WithColumns(collator, ['sample_weight'])"
                )
            if self._accumulate is not None:
                self._accumulate.reset()
            if self._counts:
                items = self._counted(batches)
            return batches, torch.ones(()) if items is None else items

        def _counted(self, batches: list[Any]) -> Tensor:
            """What counts in a step, per process on average: DDP's gradients are means over processes."""
            device = self.args.device
            own = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
            for batch in batches:
                own += _count(self.objective.criterion, batch).to(own)
            return self.accelerator.gather(own.reshape(1)).mean() if self.accelerator.num_processes > 1 else own

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(model, *args, **kwargs)
            self._waiting -= 1
            if self._accumulate is None:
                return loss
            if self._waiting > 0:
                return torch.zeros_like(loss)
            own = learned_parameters(self.objective)
            known = {id(parameter) for parameter in own}
            return self._accumulate.finish([*own, *(p for p in model.parameters() if id(p) not in known)]).to(loss)

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: float | Tensor | None = None,
        ) -> Any:
            inputs = dict(inputs)
            labels = inputs.pop("labels", None)
            if labels is None:
                raise ValueError(f"{type(self).__name__}: labels must be in the batch, got {sorted(inputs)}")
            columns = {name: inputs.pop(name) for name in self._columns if name in inputs}
            training = model.training and torch.is_grad_enabled()
            self.objective.train(training)
            items = num_items_in_batch if training and self._counts else None
            call: Callable[..., Tensor] = functools.partial(self.objective.forward, num_items=items)
            if training and self._accumulate is not None:
                call = self._accumulate
            found = _fused_state(_bare(self.model))
            if found is not None and found.objective is not None:
                found.call = call
                try:
                    outputs = model(**inputs, labels=labels, **columns)
                finally:
                    found.call = None
                loss = outputs["loss"]
            else:
                outputs = model(**inputs)
                logits = _logits(outputs)
                _beside(self.objective, logits)
                columns |= _packing(self.objective, inputs, labels)
                loss = call(logits, labels.to(logits.device), **_placed(columns, logits.device))
            if training and items is None and self._accumulate is None:
                loss = loss / getattr(
                    self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
                )
            return (loss, outputs) if return_outputs else loss

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            made = super().create_optimizer(*args, **kwargs)
            known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            learned = [p for p in learned_parameters(self.objective) if id(p) not in known]
            if learned:
                self.objective.to(self.args.device)
                self.optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
            return made

    Reweighed.__name__ = Reweighed.__qualname__ = f"Reweighed{trainer_class.__name__}"
    return Reweighed


def _accumulator(objective: Objective) -> Accumulator | None:
    try:
        return Accumulator(objective)
    except ValueError:
        return None


def _count(criterion: Any, batch: Mapping[str, Any]) -> Tensor:
    """How many labels of a batch count, each as often as its weight says."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return torch.zeros(())  # compute_loss says what is missing
    counts = (labels != criterion.ignore_index).double()
    positions = batch.get("position_ids")
    if criterion.shift and isinstance(positions, Tensor) and positions.shape == labels.shape:
        counts = counts * (positions != 0).to(counts)  # nothing predicts the first of a packed sequence
    for name in ("sample_weight", "mask"):
        given = batch.get(name)
        if given is not None:
            counts = counts * (given.unsqueeze(1) if given.ndim == 1 else given).to(counts)
    found: Tensor = counts[:, int(criterion.shift) :].sum()
    return found


@functools.cache
def _callback_class() -> type[Any]:
    from pathlib import Path

    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    class WeightingTrainerCallback(TrainerCallback):  # type: ignore[misc]
        """Sends an objective its events in Hugging Face's Trainer.

        ``fit`` with the class counts, if any, as training begins; ``step`` and ``epoch`` as they end, each once
        whatever is resumed; ``validation`` after each evaluation while training runs. Where the objective is no part of
        the model, its validation losses are observed, it is moved to the model's device, and its state is saved in each
        checkpoint's folder (``reweigh_objective.pt``) and loaded from the one that is resumed, in ``args.output_dir``
        (the trainer class of ``reweighed`` finds it anywhere), or that ``load_best_model_at_end`` takes.

        Warns (``UserWarning``) about learned weights that no optimizer has.

        Args:
            objective: The objective.
            class_counts: Occurrences per class or token. Default none.

        Raises:
            FileNotFoundError: When training is resumed, if the objective has state and the folder has none of it.
        """

        def __init__(self, objective: Objective, *, class_counts: Iterable[float] | Tensor | None = None) -> None:
            self.objective = _checked("WeightingTrainerCallback", objective)
            self.class_counts = class_counts
            self.source: Any = None
            self._running = False
            self._observing = ExitStack()

        def _apart(self, model: Any) -> bool:
            inside = {id(part) for part in model.modules()} if isinstance(model, nn.Module) else set()
            return id(self.objective) not in inside

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self._running = True
            if self.class_counts is not None:
                self.objective.update("fit", class_counts=self.class_counts)
            learned, optimizer = learned_parameters(self.objective), kwargs.get("optimizer")
            if learned and optimizer is not None:
                known = {id(p) for group in optimizer.param_groups for p in group["params"]}
                if any(id(parameter) not in known for parameter in learned):
                    warnings.warn(
                        "WeightingTrainerCallback: the objective learns weights that the optimizer does not have, so "
                        "they stay as they are; use the trainer class of reweighed(), or give it the parameters",
                        stacklevel=2,
                    )
            if self._apart(model):
                self._join(model)
                if state.global_step:
                    folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                    self._load(Path(self.source or folder) / STATE, f"to resume at step {state.global_step}")
            if state.global_step and abs(state.epoch - round(state.epoch)) < 1e-6:
                # a checkpoint of an epoch's last step is written before the epoch ends
                self.objective.update("epoch", index=round(state.epoch) - 1)

        def _join(self, model: Any) -> None:
            own = next(model.parameters(), None) if isinstance(model, nn.Module) else None
            if own is not None:
                _beside(self.objective, own)
            if any("validation" in getattr(part, "feeds", ()) for part in dynamics(self.objective)):
                self._observing.close()
                self._observing.enter_context(self.objective.observing_validation())

        def _load(self, saved: Path, why: str) -> None:
            if saved.exists():
                self.objective.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
            elif self.objective.state_dict():
                raise FileNotFoundError(
                    f"WeightingTrainerCallback: {saved} must be there {why}: it holds what the weighting has learned"
                )

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self._running = False
            self._observing.close()
            best = state.best_model_checkpoint
            if args.load_best_model_at_end and best and self._apart(model):
                self._load(Path(best) / STATE, "beside the best model")

        def _own(self, model: Any) -> list[nn.Parameter]:
            """What is learned outside the model: DDP does not see it, and the Trainer clears the model's gradients."""
            return learned_parameters(self.objective) if self._apart(model) else []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                for parameter in self._own(model):
                    if parameter.grad is None:  # every rank speaks of the same
                        parameter.grad = torch.zeros_like(parameter)
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for parameter in self._own(model):
                parameter.grad = None
            self.objective.update("step", index=state.global_step - 1)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = int(state.epoch + 1e-6)  # an epoch that max_steps cuts short is none
            if done:
                self.objective.update("epoch", index=done - 1)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._running:
                self.objective.update("validation")

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if self._apart(model) and args.should_save:
                folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.objective.state_dict(), folder / STATE)

    return WeightingTrainerCallback


def __getattr__(name: str) -> Any:
    if name == "WeightingTrainerCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
