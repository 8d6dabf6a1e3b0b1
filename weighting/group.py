"""Weights of groups of samples that follow the groups' losses: adversarial over groups, and the worst groups."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, final

import torch
from torch import Tensor

from .base import Scope, Weighting, lookup, method, tally
from .config import as_table, check_choice, check_number, check_whole, readable
from .dynamics import Event
from .frequency import Values
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms

By = Literal["group", "category", "membership"]
Balance = Literal["batch", "counts"]
Cadence = Literal["step", "forward"]

_ROW_TOLERANCE = 0.05
"""How far from 1 a row of memberships may add up: probabilities of half precision."""


class GroupWeighting(Weighting):
    r"""Common part: running group losses, and weights that make the mean a weighted sum of group means.

    Subclasses say by :meth:`shares` what the groups weigh and react to the losses of a step in :meth:`learn`.
    """

    detached = True
    update_on: Event = "step"

    def __init__(
        self,
        num_groups: int,
        *,
        adjustment: float | Values,
        group_counts: Values | None,
        smoothing: float | Schedule,
        by: By,
        balance: Balance,
        cadence: Cadence,
    ) -> None:
        super().__init__()
        self.num_groups = check_whole(self, "num_groups", num_groups, low=1)
        self.smoothing = check_hyper(self, "smoothing", smoothing, low=0.0, high=1.0, open_low=True)
        self.by = check_choice(self, "by", by, ("group", "category", "membership"))
        self.needs = frozenset({by})
        self.rows = self.needs & {"membership"}
        self.balance = check_choice(self, "balance", balance, ("batch", "counts"))
        forward = check_choice(self, "cadence", cadence, ("step", "forward")) == "forward"
        self.scope: Scope = "local" if balance == "counts" and not forward else "global"
        if forward:
            self.update_on = "forward"
        self._know_counts(group_counts)
        self._know_adjustment(adjustment, known=group_counts is not None)
        self.add_state("group_loss", torch.zeros(num_groups, dtype=torch.float64))
        self.add_state("seen", torch.zeros(num_groups, dtype=torch.bool))
        self.add_pending("loss_sum", num_groups)
        self.add_pending("loss_count", num_groups)

    def _know_counts(self, group_counts: Values | None) -> None:
        if group_counts is None:
            if self.balance == "counts":
                raise ValueError(f"{type(self).__name__}: balance='counts' needs group_counts, got None")
            return
        counts = as_table(self, "group_counts", group_counts)
        if counts.numel() != self.num_groups or not bool((counts > 0).all()):
            raise ValueError(
                f"{type(self).__name__}: group_counts must be {self.num_groups} numbers > 0, got {counts.tolist()}"
            )
        self.add_table("counts", counts)
        self.add_table("fraction", counts / counts.sum())

    def _know_adjustment(self, adjustment: float | Values, *, known: bool) -> None:
        if isinstance(adjustment, (int, float)):
            strength = torch.full((self.num_groups,), check_number(self, "adjustment", adjustment), dtype=torch.float64)
        else:
            strength = as_table(self, "adjustment", adjustment, low=-float("inf"))
        if strength.numel() != self.num_groups:
            raise ValueError(
                f"{type(self).__name__}: adjustment must be one number or {self.num_groups}, got {strength.numel()}"
            )
        if bool((strength != 0).any()) and not known:
            raise ValueError(
                f"{type(self).__name__}: adjustment is divided by the root of the group's size, so it needs "
                "group_counts, got None"
            )
        self.add_table("adjustment", strength / self.get_buffer("counts").sqrt() if known else strength)

    @abstractmethod
    def shares(self) -> Tensor:
        """``(G,)`` float64: what each group's mean loss weighs; sums to 1."""

    def learn(self, means: Tensor, present: Tensor, count: Tensor) -> None:
        """React to the group means of a step, 0 where they are not ``present``: not seen or not finite."""

    # weights

    def weigh(self, terms: LossTerms) -> Tensor:
        if self.by == "membership":
            self._check_membership(terms)
        shares = self.shares()
        if self.balance == "counts":
            return self._spread(shares / self.get_buffer("fraction"), terms)
        counts = terms.counts().detach().double()
        size = self._sums(counts, terms)
        table = shares * counts.sum() / torch.where(size > 0, size, torch.ones_like(size))
        return self._spread(table, terms)

    def _spread(self, table: Tensor, terms: LossTerms) -> Tensor:
        """What a table gives every term: its group's entry, or the mean of its memberships."""
        if self.by != "membership":
            return lookup(self, table, terms, self.by)
        return terms.spread((self._membership(terms) * table).sum(1)).to(terms.loss.dtype)

    def _sums(self, value: Tensor, terms: LossTerms) -> Tensor:
        """``(G,)`` sums of ``value`` (``*S``) over the members of each group."""
        if self.by != "membership":
            return tally(self, value, terms, self.num_groups, self.by)
        member = self._membership(terms)
        return (member * self._per_sample(value, len(member)).unsqueeze(1)).sum(0)

    def _membership(self, terms: LossTerms) -> Tensor:
        member = terms.need("membership", self)
        if member.ndim != 2 or member.shape[1] != self.num_groups:
            raise ValueError(
                f"{type(self).__name__}: membership must be (samples, {self.num_groups}), got {tuple(member.shape)}"
            )
        member = member.detach().double()
        return member.masked_fill((self._per_sample(terms.counts().detach(), len(member)) == 0).unsqueeze(1), 0.0)

    def _check_membership(self, terms: LossTerms) -> None:
        """Rows add up to 1, or are all 0: a sample of no group, or a masked one. Only where looking is free."""
        member = self._membership(terms)
        if not readable(member):
            return
        total = member.sum(1)
        right = (total - 1.0).abs().minimum(total.abs()) <= _ROW_TOLERANCE
        if not bool((right & (member >= 0).all(1)).all()):
            raise ValueError(
                f"{type(self).__name__}: membership must have rows of numbers >= 0 that add up to 1 (or 0), got "
                f"numbers in {member.min().item():g}..{member.max().item():g} and sums in "
                f"{total.min().item():g}..{total.max().item():g}"
            )

    @staticmethod
    def _per_sample(value: Tensor, size: int) -> Tensor:
        return value.reshape(size, -1).sum(1) if value.numel() else value.new_zeros(size)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        if self.by != "membership":
            return {}
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(batch, self.num_groups, generator=generator, dtype=torch.float64)
        return {"membership": (2.0 * scores).softmax(1).to(dtype)}

    # learning

    def observe(self, terms: LossTerms) -> None:
        counts = terms.counts().double()
        # 0 times a loss that is not finite would reach every group
        self.accumulate("loss_sum", self._sums(counts * torch.where(counts > 0, terms.loss.double(), 0.0), terms))
        self.accumulate("loss_count", self._sums(counts, terms))

    def commit(self, sums: dict[str, Tensor]) -> None:
        count = sums["loss_count"]
        means = sums["loss_sum"] / count  # 0 / 0 where a group is absent
        # a step that is not finite (skipped by a gradient scaler, say) must not stay in the state for good
        present = means.isfinite()
        means = torch.where(present, means, 0.0)
        running, seen = self.get_buffer("group_loss"), self.get_buffer("seen")
        mixed = torch.where(seen, running + value_of(self.smoothing) * (means - running), means)
        running.copy_(torch.where(present, mixed, running))
        seen.logical_or_(present)
        self.learn(means, present, count)

    def reset(self) -> None:
        super().reset()
        self.get_buffer("group_loss").zero_()
        self.get_buffer("seen").zero_()

    def summary(self) -> dict[str, Tensor]:
        return {"group_weight": self.shares().clone(), "group_loss": self.get_buffer("group_loss").clone()}


