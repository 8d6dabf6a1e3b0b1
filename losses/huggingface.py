"""Objectives in Hugging Face's ``Trainer`` and in what derives from it (TRL's ``SFTTrainer``).

- :func:`reweighed` makes a trainer class that takes ``objective=``: it computes the loss, hands extra columns to it,
  drives its weighting events, trains and saves what it learns.
- :func:`as_compute_loss_func` is the smaller way in: the ``compute_loss_func=`` of any ``Trainer``.
- :func:`fuse` makes a ``*ForCausalLM`` compute its loss from hidden states, without logits.

``transformers`` is imported only where a trainer is made (extra ``hf``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reweigh.weighting.base import learned_parameters
from reweigh.weighting.dynamics import dynamics

from .criteria.linear import LinearCausalLM
from .objective import Objective

STATE = "reweigh_objective.pt"
"""Name of the file beside a checkpoint that holds an objective's state."""


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


# the function


@final
class ComputeLoss:
    """What :func:`as_compute_loss_func` returns: ``(outputs, labels, num_items_in_batch=None)`` to a loss."""

    def __init__(self, objective: Objective) -> None:
        self.objective = _checked("as_compute_loss_func", objective)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        if labels is None:
            raise ValueError("as_compute_loss_func: labels must be in the batch, got None")
        name = self.objective.reduction.name
        if num_items_in_batch is not None and name != "mean":
            raise ValueError(
                f"as_compute_loss_func: num_items_in_batch counts tokens, which is the denominator of reduction 'mean' "
                f"alone, got {name!r}; use 'mean' (with weights of mean 1), or the trainer class of reweighed()"
            )
        logits = _logits(outputs)
        if next(self.objective.buffers(), logits).device != logits.device:
            self.objective.to(logits.device)
        return self.objective.forward(logits, labels.to(logits.device), num_items=num_items_in_batch)


