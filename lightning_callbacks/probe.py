"""Validation losses every few steps, without a validation: what weightings that live on them are fed with."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, final

import numpy as np
import torch
from torch.utils.data import IterableDataset

from reweigh.losses.multitask import MultiTaskLoss
from reweigh.weighting.config import check_choice, check_whole
from reweigh.weighting.counting import loaders, same_random_state
from reweigh.weighting.dynamics import drive, dynamics

from ._base import (
    LightningCallback,
    evaluating,
    fed_by,
    hand_to,
    living_on_validation,
    needs_task_losses,
    task_losses,
    transferred,
    validating,
)

NAME = "ValidationProbe"


@final
class ValidationProbe(LightningCallback):
    r"""Look at a few validation batches every few optimizer steps, for weightings that live on validation losses.

    :class:`~reweigh.weighting.CoBa` wants a record per step, and a whole validation for each would be too much. Every
    ``every_n_steps`` optimizer steps this callback draws ``num_batches`` validation batches, asks the LightningModule
    for their losses and gives them to every ``MultiTaskLoss`` whose weighting lives on validation losses; then it sends
    the ``validation`` event to those. Before the first step, one record is made of the whole validation data
    (``baseline``); a weighting that has a record already keeps that one.

    The LightningModule has a method ``task_losses(batch)`` that returns a dict of losses by task, or such a dict and
    one of counts (how many samples each loss is the mean of), and logs nothing. It is called without gradient, in
    evaluation mode, in the Trainer's precision, and its batch comes through the module's transfer hooks while
    ``trainer.validating`` is true. Afterwards each submodule is in the mode it was in, and the random state
    (Python's, NumPy's, torch's) is as it was.

    ``WeightingCallback`` beside it, in any order, leaves validation to it for those objectives: what
    ``validation_step`` computes is not observed a second time.

    - Batches come in the loader's order, again and again. The n-th batch is drawn with the random state seeded by n, so
      a shuffled or augmented loader gives a resumed run the batches of an uninterrupted one.
    - Several validation loaders: ``num_batches`` from each, so that every task has a record where each loader has its
      own. ``limit_val_batches`` holds here, too, unless it is 0.
    - Several processes: each draws from its share of the data (from the same, where Lightning does not split it), and
      records are added over ranks. A rank without data takes part in the sum.
    - ``persistent_workers`` and ``IterableDataset`` will do; an endless one needs ``baseline="probe"``.

    State and cadence:
        How many batches were drawn, records sent and steps done: integers. On resuming, the batches of the pass that
        was under way are skipped by drawing them.

    A Trainer has place for one; it takes several loaders.

    Args:
        every_n_steps: Optimizer steps per record, >= 1. Default 1.
        num_batches: Validation batches per record and loader, >= 1. Default 1.
        dataloader: Where batches come from, as it is: any iterable that can be iterated again, or a list or dict of
            them. ``None`` for the Trainer's validation data.
        baseline: ``"full"``: the first record is of all validation data. ``"probe"``: it is like the others.

    Raises:
        TypeError: When training starts, if the module has no ``task_losses``.
        ValueError: When training starts, if there is no validation data, or it can be read only once.

    Example:
        >>> from reweigh.lightning_callbacks import ValidationProbe, WeightingCallback
        >>> callbacks = [WeightingCallback(), ValidationProbe(every_n_steps=10)]  # in the Trainer
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        num_batches: int = 1,
        *,
        dataloader: Any = None,
        baseline: Literal["full", "probe"] = "full",
    ) -> None:
        super().__init__()
        self.every_n_steps = check_whole(self, "every_n_steps", every_n_steps, low=1)
        self.num_batches = check_whole(self, "num_batches", num_batches, low=1)
        self.dataloader = dataloader
        self.baseline = check_choice(self, "baseline", baseline, ("full", "probe"))
        self._drawn = 0
        self._records = 0
        self._last_step: int | None = None
        self._restored = False
        self._streams: list[_Stream] = []
        self._own: list[Any] | None = None
        self._objectives: list[tuple[str, MultiTaskLoss]] = []
        self._unfed: dict[int, bool] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "records": self._records, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn, self._records = state_dict["drawn"], state_dict["records"]
        self._last_step = state_dict["last_step"]
        self._restored = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": []}

    # hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._restored and trainer.global_step == 0:
            self._drawn = self._records = 0
            self._last_step = None
        self._restored, self._streams, self._unfed = False, [], {}
        if self._last_step is None:
            self._last_step = trainer.global_step
        self._find(pl_module)
        self._discard()
        if not self._objectives:
            if trainer.is_global_zero:
                warnings.warn(
                    f"{NAME}: no MultiTaskLoss in {type(pl_module).__name__} has a weighting that lives on validation "
                    "losses, so there is nothing to feed; take it out of the Trainer",
                    stacklevel=2,
                )
            return
        for _, module in self._objectives:
            needs_task_losses(NAME, pl_module, module, "or leave the probe out and validate in validation_step")
        self._own = self._loaders_of_its_own(trainer)
        self._records = max(self._records, *(_records_of(module) for _, module in self._objectives))
        fresh = [module for _, module in self._objectives if not _records_of(module)]
        self._record(trainer, pl_module, fresh, everything=self.baseline == "full")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._find(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._probe_if_due(trainer, pl_module)  # where a file was saved between the step and its probe

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._probe_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._streams = []
        for path, module in self._objectives:
            if trainer.is_global_zero and self._unfed.get(id(module), False):
                warnings.warn(
                    f"{NAME}: {path} ({type(module).__name__} with {type(module.weighting).__name__}) lives on "
                    f"validation losses, which never came: task_losses named none of its tasks "
                    f"({', '.join(module.tasks)})",
                    stacklevel=2,
                )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._streams = []
        self._discard()

    # records

    def _find(self, pl_module: Any) -> None:
        found = fed_by(pl_module, "validation")
        self._objectives = [(path, module) for path, module in found if isinstance(module, MultiTaskLoss)]

    def _discard(self) -> None:
        """What a record had seen when it was interrupted."""
        for _, module in self._objectives:
            for part in living_on_validation(module):
                part.discard()

    def _probe_if_due(self, trainer: Any, pl_module: Any) -> None:
        step, last = trainer.global_step, self._last_step or 0
        if step != last:
            self._last_step = step
            if step // self.every_n_steps != last // self.every_n_steps:
                self._record(trainer, pl_module, [module for _, module in self._objectives])

    def _record(self, trainer: Any, pl_module: Any, objectives: list[MultiTaskLoss], everything: bool = False) -> None:
        objectives = [module for module in objectives if not module.asleep]
        if not objectives:
            return
        with torch.no_grad(), same_random_state(), evaluating(pl_module), validating(trainer):
            for batch, place in self._everything(trainer) if everything else self._few(trainer):
                batch = transferred(trainer, pl_module, batch, place)
                with trainer.precision_plugin.val_step_context():
                    named = task_losses(NAME, pl_module, batch)
                for module in objectives:
                    self._unfed.setdefault(id(module), True)
                    if hand_to(module, "observe_validation", named):
                        self._unfed[id(module)] = False
        parts = {id(part): part for module in objectives for part in dynamics(module)}
        drive(parts.values(), "validation", index=self._records)
        self._records += 1

    def _few(self, trainer: Any) -> Iterator[tuple[Any, int]]:
        for place, (loader, limit) in enumerate(self._loaders(trainer)):
            if place >= len(self._streams) or self._streams[place].source is not loader:  # at first, or reloaded
                self._streams[place:] = [_Stream(loader, limit, self._drawn)]
            for _ in range(self.num_batches):
                batch = self._streams[place].draw()
                if batch is not _NOTHING:
                    yield batch, place
        self._drawn += self.num_batches

    def _everything(self, trainer: Any) -> Iterator[tuple[Any, int]]:
        for place, (loader, limit) in enumerate(self._loaders(trainer)):
            stream = _Stream(loader, limit)
            while (batch := stream.draw(again=False)) is not _NOTHING:
                yield batch, place

    def _loaders(self, trainer: Any) -> list[tuple[Any, float]]:
        """Loaders in order, and how many batches of each make a pass."""
        if self._own is not None:
            return [(loader, math.inf) for loader in self._own]
        combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
        found = _separate(combined)
        limits = [math.inf] if found == [combined] else trainer.num_val_batches
        return list(zip(found, limits, strict=True))

    def _loaders_of_its_own(self, trainer: Any) -> list[Any] | None:
        """Those that the Trainer's validation does not use; ``None`` where it has what is needed."""
        given = self.dataloader
        if given is None:
            loop = trainer.fit_loop.epoch_loop.val_loop
            source = loop._data_source
            if source.instance is None or not source.is_defined():
                raise ValueError(
                    f"{NAME}: there is no validation data; give fit() val_dataloaders, define val_dataloader() in the "
                    "module, or give the probe a dataloader"
                )
            with validating(trainer):
                loop.setup_data()
            if loop._combined_loader is not None:
                return None
            # there is no validation_step, or no validation is wanted
            stage, prepare = type(trainer.state.stage).VALIDATING, trainer._data_connector._prepare_dataloader
            found = _separate(source.dataloader())
            found = [prepare(loader, shuffle=False, mode=stage) for loader in found]
        else:
            found = _separate(given)
        once = [loader for loader in found if isinstance(loader, Iterator) and not hasattr(loader, "flattened")]
        if not found or once:
            raise ValueError(
                f"{NAME}: validation data must be one or more loaders that can be read again, got {once or given!r}"
            )
        return found


def _records_of(module: MultiTaskLoss) -> int:
    """How many validation events what lives on them has had."""
    return max((part.completed("validation") for part in living_on_validation(module)), default=0)


# batches

_NOTHING = object()


class _Together:
    """A CombinedLoader that gives batches of several loaders at once, with an iterator of its own."""

    def __init__(self, combined: Any) -> None:
        self.combined = combined

    def __iter__(self) -> Iterator[Any]:
        fresh = type(self.combined)(self.combined.iterables, self.combined._mode)
        fresh.limits = self.combined.limits
        return (batch for batch, _, _ in fresh)


class _Stream:
    """One loader's batches, over and over; each is drawn with the random generators seeded by its place."""

    def __init__(self, loader: Any, limit: float, skip: int = 0) -> None:
        self.source, self.limit = loader, limit
        self.loader: Any = _Together(loader) if hasattr(loader, "flattened") else loader
        self.iterator: Iterator[Any] | None = None
        self.passes = self.taken = 0
        self._skip(skip)

    def draw(self, again: bool = True) -> Any:
        """The next batch; at the end of the data the first again, or ``_NOTHING``."""
        batch = self._next()
        if batch is _NOTHING and again:
            self._begin(self.passes + 1)
            batch = self._next()
        return batch

    def _begin(self, number: int) -> None:
        self.passes, self.taken, self.iterator = number, 0, None

    def _next(self) -> Any:
        if self.taken >= self.limit:
            return _NOTHING
        with _seeded(self.source, self.passes, self.taken):
            if self.iterator is None:
                kept = getattr(self.loader, "persistent_workers", False)  # iter() would take a running validation's
                self.iterator = self.loader._get_iterator() if kept else iter(self.loader)
            batch = next(self.iterator, _NOTHING)
        self.taken += batch is not _NOTHING
        return batch

    def _skip(self, number: int) -> None:
        size = self._size()
        if size is None:  # one pass says how long a pass is
            for _ in range(number):
                if self._next() is _NOTHING:
                    size = self.taken
                    break
            else:
                return
        if size > 0:
            passes, left = divmod(number, size)
            self._begin(passes)
            for _ in range(left):
                self._next()

    def _size(self) -> int | None:
        if isinstance(getattr(self.loader, "dataset", None), IterableDataset):
            return None  # its length is a guess
        try:
            return int(min(len(self.loader), self.limit))
        except TypeError:
            return None


@contextmanager
def _seeded(loader: Any, passes: int, taken: int) -> Iterator[None]:
    """Random generators that depend on the place in the data only; a loader's own ones are put back."""
    seed = (passes * 1_000_003 + taken) % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    parts = [
        part
        for one in loaders(loader)
        for part in (one, getattr(one, "sampler", None), getattr(one, "batch_sampler", None))
        if part is not None
    ]
    generators = [g for g in (getattr(part, "generator", None) for part in parts) if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    epochs = [(part, part.epoch) for part in parts if hasattr(part, "epoch") and hasattr(part, "set_epoch")]
    for generator in generators:
        generator.manual_seed(seed)
    for part, _ in epochs:
        part.set_epoch(passes)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        for part, epoch in epochs:
            part.set_epoch(epoch)


def _separate(data: Any) -> list[Any]:
    """Loaders that are read one by one, from what Lightning takes as a collection of dataloaders."""
    if hasattr(data, "flattened") and data._mode != "sequential":
        return [data]
    return list(loaders(data))