@method(
    "group_dro",
    paper=(
        "Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization for Worst-Case "
        "Generalization"
    ),
    venue="ICLR 2020",
    official="kohpangwei/group_DRO@cbbc1c5b loss.py",
    defaults={
        "step_size": ("0.01", "authors' code"),
        "adjustment": ("0.0", "authors' code"),
        "smoothing": ("0.1", "authors' code (gamma)"),
        "cadence": ("'step'", "ours: weights are a constant of the batch; the authors' order is 'forward'"),
        "absent": ("'keep'", "ours; the authors' groups lose weight while they are absent ('decay')"),
    },
    deviations=(
        "q is kept as a logarithm: losses of 1e4 and step size 1 are finite, where the authors' code has NaN.",
        "The loss's value never contains the adjustment, which theirs adds in place; its effect on q is the same.",
        "Each adjustment counts by itself; theirs are all dropped as soon as one of them is not positive.",
        "Only training forwards move q, once per optimizer step, on the losses of all micro-batches and ranks.",
        "Normalised losses that add up to 0 or less leave q as it is; theirs are NaN.",
    ),
    examples=(
        {"num_groups": 3, "step_size": 0.5},
        {"num_groups": 3, "step_size": 0.2, "adjustment": [2.0, 0.0, -1.0], "group_counts": [90, 9, 1]},
        {"num_groups": 4, "step_size": 1.0, "normalize_losses": True, "by": "category", "absent": "decay"},
        {"num_groups": 3, "step_size": 0.5, "by": "membership"},
        {"num_groups": 3, "step_size": 0.5, "group_counts": [5, 3, 2], "balance": "counts", "by": "membership"},
    ),
)
@final
class GroupDRO(GroupWeighting):
    r"""Train for the worst group: an adversary moves weight to the groups that lose most.

    .. math::
        w_i = q_{g_i} \frac{N}{n_{g_i}}, \qquad
        q_g \leftarrow \frac{q_g\, e^{\eta a_g}}{\sum_k q_k\, e^{\eta a_k}}, \qquad
        a_g = L_g + \frac{C_g}{\sqrt{n^{\mathrm{train}}_g}}

    - :math:`L_g`: mean loss of group g over the step; the weighted mean of all losses is :math:`\sum_g q_g L_g`
    - :math:`\eta`: ``step_size``; :math:`C`: ``adjustment``
    - :math:`N, n_g`: terms and terms of group g in the batch (``balance="batch"``, authors) or in the training data
      (``balance="counts"``)

    Weights:
        >= 0, averaging 1 over the batch where all groups are there. Detached. No argument is neutral; one group, or
        ``step_size=0`` on batches with as many terms of each group, is plain training.

    State and cadence:
        ``log_q``, ``group_loss`` (running means), ``seen``: ``(G,)`` buffers, equal on all ranks. Training losses are
        observed into pending sums and committed at every optimizer step (``cadence="step"``), or inside every
        training forward before weighing (``"forward"``, the authors' order).

    Use when:
        Groups such as class and attribute, domains or languages are known in training, some are small, the worst one
        counts, and validation data with groups can choose the model.
    Avoid when:
        A group cannot be learned and takes all weight, or accuracy at training frequencies counts, which falls. Without
        the adjustment for small groups, the shortcut suite shows group weights as good.

    Deviations:
        See the record: log-space, the value without adjustment, absent groups keep their weight.

    Args:
        num_groups: Number of groups G.
        step_size: :math:`\eta` >= 0, or a schedule. Default 0.01 (authors' code).
        adjustment: Generalisation adjustment :math:`C`, of any sign, one number or one per group. Default 0.
        group_counts: Training samples per group, > 0; needed by ``adjustment`` and ``balance="counts"``.
        normalize_losses: Divide the adjusted losses by their sum before the exponent. Default False (authors' code).
        absent: What a step without terms of a group does to it: ``"keep"`` its q, or let it ``"decay"`` (authors: it
            enters with loss 0).
        smoothing: Share of the new losses in the running group losses, in (0, 1]. Default 0.1 (authors' code).
        by: Where groups come from: ``group=`` of the call, the ``"category"`` (class) of a term, or a call's
            ``membership=`` of shape ``(samples, G)``, rows adding up to 1 (soft groups) or all 0 (none).
        balance: ``"batch"`` or ``"counts"``, see above. The second has no batch statistics, so that micro-batches add
            up exactly, and equals the first in expectation.
        cadence: ``"step"`` or ``"forward"``.

    Shapes:
        Reads ``loss`` ``(*S)`` and ``group`` ``(S[0],)``, ``category`` ``(*S)`` or ``membership`` ``(S[0], G)``;
        returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> weighting = GroupDRO(2, step_size=1.0)
        >>> objective = Objective(CrossEntropy(), weighting)
        >>> logits, group = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> _ = objective(logits.requires_grad_(), torch.tensor([0, 0]), group=group)
        >>> objective.update("step")
        >>> weighting.summary()["group_weight"]
        tensor([0.1192, 0.8808], dtype=torch.float64)

    References:
        S. Sagawa, P. W. Koh, T. B. Hashimoto, P. Liang, "Distributionally Robust Neural Networks for Group Shifts: On
        the Importance of Regularization for Worst-Case Generalization", ICLR 2020.
    """

    def __init__(
        self,
        num_groups: int,
        *,
        step_size: float | Schedule = 0.01,
        adjustment: float | Values = 0.0,
        group_counts: Values | None = None,
        normalize_losses: bool = False,
        absent: Literal["keep", "decay"] = "keep",
        smoothing: float | Schedule = 0.1,
        by: By = "group",
        balance: Balance = "batch",
        cadence: Cadence = "step",
    ) -> None:
        super().__init__(
            num_groups,
            adjustment=adjustment,
            group_counts=group_counts,
            smoothing=smoothing,
            by=by,
            balance=balance,
            cadence=cadence,
        )
        self.step_size = check_hyper(self, "step_size", step_size, low=0.0)
        self.normalize_losses = bool(normalize_losses)
        self.absent_decay = check_choice(self, "absent", absent, ("keep", "decay")) == "decay"
        self.add_state("log_q", torch.full((num_groups,), 1.0 / num_groups, dtype=torch.float64).log())

    def shares(self) -> Tensor:
        return self.get_buffer("log_q").exp()

    def learn(self, means: Tensor, present: Tensor, count: Tensor) -> None:
        log_q = self.get_buffer("log_q")
        adjusted = means + self.get_buffer("adjustment")
        moving = (present | (count == 0)) & present.any() if self.absent_decay else present
        if self.normalize_losses:
            total = torch.where(moving, adjusted, 0.0).sum()
            adjusted = torch.where(total > 0, adjusted / torch.where(total > 0, total, 1.0), 0.0)
        # those that move share what they had together: their shares of it change, its size does not
        within = torch.where(moving, log_q, -torch.inf)
        gain = (within + value_of(self.step_size) * adjusted).log_softmax(0) - within.log_softmax(0)
        log_q.copy_(torch.where(moving, log_q + gain, log_q))

    def reset(self) -> None:
        super().reset()
        self.get_buffer("log_q").fill_(1.0 / self.num_groups).log_()


