"""Weights from how often a class occurs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from .base import Scope, Weighting, lookup, method
from .config import as_table, check_choice, check_whole
from .dynamics import Dynamic, Event
from .functional import effective_number_weight, inverse_frequency_weight, positive_balance_weight
from .schedules import Schedule, check_hyper, has_schedule, value_of
from .terms import LossTerms

Values = Sequence[float] | Tensor
Normalization = Literal["classes", "samples", "none"]


class ClassTable(Weighting):
    """A weighting that reads one number per class from a table."""

    needs = frozenset({"category"})
    detached = True
    scope: Scope = "local"

    @abstractmethod
    def table(self) -> Tensor:
        """``(C,)`` float64 class weights now."""

    def weigh(self, terms: LossTerms) -> Tensor:
        return lookup(self, self.table(), terms)

    def summary(self) -> dict[str, Tensor]:
        return {"class_weight": self.table().clone()}


@method(
    "class_weight",
    paper="none",
    venue="textbook",
    neutral={"weight": [1.0, 1.0, 1.0, 1.0]},
    examples=({"weight": [0.5, 1.0, 2.0, 4.0]},),
)
@final
class ClassWeight(ClassTable):
    r"""Give each class the weight you name.

    .. math:: w_i = v_{c_i}

    - :math:`v_c`: ``weight[c]``
    - :math:`c_i`: category of term :math:`i`: its target for softmax criteria, its column for sigmoid criteria

    Weights:
        The table's entries, >= 0. Detached. All ones is neutral.

    State and cadence:
        None; the table is a constant, moves with the module and is not saved.

    Use when:
        The cost of an error in each class is known from the application, or one weight per class has been tuned on
        validation data.
    Avoid when:
        Weights would only copy class counts: inverse frequency and the effective number say so and handle empty
        classes. Predicted probabilities no longer follow class frequencies.

    Deviations:
        None: there is no paper.

    Args:
        weight: One finite number >= 0 per class.

    Shapes:
        Reads ``category`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), ClassWeight([1.0, 3.0]))
        >>> objective.weights(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([1., 3.])

    References:
        None (textbook).
    """

    def __init__(self, weight: Values) -> None:
        super().__init__()
        self.add_table("weight", as_table(self, "weight", weight))

    def table(self) -> Tensor:
        return self.get_buffer("weight")


class ClassCounts(Dynamic):
    """Class counts, given at construction (a constant) or brought by the ``fit`` event (saved state).

    Args:
        counts: Samples per class, >= 0 and not all 0; ``None`` to wait for ``update("fit", class_counts=...)``.
        num_classes: Checked against the counts where given.
        owner: Name used in error messages.
    """

    def __init__(self, counts: Values | None, num_classes: int | None = None, *, owner: str = "ClassCounts") -> None:
        super().__init__()
        self.owner = owner
        self.num_classes = None if num_classes is None else check_whole(owner, "num_classes", num_classes, low=1)
        self.given = counts is not None
        self._derived: tuple[Tensor, Tensor] | None = None
        if counts is None:
            self.update_on = "fit"
            self.track_events()
            self.add_state("counts", torch.zeros(0, dtype=torch.float64))
        else:
            self.add_table("counts", self._checked("counts", counts))

    @property
    def known(self) -> bool:
        """Whether the counts have arrived."""
        return self.get_buffer("counts").numel() > 0

    def forward(self) -> Tensor:
        """``(C,)`` float64 counts; ``ValueError`` where they have not arrived."""
        if not self.known:
            raise ValueError(
                f"{self.owner}: counts are not known yet; give counts=, attach "
                "reweigh.lightning_callbacks.FitStatistics(), or call update('fit', class_counts=...)"
            )
        return self.get_buffer("counts")

    def derive(self, formula: Callable[[Tensor], Tensor], *, fixed: bool) -> Tensor:
        """``formula(counts)``; computed once per counts where it is ``fixed``, that is, has no schedule inside."""
        counts: Tensor = self()
        if not fixed or torch.compiler.is_compiling():
            return formula(counts)
        if self._derived is None or self._derived[0] is not counts:
            with torch.inference_mode(False), torch.no_grad():  # the result outlives the mode it is asked for in
                self._derived = (counts, formula(counts))
        return self._derived[1]

    def _checked(self, name: str, counts: Values) -> Tensor:
        table = as_table(self.owner, name, counts)
        if self.num_classes is not None and table.numel() != self.num_classes:
            raise ValueError(
                f"{self.owner}: {name} must have num_classes={self.num_classes} entries, got {table.numel()}"
            )
        if not bool((table > 0).any()):
            raise ValueError(f"{self.owner}: {name} must hold at least one positive number, got all zeros")
        return table

    def refresh(self, event: Event, **signals: Any) -> None:
        if event != "fit" or self.given:
            return
        if signals.get("class_counts") is None:
            raise ValueError(f"{self.owner}: update('fit') must bring class_counts=, got {sorted(signals)}")
        device = self.get_buffer("counts").device
        self._buffers["counts"] = self._checked("class_counts", signals["class_counts"]).to(device)

    def reset(self) -> None:
        super().reset()
        if not self.given:
            self._buffers["counts"] = self.get_buffer("counts").new_zeros(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "counts")
        if not self.given and isinstance(saved, Tensor):  # the number of classes comes from the data, or from the file
            self._buffers["counts"] = torch.zeros_like(saved, device=self.get_buffer("counts").device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class CountTable(ClassTable):
    """A class table computed from class counts, given at construction or by the ``fit`` event."""

    def __init__(
        self, counts: Values | None, *, normalize: Normalization = "classes", num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.normalize_by = check_choice(self, "normalize", normalize, ("classes", "samples", "none"))
        self.counts = ClassCounts(counts, num_classes, owner=type(self).__name__)
        if counts is None:
            self.update_on = "fit"

    @abstractmethod
    def raw(self, counts: Tensor) -> Tensor:
        """Class weights before rescaling."""

    def table(self) -> Tensor:
        return self.counts.derive(self._formula, fixed=not has_schedule(self))

    def _formula(self, counts: Tensor) -> Tensor:
        raw = self.raw(counts)
        if self.normalize_by == "none":
            return raw
        share = (counts > 0).to(counts.dtype) if self.normalize_by == "classes" else counts
        return raw * share.sum() / (share * raw).sum()

    def summary(self) -> dict[str, Tensor]:
        return super().summary() if self.counts.known else {}


@method(
    "inverse_frequency",
    paper="none",
    venue="textbook; power 1/2 from Mahajan et al., ECCV 2018",
    official="scikit-learn compute_class_weight('balanced')",
    defaults={"power": ("1.0", "textbook"), "normalize": ("'classes'", "the class-balanced loss's authors: sum = C")},
    deviations=(
        "A class with count 0 gets the weight of the rarest class seen, instead of infinity; it does not enter the "
        "normalisation.",
        "normalize='samples' is scikit-learn's 'balanced' n / (C n_c) up to the factor that makes the mean over "
        "training samples 1; for power 1 the two are equal.",
    ),
    neutral={"counts": [50, 20, 6, 1], "power": 0.0},
    examples=({"counts": [50, 20, 6, 1]}, {"counts": [50, 20, 6, 1], "power": 0.5, "normalize": "samples"}),
)
@final
class InverseFrequency(CountTable):
    r"""Weigh each class by a power of its inverse frequency.

    .. math:: w_i \propto n_{c_i}^{-a}

    - :math:`n_c`: ``counts[c]``, counts or frequencies
    - :math:`a`: ``power``; 1 gives every class the same total weight, 1/2 is the milder square root

    Weights:
        Positive. Detached. ``power=0`` is neutral, and so are equal counts.

    State and cadence:
        With ``counts`` given: none. Without: ``counts`` is a buffer set by the ``fit`` event
        (:class:`~reweigh.lightning_callbacks.FitStatistics` sends it), equal on all ranks and saved.

    Use when:
        Rare classes matter as much as frequent ones and class counts are known; the square root is milder. Recall of
        rare classes rises in both long-tail suites.
    Avoid when:
        The rarest class has a few noisy samples, or probabilities have to follow training frequencies. Logit adjustment
        after plain training costs nothing and does about as well in those suites.

    Deviations:
        Count 0 reads as the smallest positive count. ``normalize="samples"`` with ``power=1`` equals scikit-learn's
        ``"balanced"``.

    Args:
        counts: Samples per class, >= 0; ``None`` to receive them by the ``fit`` event.
        power: Exponent :math:`a` >= 0, or a schedule. Default 1.
        normalize: ``"classes"``: the mean over classes is 1; ``"samples"``: the mean over training samples is 1;
            ``"none"``.
        num_classes: Checked against the counts where given.

    Shapes:
        Reads ``category`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> InverseFrequency([90, 10]).table()
        tensor([0.2000, 1.8000], dtype=torch.float64)

    References:
        D. Mahajan, R. Girshick, V. Ramanathan, K. He, M. Paluri, Y. Li, A. Bharambe, L. van der Maaten, "Exploring the
        Limits of Weakly Supervised Pretraining", ECCV 2018 (square root).
    """

    def __init__(
        self,
        counts: Values | None = None,
        *,
        power: float | Schedule = 1.0,
        normalize: Normalization = "classes",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(counts, normalize=normalize, num_classes=num_classes)
        self.power = check_hyper(self, "power", power, low=0.0)

    def raw(self, counts: Tensor) -> Tensor:
        return inverse_frequency_weight(counts, value_of(self.power))


@method(
    "effective_number",
    paper="Class-Balanced Loss Based on Effective Number of Samples",
    venue="CVPR 2019",
    official="richardaecn/class-balanced-loss src/cifar_main.py",
    defaults={"beta": ("0.9999", "paper; 0.9, 0.99 and 0.999 are also used there")},
    deviations=(
        "1 - beta^n is computed as -expm1(n log beta), exact for large beta.",
        "A class with count 0 reads as the smallest positive count, instead of dividing by zero.",
    ),
    neutral={"counts": [50, 20, 6, 1], "beta": 0.0},
    examples=({"counts": [50, 20, 6, 1], "beta": 0.99},),
)
@final
class EffectiveNumber(CountTable):
    r"""Weigh each class by the inverse of its effective number of samples (class-balanced loss).

    .. math:: w_i \propto \frac{1-\beta}{1-\beta^{n_{c_i}}}

    - :math:`n_c`: ``counts[c]``
    - :math:`\beta`: ``beta`` in [0, 1): 0 gives ones, towards 1 it becomes the inverse frequency

    Weights:
        Positive; the ratio between two classes never exceeds that of the inverse frequency. Detached. ``beta=0`` is
        neutral.

    State and cadence:
        With ``counts`` given: none. Without: ``counts`` is a buffer set by the ``fit`` event, equal on all ranks and
        saved. ``beta`` may be a schedule: ``Piecewise([0.0, 0.9999], [160])`` is deferred re-weighting (DRW).

    Use when:
        Rare classes should count more and inverse frequency overshoots on classes of a few samples. It needs counts of
        samples, and gains recall of rare classes in both long-tail suites.
    Avoid when:
        Counts are shares that sum to 1, or recall of frequent classes may not fall. Logit adjustment after plain
        training costs nothing and does about as well in those suites.

    Deviations:
        Count 0 reads as the smallest positive count.

    Args:
        counts: Samples per class, >= 0; ``None`` to receive them by the ``fit`` event.
        beta: In [0, 1), or a schedule. Default 0.9999 (paper).
        normalize: ``"classes"`` (the authors' code: weights sum to the number of classes), ``"samples"``, ``"none"``.
        num_classes: Checked against the counts where given.

    Shapes:
        Reads ``category`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> EffectiveNumber([90, 10], beta=0.9).table()
        tensor([0.7889, 1.2111], dtype=torch.float64)

    References:
        Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie, "Class-Balanced Loss Based on Effective Number of Samples",
        CVPR 2019. K. Cao, C. Wei, A. Gaidon, N. Arechiga, T. Ma, "Learning Imbalanced Datasets with
        Label-Distribution-Aware Margin Loss", NeurIPS 2019 (deferred re-weighting).
    """

    def __init__(
        self,
        counts: Values | None = None,
        *,
        beta: float | Schedule = 0.9999,
        normalize: Normalization = "classes",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(counts, normalize=normalize, num_classes=num_classes)
        self.beta = check_hyper(self, "beta", beta, low=0.0, high=1.0, open_high=True)

    def raw(self, counts: Tensor) -> Tensor:
        return effective_number_weight(counts, value_of(self.beta))


@method(
    "positive_balance",
    paper="Focal Loss for Dense Object Detection",
    venue="ICCV 2017",
    acts_on="binary",
    official="pytorch/vision torchvision/ops/focal_loss.py",
    defaults={"alpha": ("0.25", "paper, with gamma 2")},
)
@final
class PositiveBalance(Weighting):
    r"""Weigh positives by alpha and negatives by 1 - alpha (the alpha of sigmoid focal loss).

    .. math:: w_i = \alpha\, y_i + (1-\alpha)(1-y_i)

    - :math:`y_i`: binary target in [0, 1], soft ones mix linearly
    - :math:`\alpha`: ``alpha``

    Weights:
        In [0, 1]. Detached. No argument is neutral: ``alpha=0.5`` only halves the loss.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        A detection loss is put together from a sigmoid criterion and focusing, and needs its constant balance of
        positives and negatives.
    Avoid when:
        Rare positives need more weight: the paper's 0.25 gives them less. Weights on positives alone show no gain in
        average precision over plain binary cross-entropy in the multi-label suite.

    Deviations:
        None.

    Args:
        alpha: In [0, 1], or a schedule. Default 0.25 (paper).

    Shapes:
        Reads ``target`` of shape ``(*S)``, values in [0, 1]; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import BinaryCrossEntropy, Objective
        >>> objective = Objective(BinaryCrossEntropy(), PositiveBalance(0.25))
        >>> objective.weights(torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor([0.7500, 0.2500])

    References:
        T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017.
    """

    needs = frozenset({"target"})
    detached = True
    scope: Scope = "local"

    def __init__(self, alpha: float | Schedule = 0.25) -> None:
        super().__init__()
        self.alpha = check_hyper(self, "alpha", alpha, low=0.0, high=1.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        return positive_balance_weight(terms.need("target", self).to(terms.loss.dtype), value_of(self.alpha))


def class_table(owner: object, name: str, value: Values | str | ClassTable) -> ClassTable:
    """What a ``weight=`` or per-class ``alpha=`` argument means.

    A sequence or tensor is a fixed table; ``"balanced"`` and ``"sqrt"`` are inverse frequency (power 1 and 1/2) and
    ``"effective"`` the effective number, with counts from the ``fit`` event; a class table is taken as it is.
    """
    if isinstance(value, ClassTable):
        return value
    if isinstance(value, str):
        check_choice(owner, name, value, ("balanced", "sqrt", "effective"))
        if value == "effective":
            return EffectiveNumber()
        return InverseFrequency(power=1.0 if value == "balanced" else 0.5)
    return ClassWeight(as_table(owner, name, value))
