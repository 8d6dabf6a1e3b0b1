"""Logit transforms: corrections that act before the criterion. Not weightings, on purpose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from reweigh.weighting.config import check_number
from reweigh.weighting.dynamics import Dynamic
from reweigh.weighting.frequency import ClassCounts, Values
from reweigh.weighting.functional import floor_counts
from reweigh.weighting.schedules import Schedule, check_hyper, has_schedule, value_of


class LogitTransform(Dynamic, ABC):
    """Changes logits before a criterion sees them: ``CrossEntropy(logits=LogitAdjustment(counts))``."""

    exact_gradient: bool = True
    """False where part of the formula is held constant while gradient flows through the rest."""

    @abstractmethod
    def forward(self, logits: Tensor, target: Tensor | None = None, *, dim: int = 1) -> Tensor:
        """New logits.

        Args:
            logits: Classes along ``dim``.
            target: What the criterion compares with, for transforms that depend on it (margins).
            dim: The class dimension.
        """


def _shaped(owner: LogitTransform, shift: Tensor, logits: Tensor, dim: int) -> Tensor:
    """One number per class, as something that can be added to logits."""
    if shift.numel() != logits.shape[dim]:
        raise ValueError(
            f"{type(owner).__name__}: has counts of {shift.numel()} classes, "
            f"but the logits have {logits.shape[dim]} along dimension {dim}"
        )
    shape = [1] * logits.ndim
    shape[dim] = -1
    return shift.to(logits.dtype).reshape(shape)


class _Priors(LogitTransform):
    """Adds tau times the log class priors."""

    def __init__(self, counts: Values | None, tau: float | Schedule, num_classes: int | None) -> None:
        super().__init__()
        self.counts = ClassCounts(counts, num_classes, owner=type(self).__name__)
        self.tau = check_hyper(self, "tau", tau, low=0.0)
        if counts is None:
            self.update_on = "fit"

    def shift(self) -> Tensor:
        """``(C,)`` float64: what is added to each class's logits."""
        return self.counts.derive(
            lambda counts: value_of(self.tau) * (floor_counts(counts) / counts.sum()).log(),
            fixed=not has_schedule(self),
        )

    def forward(self, logits: Tensor, target: Tensor | None = None, *, dim: int = 1) -> Tensor:
        return logits + _shaped(self, self.shift(), logits, dim)


@final
class LogitAdjustment(_Priors):
    r"""Add the log class priors to the logits while training, so that the model learns what the priors do not explain.

    .. math:: z'_c = z_c + \tau \log \pi_c

    - :math:`\pi_c`: share of class c in the training data, from ``counts``
    - :math:`\tau`: ``tau``; 1 is the Bayes-optimal correction for balanced error, 0 is neutral

    At inference use the model's own logits: they are balanced already. :meth:`posthoc` is the other way to the same
    end: train with plain cross-entropy and *subtract* the priors from the logits at inference.

    State and cadence:
        With ``counts`` given: none. Without: a buffer set by the ``fit`` event, equal on all ranks, saved.

    Args:
        counts: Samples per class, >= 0; ``None`` to receive them by the ``fit`` event. A class with count 0 reads as
            the smallest positive count.
        tau: Finite and >= 0, or a schedule. Default 1 (paper).
        num_classes: Checked against the counts where given.

    Shapes:
        Logits with the class dimension ``dim``; returns the same shape.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> loss = Objective(CrossEntropy(logits=LogitAdjustment([90, 10])))
        >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(1.2040)

    References:
        A. K. Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021.
    """

    def __init__(
        self, counts: Values | None = None, *, tau: float | Schedule = 1.0, num_classes: int | None = None
    ) -> None:
        super().__init__(counts, tau, num_classes)

    def posthoc(self, logits: Tensor, *, dim: int = -1) -> Tensor:
        """Logits of a model trained *without* adjustment, corrected for balanced classes: ``z - tau log pi``."""
        return logits - _shaped(self, self.shift(), logits, dim)


@final
class BalancedSoftmax(_Priors):
    r"""Balanced softmax: logit adjustment with :math:`\tau = 1`, under the name of its paper.

    .. math:: z'_c = z_c + \log n_c

    Only differences of logits matter, so counts and priors give the same loss.

    State and cadence:
        As :class:`LogitAdjustment`.

    Args:
        counts: Samples per class, >= 0; ``None`` to receive them by the ``fit`` event.
        num_classes: Checked against the counts where given.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> loss = Objective(CrossEntropy(logits=BalancedSoftmax([90, 10])))
        >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(1.2040)

    References:
        J. Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.
    """

    def __init__(self, counts: Values | None = None, *, num_classes: int | None = None) -> None:
        super().__init__(counts, 1.0, num_classes)


