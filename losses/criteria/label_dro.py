"""Label-distributionally robust losses: a soft maximum over labels, its temperature fixed or one per sample."""

from __future__ import annotations

import math
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from reweigh.weighting.config import check_choice, check_number
from reweigh.weighting.schedules import Schedule, check_hyper, value_of
from reweigh.weighting.terms import LossTerms, mask_out

from .base import _kind, expand_mask, is_index, upcast
from .element import SoftmaxCriterion
from .remembering import Remembering

Scores = Literal["raw", "softplus", "abs"]
"""What becomes of the logits: nothing, softplus over its mean, or division by the mean absolute value."""

SCORES: tuple[Scores, ...] = ("raw", "softplus", "abs")
SMOOTHING = 1e-5
"""Added to every probability before its entropy is taken (authors' code)."""
LEAST = 1e-4
"""Least temperature of a sample as a share of the common one; ``alpha >= 1`` does not reach it."""


def label_scores(logits: Tensor, scores: Scores, dim: int) -> Tensor:
    """Scores of the labels: the logits, or the logits on a scale of their own; see :data:`Scores`."""
    if scores == "softplus":
        # over its mean, softplus is the number of classes times a softmax of its logarithm, which does not underflow
        low = logits < -20.0
        usual = softplus(torch.where(low, 0.0, logits), threshold=40.0).log()
        below = torch.where(low, logits, -20.0)
        log_score = torch.where(low, below - 0.5 * below.exp(), usual)
        return logits.shape[dim] * log_score.softmax(dim)
    if scores == "abs":
        mean = logits.abs().mean(dim, keepdim=True)
        known = mean > math.sqrt(torch.finfo(mean.dtype).tiny)
        return logits / torch.where(known, mean, torch.ones_like(mean))  # a row of zeros has no scale
    return logits


def label_dro(scores: Tensor, target: Tensor, temperature: float | Tensor, margin: float | Tensor, dim: int) -> Tensor:
    r""":math:`\lambda \ln \frac1K \sum_k \exp((f_k - f_y + c[k \ne y])/\lambda)`, exact for any :math:`\lambda > 0`.

    Args:
        scores: :math:`f`, floating-point, classes along ``dim``.
        target: Class indices, of the scores' shape without ``dim``.
        temperature: :math:`\lambda`: a number, or one of the targets' shape.
        margin: :math:`c`.
        dim: The class dimension.
    """
    at = target.unsqueeze(dim)
    ahead = scores - scores.gather(dim, at)
    if isinstance(margin, Tensor) or margin != 0.0:
        ahead = ahead + margin * torch.ones_like(ahead).scatter(dim, at, 0.0)
    most = ahead.detach().amax(dim, keepdim=True)
    hot = temperature.unsqueeze(dim) if isinstance(temperature, Tensor) and temperature.ndim else temperature
    return most.squeeze(dim) + temperature * _log_mean_exp((ahead - most) / hot, dim)


def _log_mean_exp(x: Tensor, dim: int) -> Tensor:
    """``log(mean(exp(x)))`` where the largest entry is 0, without cancellation where all are near it."""
    near = x.detach().amin(dim, keepdim=True) > -0.5
    flat = torch.where(near, x, torch.zeros_like(x)).expm1().mean(dim).log1p()
    return torch.where(near.squeeze(dim), flat, x.logsumexp(dim) - math.log(x.shape[dim]))


def label_concentration(scores: Tensor, temperature: Tensor, alpha: float) -> Tensor:
    r"""How far a sample's temperature falls: :math:`\mathrm{KL}(p\,\|\,u) / (\alpha \ln K)`, in :math:`[0, 1)`.

    Args:
        scores: ``(N, K)``, K at least 2.
        temperature: ``(N,)`` that :math:`p = \mathrm{softmax}(f/\lambda)` is taken at.
        alpha: :math:`\alpha > 0`.

    Returns:
        ``(N,)`` without gradient.
    """
    classes = scores.shape[1]
    scores, temperature = scores.detach(), temperature.detach()
    p = ((scores / temperature.unsqueeze(1)).softmax(1) + SMOOTHING) / (1.0 + classes * SMOOTHING)
    apart = (p * (classes * p).log()).sum(1)
    return (apart / (alpha * math.log(classes))).clamp(0.0, 1.0 - LEAST)