def as_compute_loss_func(objective: Objective) -> ComputeLoss:
    """An objective on ``(logits, labels)`` as the ``compute_loss_func=`` of ``transformers.Trainer``.

    The causal shift is the criterion's own. ``num_items_in_batch`` is the number of labels that count over all
    micro-batches (and, with ``average_tokens_across_devices``, all ranks) and replaces the denominator; in evaluation
    it may be missing. In training the weighting's events need ``WeightingTrainerCallback``.

    Args:
        objective: With reduction ``"mean"``: other denominators are not what the Trainer counts.

    Raises:
        TypeError: If it is no objective.
        ValueError: If its reduction is ``"none"``; when called, if there are no labels, or ``num_items_in_batch`` comes
            with another reduction than ``"mean"``.

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
            sample's labels (or input ids), is padded to ``(B, T)`` on the side where the labels are.
        padding: What is padded with, by name; 0 where nothing is said.

    Raises:
        ValueError: If a sample lacks a column, or a list has another length than the sample.

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
        if all(value.ndim == 0 for value in tensors):
            return torch.stack(tensors)
        whole = batch["labels"] if "labels" in batch else batch["input_ids"]
        made = torch.full(
            whole.shape, self.padding.get(name, 0), dtype=torch.stack([t.new_zeros(()) for t in tensors]).dtype
        )
        for place, (value, row) in enumerate(zip(tensors, rows, strict=True)):
            own = len(row["labels"] if "labels" in row else row["input_ids"])
            if value.ndim != 1 or len(value) != own:
                raise ValueError(
                    f"WithColumns: {name} must be a number or a list as long as the sample ({own}), got "
                    f"{tuple(value.shape)}"
                )
            size = whole.shape[1]
            left = _padded_left(batch, place)
            made[place, (size - own if left else 0) : (size if left else own)] = value[:size]
        return made


def _padded_left(batch: dict[str, Any], place: int) -> bool:
    mask = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask[place, -1]) and not bool(mask[place, 0])


# hidden states


def fuse(model: Any, objective: Objective) -> Any:
    """Make a ``*ForCausalLM`` compute its loss from hidden states, without logits.

    Wherever ``labels`` are given the model's ``loss`` is the objective's on the last hidden states and the matrix of
    the output embeddings (tied or not, with bias or without). In training ``logits`` are ``None``; in evaluation they
    are made as ever. Without labels nothing changes. ``num_items_in_batch`` and columns that the
    objective's call takes (``sample_weight``, ``span``, ...) go to the objective. What the objective learns is not part
    of the model: give its parameters to the optimizer, or use the trainer class of :func:`reweighed`.

    Args:
        model: With ``base_model`` and ``get_output_embeddings()``: GPT-2, Llama, Qwen, Mistral, Gemma, ...
        objective: On :class:`~reweigh.losses.LinearCausalLM`.

    Returns:
        The model itself.

    Raises:
        TypeError: If the model or the criterion is of another kind.
        ValueError: If the model's logits are not its output embeddings of the last hidden states under the criterion's
            ``softcap``, which is looked at once on two tokens; or if it is fused already.
    """
    _checked("fuse", objective)
    criterion = objective.criterion
    if not isinstance(criterion, LinearCausalLM):
        raise TypeError(f"fuse: objective must have the criterion LinearCausalLM, got {type(criterion).__name__}")
    if getattr(model, "_reweigh_forward", None) is not None:
        raise ValueError("fuse: the model is fused already; call unfuse(model) first")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base = getattr(model, "base_model", None)
    if not isinstance(head, nn.Module) or base is None or base is model:
        raise TypeError(
            f"fuse: model must have a base_model and output embeddings (a *ForCausalLM), got {type(model).__name__}"
        )
    _check_head(model, base, head, criterion)
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        extra = {name: kwargs.pop(name) for name in list(kwargs) if name in columns_of(objective)}
        items = kwargs.pop("num_items_in_batch", None)
        if labels is None:
            return whole(*args, **kwargs)
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        outputs = base(*args, **kwargs, return_dict=True)
        hidden = outputs.last_hidden_state
        bias = getattr(head, "bias", None)
        if next(objective.buffers(), hidden).device != hidden.device:
            objective.to(hidden.device)
        loss = objective.forward(
            hidden, head.weight, labels.to(hidden.device), bias=bias, num_items=items, **_placed(extra, hidden.device)
        )
        logits = None if model.training else _capped(head(hidden), criterion.softcap)
        return _output(outputs, loss, logits)

    model._reweigh_forward = whole
    model.forward = forward
    model.accepts_loss_kwargs = True  # the Trainer hands over num_items_in_batch
    return model


def unfuse(model: Any) -> Any:
    """Undo :func:`fuse`; returns the model."""
    if getattr(model, "_reweigh_forward", None) is None:
        raise ValueError("unfuse: the model is not fused")
    del model.forward
    del model._reweigh_forward
    del model.accepts_loss_kwargs
    return model


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _output(outputs: Any, loss: Tensor, logits: Tensor | None) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


@torch.no_grad()
def _check_head(model: Any, base: Any, head: Any, criterion: LinearCausalLM) -> None:
    """Whether logits are what is going to be computed, on two tokens."""
    was = model.training
    model.eval()
    try:
        ids = torch.arange(2, device=head.weight.device).unsqueeze(0)
        found = _logits(model(input_ids=ids))
        hidden = base(input_ids=ids, return_dict=True).last_hidden_state
        wanted = _capped(nn.functional.linear(hidden, head.weight, getattr(head, "bias", None)), criterion.softcap)
    finally:
        model.train(was)
    scale = float(found.abs().max())
    if found.shape != wanted.shape or float((found - wanted).abs().max()) > 1e-2 * max(scale, 1e-6):
        config = getattr(model, "config", None)
        cap = getattr(config, "final_logit_softcapping", None)
        hint = f"; its config has final_logit_softcapping={cap}, give the criterion softcap={cap}" if cap else ""
        raise ValueError(
            f"fuse: the logits of {type(model).__name__} must be its output embeddings of the last hidden states under "
            f"softcap={criterion.softcap}, but they differ{hint}"
        )


def columns_of(objective: Objective) -> frozenset[str]:
    """Names of what a call may bring beside inputs and labels, for this objective."""
    found = {"sample_weight", "mask", "group", "index"}
    for part in objective.modules():
        if isinstance(part, Objective) and part.weighting is not None:
            found |= part.weighting.needs - part.criterion.provides - part.criterion.offers
    return frozenset(found)


def _placed(columns: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in columns.items()}


# the trainer


def reweighed(trainer_class: type[Any]) -> type[Any]:
    """A trainer class that takes ``objective=`` beside the arguments it has.

    - The loss is the objective's. On a :class:`~reweigh.losses.LinearCausalLM` the model is fused (:func:`fuse`).
    - Columns that its weighting needs (``sample_weight``, ``span``, ``group``, ``index``, ``reference_loss``, ...) are
      taken out of the batch; use ``remove_unused_columns=False`` and :class:`WithColumns`.
    - Gradient accumulation: with reduction ``"mean"`` the Trainer's count of labels is the denominator, exactly as in
      one large batch. Other reductions are averaged over the micro-batches.
    - ``WeightingTrainerCallback`` is attached: events, state beside checkpoints, resume.
    - What the objective learns joins the optimizer, without weight decay; its gradients are averaged over ranks, and
      not clipped with the model's.

    Args:
        trainer_class: ``transformers.Trainer`` or a class derived from it, such as ``trl.SFTTrainer``.

    Raises:
        TypeError: If it is no such class.

    Example:
        >>> reweighed(Trainer)(objective=objective, model=model, args=args)  # doctest: +SKIP
    """
    from transformers import Trainer

    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"reweighed: trainer_class must derive from transformers.Trainer, got {trainer_class!r}")

    class Reweighed(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
            self.objective = _checked("reweighed", objective)
            self._fused = isinstance(objective.criterion, LinearCausalLM)
            super().__init__(*args, **kwargs)
            if self._fused:
                fuse(self.accelerator.unwrap_model(self.model), objective)
            self.model_accepts_loss_kwargs = True  # the count of labels, whatever the model's own loss takes
            self.loss_is_scaled_for_ga = objective.reduction.name == "mean"
            self._weighting = _callback_class()(objective)
            self.add_callback(self._weighting)

        def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
            self._weighting.source = resume_from_checkpoint
            super()._load_from_checkpoint(resume_from_checkpoint, model)

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: float | Tensor | None = None,
        ) -> Any:
            inputs = dict(inputs)
            columns = {name: inputs.pop(name) for name in columns_of(self.objective) if name in inputs}
            labels = inputs.pop("labels", None)
            if labels is None:
                raise ValueError(f"{type(self).__name__}: labels must be in the batch, got {sorted(inputs)}")
            items = num_items_in_batch if self.objective.reduction.name == "mean" else None
            self.objective.train(model.training)
            if self._fused:
                outputs = model(**inputs, labels=labels, num_items_in_batch=items, **columns)
                loss = outputs["loss"]
            else:
                outputs = model(**inputs)
                logits = _logits(outputs)
                if next(self.objective.buffers(), logits).device != logits.device:
                    self.objective.to(logits.device)
                loss = self.objective.forward(
                    logits, labels.to(logits.device), num_items=items, **_placed(columns, logits.device)
                )
            if self.args.average_tokens_across_devices and items is not None:
                loss = loss * self.accelerator.num_processes  # the Trainer's gradients are means over ranks
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


@functools.cache
def _callback_class() -> type[Any]:
    from pathlib import Path

    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    class WeightingTrainerCallback(TrainerCallback):  # type: ignore[misc]
        """Sends an objective its events in Hugging Face's Trainer.

        ``fit`` with the class counts, if any, as training begins; ``step`` and ``epoch`` as they end, each once
        whatever is resumed; ``validation`` after an evaluation. Where the objective is no part of the model its state
        is saved in each checkpoint's folder (``reweigh_objective.pt``) and loaded from the one that is resumed, in
        ``args.output_dir`` (the trainer class of ``reweighed`` finds it anywhere).

        Args:
            objective: The objective.
            class_counts: Occurrences per class or token. Default none.
        """

        def __init__(self, objective: Objective, *, class_counts: Iterable[float] | Tensor | None = None) -> None:
            self.objective = _checked("WeightingTrainerCallback", objective)
            self.class_counts = class_counts
            self.source: Any = None

        def _apart(self, model: Any) -> bool:
            inside = {id(part) for part in model.modules()} if isinstance(model, nn.Module) else set()
            return id(self.objective) not in inside

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if self.class_counts is not None:
                self.objective.update("fit", class_counts=self.class_counts)
            step = state.global_step
            saved = Path(self.source or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}") / STATE
            if step and self._apart(model):
                if not saved.exists():
                    raise FileNotFoundError(
                        f"WeightingTrainerCallback: {saved} must be there to resume at step {step}: it holds what the "
                        "weighting has learned"
                    )
                self.objective.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))

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
            if any("validation" in getattr(part, "feeds", ()) for part in dynamics(self.objective)):
                self.objective.update("validation")

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if self._apart(model) and state.is_world_process_zero:
                folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.objective.state_dict(), folder / STATE)

    return WeightingTrainerCallback


def __getattr__(name: str) -> Any:
    if name == "WeightingTrainerCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
