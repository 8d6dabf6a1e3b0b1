"""Task weights that let validation losses converge together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..base import method
from ..config import check_choice, check_number, check_whole
from ..dynamics import Event
from ..terms import LossTerms
from .base import TaskWeighting

Fidelity = Literal["paper", "reference"]

_TINY = 1e-300
"""Below every sum of slopes that is not 0."""
_FLAT = 1e-15
"""Slopes up to this, per record, are what rounding leaves of a constant loss."""


class _Desk:
    """Views of a weighting's buffers, and scratch beside them: torch spends more time on a slice than on K numbers.

    Nothing here outlives a record.
    """

    def __init__(self, buffers: Mapping[str, Tensor | None], history: int) -> None:
        held = {name: value for name, value in buffers.items() if value is not None}
        get = held.__getitem__
        self.held = [(name, held[name]) for name in ("shares", "baseline", "totals", "records", "ratios", "slopes")]
        self.shares, self.baseline, self.totals, self.records = map(get, ("shares", "baseline", "totals", "records"))
        self.one, self.across, self.sign = map(get, ("one", "across", "sign"))
        self.ring = ring = get("ratios")
        self.ratios, self.ratios_flat = ring.unbind(), ring.view(history, -1)
        self.slopes, self.slopes_flat = get("slopes").unbind(), get("slopes").view(history, -1).t()
        windows = get("places").unfold(1, history, 1).unbind(1)[::-1]  # by newest slot: (4, history) by slot
        self.places, self.recent = [window[:3] for window in windows], [window[3] for window in windows]
        size = self.shares.numel()
        self.loss, self.ratio = ring.new_empty(2, size).unbind()
        self.entry = ring.new_empty(2, size + 1)  # ratio, present
        self.entry_tasks, self.entry_top = self.entry[:, :-1], self.entry[:, -1]
        self.entry_ratio, self.entry_present = self.entry_tasks.unbind()
        # rows: sum of y, number; sum of x y, sum of x; sum of x^2 y, sum of x^2
        self.sums = ring.new_empty(3, 2 * size + 2)
        rows = self.sums.view(6, -1)
        self.sums_first, self.sums_of_x, self.sums_number, self.sums_x = rows[::3], rows[2::3], rows[1], rows[3]
        self.parts = ring.new_empty(2, size + 1)  # of the fraction that a slope is
        self.above, self.below = self.parts.unbind()
        self.parts_below = self.below[:-1]
        self.now = ring.new_empty(2, size)  # size of the slope, known
        self.now_size, self.now_known = self.now.unbind()
        both = ring.new_empty(2, 2, size)  # sums over tasks, sums over records
        self.sums_across, self.sums_recent = both[0], both[1].view(-1)
        self.sums_size, self.sums_known, self.number = both[:, 0], both[:, 1], both[0, 1]

    def fits(self, buffers: Mapping[str, Tensor | None]) -> bool:
        """Whether the buffers are still those that the views are of."""
        return all(buffers[name] is value for name, value in self.held)


@method(
    "coba",
    paper="CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models",
    venue="EMNLP 2024",
    acts_on="task",
    official="codefuse-ai/MFTCoder@8ba13f44 mftcoder_accelerate/src/utils/loss_utils.py",
    defaults={
        "warmup": ("100", "authors' code; they advise the number of validation batches"),
        "history": ("200", "authors' code; they advise 2 to 5 times warmup"),
        "tau": ("5.0", "authors' code"),
        "capacity": ("50_000", "ours: the paper keeps every slope"),
        "fidelity": ("'paper'", "formulas of the paper; 'reference' is the authors' code"),
    },
    deviations=(
        "Slopes of the divergence factor are kept up to capacity, then the newest of them; the paper keeps all.",
        "The divergence factor takes the slope of the largest ratio of each record, as the authors' code does.",
        "Validation losses that are absent or not finite are skipped; in the paper's form the others keep their place.",
        "Slopes that vanish, and fewer than two records, give equal weights; the authors' code gives nan, or stops.",
        "A task without a slope has the mean weight, and the others are balanced among themselves.",
        "Records are counted, not steps: with a probe every n steps, warmup and history count probes.",
    ),
    examples=(
        {"num_tasks": 8},
        {"num_tasks": 8, "warmup": 1, "history": 4, "tau": 2.0, "renormalize": False},
        {"num_tasks": 8, "warmup": 2, "fidelity": "reference"},
    ),
)
@final
class CoBa(TaskWeighting):
    r"""Hold back tasks whose validation loss falls fastest, and those whose validation loss rises.

    .. math::
        w_k = \frac{\omega_k}{\sum_{j\ \text{present}} \omega_j} \qquad
        \omega_k = D\,\mathrm{softmax}_k\!\left(\frac{K a_k}{\sum_j |a_j|}\right)
        + (1 - D)\,\mathrm{softmax}_k\!\left(\frac{-n\,a_k}{\sum_{s} |a_k(s)|}\right)

    .. math::
        D = \min\!\left(T\,\mathrm{softmax}_s\!\left(\frac{-\tau T\,a(s)}{\sum_s |a(s)|}\right)\!\Big|_{s=T},\ 1\right)

    - :math:`a_k`: slope of a straight line (least squares) through task :math:`k`'s ratios :math:`L_k(t) / L_k(0)` of
      the last ``history`` records, against their number; :math:`L_k(0)` is its first validation loss
    - :math:`a_k(s)`: its slopes of the last ``history`` records, :math:`n` of them
    - :math:`a(s)`: slopes of the largest ratio of each record, :math:`T` of them since the warm-up
    - first softmax: relative convergence, low for the fastest; second: absolute convergence, low where a loss rises;
      :math:`D`: divergence factor, 1 while the loss falls as ever, smaller when it stops falling

    Weights:
        Positive, summing to 1 over the tasks present: the total is a weighted mean of their losses, and the plain mean
        until ``warmup`` records have been seen. Detached. No argument is neutral.

    State and cadence:
        Each ``validation`` event makes one record of what ``observe_validation`` brought since the last; the first is
        the baseline. ``update_on = "validation"``. The last ``history`` ratios and slopes of each task and
        ``capacity`` slopes of the largest ratio are saved, so a run resumes bit-equal. Ranks add their losses at the
        event. A task's baseline is the first record that has it. Time and memory do not depend on the losses.

    Use when:
        Tasks of one model converge at different speeds, some of them overfit, and a validation batch after each step is
        affordable.
    Avoid when:
        Losses are in raw units: no gain over equal weights in the two-digit suite. With losses divided by their first
        values it gains there, but no more than that division alone, at more cost.

    Deviations:
        See the record: a declared capacity, absent and non-finite losses skipped, equal weights where slopes vanish, a
        task without a slope at the mean. Only the newest of more than ``capacity`` slopes enter :math:`D`.
        ``fidelity="reference"`` is the authors' code: :math:`D` without a bound, the second softmax over ``history -
        warmup + 1`` slopes, :math:`\omega \leftarrow \mathrm{softmax}(K \omega)`, raised to at least
        :math:`1 / (10 K)`, and ratios packed together where records lack a task.

    Args:
        warmup: Records, the baseline among them, before weights move; at least three are needed. Default 100.
        history: Records that slopes are fitted to, and slopes that one is compared with, at least 2. Default 200.
        tau: Sharpness of the divergence factor, > 0. Default 5.0.
        capacity: How many slopes the divergence factor remembers. Default 50000.
        fidelity: ``"paper"`` or ``"reference"``, the authors' code. Default ``"paper"``.
        renormalize: Divide by the shares of the tasks present. ``False``: an absent task's share is missing from the
            batch. Default ``True``.
        num_tasks: Number of tasks, for use outside a :class:`~reweigh.losses.MultiTaskLoss`.

    Shapes:
        Reads ``loss`` of shape ``(K,)``; returns ``(K,)``.

    Example:
        >>> import torch
        >>> from reweigh import CoBa, MultiTaskLoss
        >>> loss = MultiTaskLoss(["fast", "slow"], CoBa(warmup=4))
        >>> for step in range(10):
        ...     loss.observe_validation({"fast": torch.tensor(0.7**step), "slow": torch.tensor(0.9**step)})
        ...     loss.update("validation")
        >>> {name: round(weight.item(), 4) for name, weight in loss.weights.items()}
        {'fast': 0.449, 'slow': 0.551}

    References:
        Z. Gong, H. Yu, C. Liao, B. Liu, C. Chen, J. Li, "CoBa: Convergence Balancer for Multitask Finetuning of Large
        Language Models", EMNLP 2024.
    """

    update_on: Event = "validation"
    feeds = frozenset({"validation"})

    def __init__(
        self,
        *,
        warmup: int = 100,
        history: int = 200,
        tau: float = 5.0,
        capacity: int = 50_000,
        fidelity: Fidelity = "paper",
        renormalize: bool = True,
        num_tasks: int | None = None,
    ) -> None:
        super().__init__()
        self.first = max(3, check_whole(self, "warmup", warmup, low=1))  # record that moves weights first
        self.history = check_whole(self, "history", history, low=2)
        self.tau = check_number(self, "tau", tau, low=0.0, open_low=True)
        self.capacity = check_whole(self, "capacity", capacity, low=1)
        self.fidelity = check_choice(self, "fidelity", fidelity, ("paper", "reference"))
        self.renormalize = bool(renormalize)
        self._warmup = warmup
        self._seen: int | None = None
        self._laid: _Desk | None = None
        self.start(num_tasks)

    def prepare(self, num_tasks: int) -> None:
        size = self.history
        zeros = torch.zeros(2, num_tasks, dtype=torch.float64)
        self.add_task_state("shares", torch.ones_like(zeros[0]))  # K omega
        self.add_task_state("baseline", zeros[0].clone())  # L(0); 0: unknown
        # rings, one slot per record; the column behind the tasks is the largest ratio
        self.add_state("ratios", zeros.new_zeros(size, 2, num_tasks + 1))  # ratio, present; 0: absent
        self.add_task_state("slopes", zeros.new_zeros(size, 2, num_tasks), dim=2)  # size of the slope, known
        self.add_state("totals", zeros.new_zeros(self.capacity))  # slope of the largest ratio
        self.add_state("records", torch.zeros((), dtype=torch.int64))
        self.add_pending("seen", 2, num_tasks, on="validation")
        # by age, newest first from the middle on, so that a slice of it fits a ring wherever its newest slot is
        age = torch.arange(size - 1, -size, -1, dtype=torch.float64).remainder(size)
        recent = size if self.fidelity == "paper" else max(1, size - self._warmup + 1)
        self.add_table("places", torch.stack([torch.ones_like(age), -age, age * age, (age < recent).double()]))
        self.add_table("one", zeros.new_ones(()))
        self.add_table("across", zeros.new_ones(num_tasks, num_tasks))
        self.add_table("sign", zeros.new_tensor([[1.0], [-1.0]]))

    # looking

    def weigh(self, terms: LossTerms) -> Tensor:
        _, present = self._look(terms)
        shares = self.get_buffer("shares") * present
        if not self.renormalize:
            return shares / self.num_tasks
        return shares / shares.sum(-1, keepdim=True).clamp_min(_TINY)

    def _look(self, terms: LossTerms) -> tuple[Tensor, Tensor]:
        """``(K,)`` detached float64 losses, and which of them are present and finite; a faster ``read``."""
        loss = terms.loss.detach().double()
        if loss.shape != (len(self.tasks),):
            return self.read(terms)  # raises
        present = loss.abs() < torch.inf
        return loss, present if terms.mask is None else present & terms.mask

    def summary(self) -> dict[str, Tensor]:
        number = self._so_far()
        if self._moving(number) < 1:
            return {}
        slope = self._fit(self._desk(), (number - 1) % self.history)[:-1]
        return {"slope": slope, "divergence_factor": self._divergence(self._desk(), self._moving(number))}

    # learning

    def observe_validation(self, terms: LossTerms) -> None:
        loss, present = self._look(terms)
        count = terms.find("count")
        number = present.double() if count is None else torch.where(present, count.double(), 0.0)
        self.accumulate("seen", torch.stack([torch.nan_to_num(loss, 0.0, 0.0, 0.0) * number, number]))

    def commit(self, sums: dict[str, Tensor]) -> None:
        """One more record, of the sums that were seen since the last."""
        desk, number = self._desk(), self._so_far()
        slot, moving = number % self.history, self._moving(number + 1)
        loss, ratio = desk.loss, desk.ratio
        torch.div(*sums["seen"].unbind(), out=loss)  # nan where absent
        torch.div(loss, desk.baseline, out=ratio)  # inf or nan where that is unknown
        torch.where(desk.baseline.bool(), desk.baseline, loss.abs_().nan_to_num_(0.0), out=desk.baseline)
        torch.nan_to_num(ratio, 0.0, 0.0, 0.0, out=desk.entry_ratio)
        torch.lt(ratio.abs_(), torch.inf, out=desk.entry_present)
        torch.amax(desk.entry_tasks, 1, out=desk.entry_top)
        desk.ratios[slot].copy_(desk.entry)
        if moving > 0:
            slope = self._fit(desk, slot)
            desk.totals.select(0, (moving - 1) % self.capacity).copy_(slope[-1])
            self._balance(desk, slope[:-1], slot, moving)
        desk.records.add_(1)
        self._seen = number + 1

    def _balance(self, desk: _Desk, slope: Tensor, slot: int, moving: int) -> None:
        """Shares from the slopes of the newest record."""
        known = desk.now_known
        torch.abs(slope, out=desk.now_size)
        desk.slopes[slot].copy_(desk.now)
        torch.mm(desk.now, desk.across, out=desk.sums_across)
        torch.mv(desk.slopes_flat, desk.recent[slot], out=desk.sums_recent)
        pace = torch.div(desk.sums_known, desk.sums_size.clamp_min(_TINY)).mul_(slope)
        scores = torch.addcmul(known.clamp_min(_TINY).log_(), pace, desk.sign).softmax(1)
        relative, absolute = scores.unbind()
        mixed = torch.lerp(absolute, relative, self._divergence(desk, moving))
        if self.fidelity == "reference":
            mixed = self._floored(mixed, known, desk.number)
        # a task without a slope has share 1
        torch.addcmul(known.neg().add_(1.0), mixed, desk.number, out=desk.shares).clamp_min_(_TINY)

    def _floored(self, mixed: Tensor, known: Tensor, number: Tensor) -> Tensor:
        """The last step of the authors' code: a softmax of its own, and a least weight where one is below it."""
        mixed = torch.addcmul(known.clamp_min(_TINY).log(), mixed, number).softmax(0)
        least = 0.1 / number.clamp_min(1.0)
        low = ((mixed < least) & (known > 0)).any()
        return torch.where(low, torch.addcmul(least, mixed, 1.0 - least * number), mixed)

    def _fit(self, desk: _Desk, slot: int) -> Tensor:
        """``(K + 1,)`` least-squares slopes of the ratios, 0 where unknown; tells the desk which are known."""
        if self.fidelity == "paper":
            torch.mm(desk.places[slot], desk.ratios_flat, out=desk.sums)
        else:
            ring = desk.ring.roll(-1 - slot, 0)
            present = ring[:, 1]
            place = present.cumsum(0) - present.sum(0)
            places = torch.stack([torch.ones_like(place), place, place * place]).unsqueeze(2)
            torch.sum((places * ring).flatten(2), 1, out=desk.sums)
        torch.mul(desk.sums_of_x, desk.sums_number, out=desk.parts).addcmul_(desk.sums_first, desk.sums_x, value=-1)
        torch.clamp(desk.parts_below, max=1.0, out=desk.now_known)  # a whole number, 0 for fewer than two records
        slope = torch.div(desk.above, desk.below.clamp_min_(1.0))
        return torch.nn.functional.hardshrink(slope, _FLAT)

    def _divergence(self, desk: _Desk, moving: int) -> Tensor:
        """The divergence factor, from the slopes of the largest ratio."""
        number = min(moving, self.capacity)
        past = desk.totals.narrow(0, 0, number)
        scaled = torch.mul(past, -self.tau * number).div_(torch.linalg.vector_norm(past, 1))  # nan where all are 0
        factor = scaled.softmax(0).select(0, (moving - 1) % self.capacity).mul_(number)
        return factor.nan_to_num(1.0) if self.fidelity == "reference" else torch.fmin(factor, desk.one)

    def _desk(self) -> _Desk:
        """Where a record is worked out, laid out once for the buffers there are."""
        if self._laid is None or not self._laid.fits(self._buffers):
            with torch.inference_mode(False):  # an event may come from inside, the next one from outside
                self._laid = _Desk(self._buffers, self.history)
        return self._laid

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_laid": None}

    def _moving(self, number: int) -> int:
        """How many of the records so far moved the weights."""
        return number - self.first + 1

    def _so_far(self) -> int:
        """Records so far, as a Python number (read from the device once)."""
        if self._seen is None:
            self._seen = int(self.get_buffer("records"))
        return self._seen

    def reset(self) -> None:
        super().reset()
        self._seen = None
        for name in ("baseline", "ratios", "slopes", "totals", "records"):
            if name in self._buffers:
                self.get_buffer(name).zero_()
        if "shares" in self._buffers:
            self.get_buffer("shares").fill_(1.0)

    # loading

    def rename(self, state: dict[str, Any], prefix: str, old: Sequence[str]) -> None:
        super().rename(state, prefix, old)
        saved = state.get(prefix + "ratios")
        if isinstance(saved, Tensor) and saved.ndim == 3 and saved.shape[2] == len(old) + 1:
            fresh = saved.new_zeros(*saved.shape[:2], self.num_tasks + 1)
            fresh[..., -1] = saved[..., -1]
            for place, task in enumerate(self.tasks):
                if task in old:
                    fresh[..., place] = saved[..., old.index(task)]
            state[prefix + "ratios"] = fresh

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self._seen = None
        super()._load_from_state_dict(state_dict, prefix, *rest)