def _parts(owner: SoftmaxCriterion, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, int]:
    """Logits, labels and the class dimension of a call."""
    name = type(owner).__name__
    if len(inputs) != 2:
        raise TypeError(f"{name}: takes (logits, target), got {len(inputs)} inputs")
    logits, target = upcast(owner, "logits", inputs[0]), inputs[1]
    if not is_index(target):
        raise TypeError(f"{name}: target must be class indices, got {_kind(target)}")
    if logits.ndim == 0:
        raise ValueError(f"{name}: logits must have a class dimension, got a scalar")
    dim = 1 if logits.ndim > 1 else 0
    shape = logits.shape[:dim] + logits.shape[dim + 1 :]
    if logits.shape[dim] == 0:
        raise ValueError(f"{name}: logits must have at least one class, got shape {tuple(logits.shape)}")
    if target.shape != shape:
        raise ValueError(
            f"{name}: target must have shape {tuple(shape)} for logits {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    return logits, target, dim


@final
class LabelDRO(SoftmaxCriterion):
    r"""A soft maximum over labels of how far each is ahead of the target: the worst case over label distributions.

    .. math:: \ell_i = \lambda \ln \frac1K \sum_k \exp\frac{f_{ik} - f_{iy_i} + c\,[k \ne y_i]}{\lambda}
              = \max_p \sum_k p_k (f_{ik} - f_{iy_i} + c\,[k \ne y_i]) - \lambda\,\mathrm{KL}(p\,\|\,1/K)

    - :math:`f`: ``scores`` of the logits, class dimension 1 (dimension 0 where unbatched); :math:`c`: ``margin``
    - :math:`\lambda`: ``temperature``; K: number of classes

    With raw scores, temperature 1 and no margin this is cross-entropy less :math:`\ln K`. A low temperature tends to
    the multi-class hinge of Crammer and Singer, a high one to the mean over labels. Terms may be negative.

    Provides ``loss``, ``log_pt`` (of the softmax of the logits), ``target``, ``category``; ``log_qt`` exactly for two
    classes.

    Args:
        temperature: :math:`\lambda > 0`, or a schedule.
        margin: :math:`c \ge 0`, or a schedule.
        scores: ``"raw"``: the logits. ``"softplus"``: softplus of the logits over its mean over classes. ``"abs"``: the
            logits over their mean absolute value (a row of zeros stays as it is).
        ignore_index: Targets with this value are removed.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``logits (N, C, d1, ...)`` with ``target (N, d1, ...)``; terms ``(N, d1, ...)``. Unbatched ``(C,)`` with ``()``.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` not integer.
        ValueError: If shapes do not fit or a label is out of range.

    Example:
        >>> import torch
        >>> LabelDRO(margin=1.0).terms(torch.zeros(1, 2), torch.tensor([0])).loss
        tensor([0.6201])
    """

    provides = frozenset({"loss", "log_pt", "target", "category"})

    def __init__(
        self,
        temperature: float | Schedule = 1.0,
        *,
        margin: float | Schedule = 0.0,
        scores: Scores = "raw",
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(None, ignore_index, 0.0, None, validate)
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        self.margin = check_hyper(self, "margin", margin, low=0.0)
        check_choice(self, "scores", scores, SCORES)
        self.scores: Scores = scores

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        logits, target, dim = _parts(self, inputs)
        if mask is not None:
            mask = expand_mask(self, mask, target.shape)
        valid = self._valid(target, mask)
        if valid is not None:
            logits = logits.masked_fill(~valid.unsqueeze(dim), 0.0)
        terms = self._indexed(logits, target, valid, dim)
        loss = label_dro(
            label_scores(logits, self.scores, dim),
            terms.need("target", self),
            value_of(self.temperature),
            value_of(self.margin),
            dim,
        )
        return terms._replace(loss=mask_out(loss, valid, 0.0))

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 4, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(4, (batch,), generator=generator)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Any, ...]] = {}
        for shape in ((4,), (5, 4), (3, 2), (3, 4, 2), (2, 4, 2, 2)):
            dim = min(len(shape) - 1, 1)
            logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
            target = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=generator)
            ignored = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.4, self.ignore_index)
            found |= {f"{shape}": (logits, target), f"{shape}, some ignored": (logits, ignored)}
        return found


