"""What the weights do to the loss, seen from outside: numbers for any logger, a table, and a figure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from reweigh.losses.multitask import MultiTaskLoss
from reweigh.losses.objective import Objective
from reweigh.weighting.config import check_number, check_whole
from reweigh.weighting.dynamics import Dynamic
from reweigh.weighting.terms import LossTerms

from ._base import PREFIX, LightningCallback, named_dynamics, summaries
from .token_metrics import frequency_bins

_SUMS = 5
"""Entries of a window's sums before the per-class ones: n, n l, n w l, n w, n w^2."""
_ROWS = 3
"""Sums per class: n, n w, n l."""


class _Window:
    """Sums over the terms that an objective has seen since the last row. They stay on the loss's device."""

    def __init__(self, tasks: tuple[str, ...] = (), *, unweighted: bool = False) -> None:
        self.tasks, self.unweighted = tasks, unweighted
        self.sums: Tensor | None = None
        self.classes: Tensor | None = None

    @torch.no_grad()
    def __call__(self, objective: Objective, terms: LossTerms, weights: Tensor | None) -> None:
        loss, counts = terms.loss.double(), terms.counts().double()
        weight = torch.ones_like(loss) if weights is None else weights.double()
        seen = counts * weight
        new = torch.stack([part.sum() for part in (counts, counts * loss, seen * loss, seen, seen * weight)])
        self.sums = new if self.sums is None else self.sums + new
        if terms.category is None or terms.num_classes is None or (weights is None and not self.unweighted):
            return
        at = terms.spread(terms.category).expand_as(loss).reshape(-1)
        if isinstance(objective, MultiTaskLoss):
            loss = loss * objective.criterion.divisor()  # each in its own units
        rows = torch.stack([part.reshape(-1) for part in (counts, seen, counts * loss)])
        classes = rows.new_zeros(_ROWS, terms.num_classes).index_add(1, at, rows)
        self.classes = classes if self.classes is None else self.classes + classes

    @property
    def num_classes(self) -> int:
        return 0 if self.classes is None else self.classes.shape[1]

    def take(self, num_classes: int, device: torch.device) -> Tensor:
        """The sums as a vector of agreed length; a new window begins."""
        flat = torch.zeros(_SUMS + _ROWS * num_classes, dtype=torch.float64, device=device)
        if self.sums is not None:
            flat[:_SUMS] = self.sums
        if self.classes is not None:
            flat[_SUMS:] = self.classes.reshape(-1)
        self.sums = self.classes = None
        return flat


