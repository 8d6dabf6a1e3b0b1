"""Balance the gradients of several tasks: what a method says of their Jacobian or Gramian becomes ``.grad``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reweigh.weighting.base import learned_parameters
from reweigh.weighting.config import check_choice, check_whole
from reweigh.weighting.dynamics import communicates

from . import foreign
from .criteria.task import Counts, Losses, Mask
from .multitask import MultiTaskLoss

Method = Callable[[Tensor], Tensor]


class _Call(NamedTuple):
    """What one call of the balancer leaves for its backward."""

    roots: dict[int, Tensor]
    """Each task's own loss, by place, of the tasks that this rank has."""
    values: Tensor
    share: Tensor | None
    """How much more each task's gradient counts here than in this rank's own mean."""


class GradientBalancer(nn.Module):
    r"""Weights for the tasks' gradients, from the gradients themselves: the socket for TorchJD's methods.

    .. math:: \texttt{grad} \mathrel{+}= J^\top w \qquad w = \text{method}(J J^\top) \qquad
        J_k = \nabla (w'_k L_k)

    - :math:`J`: one row per task that is present; absent ones have no row and weight 0
    - :math:`w'_k L_k`: a task's loss as a :class:`~reweigh.losses.MultiTaskLoss` weighs it, 1 where none is given

    A call reads the losses and returns them as a ``(K,)`` vector; :meth:`backward` takes losses, or that vector times
    a number (a ``GradScaler``'s, one over the micro-batches), and adds to ``.grad`` as a backward does, so that
    clipping, optimizers and accumulation follow as usual. The method sees gradients without that number. One backward
    per call. It costs one backward pass per present task, and memory for as many gradients.

    Several processes:
        ``sync="weights"``: each rank weighs the gradients of its own data, the mean of the weights over ranks (``2 K``
        numbers) is used by all, and gradients go through ``DistributedDataParallel`` or whatever else averages
        ``.grad``. Ranks stay equal. An approximation: weights of the joined batch are not the mean of weights. As in
        any backward through ``DistributedDataParallel``, every rank needs at least one task.
        ``sync="jacobian"``: the Jacobian is averaged over ranks (``K`` gradients instead of one), then the same is
        computed everywhere: the result is that of one process on the joined batch, uneven (``counts=``) and missing
        tasks included. ``.grad`` is then complete and passes ``DistributedDataParallel`` by, which must not be
        ``static_graph``.
        Every rank must call as often as the others, with ``{}`` where it has no task. Random methods draw the same on
        all ranks.

    A gradient that is not finite (float16 overflow) is not balanced: weights are 1, so that a ``GradScaler`` finds it.

    Args:
        method: A ``torchjd.aggregation`` weighting or aggregator, or a function: of the ``(K, K)`` Gramian to ``(K,)``
            weights, or with ``on="jacobian"`` of the ``(K, P)`` Jacobian to a ``(P,)`` direction.
        tasks: Their names, in order; or a :class:`~reweigh.losses.MultiTaskLoss` whose weighted losses are balanced
            (then hold it here only, as ``balancer.loss``). Its weighting must not be learned.
        on: ``"gramian"`` or ``"jacobian"``; ``None``: what a TorchJD object takes, a Gramian for a function.
        sync: ``"weights"`` or ``"jacobian"``.
        shared: What the method looks at: a module, or parameters, such as the trunk that tasks share. Other parameters
            get each task's gradient times its weight, or times 1 where the method gives a direction. Default: all.
        seed: For random methods: call :math:`n` draws with seed ``seed + n``.

    State and cadence:
        The number of calls, and what the method remembers (as bytes), saved.

    Shapes:
        Scalars by task name, or a ``(K,)`` tensor; returns ``(K,)``.

    Raises:
        TypeError: If the method does not fit ``on``, or the weighting learns.
        ValueError: If the method returns a wrong shape, or parameters are not known.

    Example:
        >>> import torch
        >>> from reweigh import GradientBalancer
        >>> def equal_length(gramian):  # w_k = 1 / |g_k|
        ...     return gramian.diagonal().rsqrt()
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> balancer = GradientBalancer(equal_length, ["near", "far"])
        >>> near, far = net(torch.tensor([3.0, 4.0])), net(torch.tensor([0.0, 2.0]))
        >>> {name: round(w.item(), 3) for name, w in balancer.backward({"near": near, "far": far}).items()}
        {'near': 0.2, 'far': 0.5}
        >>> net.weight.grad
        tensor([[0.6000, 1.8000]])
    """

    calls: Tensor

    def __init__(
        self,
        method: Method,
        tasks: Sequence[str] | MultiTaskLoss,
        *,
        on: Literal["gramian", "jacobian"] | None = None,
        sync: Literal["weights", "jacobian"] = "weights",
        shared: nn.Module | Iterable[nn.Parameter] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not callable(method):
            raise TypeError(f"GradientBalancer: method must be callable, got {type(method).__name__}")
        if on is not None:
            check_choice(self, "on", on, ("gramian", "jacobian"))
        self.sync = check_choice(self, "sync", sync, ("weights", "jacobian"))
        self.seed = check_whole(self, "seed", seed)
        self.loss = tasks if isinstance(tasks, MultiTaskLoss) else MultiTaskLoss(tasks)
        if learned_parameters(self.loss) or (self.loss.weighting is not None and not self.loss.weighting.detached):
            raise TypeError(
                f"GradientBalancer: {self.loss.weighting!r} is learned by the gradient that is balanced here; "
                "use a weighting that is not, or none"
            )
        self._method, self.on, self.directs = _role(method, on)
        self._fixed = foreign.fixtures(self._method[0]) if isinstance(self._method[0], nn.Module) else {}
        if isinstance(shared, nn.Module):
            shared = shared.parameters()
        self._shared = None if shared is None else tuple(shared)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self._open: _Call | None = None
        self._weights: dict[str, Tensor] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return self.loss.tasks

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of the last backward by task name, 0 for absent ones; empty where the method gives a direction."""
        return dict(self._weights)

    def summary(self) -> dict[str, Tensor]:
        """The same as ``weight/<task>``, for loggers."""
        return {f"weight/{task}": weight for task, weight in self._weights.items()}

    # the call

    def forward(self, losses: Losses, *, mask: Mask | None = None, counts: Counts | None = None) -> Tensor:
        """The ``(K,)`` weighted losses, 0 for absent tasks; arguments as for :class:`~reweigh.losses.MultiTaskLoss`."""
        criterion = self.loss.criterion
        if isinstance(losses, Tensor):
            self._check_shape(losses)
            losses = dict(zip(self.tasks, losses.unbind(), strict=True))
        # aliases: a loss that is part of another one still has a row of its own
        named = {name: v.view_as(v) if isinstance(v, Tensor) else v for name, v in losses.items()}
        terms = criterion.terms(named, mask=mask, counts=counts)
        roots = {k: named[task] for k, task in enumerate(self.tasks) if task in named and named[task].requires_grad}
        learn = self.training and torch.is_grad_enabled()
        vector, _ = self.loss._weigh(terms, learn=learn)
        share = None
        if learn and communicates(criterion.sync):
            joined = terms.find("count")
            given = criterion._counts(counts, vector)
            if joined is not None:
                given = torch.ones_like(joined) if given is None else given
                share = torch.where(joined > 0, given / torch.where(joined > 0, joined, 1.0), 1.0)
                share = torch.where(share > 0, share, 1.0)
        self._open = _Call(roots, vector.detach(), share)
        return vector

    def _check_shape(self, vector: Tensor) -> None:
        if vector.shape != (len(self.tasks),):
            raise ValueError(
                f"GradientBalancer: losses must hold one number per task ({', '.join(self.tasks)}), "
                f"got shape {tuple(vector.shape)}"
            )

    def backward(
        self,
        losses: Losses,
        parameters: Iterable[nn.Parameter] | None = None,
        *,
        mask: Mask | None = None,
        counts: Counts | None = None,
        retain_graph: bool = False,
    ) -> dict[str, Tensor]:
        """Add the balanced gradient to ``.grad``.

        Args:
            losses: By task name, or as a ``(K,)`` tensor in their order; or, after a call of this module, the vector
                that it returned, perhaps times a number.
            parameters: Those that get a gradient. Default: all that the losses depend on; with ``sync="jacobian"`` in
                several processes they must be given, because losses of one rank may not depend on all of them.
            mask: As in the call, with losses by name.
            counts: As in the call, with losses by name.
            retain_graph: Whether the graph may be used again.

        Returns:
            :attr:`weights`.
        """
        if isinstance(losses, Tensor) and self._open is not None:
            if mask is not None or counts is not None:
                raise ValueError("GradientBalancer: mask= and counts= belong to the call that made the vector")
            self._check_shape(losses)
            vector = losses
        else:
            vector = self(losses, mask=mask, counts=counts)
        call, self._open = self._open, None
        if call is None:
            raise RuntimeError("GradientBalancer: a call left nothing to go backward from")
        several = communicates(self.loss.sync)
        if several and self.sync == "weights" and self.directs:
            raise ValueError(
                f"GradientBalancer: {type(self._method[0]).__name__} gives a direction, not weights that ranks could "
                "average; use sync='jacobian'"
            )
        held = self._parameters_of(vector, parameters, several and self.sync == "jacobian")
        rows = self._rows(vector, call, held, retain_graph)
        with torch.no_grad():
            if several and self.sync == "jacobian":
                self._everywhere(rows, held, call, vector)
            else:
                self._here(rows, held, call, vector, several)
            self.calls += 1
        return self.weights

    # rows

    def _parameters_of(
        self, vector: Tensor, given: Iterable[nn.Parameter] | None, all_ranks: bool
    ) -> list[nn.Parameter]:
        if given is not None:
            own = {id(parameter) for parameter in self.parameters()}
            return [p for p in dict.fromkeys(given) if p.requires_grad and id(p) not in own]
        if all_ranks:
            raise ValueError("GradientBalancer: sync='jacobian' in several processes needs backward(..., parameters=)")
        return _leaves(vector)

    def _rows(
        self, vector: Tensor, call: _Call, held: list[nn.Parameter], retain_graph: bool
    ) -> dict[int, list[Tensor | None]]:
        """Each present task's gradient of every parameter: one backward pass per task."""
        if not call.roots or not held or not vector.requires_grad:
            return {}
        starts: dict[int, tuple[Tensor, Tensor]] = {}
        ones = torch.ones_like(vector)
        # a task's own factor: its weight, what was done to the vector since, this rank's part of the mean
        factors = torch.autograd.grad(vector, list(call.roots.values()), ones, retain_graph=True, allow_unused=True)
        for (place, root), factor in zip(call.roots.items(), factors, strict=True):
            if factor is not None and bool((factor != 0).any()):
                starts[place] = (root, factor)
        rows: dict[int, list[Tensor | None]] = {}
        hooks = {parameter: parameter._backward_hooks for parameter in held if parameter._backward_hooks}
        try:
            for parameter in hooks:  # they run once, on the gradient, not on its parts
                parameter._backward_hooks = None
            for number, (place, (root, slope)) in enumerate(starts.items()):
                keep = retain_graph or number < len(starts) - 1
                rows[place] = list(torch.autograd.grad(root, held, slope, retain_graph=keep, allow_unused=True))
        finally:
            for parameter, held_back in hooks.items():
                parameter._backward_hooks = held_back
        return rows

    # results

    def _here(
        self,
        rows: dict[int, list[Tensor | None]],
        held: list[nn.Parameter],
        call: _Call,
        vector: Tensor,
        several: bool,
    ) -> None:
        """Weights of this rank's rows, averaged over ranks; gradients by an ordinary backward into the parameters."""
        wide, scale = _wide(held), _scale(vector, call.values)
        places, looked = list(rows), self._looked_at(held)
        cells = torch.ones(len(self.tasks), dtype=torch.float64, device=vector.device)
        if call.share is not None:
            cells = call.share.to(cells)
        weights = torch.zeros_like(cells)
        direction: Tensor | None = None
        if places:
            size = (scale * cells[places]).to(wide)
            if self.on == "gramian":
                gramian = _gramian([rows[k] for k in places], looked, wide) / (size[:, None] * size).double()
                found: Tensor = self._ask(gramian)
            else:
                jacobian = torch.stack([_flat(rows[k], held, looked, wide) for k in places])
                found = self._ask(jacobian / size[:, None].to(jacobian.device))
            if self.directs:
                direction = found * scale.to(found)
            else:
                weights[places] = found.to(weights)
        if several:
            here = torch.zeros_like(weights)
            here[places] = 1.0
            both = torch.stack([weights, here])
            dist.all_reduce(both) if self.loss.sync == "auto" else _reduced(both, self.loss.sync)
            weights = both[0] / both[1].clamp(min=1.0)
        self._remember(weights)
        if not places:
            return
        shares = weights[places].tolist() if direction is None else [1.0] * len(places)
        gradients = _combined([rows[k] for k in places], shares, held)
        touched = [gradient is not None for gradient in gradients]
        if direction is not None:
            _unflatten(direction, gradients, held, looked)
        reached = [(p, g) for p, g, some in zip(held, gradients, touched, strict=True) if some and g is not None]
        if reached:
            # parameters are their own graph: this runs the hooks a backward runs (DDP's too), and no pass of the model
            torch.autograd.backward([p for p, _ in reached], [g for _, g in reached])

    def _everywhere(
        self, rows: dict[int, list[Tensor | None]], held: list[nn.Parameter], call: _Call, vector: Tensor
    ) -> None:
        """The same on every rank, from the Jacobian averaged over ranks."""
        wide, looked, size = _wide(held), self._looked_at(held), len(self.tasks)
        sync, places = self.loss.sync, list(rows)
        rest = [i for i in range(len(held)) if i not in looked]
        device = held[0].device if held else vector.device
        # which tasks and parameters any rank has, the scale where it is known, and how many ranks there are
        notes = torch.zeros(size + len(held) + 3, dtype=torch.float64, device=device)
        notes[places] = 1.0
        for row in rows.values():
            for at, part in enumerate(row):
                if part is not None:
                    notes[size + at] = 1.0
        if places:
            notes[-3], notes[-2] = _scale(vector, call.values).to(notes), 1.0
        notes[-1] = 1.0
        notes = _reduced(notes, sync)
        ranks, everyone = notes[-1], [k for k, here in enumerate((notes[:size] > 0).tolist()) if here]
        reached = (notes[size : size + len(held)] > 0).tolist()
        weights = torch.zeros(size, dtype=torch.float64, device=device)
        if not everyone:
            self._remember(weights)
            return
        scale = notes[-3] / notes[-2]
        empty: list[Tensor | None] = [None] * len(held)
        jacobian = torch.stack(
            [_reduced(_flat(rows.get(k, empty), held, looked, wide), sync) / ranks.to(wide) for k in everyone]
        ) / scale.to(wide)
        found = self._ask((jacobian @ jacobian.T).double() if self.on == "gramian" else jacobian)
        if self.directs:
            direction, shares = found, [1.0] * size
        else:
            weights[everyone] = found.to(weights)
            direction, shares = found.to(jacobian) @ jacobian, weights.tolist()
        self._remember(weights)
        mixed = _combined([rows[k] for k in places], [shares[k] for k in places], held) if places else empty
        gradients: list[Tensor | None] = list(empty)
        if rest:
            flat = _reduced(_flat(mixed, held, rest, wide), sync) / ranks.to(wide)
            _unflatten(flat, gradients, held, rest)
        _unflatten(direction * scale.to(direction), gradients, held, looked)
        for parameter, gradient, some in zip(held, gradients, reached, strict=True):
            if some and gradient is not None:
                gradient = gradient.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _looked_at(self, held: list[nn.Parameter]) -> list[int]:
        """Places of the parameters that the method looks at."""
        if self._shared is None:
            return list(range(len(held)))
        shared = {id(parameter) for parameter in self._shared}
        found = [place for place, parameter in enumerate(held) if id(parameter) in shared]
        if not found:
            raise ValueError("GradientBalancer: none of the parameters that get a gradient is in shared=")
        return found

    def _ask(self, matrix: Tensor) -> Tensor:
        """The method's answer, checked; ones where the gradients are not finite."""
        number, length = matrix.shape
        shape = (length,) if self.directs else (number,)
        if not bool(matrix.isfinite().all()):
            return matrix.sum(0) if self.directs else matrix.new_ones(number)
        with foreign.seeded(self.seed + int(self.calls), matrix.device):
            found = self._method[0](matrix)
        if not isinstance(found, Tensor) or found.shape != shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"GradientBalancer: method must return {'a direction' if self.directs else 'weights'} of shape {shape} "
                f"for the {'Gramian' if self.on == 'gramian' else 'Jacobian'} of {number} tasks, got {what}"
            )
        return found.detach()

    def _remember(self, weights: Tensor) -> None:
        self._weights = {} if self.directs else dict(zip(self.tasks, weights.unbind(), strict=True))

    # state

    def get_extra_state(self) -> Tensor:
        method = self._method[0]
        if not isinstance(method, nn.Module):
            return torch.zeros(0, dtype=torch.uint8)
        try:
            return foreign.pack(method, self._fixed)
        except foreign.Unsaved as error:
            warnings.warn(f"GradientBalancer: {error}; after loading the method starts fresh", stacklevel=2)
            return torch.zeros(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        method = self._method[0]
        if isinstance(method, nn.Module) and state.numel():
            foreign.unpack(method, state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None, "_weights": {}}

    def extra_repr(self) -> str:
        return f"{self._method[0]!r}, on={self.on!r}, sync={self.sync!r}"


def _role(method: Any, on: str | None) -> tuple[tuple[Method], str, bool]:
    """The function to call (in a tuple: its parameters and buffers are not ours), on what, and whether it directs."""
    kinds = {kind.__name__ for kind in type(method).__mro__}
    torchjd = sys.modules.get("torchjd.aggregation")  # who gives one of its objects has imported it
    if torchjd is not None and isinstance(method, torchjd.Aggregator):
        by_gramian = getattr(method, "gramian_weighting", None)
        if on != "jacobian" and by_gramian is not None:
            return (by_gramian,), "gramian", False
        if on == "gramian":
            raise TypeError(f"GradientBalancer: {type(method).__name__} needs the Jacobian, use on='jacobian'")
        if "WeightedAggregator" in kinds:
            return (method.weighting,), "jacobian", False
        return (method,), "jacobian", True
    if torchjd is not None and isinstance(method, torchjd.Weighting):
        return (method,), on or ("jacobian" if "_MatrixWeighting" in kinds else "gramian"), False
    return (method,), on or "gramian", on == "jacobian"


def _reduced(part: Tensor, sync: Any) -> Tensor:
    """The sum over ranks."""
    if sync == "auto":
        dist.all_reduce(part)
        return part
    total: Tensor = sync(part)
    return total


def _leaves(vector: Tensor) -> list[nn.Parameter]:
    """The leaf tensors that a vector depends on, in an order that its graph fixes."""
    found: dict[int, Any] = {}
    seen, queue = set(), [vector.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.setdefault(id(leaf), leaf)
        queue += [following for following, _ in node.next_functions]
    return list(found.values())


def _wide(held: list[nn.Parameter]) -> torch.dtype:
    return torch.float64 if any(parameter.dtype == torch.float64 for parameter in held) else torch.float32


def _scale(vector: Tensor, before: Tensor) -> Tensor:
    """What the vector was multiplied by since the call, float64; 1 where that cannot be told."""
    now, before = vector.detach().double(), before.double()
    at = before.abs().argmax()
    ratio = now[at] / torch.where(before[at] != 0, before[at], 1.0)
    return torch.where((before[at] != 0) & ratio.isfinite() & (ratio != 0), ratio, 1.0)


def _gramian(rows: list[list[Tensor | None]], looked: list[int], wide: torch.dtype) -> Tensor:
    """``(K, K)`` float64 inner products, parameter by parameter."""
    first = next(part for row in rows for part in row if part is not None)
    gramian = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=first.device)
    for at in looked:
        have = [k for k, row in enumerate(rows) if row[at] is not None]
        if have:
            block = torch.stack([part.reshape(-1).to(wide) for k in have if (part := rows[k][at]) is not None])
            places = torch.tensor(have, device=gramian.device)
            gramian[places[:, None], places] += (block @ block.T).to(gramian)
    return gramian


def _flat(row: list[Tensor | None], held: list[nn.Parameter], places: list[int], wide: torch.dtype) -> Tensor:
    parts = []
    for at in places:
        part = row[at]
        parts.append(held[at].new_zeros(held[at].numel(), dtype=wide) if part is None else part.reshape(-1).to(wide))
    return torch.cat(parts)


def _unflatten(flat: Tensor, into: list[Tensor | None], held: list[nn.Parameter], places: list[int]) -> None:
    """Cut a flat gradient into those of the parameters at ``places``."""
    sizes = [held[at].numel() for at in places]
    for at, part in zip(places, torch.split(flat, sizes), strict=True):
        into[at] = part.view_as(held[at]).to(held[at].dtype)


def _combined(rows: list[list[Tensor | None]], shares: list[float], held: list[nn.Parameter]) -> list[Tensor | None]:
    """The weighted sum of rows, ``None`` for parameters that none reaches."""
    total: list[Tensor | None] = []
    for at, parameter in enumerate(held):
        mixed: Tensor | None = None
        for row, share in zip(rows, shares, strict=True):
            part = row[at]
            if part is not None:
                mixed = part * share if mixed is None else mixed.add(part, alpha=share)
        total.append(None if mixed is None else mixed.to(parameter.dtype))
    return total