@final
class AdaptiveLabelDRO(Remembering):
    r"""The same soft maximum with a temperature for each training sample, lower the surer the model is of a label.

    .. math:: \ell_i = \lambda_i \ln \frac1K \sum_k \exp\frac{f_{ik} - f_{iy_i} + c\,[k \ne y_i]}{\lambda_i}
              - \frac{\alpha \ln K}{2\lambda_0}(\lambda_i - \lambda_0)^2

    .. math:: \lambda_i \leftarrow \lambda_0\Big(1 - \frac{\mathrm{KL}(p_i\,\|\,1/K)}{\alpha \ln K}\Big), \qquad
              p_i = \mathrm{softmax}(f_i / \lambda_i)

    - :math:`f`: ``scores`` of the logits; :math:`c`: ``margin``; :math:`\lambda_0`: ``temperature``;
      :math:`\alpha`: ``alpha``

    Every training forward of a sample takes one step of its :math:`\lambda_i`, which starts at :math:`\lambda_0`; the
    loss uses the value after that step. Temperatures are constants to the gradient. They are held in a table as shares
    of ``temperature``, in float32, written at the ``step`` event: what all micro-batches and ranks saw, copies of a
    sample averaged. Calls that learn nothing take the step for their own loss only, and may leave ``index`` out: then
    the sample is new, as validation data are.

    Provides ``loss``, ``log_pt`` (of the softmax of the logits), ``target``, ``category`` and the extra
    ``temperature`` (:math:`\lambda_i`); ``log_qt`` exactly for two classes.

    Args:
        num_samples: Length of the training set.
        temperature: :math:`\lambda_0 > 0`, or a schedule.
        alpha: :math:`\alpha > 0`; large values keep temperatures at :math:`\lambda_0`. At 1 and above no temperature
            falls to :math:`10^{-4}\lambda_0`, where all are held.
        margin: :math:`c \ge 0`, or a schedule. It has no part in :math:`p`.
        scores: As in :class:`~reweigh.losses.LabelDRO`.
        ignore_index: Targets with this value are removed, and teach nothing.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.
        device: Where the table stays, such as ``"cpu"``; ``None``: it moves with the module.
        storage: A folder for a memory-mapped table, as in :class:`~reweigh.weighting.SampleTable`.

    Shapes:
        ``logits (N, C)``, C at least 2, ``target (N,)``, ``index=`` ``(N,)``; terms ``(N,)``. ``temperatures=``
        ``(N,)`` replaces what the table holds.

    Raises:
        TypeError: If ``logits`` is not floating-point, ``target`` or ``index`` not integer.
        ValueError: If shapes do not fit, a label or index is out of range, or ``index`` is missing in training.

    Example:
        >>> import torch
        >>> criterion = AdaptiveLabelDRO(10)
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> criterion.terms(logits, torch.tensor([0, 0]), index=torch.tensor([3, 7])).find("temperature")
        tensor([1.0000, 0.5271])
    """

    provides = frozenset({"loss", "log_pt", "target", "category", "temperature"})
    accepts = frozenset({"index", "temperatures"})

    def __init__(
        self,
        num_samples: int,
        *,
        temperature: float | Schedule = 1.0,
        alpha: float = 1.0,
        margin: float | Schedule = 0.0,
        scores: Scores = "raw",
        ignore_index: int = -100,
        validate: bool | None = None,
        device: str | None = None,
        storage: str | None = None,
    ) -> None:
        super().__init__(num_samples, 1, 1.0, ignore_index, validate, device, storage)
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        self.alpha = check_number(self, "alpha", alpha, low=0.0, open_low=True)
        self.margin = check_hyper(self, "margin", margin, low=0.0)
        check_choice(self, "scores", scores, SCORES)
        self.scores: Scores = scores

    def measure(
        self, *inputs: Any, mask: Tensor | None, index: Tensor | None = None, temperatures: Tensor | None = None
    ) -> LossTerms:
        logits, target, _ = _parts(self, inputs)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"AdaptiveLabelDRO: logits must be (N, C) with at least two classes, got {tuple(logits.shape)}"
            )
        if mask is not None:
            mask = expand_mask(self, mask, target.shape)
        valid = self._valid(target, mask)
        if valid is not None:
            logits = logits.masked_fill(~valid.unsqueeze(1), 0.0)
        usual = value_of(self.temperature)
        if temperatures is None:
            before = usual * self._recall(index, valid, logits).squeeze(1)
        else:
            before = mask_out(self._constant("temperatures", temperatures, target.shape, logits), valid, 1.0)
            if self._may_look(before) and not bool(((before > 0.0) & before.isfinite()).all()):
                raise ValueError(f"AdaptiveLabelDRO: temperatures must be finite and > 0, got {float(before.min()):g}")
        terms = self._indexed(logits, target, valid, 1)
        scores = label_scores(logits, self.scores, 1)
        fall = label_concentration(scores, before, self.alpha)
        now = usual * (1.0 - fall)
        loss = label_dro(scores, terms.need("target", self), now, value_of(self.margin), 1)
        loss = loss - 0.5 * self.alpha * math.log(logits.shape[1]) * usual * fall.square()
        return terms._replace(loss=mask_out(loss, valid, 0.0), extras={"temperature": mask_out(now, valid, 0.0)})

    def observe(self, terms: LossTerms) -> None:
        self._remember(terms, (terms.need("temperature", self) / value_of(self.temperature)).unsqueeze(1))

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, 4, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(4, (batch,), generator=generator)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        logits, target = self.example_inputs(seed=seed, dtype=dtype)
        away = torch.arange(len(target)) % 3 == 1
        return {
            "usual": (logits, target),
            "some ignored": (logits, target.masked_fill(away, self.ignore_index)),
            "two classes": (logits[:, :2], target % 2),
        }
