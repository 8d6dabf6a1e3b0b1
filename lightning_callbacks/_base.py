"""What the callbacks share: a base that both Lightning packages accept, and walks over a module tree."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from reweigh.losses.multitask import MultiTaskLoss
from reweigh.losses.objective import Objective
from reweigh.weighting.base import Feed, Weighting
from reweigh.weighting.dynamics import Dynamic, dynamics
from reweigh.weighting.schedules import Schedule
from reweigh.weighting.tasks.base import TaskWeighting

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
PREFIX = "reweigh"


def _bases() -> tuple[type, ...]:
    """``Callback`` of each Lightning package that can be imported; a Trainer only accepts its own."""
    found = [package.Callback for package in map(_imported, PACKAGES) if package is not None]
    if not found:
        raise ImportError(
            "reweigh.lightning_callbacks needs Lightning, which cannot be imported; "
            "install it with: pip install reweigh[lightning]"
        )
    return tuple(dict.fromkeys(found))


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


if TYPE_CHECKING:
    from pytorch_lightning import Callback

    class LightningCallback(Callback): ...
else:
    LightningCallback = type(
        "LightningCallback",
        _bases(),
        {"__doc__": "Base of the callbacks: works in Trainers of both Lightning packages.", "__module__": __name__},
    )


def named_dynamics(root: nn.Module) -> Iterator[tuple[str, Dynamic]]:
    """What :func:`~reweigh.weighting.dynamics` finds, with dotted names; the root has its class's name."""
    names = {id(module): name or type(module).__name__ for name, module in root.named_modules()}
    for module in dynamics(root):
        yield names[id(module)], module


def summaries(found: list[tuple[str, Dynamic]], max_entries: int, *, calls: bool = False) -> dict[str, Tensor]:
    """0-d numbers a logger may plot: ``reweigh/<path>/<name>``, with ``/<i>`` or ``/<task>`` for a vector's entries.

    Vectors longer than ``max_entries`` are given by their smallest, mean and largest entry. ``calls`` adds what a
    MultiTaskLoss says of its last call. No device is read.
    """
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, module in found:
            parts: dict[str, Tensor] = {}
            if isinstance(module, Weighting) or (calls and isinstance(module, MultiTaskLoss)):
                parts = module.summary()
            elif isinstance(module, Schedule):
                parts = {"value": module()}
            for name, value in parts.items():
                tasks = (
                    module.tasks if isinstance(module, TaskWeighting) and value.shape == (len(module.tasks),) else ()
                )
                values.update(spell(f"{PREFIX}/{path}/{name}", value.detach(), max_entries, tasks))
    return values


def spell(name: str, value: Tensor, max_entries: int, labels: Sequence[str] = ()) -> dict[str, Tensor]:
    """A tensor as named 0-d tensors; labels for its entries, where they have any."""
    if value.ndim == 0:
        return {name: value}
    flat = value.reshape(-1)
    if flat.numel() <= max_entries:
        names = labels if len(labels) == flat.numel() else range(flat.numel())
        return {f"{name}/{label}": entry for label, entry in zip(names, flat.unbind(), strict=True)}
    return {f"{name}/min": flat.min(), f"{name}/mean": flat.double().mean(), f"{name}/max": flat.max()}


def fitting(trainer: Any) -> bool:
    """Whether the Trainer is in ``fit`` and past the sanity check."""
    return bool(trainer.state.fn == "fit") and not trainer.sanity_checking


# losses beside those of training


def fed_by(root: nn.Module, feed: Feed) -> list[tuple[str, Objective]]:
    """Objectives whose weighting lives on this, with dotted names."""
    return [
        (name or type(module).__name__, module)
        for name, module in root.named_modules()
        if isinstance(module, Objective) and module.weighting is not None and feed in module.weighting.feeds
    ]


def living_on_validation(objective: Objective) -> list[Weighting]:
    """Parts of an objective's weighting that take validation losses."""
    inside = [] if objective.weighting is None else dynamics(objective.weighting)
    return [part for part in inside if isinstance(part, Weighting) and "validation" in part.feeds]


def several_tasks(found: Iterable[tuple[str, Objective]]) -> list[MultiTaskLoss]:
    """Those of them that take losses by name."""
    return [module for _, module in found if isinstance(module, MultiTaskLoss)]


def needs_task_losses(owner: str, pl_module: Any, module: MultiTaskLoss, otherwise: str) -> None:
    """Raise where the LightningModule cannot say its tasks' losses on a batch."""
    if not callable(getattr(pl_module, "task_losses", None)):
        raise TypeError(
            f"{owner}: {type(module.weighting).__name__} needs losses that training_step does not bring; define "
            f"task_losses(self, batch) in {type(pl_module).__name__}, returning a dict of the losses of "
            f"{', '.join(module.tasks)}, {otherwise}"
        )


Named = tuple[Mapping[str, Tensor], Mapping[str, Any] | None]
"""Losses by task, and how many samples each is the mean of, where that is said."""


def task_losses(owner: str, pl_module: Any, batch: Any) -> Named:
    """What the LightningModule says of a batch: losses by task, or those and counts.

    Raises:
        TypeError: If the answer is of another kind.
        ValueError: If it names a task that no MultiTaskLoss of the module has.
    """
    answer = pl_module.task_losses(batch)
    losses, counts = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    if not isinstance(losses, Mapping) or not (counts is None or isinstance(counts, Mapping)):
        raise TypeError(
            f"{owner}: {type(pl_module).__name__}.task_losses must return a dict of losses by task, or a pair of such "
            f"a dict and one of counts, got {type(answer).__name__}"
        )
    known = {task for module in pl_module.modules() if isinstance(module, MultiTaskLoss) for task in module.tasks}
    unknown = [task for task in losses if task not in known]
    if unknown:
        raise ValueError(
            f"{owner}: {type(pl_module).__name__}.task_losses names {', '.join(map(repr, unknown))}; "
            f"the tasks are {', '.join(sorted(known))}"
        )
    return losses, counts


def hand_to(module: MultiTaskLoss, how: Literal["observe_after", "observe_validation"], named: Named) -> bool:
    """Give an objective the losses it knows; whether there were any."""
    losses, counts = named
    own = {task: loss for task, loss in losses.items() if task in module.tasks}
    if own:
        number = None if counts is None else {task: counts[task] for task in own if task in counts}
        getattr(module, how)(own, counts=number)
    return bool(own)


# what a look aside must leave as it was


RandomState = tuple[Any, Any, Tensor, Tensor | None]


def random_state() -> RandomState:
    """Where the global random generators stand: Python's, NumPy's, torch's, and that of the current CUDA device."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def set_random_state(state: RandomState) -> None:
    """Put them back there."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


@contextmanager
def same_norms(root: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms as they were, which forwards in training mode would move."""
    kept = [
        (buffer, buffer.clone())
        for module in root.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats
        for buffer in module.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule is in its own mode again."""
    modes = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """The stage of a validation, for batch hooks that ask for it."""
    stage = trainer.state.stage
    trainer.state.stage = type(stage).VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def transferred(trainer: Any, pl_module: Any, batch: Any, place: int = 0) -> Any:
    """A loader's batch as the module's hooks want it: converted, moved to the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=place)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=place)
