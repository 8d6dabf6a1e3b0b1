"""State that every rank agrees on, and the events that move it.

Two kinds of numbers live in a :class:`Dynamic`:

- **state** (:meth:`Dynamic.add_state`): a buffer, equal on all ranks, saved, float64 or int64 whatever the model's
  dtype;
- **pending sums** (:meth:`Dynamic.add_pending`) and **rows** (:meth:`Dynamic.add_rows`): what this rank has seen since
  the last commit. Neither buffer (DDP's buffer broadcast would overwrite it) nor saved.

:func:`drive` turns the second into the first: one packed all-reduce of the sums of every module at once (and messages
that join their rows, where there are any), then each commits.
"""

from __future__ import annotations

import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import Configured, check_choice, check_whole
from .ranks import Shard, collect, shards

Event = Literal["never", "fit", "forward", "step", "epoch", "validation"]
"""When state changes. ``fit`` comes before training, ``forward`` inside the call, the rest after what they name."""

Sync = Literal["auto"] | Callable[[Tensor], Tensor] | None
"""How pending sums are added over ranks: torch.distributed where initialised, a function, or not at all."""

EVENTS: tuple[Event, ...] = get_args(Event)
_COUNTED: tuple[Event, ...] = ("forward", "step", "epoch", "validation")
_MOST_WAITING = 10_000
"""Forwards whose rows may wait for a commit; more than that means that nobody sends events."""


