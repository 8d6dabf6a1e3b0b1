"""What the callbacks share: a base that both Lightning packages accept, and walks over a module tree."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reweigh.weighting.base import Weighting
from reweigh.weighting.dynamics import Dynamic, dynamics
from reweigh.weighting.schedules import Schedule

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


def summaries(found: list[tuple[str, Dynamic]], max_entries: int) -> dict[str, Tensor]:
    """0-d numbers a logger may plot: ``reweigh/<path>/<name>``, with ``/<i>`` for the entries of a vector.

    Vectors longer than ``max_entries`` are given by their smallest, mean and largest entry. No device is read.
    """
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, module in found:
            parts: dict[str, Tensor] = {}
            if isinstance(module, Weighting):
                parts = module.summary()
            elif isinstance(module, Schedule):
                parts = {"value": module()}
            for name, value in parts.items():
                values.update(spell(f"{PREFIX}/{path}/{name}", value.detach(), max_entries))
    return values


def spell(name: str, value: Tensor, max_entries: int) -> dict[str, Tensor]:
    """A tensor as named 0-d tensors."""
    if value.ndim == 0:
        return {name: value}
    flat = value.reshape(-1)
    if flat.numel() <= max_entries:
        return {f"{name}/{i}": entry for i, entry in enumerate(flat.unbind())}
    return {f"{name}/min": flat.min(), f"{name}/mean": flat.double().mean(), f"{name}/max": flat.max()}


def fitting(trainer: Any) -> bool:
    """Whether the Trainer is in ``fit`` and past the sanity check."""
    return bool(trainer.state.fn == "fit") and not trainer.sanity_checking
