"""What a mean over samples hides: the worst group, the worst class, the rare classes, how few samples carry the loss.

They are torchmetrics metrics: states are summed over batches and ranks, and a LightningModule logs them by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from reweigh.weighting.config import as_table, check_choice, check_number, check_whole, owner_name


class _ByKey(Metric):
    """Right predictions and samples by key (group or class), as whole numbers, so that every rank gets the same ratio.

    torchmetrics' rules for predictions hold: one more dimension than the target means scores per class (logits or
    probabilities), whole numbers of the target's shape are classes, and real ones are binary probabilities, or logits
    where any of them is outside [0, 1].
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    right: Tensor
    seen: Tensor

    def __init__(
        self, keys: int, *, threshold: float, ignore_index: int | None, validate_args: bool, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.threshold = check_number(self, "threshold", threshold, low=0.0, high=1.0)
        self.ignore_index, self.validate_args = ignore_index, validate_args
        self.add_state("right", torch.zeros(keys, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(keys, dtype=torch.int64), dist_reduce_fx="sum")

    def _take(self, preds: Tensor, target: Tensor, key: Tensor, name: str) -> None:
        """Add a batch; ``key`` is ``(N,)`` or of the target's shape, and is called ``name`` where it is wrong."""
        labels = self._labels(preds, target)
        if key.ndim < target.ndim:
            key = key.reshape(key.shape + (1,) * (target.ndim - key.ndim))
        if key.ndim != target.ndim or any(k not in (1, t) for k, t in zip(key.shape, target.shape, strict=True)):
            raise ValueError(
                f"{owner_name(self)}: {name} must have an entry per sample or the target's shape, got "
                f"{tuple(key.shape)} for a target of {tuple(target.shape)}"
            )
        counts = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            counts = target != self.ignore_index
        key = torch.where(counts, key.expand_as(target), 0).long().reshape(-1)
        if self.validate_args and key.numel():
            low, high = int(key.min()), int(key.max())
            if low < 0 or high >= len(self.seen):
                raise ValueError(
                    f"{owner_name(self)}: {name} must be between 0 and {len(self.seen) - 1}, got {low} to {high}"
                )
        self.right = self.right.index_add(0, key, (counts & (labels == target)).long().reshape(-1))
        self.seen = self.seen.index_add(0, key, counts.long().reshape(-1))

    def _labels(self, preds: Tensor, target: Tensor) -> Tensor:
        if preds.ndim == target.ndim + 1 and preds.is_floating_point():
            if preds.shape[:1] + preds.shape[2:] == target.shape:
                return preds.argmax(1)
        elif preds.shape == target.shape:
            if not preds.is_floating_point():
                return preds
            logits = ((preds < 0) | (preds > 1)).any()
            return (torch.where(logits, preds.sigmoid(), preds) > self.threshold).to(target.dtype)
        raise ValueError(
            f"{owner_name(self)}: preds must be classes or binary scores of the target's shape (N, ...), or real "
            f"scores (N, C, ...); got {tuple(preds.shape)} ({preds.dtype}) for a target of {tuple(target.shape)}"
        )

    def _shares(self) -> Tensor:
        """``(K,)`` float64 share of right predictions; nan where nothing was seen."""
        return self.right.double() / self.seen.double()

    @staticmethod
    def _least(shares: Tensor) -> Tensor:
        """The smallest that is known; nan where none is."""
        none = shares.isnan()
        least = torch.where(none, torch.inf, shares).min()
        return torch.where(none.all(), torch.nan, least).float()

    @staticmethod
    def _mean(values: Tensor, chosen: Tensor) -> Tensor:
        """The mean of known and chosen values; nan where there is none."""
        kept = chosen & ~values.isnan()
        return (torch.where(kept, values, 0.0).sum() / kept.sum()).float()


@final
class GroupAccuracy(_ByKey):
    r"""Accuracy of each group, ``(num_groups,)``; nan for a group that was not seen.

    .. math:: a_g = \frac{\sum_i [g_i = g]\,[\hat y_i = y_i]}{\sum_i [g_i = g]}

    In a ``MetricCollection`` with :class:`WorstGroupAccuracy` the two share one update.

    State and cadence:
        Two counts per group, summed over batches and ranks.

    Args:
        num_groups: Number of groups, >= 1.
        threshold: Of binary probabilities, in [0, 1]. Default 0.5.
        ignore_index: Targets with this value are left out. Default: none.
        validate_args: Whether each batch is checked for groups outside ``0 ... num_groups - 1``, which reads a value
            back from the device. Default True.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(preds, target, group)``: predictions ``(N, C, ...)`` (scores) or ``(N, ...)`` (classes, or binary
        scores), target ``(N, ...)``, group ``(N,)`` or ``(N, ...)``.

    Example:
        >>> metric = GroupAccuracy(3)
        >>> metric.update(torch.tensor([1, 0, 1, 1]), torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 2, 2]))
        >>> metric.compute()
        tensor([0.5000,    nan, 1.0000])
    """

    def __init__(
        self,
        num_groups: int,
        *,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_groups = check_whole(self, "num_groups", num_groups, low=1)
        super().__init__(
            num_groups, threshold=threshold, ignore_index=ignore_index, validate_args=validate_args, **kwargs
        )

    def update(self, preds: Tensor, target: Tensor, group: Tensor) -> None:
        """Add a batch."""
        self._take(preds, target, group, "group")

    def compute(self) -> Tensor:
        """``(num_groups,)`` accuracies."""
        return self._shares().float()


@final
class WorstGroupAccuracy(_ByKey):
    r"""Accuracy of the group that is served worst (Sagawa et al., ICLR 2020).

    .. math:: \min_{g \text{ seen}} \frac{\sum_i [g_i = g]\,[\hat y_i = y_i]}{\sum_i [g_i = g]}

    A group without samples is left out, not counted as 0; where no group has any the result is nan.
    :class:`GroupAccuracy` has all groups.

    State and cadence:
        Two counts per group, summed over batches and ranks before the minimum is taken: the worst group of all data,
        not the mean of each batch's worst.

    Args:
        num_groups: Number of groups, >= 1.
        threshold: Of binary probabilities, in [0, 1]. Default 0.5.
        ignore_index: Targets with this value are left out. Default: none.
        validate_args: Whether each batch is checked for groups outside ``0 ... num_groups - 1``, which reads a value
            back from the device. Default True.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(preds, target, group)``: predictions ``(N, C, ...)`` (scores) or ``(N, ...)`` (classes, or binary
        scores), target ``(N, ...)``, group ``(N,)`` or ``(N, ...)``.

    Example:
        >>> metric = WorstGroupAccuracy(3)
        >>> logits = torch.tensor([[0.2, 1.5], [2.0, 0.1], [0.3, 0.4], [0.0, 3.0]])
        >>> metric.update(logits, torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 2, 2]))
        >>> metric.compute()
        tensor(0.5000)

        In a LightningModule, ``self.worst = WorstGroupAccuracy(3)`` and, in ``validation_step``::

            self.worst.update(logits, target, group)
            self.log("val/worst_group", self.worst)

    References:
        Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, ICLR 2020.
    """

    def __init__(
        self,
        num_groups: int,
        *,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_groups = check_whole(self, "num_groups", num_groups, low=1)
        super().__init__(
            num_groups, threshold=threshold, ignore_index=ignore_index, validate_args=validate_args, **kwargs
        )

    def update(self, preds: Tensor, target: Tensor, group: Tensor) -> None:
        """Add a batch."""
        self._take(preds, target, group, "group")

    def compute(self) -> Tensor:
        """The smallest accuracy of a group that was seen."""
        return self._least(self._shares())


@final
class WorstClassRecall(_ByKey):
    r"""Recall of the class that is recognised worst.

    .. math:: \min_{c \text{ seen}} \frac{\sum_i [y_i = c]\,[\hat y_i = c]}{\sum_i [y_i = c]}

    A class without samples is left out, not counted as 0; where no class has any the result is nan. All recalls:
    ``torchmetrics.classification.MulticlassRecall(num_classes, average=None)``.

    State and cadence:
        Two counts per class, summed over batches and ranks before the minimum is taken.

    Args:
        num_classes: Number of classes, >= 2.
        threshold: Of binary probabilities, in [0, 1]. Default 0.5.
        ignore_index: Targets with this value are left out. Default: none.
        validate_args: Whether each batch is checked for targets outside ``0 ... num_classes - 1``, which reads a value
            back from the device. Default True.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(preds, target)``: predictions ``(N, C, ...)`` (scores) or ``(N, ...)`` (classes, or binary scores),
        target ``(N, ...)``.

    Example:
        >>> metric = WorstClassRecall(3)
        >>> metric.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_classes = check_whole(self, "num_classes", num_classes, low=2)
        super().__init__(
            num_classes, threshold=threshold, ignore_index=ignore_index, validate_args=validate_args, **kwargs
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._take(preds, target, target, "target")

    def compute(self) -> Tensor:
        """The smallest recall of a class that was seen."""
        return self._least(self._shares())


@final
class SplitAccuracy(_ByKey):
    r"""Accuracy on classes with many, medium and few training samples, as reported for long-tailed data.

    With :math:`n_c` training samples of class c and recall :math:`r_c` on the data given to ``update``:

    .. math::
        \text{many} = \operatorname{mean}_{c:\,n_c > m} r_c, \quad
        \text{medium} = \operatorname{mean}_{c:\,f \le n_c \le m} r_c, \quad
        \text{few} = \operatorname{mean}_{c:\,n_c < f} r_c, \quad
        \text{all} = \operatorname{mean}_c r_c

    over classes that were seen; nan where a split has none. With ``average="micro"`` each sample counts the same
    instead of each class. On test data with as many samples of each class both are the same.

    State and cadence:
        Two counts per class, summed over batches and ranks.

    Args:
        class_counts: Training samples of each class (:func:`reweigh.class_counts` counts them).
        many: Classes with more are ``"many"``, >= ``few``. Default 100.
        few: Classes with less are ``"few"``, >= 0. Default 20.
        average: ``"macro"``: the mean over classes; ``"micro"``: over samples. Default ``"macro"``.
        ignore_index: Targets with this value are left out. Default: none.
        validate_args: Whether each batch is checked for targets that are no class, which reads a value back from the
            device. Default True.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(preds, target)``: predictions ``(N, C, ...)`` (scores) or ``(N, ...)`` (classes), target ``(N, ...)``.
        ``compute()``: a dict of 0-d tensors with the keys ``many``, ``medium``, ``few``, ``all``.

    Example:
        >>> metric = SplitAccuracy([500, 60, 3])
        >>> metric.update(torch.tensor([0, 0, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 2]))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'many': 1.0, 'medium': 0.5, 'few': 0.0, 'all': 0.5}

        In a LightningModule, ``self.log`` takes metrics of one number; log the dict at the end of the epoch::

            def on_validation_epoch_end(self):
                self.log_dict({f"val/{name}": value for name, value in self.splits.compute().items()})
                self.splits.reset()

    References:
        Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019 (the thresholds).
    """

    class_counts: Tensor

    def __init__(
        self,
        class_counts: Sequence[float] | Tensor,
        many: float = 100,
        few: float = 20,
        *,
        average: str = "macro",
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        counts = as_table(self, "class_counts", class_counts)
        super().__init__(len(counts), threshold=0.5, ignore_index=ignore_index, validate_args=validate_args, **kwargs)
        self.few = check_number(self, "few", few, low=0.0)
        self.many = check_number(self, "many", many, low=self.few)
        self.average = check_choice(self, "average", average, ("macro", "micro"))
        self.register_buffer("class_counts", counts, persistent=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._take(preds, target, target, "target")

    def compute(self) -> dict[str, Tensor]:
        """Accuracy of each split, and of all classes."""
        many, few = self.class_counts > self.many, self.class_counts < self.few
        splits = {"many": many, "medium": ~many & ~few, "few": few, "all": torch.ones_like(many)}
        if self.average == "micro":
            return {name: (self.right[chosen].sum() / self.seen[chosen].sum()) for name, chosen in splits.items()}
        return {name: self._mean(self._shares(), chosen) for name, chosen in splits.items()}


class _OfWeights(Metric):
    """Sums over weights, in float64."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    terms: Tensor
    total: Tensor

    def __init__(self, *, validate_args: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.validate_args = validate_args
        self._sum("terms")
        self._sum("total")

    def _sum(self, name: str) -> None:
        self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, weights: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take a batch's number of terms and sum; returns weights and counts as float64, without what counts 0."""
        weights = weights.detach().double()
        if counts is None:
            number = torch.ones_like(weights)
        else:
            number = counts.detach().double()
            number = number.reshape(number.shape + (1,) * (weights.ndim - number.ndim)).expand_as(weights)
        weights = torch.where(number > 0, weights, 0.0)
        if self.validate_args:
            wrong = ~(weights.isfinite() & (weights >= 0) & number.isfinite() & (number >= 0))
            if bool(wrong.any()):
                raise ValueError(
                    f"{owner_name(self)}: weights and counts must be finite and >= 0, got "
                    f"{float(weights[wrong][0])} that counts {float(number[wrong][0])}"
                )
        self.terms = self.terms + number.sum()
        self.total = self.total + (number * weights).sum()
        return weights, number


@final
class EffectiveSampleSize(_OfWeights):
    r"""Kish's effective sample size of the weights: as if so many terms had equal weights.

    .. math:: n_\text{eff} = \frac{\left(\sum_i n_i w_i\right)^2}{\sum_i n_i w_i^2}

    with :math:`n_i` the number of terms that term i stands for (0 where masked). It is the number of terms where all
    weights are equal, and 1 where one has all of it; scaling all weights changes nothing. 0 where all weights are 0;
    nan where nothing was seen.

    State and cadence:
        Three sums in float64, over batches and ranks.

    Args:
        share: Whether to give it as a share of the number of terms, in [0, 1]. Default False.
        validate_args: Whether each batch is checked for weights that are negative or not finite, which reads a value
            back from the device. Default True.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(weights, counts=None)``: weights ``(*S)`` (of :meth:`reweigh.losses.Objective.weights`, say); counts
        ``(*S)`` or ``(S[0],)``, bool or numbers. What counts 0 may hold anything.

    Example:
        >>> metric, share = EffectiveSampleSize(), EffectiveSampleSize(share=True)
        >>> for weights in (torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])):
        ...     metric.update(weights)
        ...     share.update(weights)
        >>> metric.compute().item(), share.compute().item()
        (3.0, 0.5)

    References:
        Kish, Survey Sampling, Wiley 1965.
    """

    higher_is_better = None
    squares: Tensor

    def __init__(self, *, share: bool = False, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        self.share = share
        self._sum("squares")

    def update(self, weights: Tensor, counts: Tensor | None = None) -> None:
        """Add a batch."""
        weight, number = self._add(weights, counts)
        self.squares = self.squares + (number * weight.square()).sum()

    def compute(self) -> Tensor:
        """The number, or the share."""
        size = self.total.square() / torch.where(self.squares > 0, self.squares, 1.0)
        size = torch.where(self.terms > 0, size, torch.nan)
        return (size / self.terms if self.share else size).float()


@final
class WeightEntropy(_OfWeights):
    r"""Entropy of the weights as a distribution over terms: 1 where all are equal, 0 where one term has everything.

    With :math:`p_i = w_i / \sum_j n_j w_j`, N the number of terms and :math:`n_i` how many of them term i stands for:

    .. math::
        H = -\sum_i n_i\, p_i \log p_i, \qquad
        \mathrm{KL}(p \,\|\, u) = \log N - H = \frac{\sum_i n_i w_i \log w_i}{\sum_i n_i w_i}
        - \log \frac{\sum_i n_i w_i}{N}

    and the normalised entropy is :math:`H / \log N = 1 - \mathrm{KL} / \log N`. exp(H) is another effective number
    of terms. Scaling all weights changes nothing. nan where nothing was seen, or all weights are 0.

    State and cadence:
        Three sums in float64, over batches and ranks. What is small, the divergence, is made from them, and the entropy
        from it: near uniform weights lose no digits to log N.

    Args:
        kind: ``"normalized"`` (in [0, 1]; 1 for a single term), ``"entropy"`` (H, in nats) or ``"kl"`` (the divergence
            to equal weights, in nats). Default ``"normalized"``.
        validate_args: Whether each batch is checked for weights that are negative or not finite, which reads a value
            back from the device. Default True.
        **kwargs: Of ``torchmetrics.Metric``.

    Shapes:
        ``update(weights, counts=None)``: weights ``(*S)``; counts ``(*S)`` or ``(S[0],)``, bool or numbers. What counts
        0 may hold anything.

    Example:
        >>> metric = WeightEntropy()
        >>> metric.update(torch.tensor([2.0, 2.0]))
        >>> metric.update(torch.tensor([0.0, 0.0]))
        >>> metric.compute()  # half of the terms share it all: log 2 / log 4
        tensor(0.5000)
    """

    higher_is_better = None
    logs: Tensor

    def __init__(self, *, kind: str = "normalized", validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(validate_args=validate_args, **kwargs)
        self.kind = check_choice(self, "kind", kind, ("normalized", "entropy", "kl"))
        self._sum("logs")

    def update(self, weights: Tensor, counts: Tensor | None = None) -> None:
        """Add a batch."""
        weight, number = self._add(weights, counts)
        self.logs = self.logs + (number * torch.xlogy(weight, weight)).sum()

    def compute(self) -> Tensor:
        """The entropy, or the divergence."""
        largest = self.terms.log().clamp_min(0.0)
        divergence = self.logs / self.total - (self.total / self.terms).log()
        divergence = divergence.clamp(torch.zeros_like(largest), largest)  # where rounding left it outside
        if self.kind == "kl":
            return divergence.float()
        if self.kind == "entropy":
            return (largest - divergence).float()
        normalized = 1.0 - divergence / torch.where(largest > 0, largest, 1.0)
        return torch.where(divergence.isnan(), torch.nan, torch.where(largest > 0, normalized, 1.0)).float()
