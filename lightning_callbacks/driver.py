"""The driver: Trainer hooks become the events that dynamic weightings, schedules and logit transforms live on."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler

from reweigh.losses.multitask import MultiTaskLoss
from reweigh.losses.objective import Objective
from reweigh.weighting.base import learned_parameters
from reweigh.weighting.config import check_whole
from reweigh.weighting.counting import loaders, same_random_state
from reweigh.weighting.dynamics import Dynamic, Event, drive, dynamics
from reweigh.weighting.frequency import ClassCounts, ClassTable

from ._base import (
    LightningCallback,
    RandomState,
    fed_by,
    fitting,
    hand_to,
    living_on_validation,
    named_dynamics,
    needs_task_losses,
    random_state,
    same_norms,
    set_random_state,
    several_tasks,
    summaries,
    task_losses,
)
from .probe import ValidationProbe

NAME = "WeightingCallback"


@final
class WeightingCallback(LightningCallback):
    r"""Drive every dynamic weighting, schedule and logit transform found in the LightningModule. Needs no arguments.

    ===============  =====================================================  ===========================================
    event            sent from                                              index
    ===============  =====================================================  ===========================================
    ``step``         ``on_train_batch_end``, when an optimizer has stepped  ``trainer.global_step - 1``
    ``epoch``        ``on_train_epoch_end``, else at the next epoch's or    ``trainer.current_epoch``
                     batch's start
    ``validation``   ``on_validation_epoch_end``, not the sanity check      the next one
    ===============  =====================================================  ===========================================

    Events act before ``ModelCheckpoint`` saves at the same hook, and each acts once, however often a resumed Trainer
    repeats its hook: training without random steps that continues from any end-of-epoch checkpoint gives the same bits
    as training that was never interrupted (Lightning does not save random state). All ranks send the same events;
    what they have seen is added in one all-reduce per event.

    - A file saved on an epoch's last batch, before its validation: Lightning makes up for neither the end of the epoch
      nor the validation. The epoch event is sent at the next epoch's start, the ``validation`` event is lost.
    - Gradient accumulation: one ``step`` per optimizer step, also for the incomplete window that ends an epoch.
    - LBFGS calls the closure several times per step: a step's statistics are those of all its forwards.
    - Manual optimisation: one ``step`` per batch in which an optimizer stepped. Its index counts as
      ``trainer.global_step`` does: with two optimizers, schedules ``by="step"`` move by two per batch.
    - A module that was trained before, in a new Trainer: its clocks go on from where they stand.

    Weightings over tasks that live on more than training losses get it:

    - **on validation losses** (:class:`~reweigh.weighting.CoBa`): the objective's calls in ``validation_step`` are
      observed, those of the sanity check and of ``trainer.validate()`` are not. A
      :class:`~reweigh.lightning_callbacks.ValidationProbe` in the same Trainer takes this over, events included.
    - **on losses after the step** (:class:`~reweigh.weighting.FAMO`): the LightningModule has a method
      ``task_losses(batch)`` that returns a dict of losses by task, or such a dict and one of counts, and logs nothing.
      After an optimizer step it is called, without gradient, with all batches of the step as ``training_step`` got
      them, in the same mode and precision and with the random state of before ``training_step``, so that dropout masks
      are the same where both draw alike. The random state and the statistics of batch norms are left as they were.
      Batches are kept until the step for this, at the cost of their memory. A step that the gradient scaler skipped has
      no losses after it.

    Logged, at the Trainer's ``log_every_n_steps``: every weighting's and every ``MultiTaskLoss``'s ``summary()`` and
    every schedule's value, as ``reweigh/<path>/<name>``, vectors as ``.../<i>``, tasks as ``.../<task>``.

    Warns (``UserWarning``) about what would silently do nothing or too much: nothing found in the module; a learned
    weight that no optimizer has; an event or losses that never came; a ``WeightedRandomSampler`` beside class weights.

    State and cadence:
        The weightings' own state lives in the module's ``state_dict``. This callback saves integers only: where the
        last validation was, and how far modules' clocks are from the Trainer's: those of modules that had been trained
        before its first step, and those that :meth:`start_over` set back.

    Args:
        log: Whether to log.
        max_entries: Vectors with more entries are logged as their min, mean and max. Default 16.

    Raises:
        TypeError: When training starts, if a weighting lives on losses after the step and there is no ``task_losses``.

    Example:
        >>> import warnings, torch, pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> from reweigh.weighting import InverseClassLoss
        >>> class Classifier(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 3)
        ...         self.loss = Objective(CrossEntropy(), InverseClassLoss(3))
        ...     def training_step(self, batch):
        ...         return self.loss(self.net(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> model, data = Classifier(), TensorDataset(torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> trainer = pl.Trainer(max_epochs=2, callbacks=WeightingCallback(), accelerator="cpu", barebones=True)
        >>> with warnings.catch_warnings():  # Lightning's about the size of the example
        ...     warnings.simplefilter("ignore")
        ...     trainer.fit(model, DataLoader(data, batch_size=2))
        >>> model.loss.weighting.completed("step"), model.loss.weighting.completed("epoch")
        (6, 2)
    """

    def __init__(self, log: bool = True, *, max_entries: int = 16) -> None:
        super().__init__()
        self.log_weights = bool(log)
        self.max_entries = check_whole(self, "max_entries", max_entries, low=1)
        self._found: list[tuple[str, Dynamic]] = []
        self._offsets: dict[str, list[int]] = {}
        self._last_step = -1
        self._validated: int | None = None
        self._feeding: dict[str, list[tuple[str, Objective]]] = {"validation": [], "after": []}
        self._elsewhere: set[int] = set()
        self._observing = ExitStack()
        self._before: dict[str, list[Tensor]] = {}
        self._fed: dict[str, Tensor | bool] = {}
        self._window: list[tuple[Any, RandomState]] = []
        self._random: RandomState | None = None
        self._scale: float | None = None
        self._skipped = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(log=self.log_weights, max_entries=self.max_entries)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"offsets": {path: list(ahead) for path, ahead in self._offsets.items() if any(ahead)}}
        return state if self._validated is None else {**state, "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offsets = {path: list(ahead) for path, ahead in state_dict["offsets"].items()}
        self._validated = state_dict.get("validated")

    # hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._offsets = {}
            self._validated = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._last_step = trainer.global_step
        self._fed = {}
        self._find(trainer, pl_module)
        self._forget()
        for _, module in self._found:
            # forwards of a learning-rate or batch-size search, whose steps were undone
            module.discard()
        self._look_ahead(pl_module)
        if trainer.is_global_zero:
            _warn_if_nothing(self._found)
            _warn_if_not_optimized(trainer, pl_module)
            _warn_if_reweighted_twice(trainer, self._found)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._find(trainer, pl_module)
        self._catch_up(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._catch_up(trainer)
        if self._look_ahead(pl_module):
            self._random = random_state()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._random is not None:
            self._look_at_scale(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._random is not None and batch is not None:
            self._window.append((batch, self._random))
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            if self._window:
                self._look_back(trainer, pl_module)
            self._send("step", trainer.global_step - 1)
        self._random = None
        if self.log_weights and _logs_now(trainer):
            values = summaries(self._found, self.max_entries, calls=True)
            if values:
                pl_module.log_dict(values, on_step=True, on_epoch=False, sync_dist=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._send("epoch", trainer.current_epoch)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._observing.close()
        if fitting(trainer) and self._validated != _batches_so_far(trainer):
            for path, objective in self._feeding["validation"]:
                self._before[path] = [part.clone() for part in _pending(objective)]
                self._observing.enter_context(objective.observing_validation())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._observing.close()
        if fitting(trainer) and self._validated != _batches_so_far(trainer):
            self._validated = _batches_so_far(trainer)
            self._note_what_was_fed()
            drive((module for _, module in self._found if id(module) not in self._elsewhere), "validation")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.global_step > 0:
            _warn_if_never_driven(self._found)
            self._warn_if_never_fed()
        self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        for path, objective in self._feeding["validation"]:
            if path in self._before:  # in the middle of a validation
                for module in living_on_validation(objective):
                    module.discard()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_observing": ExitStack(), "_window": [], "_random": None}

    def start_over(self, trainer: Any, pl_module: Any) -> None:
        """Count events anew from here: the module's weightings have been set back to where they began."""
        self._find(trainer, pl_module)
        self._offsets = {
            path: [module.completed("step") - trainer.global_step, module.completed("epoch") - trainer.current_epoch]
            for path, module in self._found
            if module.tracks_events
        }

    # losses beside those of training

    def _look_ahead(self, pl_module: Any) -> bool:
        """Whether batches must be kept for a second look after the step."""
        awake = [module for module in several_tasks(self._feeding["after"]) if not module.asleep]
        for module in awake:
            needs_task_losses(NAME, pl_module, module, "or take FAMO(next_batch=True), which does without")
        return bool(awake)

    def _look_at_scale(self, trainer: Any) -> None:
        """A gradient scaler that skips a step makes its scale smaller, which is all it shows."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scale = float(scaler.get_scale())
            self._skipped = self._skipped or (self._scale is not None and scale < self._scale)
            self._scale = scale

    def _look_back(self, trainer: Any, pl_module: Any) -> None:
        """The losses of the step's own batches, now that the step is done."""
        self._look_at_scale(trainer)
        window, skipped = self._window, self._skipped
        self._window, self._skipped, self._scale = [], False, None
        if skipped:
            return
        with torch.no_grad(), same_random_state(), same_norms(pl_module):
            for batch, state in window:
                set_random_state(state)
                with trainer.precision_plugin.train_step_context():
                    named = task_losses(NAME, pl_module, batch)
                for path, module in self._feeding["after"]:
                    if isinstance(module, MultiTaskLoss):
                        self._fed[path] = hand_to(module, "observe_after", named) or self._fed.get(path, False)

    def _note_what_was_fed(self) -> None:
        for path, objective in self._feeding["validation"]:
            if path not in self._before:
                continue
            pairs = zip(_pending(objective), self._before[path], strict=True)
            changed = [(now != old.to(now.device)).any() for now, old in pairs]
            if changed:  # tensors, read when training ends
                so_far = torch.as_tensor(self._fed.get(path, False), device=changed[0].device)
                self._fed[path] = torch.stack([*changed, so_far]).any()
        self._before = {}

    def _warn_if_never_fed(self) -> None:
        for feed, found in self._feeding.items():
            for path, objective in found:
                could = isinstance(objective, MultiTaskLoss) or feed == "validation"
                if objective.asleep or bool(self._fed.get(path, could)):  # nothing came where nothing was due
                    continue
                if feed == "validation":
                    advice = (
                        "validation losses, and validation ran, but it was not called there: call it in "
                        "validation_step as in training_step, or add a ValidationProbe to the Trainer"
                    )
                elif isinstance(objective, MultiTaskLoss):
                    advice = "losses after the optimizer's step, which never came: task_losses named none of its tasks"
                else:
                    advice = "losses after the optimizer's step, which only a MultiTaskLoss can take"
                warnings.warn(
                    f"{NAME}: {path} ({type(objective).__name__} with {type(objective.weighting).__name__}) lives on "
                    f"{advice}",
                    stacklevel=3,
                )

    def _forget(self) -> None:
        self._observing.close()
        self._before, self._window, self._random, self._scale, self._skipped = {}, [], None, None, False

    # events

    def _find(self, trainer: Any, pl_module: Any) -> None:
        self._found = list(named_dynamics(pl_module))
        probed = any(isinstance(callback, ValidationProbe) for callback in trainer.callbacks)
        live = fed_by(pl_module, "validation")
        elsewhere = several_tasks(live) if probed else []
        self._elsewhere = {id(part) for module in elsewhere for part in dynamics(module)}
        self._feeding = {
            "validation": [(path, module) for path, module in live if not any(module is other for other in elsewhere)],
            "after": fed_by(pl_module, "after"),
        }
        for path, module in self._found:
            if module.tracks_events and path not in self._offsets:
                ahead = (
                    module.completed("step") - trainer.global_step,
                    module.completed("epoch") - trainer.current_epoch,
                )
                self._offsets[path] = [max(0, n) for n in ahead]

    def _catch_up(self, trainer: Any) -> None:
        """Send the epoch event that a Trainer resumed after an epoch's last batch never repeats."""
        epoch = trainer.current_epoch
        behind = any(
            module.completed("epoch") < epoch + self._offsets[path][1]
            for path, module in self._found
            if module.tracks_events and not module.asleep
        )
        if behind:
            self._send("epoch", epoch - 1)

    def _send(self, event: Event, index: int) -> None:
        groups: dict[int, list[Dynamic]] = {}
        for path, module in self._found:
            if module.tracks_events:
                groups.setdefault(self._offsets[path][event == "epoch"], []).append(module)
        for ahead, modules in groups.items():
            drive(modules, event, index=index + ahead)


def _pending(objective: Objective) -> list[Tensor]:
    """What has been seen since the last commit by what lives on validation losses."""
    return [part for module in living_on_validation(objective) for part in module._pending.values()]


def _batches_so_far(trainer: Any) -> int:
    """Place of a validation in training: some versions of Lightning repeat it when they resume from its end."""
    return int(trainer.fit_loop.epoch_loop.total_batch_idx)


def _logs_now(trainer: Any) -> bool:
    if trainer.barebones:
        return False
    # the summaries of most batches would be thrown away
    return bool(trainer.fast_dev_run or getattr(trainer._logger_connector, "should_update_logs", True))


def _warn_if_nothing(found: list[tuple[str, Dynamic]]) -> None:
    if not found:
        warnings.warn(
            "WeightingCallback: found no objective or weighting in the LightningModule, so there is nothing to drive; "
            "assign the objective to an attribute of the module (self.loss = ...), not to a list, dict or local name",
            stacklevel=3,
        )


def _warn_if_not_optimized(trainer: Any, pl_module: Any) -> None:
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(id(p) for p in pl_module.parameters()):
        return  # no optimizer, or a strategy that optimizes copies
    missing = {id(p) for p in learned_parameters(pl_module)} - held
    if missing:
        names = ", ".join(name for name, parameter in pl_module.named_parameters() if id(parameter) in missing)
        warnings.warn(
            f"WeightingCallback: learned weights are in no optimizer and will not change: {names}; in "
            "configure_optimizers add the groups of objective.parameter_groups(), or pass self.parameters()",
            stacklevel=3,
        )


def _warn_if_never_driven(found: list[tuple[str, Dynamic]]) -> None:
    advice = {
        "forward": "no training forward reached it: call the objective in training_step, in training mode",
        "step": "no optimizer step came",
        "epoch": "no training epoch ended",
        "validation": "no validation ran: give the Trainer validation data, or a smaller check_val_every_n_epoch",
    }
    for path, module in found:
        event = module.update_on
        if module.tracks_events and not module.asleep and event in advice and not module.completed(event):
            warnings.warn(
                f"WeightingCallback: {path} ({type(module).__name__}) changes on {event!r}, which never happened, so "
                f"it still has its initial weights; {advice[event]}",
                stacklevel=3,
            )


def _warn_if_reweighted_twice(trainer: Any, found: list[tuple[str, Dynamic]]) -> None:
    tables = [(path, module) for path, module in found if isinstance(module, (ClassTable, ClassCounts))]
    if tables and any(_resamples(loader) for loader in loaders(trainer.train_dataloader)):
        path, module = tables[0]
        warnings.warn(
            f"WeightingCallback: the training data is drawn by a WeightedRandomSampler and {path} "
            f"({type(module).__name__}) weighs classes as well, so rare classes count twice; keep one of the two",
            stacklevel=3,
        )


def _resamples(loader: Any) -> bool:
    """Whether a weighted sampler is behind the loader, also when Lightning has wrapped it for several ranks."""
    queue, seen = [loader], 0
    while queue and seen < 16:
        thing, seen = queue.pop(), seen + 1
        if isinstance(thing, WeightedRandomSampler):
            return True
        names = ("sampler", "_sampler", "batch_sampler") if thing is loader else ("sampler", "_sampler", "dataset")
        inner = [getattr(thing, name, None) for name in names]
        queue += [part for part in inner if part is not None and not isinstance(part, nn.Module)]
    return False
