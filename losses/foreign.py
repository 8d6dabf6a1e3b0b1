"""Modules of other libraries: all they remember as one tensor, and a loan of them that leaves no trace."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OWN_TO_TORCH = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class Unsaved(TypeError):
    """A module remembers something that no checkpoint can hold."""


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name not in _OWN_TO_TORCH}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    return isinstance(value, (Tensor, *_PLAIN))


def _mapped(value: Any, change: Any) -> Any:
    """``value`` with every tensor in it changed; lists, tuples and dicts are new ones."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def fixtures(module: nn.Module) -> dict[str, Any]:
    """What a module holds that is no number, at construction: its functions and helpers, taken for configuration."""
    return {
        f"{path}.{name}": value
        for path, part in module.named_modules()
        for name, value in _attributes(part).items()
        if not _plain(value) and not isinstance(value, torch.optim.Optimizer)
    }


def pack(module: nn.Module, fixed: dict[str, Any]) -> Tensor:
    """Everything a module remembers (parameters, buffers, plain attributes, its own optimizers) as bytes.

    Raises:
        Unsaved: If it remembers something else that was not there in ``fixed``.
    """
    places = {id(parameter): name for name, parameter in module.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    for path, part in module.named_modules():
        plain, optimizers = {}, {}
        for name, value in _attributes(part).items():
            if isinstance(value, torch.optim.Optimizer):
                held = [[places[id(parameter)] for parameter in group["params"]] for group in value.param_groups]
                optimizers[name] = {"kind": type(value).__name__, "held": held, "state": value.state_dict()}
            elif _plain(value):
                plain[name] = value
            elif fixed.get(f"{path}.{name}") is not value:
                raise Unsaved(f"{type(part).__name__} keeps {name!r} ({type(value).__name__}), which cannot be saved")
        state[path] = {
            "plain": plain,
            "optimizers": optimizers,
            "buffers": dict(part._buffers),
            "parameters": {name: p.data for name, p in part._parameters.items() if p is not None},
        }
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def holds_data(packed: Tensor) -> bool:
    """Whether what :func:`pack` took are numbers, not those of a module on the ``meta`` device."""
    if packed.is_meta:
        return False
    found: list[Tensor] = []
    _mapped(torch.load(io.BytesIO(bytes(packed.tolist())), weights_only=True), lambda tensor: found.append(tensor))
    return not any(tensor.is_meta for tensor in found)


@torch.no_grad()
def unpack(module: nn.Module, packed: Tensor) -> None:
    """Give a module of the same kind what :func:`pack` took."""
    state = torch.load(io.BytesIO(bytes(packed.tolist())), weights_only=True)
    places = dict(module.named_parameters())
    for path, part in module.named_modules():
        saved = state[path]
        for name, value in saved["parameters"].items():
            part.get_parameter(name).copy_(value)
        for name, value in saved["buffers"].items():
            part._buffers[name] = value
        for name, value in _attributes(part).items():
            if isinstance(value, torch.optim.Optimizer):
                vars(part)[name] = None
        vars(part).update(saved["plain"])
        for name, found in saved["optimizers"].items():
            groups = [
                {
                    **{key: value for key, value in group.items() if key != "params"},
                    "params": [places[n] for n in names],
                }
                for group, names in zip(found["state"]["param_groups"], found["held"], strict=True)
            ]
            optimizer = getattr(torch.optim, found["kind"])(groups, lr=groups[0]["lr"])
            optimizer.load_state_dict(found["state"])
            vars(part)[name] = optimizer


def convert(module: nn.Module, change: Any) -> None:
    """Apply a change of dtype or device to what ``module.to`` forgets: plain tensor attributes, its optimizers."""
    for part in module.modules():
        for name, value in _attributes(part).items():
            if isinstance(value, torch.optim.Optimizer):
                for held in value.state.values():
                    held.update({key: _mapped(item, change) for key, item in held.items() if key != "step"})
            elif _plain(value):
                vars(part)[name] = _mapped(value, change)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else change(buffer)


@contextmanager
def borrowed(module: nn.Module, keep: Tensor | None = None) -> Iterator[None]:
    """Use a module, then find it as it was.

    With ``keep``, a ``(K,)`` bool tensor, everything of shape ``(K,)`` in it is cut to the kept entries meanwhile.
    """

    def cut(value: Tensor) -> Tensor:
        return value[keep] if keep is not None and value.shape == keep.shape else value.clone()

    before = [(p, _attributes(p), dict(p._buffers), dict(p._parameters)) for p in module.modules()]
    try:
        for part, own, buffers, parameters in before:
            vars(part).update({name: _mapped(value, cut) for name, value in own.items() if _plain(value)})
            part._buffers.update({name: None if value is None else cut(value) for name, value in buffers.items()})
            if keep is not None:
                for name, parameter in parameters.items():
                    if parameter is not None and parameter.shape == keep.shape:
                        part._parameters[name] = parameter[keep]  # type: ignore[assignment]  # for this loan only
        yield
    finally:
        for part, own, buffers, parameters in before:
            for name in _attributes(part).keys() - own.keys():
                del vars(part)[name]
            vars(part).update(own)
            part._buffers.clear()
            part._buffers.update(buffers)
            part._parameters.update(parameters)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on ``seed`` alone, the same on every rank; nobody else's are touched."""
    on = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on):
        torch.manual_seed(seed)
        yield
