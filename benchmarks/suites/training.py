"""What suites that train with Lightning share: quiet, deterministic, paired runs, with time and weights recorded."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from reweigh.lightning_callbacks import WeightingMonitor
from reweigh.losses import Objective


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread, deterministic algorithms, a fresh random state; all as before on leaving."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's start-up remarks and its use of what torch deprecates, and only those."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (r"The '\w+_dataloader' does not have many workers", "GPU available but not used"):
            warnings.filterwarnings("ignore", message=message)
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"pytorch_lightning\.|lightning_fabric\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class EpochOrder(Sampler[list[int]]):
    """Batches of indices whose order is a function of seed and epoch alone.

    Whatever reads the loader beside the training (the counting of classes) shifts nothing, so runs stay paired.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = self._order(generator)
        starts = range(0, self.size, self.batch_size)
        return iter([order[start : start + self.batch_size].tolist() for start in starts])

    def _order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.size, generator=generator)


class WeightedOrder(EpochOrder):
    """Batches drawn with replacement, in proportion to weights; as many per epoch as there would be without."""

    def __init__(self, weights: Tensor, batch_size: int, seed: int) -> None:
        super().__init__(len(weights), batch_size, seed)
        self.weights = weights

    def _order(self, generator: torch.Generator) -> Tensor:
        return self.weights.multinomial(self.size, replacement=True, generator=generator)


class Classifier(pl.LightningModule):
    """A network, an objective, AdamW. Batches are inputs, target, and what else the objective is called with."""

    meta: tuple[str, ...] = ()
    """Names of what stands behind the target in a batch."""

    @classmethod
    def taking(cls, *names: str) -> type[Classifier]:
        """The module for batches with these behind the target."""
        return cast("type[Classifier]", type(cls.__name__, (cls,), {"meta": names}))

    def __init__(self, net: nn.Module, objective: Objective, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.net, self.objective, self.options = net, objective, options

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, target, *rest = batch
        return cast(Tensor, self.objective(self.net(inputs), target, **dict(zip(self.meta, rest, strict=True))))

    def configure_optimizers(self) -> Any:
        options = self.options
        groups: list[dict[str, Any]] = [{"params": [*self.net.parameters()]}, *self.objective.parameter_groups()]
        rate: dict[str, Any] = {"lr": options["lr"], "weight_decay": options["weight_decay"]}
        if options.get("optimizer", "adamw") == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, fused=True, **rate)
        else:
            optimizer = torch.optim.SGD(groups, momentum=0.9, **rate)
        if "milestones" not in options and "rate_warmup" not in options:
            return optimizer
        warmup, marks = options.get("rate_warmup", 0), [m * options["steps"] for m in options.get("milestones", ())]

        def factor(step: int) -> float:
            return float(min(1.0, (step + 1) / max(1, warmup)) * 0.1 ** sum(step >= mark for mark in marks))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepTimer(pl.Callback):
    """Median wall time from one step's start to the next one's; epoch ends and start-up are outliers and drop out."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(time.perf_counter())

    @property
    def milliseconds(self) -> float:
        """Per step."""
        return 1e3 * median(b - a for a, b in zip(self.starts, self.starts[1:], strict=False))


class FirstBatch(pl.Callback):
    """A hash of the initial weights and the first training batch: whether methods were compared like with like."""

    def __init__(self) -> None:
        self.found: str | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if self.found is not None:
            return
        own = {
            id(p) for part in pl_module.modules() if isinstance(part, Objective) for p in part.parameters()
        }  # what an objective learns is its own
        digest = hashlib.sha256()
        for value in (*(p for p in pl_module.parameters() if id(p) not in own), *tree_leaves(batch)):
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().double().numpy().tobytes())
        self.found = digest.hexdigest()[:16]


class KeepBest(pl.Callback):
    """Early stopping without stopping: the network ends as it was when it scored best, at the first such moment.

    Args:
        score: Of the network in evaluation mode; compared as it is, tuples entry by entry.
        every: Steps between looks.
        restore: False leaves the network as training has ended; ``state`` has the best.
    """

    def __init__(self, score: Callable[[nn.Module], Any], every: int, *, restore: bool = True) -> None:
        self.score, self.every, self.restore = score, every, restore
        self.best: Any = None
        self.step: int | None = None
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        found = self.score(pl_module.net.eval())
        pl_module.net.train()
        if self.best is None or found > self.best:
            self.best, self.step = found, step
            self.state = {name: value.clone() for name, value in pl_module.net.state_dict().items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.restore:
            pl_module.net.load_state_dict(self.state)


def weight_curves(monitor: WeightingMonitor, groups: Mapping[str, Sequence[int]]) -> dict[str, list[float | None]]:
    """Mean weight of a training term in each group of classes, each class counting the same, at every recorded step.

    A window in which a class of the group was not seen has no value for it.
    """
    rows = [row for row in monitor.history() if any("/class_weight/" in name for name in row)]
    curves: dict[str, list[float | None]] = {"step": [row["step"] for row in rows]}
    for group, classes in groups.items():
        found = [[row.get(f"reweigh/objective/class_weight/{label}") for label in classes] for row in rows]
        curves[group] = [None if None in means else fmean(cast(list[float], means)) for means in found]
    return curves


def task_curves(monitor: WeightingMonitor, tasks: Sequence[str]) -> dict[str, Any]:
    """Weight and loss of each task at every recorded step."""
    rows = [row for row in monitor.history() if any("/task_weight/" in name for name in row)]
    return {
        "step": [row["step"] for row in rows],
        **{
            what: {task: [row.get(f"reweigh/objective/task_{what}/{task}") for row in rows] for task in tasks}
            for what in ("weight", "loss")
        },
    }


def train(
    net: nn.Module,
    objective: Objective,
    data: tuple[Tensor, ...] | Dataset[Any],
    options: Mapping[str, Any],
    *,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    module: type[Classifier] = Classifier,
    order: EpochOrder | None = None,
) -> float:
    """Train ``net`` in place with Lightning, on the CPU unless told otherwise; returns the median ms of a step.

    ``options`` holds ``steps``, ``batch_size``, ``lr``, ``weight_decay``, and where they are there ``optimizer``
    (``"adamw"``, ``"sgd"``), ``milestones`` (shares of the training after which the rate is divided by 10),
    ``rate_warmup`` (steps of a rising rate), ``accelerator`` and ``loaders`` (processes that read). Others are the
    caller's, under other names. A data set that is read piece by piece takes a list of indices and gives the batch.
    """
    dataset: Any = TensorDataset(*data) if isinstance(data, tuple) else data
    loader = DataLoader(
        dataset,
        sampler=order or EpochOrder(len(dataset), options["batch_size"], seed),
        batch_size=None,  # a sampler of lists: one indexing per batch
        num_workers=options.get("loaders", 0),
    )
    timer = StepTimer()
    with quiet():
        trainer = pl.Trainer(
            accelerator=options.get("accelerator", "cpu"),
            devices=1,
            max_steps=options["steps"],
            max_epochs=-1,
            callbacks=[timer, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module(net, objective, options), loader)
    return timer.milliseconds