@final
class BinaryLogitAdjustment(LogitTransform):
    r"""Logit adjustment for independent labels: add each label's log-odds of being present while training.

    .. math:: z'_c = z_c + \tau \log \frac{\pi_c}{1 - \pi_c}

    - :math:`\pi_c`: share of the training samples that have label c, ``counts[c] / samples``
    - :math:`\tau`: ``tau``; 0 is neutral

    At inference use the model's own logits: a label is then predicted where the sample makes it likelier than it is
    on average. It is the two-class softmax adjustment of each label against its absence.

    Args:
        counts: Samples that have each label, >= 0.
        samples: Number of training samples, at least every count. Counts of 0 and of all samples read as half a sample
            from the end.
        tau: Finite and >= 0, or a schedule. Default 1.

    Shapes:
        Logits with the label dimension ``dim``; returns the same shape.

    Raises:
        ValueError: If a count is above ``samples``, or as :class:`LogitAdjustment`.

    Example:
        >>> import torch
        >>> BinaryLogitAdjustment([10, 50], samples=100)(torch.zeros(1, 2))
        tensor([[-2.1972,  0.0000]])

    References:
        A. K. Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021, in the two-class case.
    """

    def __init__(self, counts: Values, *, samples: float, tau: float | Schedule = 1.0) -> None:
        super().__init__()
        self.counts = ClassCounts(counts, None, owner=type(self).__name__)
        self.samples = check_number(self, "samples", samples, low=0.0, open_low=True)
        most = float(self.counts().max())
        if most > self.samples:
            raise ValueError(f"BinaryLogitAdjustment: counts must be <= samples = {self.samples:g}, got {most:g}")
        self.tau = check_hyper(self, "tau", tau, low=0.0)

    def shift(self) -> Tensor:
        """``(C,)`` float64: what is added to each label's logits."""

        def odds(counts: Tensor) -> Tensor:
            present = counts.clamp(0.5, self.samples - 0.5)
            return value_of(self.tau) * (present / (self.samples - present)).log()

        return self.counts.derive(odds, fixed=not has_schedule(self))

    def forward(self, logits: Tensor, target: Tensor | None = None, *, dim: int = 1) -> Tensor:
        return logits + _shaped(self, self.shift(), logits, dim)


@final
class Temperature(LogitTransform):
    """Divide the logits by a temperature > 0, which may be a schedule."""

    def __init__(self, temperature: float | Schedule = 1.0) -> None:
        super().__init__()
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)

    def forward(self, logits: Tensor, target: Tensor | None = None, *, dim: int = 1) -> Tensor:
        return logits / value_of(self.temperature)


@final
class Chain(LogitTransform):
    """Apply several transforms, the first one first. ``steps`` are further ones, for YAML, which has no ``*args``."""

    def __init__(self, *transforms: LogitTransform, steps: Sequence[LogitTransform] = ()) -> None:
        super().__init__()
        transforms = (*transforms, *steps)
        for transform in transforms:
            if not isinstance(transform, LogitTransform):
                raise TypeError(f"Chain: transforms must be LogitTransforms, got {type(transform).__name__}")
        self.transforms = nn.ModuleList(transforms)
        self.exact_gradient = all(transform.exact_gradient for transform in transforms)

    def forward(self, logits: Tensor, target: Tensor | None = None, *, dim: int = 1) -> Tensor:
        for transform in self.transforms:
            logits = transform(logits, target, dim=dim)
        return logits


def posthoc_logit_adjustment(logits: Tensor, counts: Values, *, tau: float = 1.0, dim: int = -1) -> Tensor:
    r"""Correct a trained model's logits for balanced classes, without retraining: :math:`z_c - \tau\log\pi_c`.

    Example:
        >>> import torch
        >>> posthoc_logit_adjustment(torch.tensor([[2.0, 1.0]]), [90, 10]).argmax(-1)
        tensor([1])
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"posthoc_logit_adjustment: logits must be a floating-point tensor, got {found}")
    return LogitAdjustment(counts, tau=tau).posthoc(logits, dim=dim)
