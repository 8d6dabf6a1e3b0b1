"""Weights of samples that are remembered: set from outside, learned by mirror descent, or by relative difficulty."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from .base import Scope, Weighting, lookup, method
from .config import as_table, check_whole
from .dynamics import Event
from .frequency import Values
from .sample import SampleTable, note, places
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


@method(
    "sample_weight_table",
    paper="Just Train Twice: Improving Group Robustness without Training Group Information",
    venue="ICML 2021; the table itself is textbook",
    official="anniesch/jtt",
    neutral={"num_samples": 64},
    examples=({"num_samples": 8, "weights": [1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 1.0, 0.25]},),
)
@final
class SampleWeight(Weighting):
    r"""Give each training sample the weight that a table holds: scores, error sets, weights from another program.

    .. math:: w_i = v_{k_i}

    - :math:`v`: the table; :math:`k_i`: ``index=`` of the sample

    Weights:
        The table's entries, >= 0. Detached. All ones, which is how it begins, are neutral.

    State and cadence:
        ``table``: a :class:`SampleTable`, saved. It changes by :meth:`set` only, which every rank has to call alike.

    Use when:
        Weights per training sample come from another program and may change during training: data scores, a curriculum,
        the error set of Just Train Twice.
    Avoid when:
        The weight is a column of the data set: pass it as sample weight, which statistics count too. Groups are known:
        group weights gain more than Just Train Twice in the shortcut suite.

    Deviations:
        None: the table is textbook.

    Args:
        num_samples: Length of the data set.
        weights: One number >= 0 per sample. Default: ones.
        device: As in :class:`SampleTable`.
        storage: As in :class:`SampleTable`.

    Shapes:
        Reads ``index`` ``(S[0],)``; returns weights that broadcast to ``(*S)``.

    Example:
        >>> import torch
        >>> weighting = SampleWeight(4)
        >>> weighting.set([1, 3], 20.0)
        >>> weighting.table.read(torch.arange(4)).flatten()
        tensor([ 1., 20.,  1., 20.])

    References:
        E. Z. Liu, B. Haghgoo, A. S. Chen, A. Raghunathan, P. W. Koh, S. Sagawa, P. Liang, C. Finn, "Just Train Twice:
        Improving Group Robustness without Training Group Information", ICML 2021.
    """

    needs = frozenset({"index"})
    detached = True
    scope: Scope = "local"

    def __init__(
        self,
        num_samples: int,
        *,
        weights: Values | None = None,
        device: str | None = None,
        storage: str | None = None,
    ) -> None:
        super().__init__()
        self.table = SampleTable(num_samples, fill=1.0, device=device, storage=storage)
        if weights is not None:
            first = as_table(self, "weights", weights)
            if len(first) != num_samples:
                raise ValueError(f"SampleWeight: weights must hold num_samples={num_samples} numbers, got {len(first)}")
            self.table.begins = first.float().unsqueeze(1)
            self.table.reset()

    @torch.no_grad()
    def set(self, index: Values | Tensor, weights: Values | Tensor | float) -> None:
        """Give samples new weights: one number for all, or one for each.

        Raises:
            ValueError: If an index is out of range or named twice, or a weight is negative or not finite.
        """
        at = torch.as_tensor(index).long().reshape(-1)
        if not at.numel():
            return
        given = torch.as_tensor(weights, dtype=torch.float64)
        values = as_table(self, "weights", given.expand(len(at)) if given.ndim == 0 else given)
        if len(values) != len(at):
            raise ValueError(f"SampleWeight: weights must be one number or {len(at)}, got {len(values)}")
        if bool((at.sort().values.diff() == 0).any()):
            raise ValueError("SampleWeight: index must name each sample once, got some twice")
        self.table.read(at, self)  # a wrong index is refused before anything is written
        self.table.write(at, values.unsqueeze(1), self)

    def weigh(self, terms: LossTerms) -> Tensor:
        found = self.table.read(places(self, terms), self).squeeze(1)
        return terms.spread(found.to(terms.loss.dtype))

    def reset(self) -> None:
        super().reset()
        self.table.reset()


@method(
    "adawac",
    paper=(
        "Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization under Concept Shift"
    ),
    venue="ICML 2023",
    acts_on="stacked",
    official="gail-yxie/adawac@7d1b79e2 models.py",
    defaults={"lr": ("1.0", "authors' code (lr_w); their U-Net script uses 8")},
    deviations=(
        "One logit per sample instead of two weights: the same numbers without overflow, and without a state in which "
        "a weight of 0 stays 0 for good.",
        "Several visits of a sample within one optimizer step count as one, by their mean.",
    ),
    examples=({"num_samples": 8}, {"num_samples": 10, "lr": 0.3}),
)
@final
class AdaWAC(Weighting):
    r"""Decide for each sample how far to trust its label, and how far consistency under augmentation.

    .. math::
        w_{i0} = \sigma(a_i), \quad w_{i1} = 1 - \sigma(a_i), \qquad a_i \leftarrow a_i + \eta\,(\ell_{i0} - \ell_{i1})

    - :math:`\ell_{i0}, \ell_{i1}`: supervised and consistency loss of sample i
      (:class:`~reweigh.losses.StackedLosses`); :math:`\eta`: ``lr``
    - :math:`a_i`: starts at 0, and is that after this visit: :math:`\eta \sum_t (\ell_{i0} - \ell_{i1})`

    Weights:
        In (0, 1), both of a sample adding up to 1: the larger loss gains (mirror ascent). Detached. Equal losses are a
        fixed point, and a sample of which only one loss counts keeps its logit. No argument is neutral.

    State and cadence:
        ``logit``: a :class:`SampleTable`, written at every optimizer step, by all micro-batches and ranks.

    Use when:
        Each sample has a supervised and a consistency loss and comes back every epoch, with labels dense and hard on
        some samples and sparse on others, as in segmentation under concept shift.
    Avoid when:
        Samples are seldom seen again or have no stable index: the weights stay near one half. A fixed factor on the
        consistency loss is the simpler alternative there.

    Deviations:
        See the record: logits, copies averaged.

    Args:
        num_samples: Length of the data set.
        lr: Step :math:`\eta` >= 0, or a schedule. Default 1.0 (authors' code).
        device: As in :class:`SampleTable`.
        storage: As in :class:`SampleTable`.

    Shapes:
        Reads ``loss`` ``(N, 2)`` and ``index`` ``(N,)``; returns ``(N, 2)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> AdaWAC(10).weigh(LossTerms(torch.tensor([[2.0, 2.0], [1.0, 0.0]]), index=torch.tensor([4, 7])))
        tensor([[0.5000, 0.5000],
                [0.7311, 0.2689]])

    References:
        Y. Dong, Y. Xie, R. Ward, "Adaptively Weighted Data Augmentation Consistency Regularization for Robust
        Optimization under Concept Shift", ICML 2023.
    """

    needs = frozenset({"index"})
    detached = True
    scope: Scope = "local"
    update_on: Event = "step"

    def __init__(
        self,
        num_samples: int,
        *,
        lr: float | Schedule = 1.0,
        device: str | None = None,
        storage: str | None = None,
    ) -> None:
        super().__init__()
        self.lr = check_hyper(self, "lr", lr, low=0.0)
        self.logit = SampleTable(num_samples, device=device, storage=storage)
        self.add_rows("visits", 3)

    def _gap(self, terms: LossTerms) -> Tensor:
        if terms.loss.ndim != 2 or terms.loss.shape[1] != 2:
            raise ValueError(
                "AdaWAC: terms must be (samples, 2), the supervised and the consistency loss of each; "
                f"got {tuple(terms.loss.shape)}"
            )
        supervised, consistency = terms.loss.detach().unbind(1)
        gap = supervised - consistency
        # one loss alone says nothing of their difference
        return gap if terms.mask is None else torch.where(terms.mask.all(1), gap, torch.zeros_like(gap))

    def weigh(self, terms: LossTerms) -> Tensor:
        before = self.logit.read(places(self, terms), self).squeeze(1)
        logit = before.to(terms.loss.dtype) + value_of(self.lr) * self._gap(terms)
        return torch.stack([logit, -logit], 1).sigmoid()

    def observe(self, terms: LossTerms) -> None:
        self.collect("visits", note(self, terms, self._gap(terms)))

    def commit(self, sums: dict[str, Tensor]) -> None:
        found = self.logit.seen(sums["visits"], self)
        before = found.before
        moved = before + (value_of(self.lr) * found.means).to(before)
        learned = (found.times > 0).unsqueeze(1) & moved.isfinite()
        self.logit.write(found.samples, torch.where(learned, moved, before), self)

    def reset(self) -> None:
        super().reset()
        self.logit.reset()


@method(
    "relative_difficulty",
    paper="Learning from Failure: Training Debiased Classifier from Biased Classifier",
    venue="NeurIPS 2020",
    official="alinlab/LfF@e66796ec train.py, util.py",
    defaults={"smoothing": ("0.3", "authors' code: 0.7 of the old value is kept")},
    deviations=(
        "The largest running loss of a class is a running one within an epoch, and exact at its end. A batch's losses "
        "enter it at the step, for a sample itself at once; the authors search the whole table, with this batch in it, "
        "at every step.",
        "No 1e-8 in the denominator: where both running losses are 0 the weight is 1/2.",
        "The biased network's gradient has no further factor q beside GeneralizedCrossEntropy's.",
    ),
    examples=({"num_samples": 8, "num_classes": 4}, {"num_samples": 12, "num_classes": 4, "smoothing": 1.0}),
)
@final
class RelativeDifficulty(Weighting):
    r"""Turn to the samples that a biased network fails on (learning from failure).

    .. math::
        w_i = \frac{b_i}{b_i + d_i}, \qquad b_i = \frac{B_i}{\max_{j:\,y_j = y_i} B_j}, \quad
        d_i = \frac{D_i}{\max_{j:\,y_j = y_i} D_j}

    - :math:`B_i, D_i`: running losses of sample i under the biased network (``biased_loss=`` of the call) and under
      this one: :math:`B \leftarrow (1 - s) B + s\,\ell` with :math:`s`: ``smoothing``
    - :math:`y_i`: class of the sample

    Weights:
        In [0, 1]: near 1 where only the biased network fails, near 0 where only this one does. Detached.
        No argument is neutral.

    State and cadence:
        ``losses``: a :class:`SampleTable` of two running losses and the class; ``class_max``: ``(C, 2)`` float64.
        Both move at every optimizer step, by all micro-batches and ranks; ``class_max`` is exact after each epoch.

    Use when:
        Data are biased, nobody has labelled by what, and the bias is easier to learn than the task; a biased network is
        trained beside this one, and samples have an index.
    Avoid when:
        Labels are noisy: the biased network fails on wrong labels first. Groups are known: group weights need no second
        network.

    Deviations:
        See the record: class maxima, both losses 0. As in the authors' code the first visit starts the running losses.

    Args:
        num_samples: Length of the data set.
        num_classes: Number of classes C.
        smoothing: Share of the new loss, in (0, 1], or a schedule. Default 0.3 (authors' code).
        device: As in :class:`SampleTable`.
        storage: As in :class:`SampleTable`.

    Shapes:
        Reads ``loss`` and ``category`` ``(N,)``, ``index`` and ``biased_loss`` ``(N,)``; returns ``(N,)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), RelativeDifficulty(100, 2))
        >>> logits, target, index = torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([3, 5])
        >>> objective.weights(logits, target, index=index, biased_loss=torch.tensor([0.1, 3.0]))
        tensor([0.5000, 0.5000])

    References:
        J. Nam, H. Cha, S. Ahn, J. Lee, J. Shin, "Learning from Failure: Training Debiased Classifier from Biased
        Classifier", NeurIPS 2020.
    """

    needs = frozenset({"index", "category", "biased_loss"})
    detached = True
    scope: Scope = "local"
    update_on: Event = "step"

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        smoothing: float | Schedule = 0.3,
        device: str | None = None,
        storage: str | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = check_whole(self, "num_classes", num_classes, low=1)
        self.smoothing = check_hyper(self, "smoothing", smoothing, low=0.0, high=1.0, open_low=True)
        # the third column is the class, -1 for samples that were never seen
        self.losses = SampleTable(num_samples, 3, fill=-1.0, device=device, storage=storage)
        self.add_state("class_max", torch.zeros(num_classes, 2, dtype=torch.float64))
        self.add_rows("visits", 5)

    def _mixed(self, before: Tensor, now: Tensor, new: Tensor) -> Tensor:
        return torch.where(new, now, before + value_of(self.smoothing) * (now - before))

    def weigh(self, terms: LossTerms) -> Tensor:
        before = self.losses.read(places(self, terms), self).to(terms.loss.dtype)
        now = terms.need("biased_loss", self).detach().to(terms.loss.dtype), terms.loss.detach()
        shares = []
        for place, (loss, most) in enumerate(zip(now, self.get_buffer("class_max").unbind(1), strict=True)):
            old, new = terms.spread(before[:, place]), terms.spread(before[:, 2] < 0)
            running = self._mixed(old, terms.spread(loss), new).clamp_min(0.0)
            top = torch.maximum(lookup(self, most, terms), running)
            shares.append(running / torch.where(top > 0, top, torch.ones_like(top)))
        biased, own = shares
        total = biased + own
        return torch.where(total > 0, biased / torch.where(total > 0, total, torch.ones_like(total)), 0.5)

    def observe(self, terms: LossTerms) -> None:
        if terms.loss.ndim != 1:
            raise ValueError(
                f"RelativeDifficulty: learns from one term per sample, got terms of shape {tuple(terms.loss.shape)}"
            )
        valid = terms.counts() > 0
        biased = torch.where(valid, terms.need("biased_loss", self).to(terms.loss.dtype), 0.0)
        own, category = torch.where(valid, terms.loss, 0.0), terms.need("category", self)
        self.collect("visits", note(self, terms, biased, own, category))

    def commit(self, sums: dict[str, Tensor]) -> None:
        found = self.losses.seen(sums["visits"], self)
        before = found.before
        running = self._mixed(before[:, :2].double(), found.means[:, :2], before[:, 2:] < 0)
        learned = (found.times > 0) & running.isfinite().all(1)
        after = torch.cat([running, found.means[:, 2:]], 1).to(before)
        self.losses.write(found.samples, torch.where(learned.unsqueeze(1), after, before), self)
        self._raise(torch.where(learned.unsqueeze(1), running, torch.zeros_like(running)), found.means[:, 2])

    def _raise(self, running: Tensor, category: Tensor) -> None:
        most = self.get_buffer("class_max")
        at = category.long().clamp(0, self.num_classes - 1).unsqueeze(1).expand_as(running)
        most.scatter_reduce_(0, at.to(most.device), running.to(most), "amax")

    def refresh(self, event: Event, **signals: object) -> None:
        if event == "epoch":
            rows = self.losses.rows
            known = rows[:, 2:] >= 0
            self.get_buffer("class_max").zero_()
            self._raise(torch.where(known, rows[:, :2], torch.zeros_like(rows[:, :2])), rows[:, 2])

    def reset(self) -> None:
        super().reset()
        self.losses.reset()
        self.get_buffer("class_max").zero_()

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed + 1)
        return {"biased_loss": 3.0 * torch.rand(batch, generator=generator, dtype=torch.float64).to(dtype)}