@method(
    "group_cvar",
    paper=(
        "Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization for Worst-Case "
        "Generalization"
    ),
    venue="ICLR 2020",
    official="kohpangwei/group_DRO@cbbc1c5b loss.py (btl)",
    defaults={
        "alpha": ("0.2", "authors' code"),
        "smoothing": ("0.1", "authors' code (gamma)"),
        "minimum": ("0.0", "authors' code (minimum_variational_weight)"),
        "cadence": ("'step'", "ours: weights are a constant of the batch; the authors' order is 'forward'"),
    },
    deviations=(
        "alpha=1 is plain training; the authors' code runs off the end of the group list.",
        "Groups with equal running losses share what is left for them, so that before anything was seen all count by "
        "their size; theirs fill in an arbitrary order.",
        "Each adjustment counts by itself, also beside one that is not positive.",
    ),
    examples=(
        {"num_groups": 3, "group_counts": [90, 9, 1]},
        {"num_groups": 3, "group_counts": [5, 3, 2], "alpha": 0.6, "minimum": 0.1, "adjustment": 1.0},
    ),
)
@final
class GroupCVaR(GroupWeighting):
    r"""Train for the worst fraction of the data, made up of whole groups (greedy CVaR over groups).

    .. math::
        q_g = \frac{1}{\alpha}\min\Big(f_g, \big[\alpha - \sum_{k:\,\bar a_k > \bar a_g} f_k\big]_+\Big), \qquad
        w_i = q_{g_i}\frac{N}{n_{g_i}}

    - :math:`f_g`: share of group g in the training data; :math:`\alpha`: ``alpha``
    - :math:`\bar a_g`: running mean loss of g plus :math:`C_g/\sqrt{n_g}`: the worst groups are filled up first

    Weights:
        >= 0. Detached; q is mixed with the groups' shares by ``minimum``. No argument is neutral in itself;
        ``alpha=1`` gives every group its share of the data.

    State and cadence:
        ``group_loss`` and ``seen``: ``(G,)`` buffers, equal on all ranks, moved at every optimizer step
        (``cadence="step"``) or inside every training forward (``"forward"``, the authors' order).

    Use when:
        Groups are known in training and several bad ones should count, not the worst alone, by their present losses and
        not by sums over the past.
    Avoid when:
        Group losses are noisy: whole groups are switched on and off. A least weight per group or group DRO is smoother,
        and constant group weights are simpler.

    Deviations:
        See the record: ``alpha=1``, ties.

    Args:
        num_groups: Number of groups G.
        alpha: Fraction of the data in (0, 1], or a schedule. Default 0.2 (authors' code).
        group_counts: Training samples per group, > 0. Required.
        smoothing: Share of the new losses in the running group losses, in (0, 1]. Default 0.1 (authors' code).
        adjustment: Generalisation adjustment C, one number or one per group. Default 0.
        minimum: Share of plain training mixed in, in [0, 1]. Default 0 (authors' code).
        by: As in :class:`GroupDRO`.
        balance: As in :class:`GroupDRO`.
        cadence: ``"step"`` or ``"forward"``.

    Shapes:
        As :class:`GroupDRO`.

    Example:
        >>> import torch
        >>> weighting = GroupCVaR(3, alpha=0.5, group_counts=[60, 30, 10])
        >>> weighting.get_buffer("group_loss").copy_(torch.tensor([0.1, 0.9, 0.4]))
        tensor([0.1000, 0.9000, 0.4000], dtype=torch.float64)
        >>> weighting.shares()
        tensor([0.2000, 0.6000, 0.2000], dtype=torch.float64)

    References:
        S. Sagawa, P. W. Koh, T. B. Hashimoto, P. Liang, "Distributionally Robust Neural Networks for Group Shifts: On
        the Importance of Regularization for Worst-Case Generalization", ICLR 2020 (authors' code).
    """

    def __init__(
        self,
        num_groups: int,
        *,
        group_counts: Values,
        alpha: float | Schedule = 0.2,
        smoothing: float | Schedule = 0.1,
        adjustment: float | Values = 0.0,
        minimum: float | Schedule = 0.0,
        by: By = "group",
        balance: Balance = "batch",
        cadence: Cadence = "step",
    ) -> None:
        super().__init__(
            num_groups,
            adjustment=adjustment,
            group_counts=group_counts,
            smoothing=smoothing,
            by=by,
            balance=balance,
            cadence=cadence,
        )
        if group_counts is None:
            raise ValueError("GroupCVaR: group_counts must be given, got None")
        self.alpha = check_hyper(self, "alpha", alpha, low=0.0, high=1.0, open_low=True)
        self.minimum = check_hyper(self, "minimum", minimum, low=0.0, high=1.0)

    def shares(self) -> Tensor:
        alpha, least = value_of(self.alpha), value_of(self.minimum)
        height, fraction = self.get_buffer("group_loss") + self.get_buffer("adjustment"), self.get_buffer("fraction")
        above = (height.unsqueeze(0) > height.unsqueeze(1)).double() @ fraction
        level = (height.unsqueeze(0) == height.unsqueeze(1)).double() @ fraction
        filled = fraction * ((alpha - above) / level).clamp(0.0, 1.0) / alpha
        return least * fraction + (1.0 - least) * filled