@final
class WeightingMonitor(LightningCallback):
    r"""Record what the weights do: raw beside weighted loss, mean weight, effective sample size, weight per class.

    Every ``every_n_steps`` optimizer steps, and once more at the end, a row is made of all training terms seen since
    the last one, for each :class:`~reweigh.losses.Objective` in the module. With :math:`n_i` the number of terms that
    term i stands for (0 where masked), :math:`\ell_i` its unweighted loss and :math:`w_i` its weight:

    =============================  ==================================================================================
    ``reweigh/<path>/...``         value
    =============================  ==================================================================================
    ``raw_loss``                   :math:`\sum n\ell / \sum n`
    ``weighted_loss``              :math:`\sum n w\ell / \sum n`
    ``mean_weight``                :math:`\sum n w / \sum n`
    ``effective_sample_size``      :math:`(\sum n w)^2 / \sum n w^2` (Kish)
    ``effective_share``            the same, divided by :math:`\sum n`; 1 where all weights are equal
    ``num_terms``                  :math:`\sum n`
    ``class_weight/<c>``           :math:`\sum_{i\in c} n w / \sum_{i\in c} n`, for classes that were seen
    ``task_weight/<task>``         the same for the tasks of a :class:`~reweigh.losses.MultiTaskLoss`
    ``task_loss/<task>``           its mean unweighted loss, in its own units
    ``bin_loss/<b>``               with ``token_counts``: :math:`\sum_{i\in b} n\ell / \sum_{i\in b} n` over the tokens
                                   of bin b, from 0, the rarest (:func:`~reweigh.lightning_callbacks.frequency_bins`)
    ``bin_weight/<b>``             their mean weight
    =============================  ==================================================================================

    Class weights inside a criterion (torch's ``weight``) belong to :math:`\ell`, not to :math:`w`.

    The ``summary()`` of every weighting and the value of every schedule stand beside them. Rows go to all loggers of
    the Trainer, and to :meth:`history`.

    Warns (``UserWarning``, once per objective) when the effective share falls below ``warn_below``: the loss is then
    made by few terms.

    State and cadence:
        Sums stay on the loss's device; they are added over ranks and read by the host once per row. Nothing is saved,
        and what is watched is let go when training ends or fails. Objectives inside ``torch.compile`` are not seen.

    Args:
        every_n_steps: Optimizer steps per row, >= 1. Default 50.
        warn_below: Effective share that is too small, in [0, 1]; 0 never warns. Default 0.1.
        max_entries: Vectors and class tables with more entries are given by their min, mean and max. Default 16.
        token_counts: How often each class (token) occurs, ``(V,)``, for losses and weights by frequency. Default none.
        bins: Number of frequency bins of equal shares of the running text, >= 1. Default 5.

    Example:
        >>> monitor = WeightingMonitor(every_n_steps=10)  # in the Trainer's callbacks
        >>> monitor.history()  # rows after training
        []
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        warn_below: float = 0.1,
        max_entries: int = 16,
        token_counts: Sequence[float] | Tensor | None = None,
        bins: int = 5,
    ) -> None:
        super().__init__()
        self.bin_of = None if token_counts is None else frequency_bins(token_counts, bins)
        self.every_n_steps = check_whole(self, "every_n_steps", every_n_steps, low=1)
        self.warn_below = check_number(self, "warn_below", warn_below, low=0.0, high=1.0)
        self.max_entries = check_whole(self, "max_entries", max_entries, low=1)
        self._rows: list[dict[str, float]] = []
        self._windows: dict[str, _Window] = {}
        self._stops: list[Callable[[], Any]] = []
        self._found: list[tuple[str, Dynamic]] = []
        self._warned: set[str] = set()
        self._last_step = 0
        self._place: dict[str, int] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps, max_entries=self.max_entries)

    def history(self) -> list[dict[str, float]]:
        """All rows so far, plain numbers by name, with ``step`` and ``epoch``; ``pandas.DataFrame`` takes the list."""
        return [dict(row) for row in self._rows]

    # hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._let_go()
        self._last_step = trainer.global_step
        self._watch(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        # the number that Lightning logs this batch's metrics under
        at = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", step - 1)
        self._place = {"step": at, "epoch": trainer.current_epoch}
        if step // self.every_n_steps != self._last_step // self.every_n_steps:
            self._record(trainer, pl_module)
            self._last_step = step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step != self._last_step:
            self._record(trainer, pl_module)
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._let_go()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._let_go()

    # rows

    def _watch(self, root: nn.Module) -> None:
        self._found = list(named_dynamics(root))
        for path, module in self._found:
            if isinstance(module, Objective):
                tasks = module.tasks if isinstance(module, MultiTaskLoss) else ()
                self._windows[path] = window = _Window(tasks, unweighted=self.bin_of is not None)
                self._stops.append(module.watch(window))

    def _let_go(self) -> None:
        for stop in self._stops:
            stop()
        self._stops, self._windows, self._found = [], {}, []

    def _record(self, trainer: Any, pl_module: Any) -> None:
        device, windows = pl_module.device, self._windows
        sizes = [window.num_classes for window in windows.values()]
        several = trainer.world_size > 1
        if several and windows:
            # a rank may not have met an objective yet; all must speak of the same number of classes
            agreed = trainer.strategy.reduce(torch.tensor(sizes, device=device), reduce_op="max")
            sizes = [int(size) for size in agreed.tolist()]
        parts = [window.take(size, device) for window, size in zip(windows.values(), sizes, strict=True)]
        if several and parts:
            total = trainer.strategy.reduce(torch.cat(parts), reduce_op="sum")
            parts = list(total.split([part.numel() for part in parts]))
        values = summaries(self._found, self.max_entries)
        packed = [*parts, *(value.double().reshape(1).to(device) for value in values.values())]
        numbers: list[float] = torch.cat(packed).tolist() if packed else []  # the one read of the device

        row: dict[str, float] = {}
        for path, size in zip(windows, sizes, strict=True):
            row.update(self._terms(path, numbers[: _SUMS + _ROWS * size], size))
            del numbers[: _SUMS + _ROWS * size]
        row.update(zip(values, numbers, strict=True))
        if not row:
            return
        for logger in trainer.loggers:
            logger.log_metrics(row, step=self._place["step"])
        self._rows.append({**self._place, **row})
        if trainer.is_global_zero:
            self._warn(row)

    def _terms(self, path: str, sums: list[float], num_classes: int) -> dict[str, float]:
        size, raw, weighted, weight, squares = sums[:_SUMS]
        if size <= 0:
            return {}
        effective = weight**2 / squares if squares > 0 else 0.0
        name = f"{PREFIX}/{path}"
        row = {
            f"{name}/raw_loss": raw / size,
            f"{name}/weighted_loss": weighted / size,
            f"{name}/mean_weight": weight / size,
            f"{name}/effective_sample_size": effective,
            f"{name}/effective_share": effective / size,
            f"{name}/num_terms": size,
        }
        if self.bin_of is not None and num_classes == len(self.bin_of):
            rows = torch.tensor(sums[_SUMS:]).reshape(_ROWS, num_classes)
            row.update(_by_bin(name, rows, self.bin_of))
        counts, weights, losses = (sums[_SUMS + k * num_classes : _SUMS + (k + 1) * num_classes] for k in range(_ROWS))
        means = {c: w / n for c, (n, w) in enumerate(zip(counts, weights, strict=True)) if n > 0}
        if tasks := self._windows[path].tasks:
            row.update({f"{name}/task_weight/{tasks[c]}": mean for c, mean in means.items()})
            row.update({f"{name}/task_loss/{tasks[c]}": losses[c] / counts[c] for c in means})
        elif num_classes <= self.max_entries:
            row.update({f"{name}/class_weight/{c}": mean for c, mean in means.items()})
        elif means:
            spread = {"min": min(means.values()), "max": max(means.values())}
            spread["mean"] = sum(means.values()) / len(means)
            row.update({f"{name}/class_weight/{key}": value for key, value in spread.items()})
        return row

    def _warn(self, row: dict[str, float]) -> None:
        for name, share in row.items():
            if name.endswith("/effective_share") and share < self.warn_below and name not in self._warned:
                self._warned.add(name)
                path = name.removeprefix(f"{PREFIX}/").removesuffix("/effective_share")
                warnings.warn(
                    f"WeightingMonitor: the effective sample size of {path} is {share:.1%} of its terms, so few terms "
                    "make the loss; weaken the weighting (a smaller gamma or power, .clip(max=...)), or set warn_below",
                    stacklevel=2,
                )

    # figure

    def plot(self, path: str | None = None) -> Any:
        """A matplotlib ``Figure``: losses, effective share and weights over optimizer steps.

        Args:
            path: The objective to show; ``None`` for the first one.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing was recorded, or not for this objective.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "WeightingMonitor.plot needs matplotlib; install it with: pip install reweigh[plot]"
            ) from error
        ends = "/raw_loss"
        paths = [name.removeprefix(f"{PREFIX}/").removesuffix(ends) for name in self._columns() if name.endswith(ends)]
        if not paths or (path is not None and path not in paths):
            raise ValueError(f"WeightingMonitor: nothing was recorded for {path or 'any objective'}, only for {paths}")
        shown = paths[0] if path is None else path
        figure = Figure(figsize=(7.0, 8.0), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        own = f"{PREFIX}/{shown}/"
        self._draw(top, [(f"{own}raw_loss", "raw"), (f"{own}weighted_loss", "weighted")])
        top.set(title=shown, ylabel="mean loss per term")
        self._draw(middle, [(f"{own}effective_share", "effective sample size / terms")])
        middle.set(ylabel="effective share", ylim=(0.0, 1.05))
        if self.warn_below:
            middle.axhline(self.warn_below, color="0.5", linewidth=0.8, linestyle=":")
        classes = [
            (name, label + name.rsplit("/", 1)[1])
            for kind, label in (("class_weight", "class "), ("task_weight", ""))
            for name in self._columns()
            if f"{own}{kind}/" in name
        ]
        self._draw(bottom, [(f"{own}mean_weight", "mean"), *classes])
        bottom.set(ylabel="weight", xlabel="step")
        for axes in (top, middle, bottom):
            axes.grid(True, linewidth=0.4, color="0.85")
            axes.set_axisbelow(True)
            axes.legend(fontsize="small", ncols=1 + len(axes.get_lines()) // 6, framealpha=0.8)
        return figure

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def _draw(self, axes: Any, curves: list[tuple[str, str]]) -> None:
        for i, (name, label) in enumerate(curves):
            points = [(row["step"], row[name]) for row in self._rows if name in row]
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps,
                values,
                label=label,
                color=_COLOURS[i % len(_COLOURS)],
                linestyle=_DASHES[i // len(_COLOURS) % len(_DASHES)],
                marker="." if len(points) < 60 else "",
            )


_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, without the yellow that paper swallows."""
_DASHES = ("-", "--", ":")


def _by_bin(name: str, rows: Tensor, bin_of: Tensor) -> dict[str, float]:
    """Loss and weight of rare and of frequent tokens apart, for bins that were seen."""
    counts, weights, losses = rows.new_zeros(_ROWS, int(bin_of.max()) + 1).index_add(1, bin_of, rows).tolist()
    found: dict[str, float] = {}
    for place, number in enumerate(counts):
        if number > 0:
            found[f"{name}/bin_loss/{place}"] = losses[place] / number
            found[f"{name}/bin_weight/{place}"] = weights[place] / number
    return found
