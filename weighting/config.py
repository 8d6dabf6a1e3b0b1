"""Objects that print as the call that rebuilds them, and argument checks that say what is wrong."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LONGEST_TABLE = 64


class Configured:
    """Remembers the arguments it was constructed with, so that ``eval(repr(x))`` rebuilds ``x``.

    Tables of more than 64 entries print as shape and checksum, foreign objects in angle brackets; neither is rebuilt.
    """

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Configured:  # noqa: PYI034
        self = super().__new__(cls)
        object.__setattr__(self, "_given", (args, kwargs))
        return self

    def __repr__(self) -> str:
        args, kwargs = self._given
        signature = inspect.signature(type(self).__init__)
        bound = signature.bind(self, *args, **kwargs).arguments
        parts: list[str] = []
        for place, (name, parameter) in enumerate(list(signature.parameters.items())[1:]):
            if name not in bound:
                continue
            value = bound[name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                parts += [_show(item) for item in value]
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                parts += [f"{key}={_show(item)}" for key, item in value.items()]
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                parts.append(f"{name}={_show(value)}")
            else:
                parts.append(f"{name}={_show(value)}" if place else _show(value))
        return f"{type(self).__name__}({', '.join(parts)})"


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.tolist() if value.numel() <= _LONGEST_TABLE else value.detach().cpu()
    elif hasattr(value, "tolist"):  # numpy
        value = value.tolist()
    if isinstance(value, Tensor):
        return f"<{tuple(value.shape)} crc32 {zlib.crc32(value.contiguous().numpy().tobytes()):08x}>"
    if isinstance(value, (list, tuple, range)) and len(value) > _LONGEST_TABLE:
        return f"<({len(value)},) crc32 {zlib.crc32(repr(list(value)).encode()):08x}>"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, (Configured, str, bytes, int, float, complex, list, tuple, dict, range, type(None))):
        return repr(value)
    return f"<{value!r}>"  # somebody else's object: its repr need not rebuild it


def owner_name(owner: object) -> str:
    """Name used at the head of an error message."""
    return owner if isinstance(owner, str) else type(owner).__name__


def check_number(
    owner: object,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a float, or raise naming the owner, the argument, the rule and the value found.

    Raises:
        TypeError: If the value is not a real number.
        ValueError: If it is not finite or outside the range.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner_name(owner)}: {name} must be a number, got {value!r} ({type(value).__name__})")
    inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    if not (math.isfinite(value) and inside):
        rules = ["finite"]
        if low > -math.inf:
            rules.append(f"{'>' if open_low else '>='} {low:g}")
        if high < math.inf:
            rules.append(f"{'<' if open_high else '<='} {high:g}")
        raise ValueError(f"{owner_name(owner)}: {name} must be {' and '.join(rules)}, got {value!r}")
    return float(value)


def check_whole(owner: object, name: str, value: Any, *, low: int = 0) -> int:
    """Return ``value`` as an int of at least ``low``, or raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner_name(owner)}: {name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < low:
        raise ValueError(f"{owner_name(owner)}: {name} must be >= {low}, got {value!r}")
    return value


def check_choice(owner: object, name: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``, or raise naming them."""
    if value not in choices:
        raise ValueError(f"{owner_name(owner)}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def as_table(owner: object, name: str, values: Any, *, low: float = 0.0) -> Tensor:
    """Return ``values`` as a float64 vector of finite numbers, all at least ``low``.

    Accepts any sequence, array or tensor. Raises ``TypeError`` or ``ValueError`` naming the owner and the first entry
    that breaks the rule.
    """
    try:
        if isinstance(values, Tensor) and values.is_complex():
            raise TypeError
        table = torch.as_tensor(values, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{owner_name(owner)}: {name} must be a sequence of numbers, got {type(values).__name__}"
        ) from error
    if table.ndim != 1 or table.numel() == 0:
        raise ValueError(
            f"{owner_name(owner)}: {name} must be a non-empty vector (one number per class), "
            f"got shape {tuple(table.shape)}"
        )
    wrong = ~torch.isfinite(table) | (table < low)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"{owner_name(owner)}: {name} must be finite and >= {low:g}, got {table[at].item():g} at position {at}"
        )
    return table


def readable(tensor: Tensor, *, wait: bool = False) -> bool:
    """Whether Python may look at the values: eager, outside ``torch.func`` transforms, and on the CPU.

    Elsewhere looking is a graph break, an error, or (on a device, allowed by ``wait``) a synchronisation.
    """
    return not (tensor.is_meta or (tensor.device.type != "cpu" and not wait) or watched())


def watched() -> bool:
    """Whether ``torch.compile`` or a ``torch.func`` transform is looking on: plain operations only, and no values."""
    if torch.compiler.is_compiling():
        return True
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())
