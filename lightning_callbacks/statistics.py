"""Class counts, once and before training, sent to every weighting that was given none."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from reweigh.weighting.config import check_whole
from reweigh.weighting.counting import Labels, Tally, loaders, same_random_state, subset_of, visit
from reweigh.weighting.dynamics import drive, dynamics
from reweigh.weighting.frequency import ClassCounts

from ._base import LightningCallback


@final
class FitStatistics(LightningCallback):
    r"""Count the classes of the training data before training, for every weighting that was given no counts.

    Weightings and logit transforms constructed without ``counts`` (``FocalLoss(weight="balanced")``,
    ``InverseFrequency()``, ``LogitAdjustment()``) wait for the ``fit`` event. This callback sends it, with
    ``class_counts`` of the whole training set, before the learning-rate finder and the sanity check run; the order of
    callbacks does not matter. Where nothing waits for counts it does nothing.

    - Counts are of the data set, not of this rank's share of it, and equal on all ranks.
    - Reading the data changes neither the global random state nor the order of training batches.
    - The same data set is counted once; resuming keeps the checkpoint's counts.

    State and cadence:
        ``counts``: ``(C,)`` tensor, saved. The weightings keep their own copy in the module's ``state_dict``. Changes
        when ``fit`` starts.

    Args:
        labels, num_classes, ignore_index, multilabel: As in ``reweigh.weighting.class_counts``. ``num_classes=None``
            takes the number that the waiting weightings were constructed with, where they were.
        module: Dotted name of the submodule to serve, where heads have different labels: one callback for each.
        sharded: Whether each rank sees other samples, so that counts are added over ranks. ``None``: they are added if
            they differ between ranks, as they do where an ``IterableDataset`` yields each rank its own shard.

    Raises:
        ValueError: If labels cannot be counted (see ``class_counts``), if the data can be read only once, or if
            ``module`` names nothing.

    Example:
        >>> from reweigh.losses import FocalLoss
        >>> loss = FocalLoss(weight="balanced")  # in the LightningModule
        >>> callbacks = [FitStatistics()]  # in the Trainer; or, without one:
        >>> loss.update("fit", class_counts=class_counts([0, 0, 0, 1]))
    """

    def __init__(
        self,
        labels: Labels = None,
        *,
        num_classes: int | None = None,
        ignore_index: int = -100,
        multilabel: bool | None = None,
        module: str | None = None,
        sharded: bool | None = None,
    ) -> None:
        super().__init__()
        self.labels = labels
        self.num_classes = None if num_classes is None else check_whole(self, "num_classes", num_classes, low=1)
        self.ignore_index = ignore_index
        self.multilabel = multilabel
        self.module = module
        self.sharded = sharded
        self.counts: Tensor | None = None
        self._seen: list[tuple[Any, Any, int]] = []

    @property
    def state_key(self) -> str:
        labels = self.labels if isinstance(self.labels, (str, int)) else getattr(self.labels, "__qualname__", None)
        return self._generate_state_key(labels=labels, module=self.module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.counts is None else {"counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = state_dict["counts"]
        self._seen = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": []}  # weak references do not travel to other processes

    # hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            # Tuner callbacks train in on_fit_start and Lightning puts them first. Counting here would be too early: the
            # module's own setup() and configure_model() are still to come.
            trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        try:
            root = pl_module if self.module is None else pl_module.get_submodule(self.module)
        except AttributeError as error:
            raise ValueError(
                f"FitStatistics: module must name a submodule of {type(pl_module).__name__}, got {self.module!r}"
            ) from error
        waiting = [part for part in dynamics(root) if isinstance(part, ClassCounts) and not part.given]
        if not waiting:
            return
        if trainer.ckpt_path is not None and all(part.known for part in waiting):
            self.counts = waiting[0].get_buffer("counts").detach().cpu().clone()
            return
        asked = [part.num_classes for part in waiting if part.num_classes is not None]
        drive(dynamics(root), "fit", class_counts=self._count(trainer, pl_module, max(asked, default=None)))

    def _count(self, trainer: Any, pl_module: Any, num_classes: int | None) -> Tensor:
        with same_random_state():  # train_dataloader() may split at random, and will be called again
            data = _train_data(trainer, pl_module)
        seen = list(_fingerprint(data))
        if self.counts is None or not _unchanged(self._seen, seen):
            tally = Tally(self.num_classes or num_classes, self.ignore_index, self.multilabel)
            with same_random_state():
                visit(data, self.labels, tally)
            self.counts = self._whole(trainer, tally)
            self._seen = seen
        return self.counts

    def _whole(self, trainer: Any, tally: Tally) -> Tensor:
        """This rank's counts, or all ranks' together where they hold different samples."""
        if trainer.world_size == 1:
            return tally.result()
        counts, device = tally.counts, trainer.strategy.root_device

        def over_ranks(value: Tensor, how: str) -> Tensor:
            reduced: Tensor = trainer.strategy.reduce(value.clone().to(device), reduce_op=how)
            return reduced.cpu()

        padded = counts.new_zeros(int(over_ranks(torch.tensor(counts.numel()), "max")))
        padded[: counts.numel()] = counts
        differ = not torch.equal(over_ranks(padded, "max"), over_ranks(padded, "min"))
        if differ and self.sharded is False:
            raise ValueError(
                "FitStatistics: ranks count different classes although sharded=False; leave sharded=None to add them up"
            )
        tally.counts = over_ranks(padded, "sum") if self.sharded or differ else padded
        return tally.result()


def _train_data(trainer: Any, pl_module: Any) -> Any:
    source = getattr(trainer.fit_loop, "_data_source", None)
    if source is not None:
        return source.dataloader()
    return (pl_module if trainer.datamodule is None else trainer.datamodule).train_dataloader()


def _fingerprint(data: Any) -> Iterator[tuple[Any, Any, int]]:
    """What a data collection was, without keeping it alive."""
    for loader in loaders(data):
        dataset = getattr(loader, "dataset", loader)
        indices = subset_of(loader) if isinstance(loader, DataLoader) else None
        try:
            size = len(dataset)
        except TypeError:
            size = -1
        try:
            yield weakref.ref(dataset), indices, size
        except TypeError:  # lists have no weak references
            yield None, indices, size


def _unchanged(before: list[tuple[Any, Any, int]], now: list[tuple[Any, Any, int]]) -> bool:
    return len(before) == len(now) > 0 and all(
        old is not None and new is not None and old() is new() and old() is not None and rest_old == rest_new
        for (old, *rest_old), (new, *rest_new) in zip(before, now, strict=True)
    )