class _Built(ABCMeta):
    """Builds on the CPU what is built under ``torch.device("meta")``: constants and first states are values."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type != "meta":
            return super().__call__(*args, **kwargs)
        with torch.device("cpu"):
            made = super().__call__(*args, **kwargs)
        for part in made.modules():
            if isinstance(part, Dynamic):
                part._placeholders = True
        return made


class Dynamic(Configured, nn.Module, metaclass=_Built):
    """A module with declared state that events change. Base of weightings, schedules and logit transforms.

    Subclasses declare everything in ``__init__`` and override :meth:`commit` and :meth:`refresh`; both run under
    ``no_grad`` and must give the same result on every rank.
    """

    update_on: Event = "never"
    """The event at which this module's output changes. Instances may set their own."""
    sync: Sync = "auto"
    opaque: ClassVar[bool] = False
    """True where events must not reach the modules inside."""
    asleep: bool = False
    """True while events pass this module by (``MultiTaskLoss.freeze``)."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: dict[str, Tensor] = {}
        self._pending_on: dict[str, Event] = {}
        self._numbers: set[str] = set()
        self._rows: dict[str, list[Tensor]] = {}
        self._widths: dict[str, int] = {}
        self._exact: set[str] = set()
        self._tables: dict[str, Tensor] = {}
        self._placeholders = False
        self._ticks: list[int] | None = None
        if self.update_on != "never":
            self.track_events()

    # declaration

    def add_state(self, name: str, value: Tensor) -> None:
        """Declare state: a saved buffer that keeps its dtype under ``.half()`` and is equal on all ranks."""
        self.register_buffer(name, value)
        self._exact.add(name)

    def add_table(self, name: str, value: Tensor) -> None:
        """Declare a constant: a buffer that moves with the module, keeps its dtype and value, and is not saved."""
        self.register_buffer(name, value, persistent=False)
        self._exact.add(name)
        self._tables[name] = value

    def add_pending(self, name: str, *shape: int, on: Event | None = None) -> None:
        """Declare a float64 sum that this rank collects between commits, zero at first.

        It is committed at every step (and at the event that this module lives on), or only at the event ``on``.
        """
        # torch.compile drops what is added to a 0-d tensor on the CPU, so a single number is kept as a vector
        self._pending[name] = torch.zeros(shape or (1,), dtype=torch.float64)
        if not shape:
            self._numbers.add(name)
        if on is not None:
            self._pending_on[name] = on
        self.track_events()

    def add_rows(self, name: str, width: int, *, on: Event | None = None) -> None:
        """Declare float64 rows that this rank collects between commits, any number of them.

        They are committed when sums are, as ``(N, width)``: those of all ranks, in the order of ranks.
        """
        self._rows[name] = []
        self._widths[name] = width
        if on is not None:
            self._pending_on[name] = on
        self.track_events()

    def track_events(self) -> None:
        """Declare the counters that make updates idempotent and that schedules read."""
        if "clock" not in self._buffers:
            self.add_state("clock", torch.zeros(len(_COUNTED), dtype=torch.int64))

    @property
    def tracks_events(self) -> bool:
        """Whether events reach this module at all."""
        return "clock" in self._buffers

    def get_buffer(self, target: str) -> Tensor:
        """The buffer of that name; the same as torch's, without its walk over dots for one of this module's own."""
        own = self._buffers.get(target)
        return super().get_buffer(target) if own is None else own

    # what happened so far

    def completed(self, event: Event) -> int:
        """How many events of this kind are behind us, as a Python number (read from the device once)."""
        if not self.tracks_events:
            return 0
        if event == "forward":
            return int(self.get_buffer("clock")[0])
        if self._ticks is None:
            self._ticks = [int(n) for n in self.get_buffer("clock").tolist()]
        return self._ticks[_COUNTED.index(event)]

    def position(self, event: Event) -> Tensor:
        """The same number as a 0-d tensor on the module's device, safe to read under ``torch.compile``."""
        return self.get_buffer("clock")[_COUNTED.index(event)]

    def awaits(self, event: Event, index: int | None) -> bool:
        """Whether this event would do anything: one that was seen before does not."""
        if self.asleep:
            return False
        return self.tracks_events and (event == "fit" or index is None or index >= self.completed(event))

    def _collects(self, event: Event) -> list[str]:
        """Names of the pending sums and rows that an event commits."""
        # in mid-accumulation an epoch or validation is no step, except for what lives on it
        usual = event in ("step", "forward", self.update_on)
        apart = self._pending_on
        if not apart:
            return [*self._pending, *self._rows] if usual else []
        return [name for name in (*self._pending, *self._rows) if (apart[name] == event if name in apart else usual)]

    def _tick(self, event: Event, index: int | None) -> None:
        if event == "fit":
            return
        if event == "forward":  # never indexed, and inside compiled code: tensors only
            self.get_buffer("clock")[0].add_(1)
            return
        self._placeholders = False  # whoever loads has finished
        done = self.completed(event) + 1 if index is None else index + 1
        if self._ticks is not None:
            self._ticks[_COUNTED.index(event)] = done
        self.get_buffer("clock").select(0, _COUNTED.index(event)).fill_(done)

    # what subclasses fill in

    def accumulate(self, name: str, value: Tensor) -> None:
        """Add to a pending sum, on this rank only, without communication."""
        pending = self._pending[name]
        if pending.device != value.device:
            # where nothing has values yet there is nothing to carry over
            moved = torch.zeros_like(pending, device=value.device) if pending.is_meta else pending.to(value.device)
            pending = self._pending[name] = moved
        value = value.detach().to(pending.dtype)
        pending.add_(value.reshape(1) if name in self._numbers else value)

    def collect(self, name: str, rows: Tensor) -> None:
        """Add ``(n, width)`` pending rows, on this rank only, without communication."""
        waiting = self._rows[name]
        if len(waiting) >= _MOST_WAITING:
            warnings.warn(
                f"{type(self).__name__}: {_MOST_WAITING} training forwards without an update('step'); what they saw "
                "is dropped. Send events (or attach WeightingCallback), or call eval() where nothing is trained",
                stacklevel=2,
            )
            waiting.clear()
        waiting.append(rows.detach().double())

    def commit(self, sums: dict[str, Tensor]) -> None:
        """Take what was pending on all ranks into the state. ``sums`` (and rows) are this module's own copies."""

    def refresh(self, event: Event, **signals: Any) -> None:
        """React to an event, after what was pending has been committed."""

    def discard(self, names: Iterable[str] | None = None) -> None:
        """Drop what this rank has seen since the last commit (some sums, or all), as after steps that were undone."""
        for name in (*self._pending, *self._rows) if names is None else names:
            if name in self._rows:
                self._rows[name].clear()
            else:
                self._pending[name].zero_()

    def reset(self) -> None:
        """Forget what was learned from the data: events, sums and (in subclasses) state."""
        self.discard()
        if self.tracks_events:
            self.get_buffer("clock").zero_()
            self._ticks = None

    # driving

    def update(self, event: Event, *, index: int | None = None, **signals: Any) -> None:
        """Tell this module, and all inside it, that something happened.

        Args:
            event: ``"fit"``, ``"forward"``, ``"step"``, ``"epoch"`` or ``"validation"``.
            index: Number of the step, epoch or validation that has just ended, from 0, over the module's whole life:
                one that was seen before changes nothing, so an update may be sent twice, and a loop that starts
                counting anew on a trained module must :meth:`reset` it. Without an index the event counts as the next.
            **signals: What the event brings (for ``fit``: ``class_counts``).
        """
        drive(dynamics(self), event, index=index, **signals)

    # plumbing of nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dynamic:
        before = {name: self._buffers[name] for name in self._exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            moved, source = self._buffers[name], self._tables.get(name, old)
            if moved is None or source is None or moved is old:
                continue
            # only the device is taken over: neither a narrower dtype nor the emptiness of to_empty()
            self._buffers[name] = (
                torch.empty_like(source, device=moved.device) if source.is_meta else source.to(moved.device)
            )
        for name, pending in self._pending.items():
            device = fn(torch.zeros(0, device=pending.device)).device
            self._pending[name] = torch.zeros_like(pending, device=device) if pending.is_meta else pending.to(device)
        for waiting in self._rows.values():
            kept = [rows for rows in waiting if not rows.is_meta]
            waiting[:] = [rows.to(fn(torch.zeros(0, device=rows.device)).device) for rows in kept]
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and "_tables" in self.__dict__:
            value = self._kept(name, value)
        super().__setattr__(name, value)

    def _kept(self, name: str, value: Tensor) -> Tensor:
        """What an assignment leaves: loaders that build on the meta device put uninitialised tensors in place."""
        if name in self._tables:
            return self._tables[name].to(value.device)
        if not self._placeholders or getattr(value, "_is_hf_initialized", False):
            return value  # transformers marks what came from the file
        own = self._buffers.get(name) if name in self._exact else self._parameters.get(name)
        if own is None or own.is_meta:
            return value
        held = own.detach().to(value.device)
        return nn.Parameter(held, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else held

    def train(self, mode: bool = True) -> Dynamic:
        self._placeholders = False  # whoever loads has finished
        super().train(mode)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._ticks = None
        self.discard()  # it belongs to the trajectory that is being left
        absent = [
            name
            for name in self._exact
            if name not in self._non_persistent_buffers_set and prefix + name not in state_dict
        ]
        for name in absent:  # a checkpoint from before this module was there
            state_dict[prefix + name] = self._buffers[name]
        if absent:
            warnings.warn(
                f"{type(self).__name__}: the checkpoint has no {', '.join(sorted(prefix + n for n in absent))}; "
                "starting fresh",
                stacklevel=2,
            )
        waiting, self._placeholders = self._placeholders, False  # with assign=True torch assigns what it loads
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._placeholders = waiting


def dynamics(root: nn.Module) -> Iterator[Dynamic]:
    """Every :class:`Dynamic` in a module tree, each once, parents first, in an order equal on all ranks."""
    seen: set[int] = set()

    def walk(module: nn.Module) -> Iterator[Dynamic]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, Dynamic):
            yield module
            if module.opaque:
                return
        for child in module.children():
            yield from walk(child)

    return walk(root)


@torch.no_grad()
def drive(modules: Iterable[Dynamic], event: Event, *, index: int | None = None, **signals: Any) -> None:
    """Deliver one event to many modules: add their pending sums over the ranks in one all-reduce, commit, refresh.

    Every rank must call this with the same modules and events. Events seen before (by ``index``) are left out.
    """
    check_choice("update", "event", event, EVENTS[1:])
    if index is not None:
        check_whole("update", "index", index)
    due = [module for module in modules if module.awaits(event, index)]
    if event != "fit":
        asked = [(module, module._collects(event)) for module in due]
        collecting = [(module, names) for module, names in asked if names]
        for (module, names), sums in zip(collecting, _gather(collecting), strict=True):
            module.commit(sums)
            module.discard(names)
    for module in due:
        module.refresh(event, **signals)
        module._tick(event, index)


def _gather(modules: list[tuple[Dynamic, list[str]]]) -> list[dict[str, Tensor]]:
    """What waits on all ranks under each module's names; one communication per kind of ``sync``, and two for rows."""
    local: list[dict[str, Tensor]] = []
    packs: dict[Sync, list[tuple[dict[str, Tensor], str]]] = {}
    joining: list[tuple[dict[str, Tensor], str]] = []
    for module, names in modules:
        found: dict[str, Tensor] = {}
        local.append(found)
        for name in names:
            if name in module._rows:
                found[name] = _stacked(module, name)
                if communicates(module.sync):
                    if module.sync != "auto":
                        raise TypeError(f"{type(module).__name__}: rows need sync 'auto' or None, got {module.sync!r}")
                    joining.append((found, name))
            else:
                waiting = module._pending[name].clone()
                found[name] = waiting.reshape(()) if name in module._numbers else waiting
                packs.setdefault(module.sync, []).append((found, name))
    for sync, slots in packs.items():
        if not communicates(sync):
            continue
        flat = over_ranks(torch.cat([sums[name].reshape(-1) for sums, name in slots]), sync)
        parts = torch.split(flat, [sums[name].numel() for sums, name in slots])
        for (sums, name), part in zip(slots, parts, strict=True):
            sums[name] = part.reshape(sums[name].shape)
    _join(joining)
    return local


def _stacked(module: Dynamic, name: str) -> Tensor:
    waiting = module._rows[name]
    if len(waiting) == 1:
        return waiting[0]
    return torch.cat(waiting) if waiting else torch.zeros(0, module._widths[name], dtype=torch.float64)


def _join(slots: list[tuple[dict[str, Tensor], str]]) -> None:
    """Put the rows of all ranks in the place of this rank's."""
    if not slots:
        return
    own = [found[name] for found, name in slots]
    device = next((rows.device for rows in own if rows.numel()), None)
    if device is None:  # this rank has seen nothing, and gloo and nccl want to be told where that is
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else own[0].device
    layout = shards("update", [len(rows) for rows in own], str([rows.shape[1] for rows in own]), device)
    flat = torch.cat([rows.reshape(-1).to(device) for rows in own])
    sizes = [
        sum(part.sizes[rank] * rows.shape[1] for part, rows in zip(layout, own, strict=True))
        for rank in range(dist.get_world_size())
    ]
    everything = collect(flat, Shard(tuple(sizes), dist.get_rank()))
    found_parts = torch.split(everything, sizes)
    pieces: list[list[Tensor]] = [[] for _ in own]
    for rank, part in enumerate(found_parts):
        lengths = [shard.sizes[rank] * rows.shape[1] for shard, rows in zip(layout, own, strict=True)]
        for place, piece in enumerate(torch.split(part, lengths)):
            pieces[place].append(piece.reshape(-1, own[place].shape[1]))
    for (found, name), joined in zip(slots, pieces, strict=True):
        found[name] = torch.cat(joined)


def communicates(sync: Sync) -> bool:
    """Whether a sum over ranks is more than this rank's part."""
    if sync == "auto":
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return sync is not None


def over_ranks(part: Tensor, sync: Sync) -> Tensor:
    """The sum of every rank's ``part``, which may be overwritten."""
    if sync == "auto":
        dist.all_reduce(part)
        return part
    return part if sync is None else sync(part)
