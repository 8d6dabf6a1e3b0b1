"""Softmax cross-entropy for labels that a known noise may have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from reweigh.weighting.config import owner_name
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from ..logits import LogitTransform
from .base import _kind, expand_mask, is_index, upcast
from .labels import _Element

Transition = Sequence[Sequence[float]] | Tensor


def transition_matrix(owner: object, transition: Transition) -> Tensor:
    """``(C, C)`` float64 matrix whose row k holds the probabilities of the labels that class k is given.

    Raises:
        TypeError: If it is not a matrix of numbers.
        ValueError: If it is not square, an entry is not a probability, a row does not sum to 1 (to 1e-5; rows are
            rescaled exactly), or a label is never given.
    """
    name = owner_name(owner)
    try:
        matrix = torch.as_tensor(transition, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: transition must be a matrix of numbers, got {type(transition).__name__}") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"{name}: transition must be a square matrix, got shape {tuple(matrix.shape)}")
    if not bool(((matrix >= 0) & (matrix <= 1 + 1e-5)).all()):
        raise ValueError(f"{name}: transition must hold probabilities, numbers in [0, 1], got {matrix.tolist()}")
    sums = matrix.sum(1)
    wrong = (sums - 1.0).abs() > 1e-5
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        other = " (its columns do: transpose it)" if bool(((matrix.sum(0) - 1.0).abs() <= 1e-5).all()) else ""
        raise ValueError(
            f"{name}: each row of transition must sum to 1, T[k, j] = P(label j | clean class k), but row {at} sums to "
            f"{float(sums[at]):g}{other}"
        )
    never = matrix.sum(0) == 0
    if bool(never.any()):
        at = int(never.nonzero()[0])
        raise ValueError(
            f"{name}: column {at} of transition is 0, so that label {at} would be impossible and its loss infinite; "
            "give it a small probability"
        )
    return matrix / sums.unsqueeze(1)


@final
class NoisyCrossEntropy(_Element):
    r"""Cross-entropy that knows how labels were changed.

    .. math:: \ell_i = -\log f_{y_i}(x_i) \quad\text{or, corrected,}\quad
              \ell_i = -\log \sum_k f_k(x_i)\, T_{k, y_i}

    - :math:`f`: softmax probabilities, of the clean class
    - :math:`T_{k,j}`: ``transition[k][j]``, probability that a sample of class k is labelled j. Rows sum to 1

    Provides ``loss``, ``log_pt``, ``target``, ``category``, and ``log_noisy_pt``: the log-probability of the label
    *given*, :math:`\log \sum_k f_k T_{k,y}`, beside ``log_pt``, that of the same class as the clean one. Under
    ``corrected`` both are the first, and the loss is minus that: what is composed with it (focal, confidence weights)
    looks at the label given.

    Args:
        transition: ``(C, C)`` numbers, nested sequences or a tensor.
        corrected: Forward correction: the loss of the label given, whose minimiser is the classifier of clean labels.
        ignore_index: Targets with this value are removed.
        logits: A transform applied to the logits first.
        validate: As for :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``logits (N, C, d1, ...)`` with ``target (N, d1, ...)`` integers; terms ``(N, d1, ...)``. Unbatched ``(C,)``
        with ``()``. float16 and bfloat16 logits are computed in float32.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``target`` not of integers.
        ValueError: If shapes do not fit, a label is out of range, or ``transition`` is no transition matrix.

    Example:
        >>> import torch
        >>> flips = [[0.9, 0.1], [0.3, 0.7]]  # a third of what is labelled 0 by mistake: 1 is taken for 0 more often
        >>> terms = NoisyCrossEntropy(flips).terms(torch.zeros(1, 2), torch.tensor([0]))
        >>> terms.extras["log_noisy_pt"].exp()  # 0.5 * 0.9 + 0.5 * 0.3
        tensor([0.6000])
    """

    provides = frozenset({"loss", "log_pt", "target", "category", "log_noisy_pt"})

    def __init__(
        self,
        transition: Transition,
        *,
        corrected: bool = False,
        ignore_index: int = -100,
        logits: LogitTransform | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(None, ignore_index, 0.0, logits, validate)
        self.corrected = corrected
        matrix = transition_matrix(self, transition)
        self.num_classes = len(matrix)
        # row j: log-probabilities of the label j for each clean class
        self.add_table("log_column", matrix.T.log().contiguous())

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        if len(inputs) != 2:
            raise TypeError(f"NoisyCrossEntropy: takes (logits, target), got {len(inputs)} inputs")
        logits, target = upcast(self, "logits", inputs[0]), inputs[1]
        if not is_index(target):
            raise TypeError(f"NoisyCrossEntropy: target must be class indices, got {_kind(target)}")
        if logits.ndim == 0:
            raise ValueError("NoisyCrossEntropy: logits must have a class dimension, got a scalar")
        dim = 1 if logits.ndim > 1 else 0
        shape = logits.shape[:dim] + logits.shape[dim + 1 :]
        if logits.shape[dim] != self.num_classes:
            raise ValueError(
                f"NoisyCrossEntropy: logits must have the {self.num_classes} classes of transition in dimension {dim}, "
                f"got shape {tuple(logits.shape)}"
            )
        if target.shape != shape:
            raise ValueError(
                f"NoisyCrossEntropy: target must have shape {tuple(shape)} for logits {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        target = target.long()
        valid = self._valid(target, None if mask is None else expand_mask(self, mask, shape))
        if valid is not None:
            target = target.masked_fill(~valid, 0)
            logits = logits.masked_fill(~valid.unsqueeze(dim), 0.0)
        self._check_labels(target, self.num_classes)
        if self.logits is not None:
            logits = self.logits(logits, target, dim=dim)
        log_p = logits.log_softmax(dim)
        log_pt = log_p.gather(dim, target.unsqueeze(dim)).squeeze(dim)
        column = nn.functional.embedding(target, self.get_buffer("log_column")).movedim(-1, dim).to(log_p.dtype)
        log_noisy_pt = (log_p + column).logsumexp(dim).clamp_max(0.0)
        if self.corrected:
            log_pt = log_noisy_pt
        return LossTerms(
            loss=mask_out(-log_pt, valid, 0.0),
            mask=valid,
            log_pt=mask_out(log_pt, valid, NEUTRAL_LOG_PT),
            target=target,
            category=target,
            num_classes=self.num_classes,
            extras={"log_noisy_pt": mask_out(log_noisy_pt, valid, NEUTRAL_LOG_PT)},
        )

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, self.num_classes, generator=generator, dtype=torch.float64) * 2
        return logits.to(dtype), torch.randint(self.num_classes, (batch,), generator=generator)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Any, ...]] = {}
        classes = self.num_classes
        for shape in ((classes,), (5, classes), (3, classes, 2), (2, classes, 2, 2)):
            dim = min(len(shape) - 1, 1)
            logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
            target = torch.randint(classes, shape[:dim] + shape[dim + 1 :], generator=generator)
            ignored = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.4, self.ignore_index)
            found |= {f"{shape}, classes": (logits, target), f"{shape}, some ignored": (logits, ignored)}
        return found
