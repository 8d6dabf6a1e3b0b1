"""Softmax cross-entropy over cosine similarities to one learned vector per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from reweigh.weighting.config import check_whole
from reweigh.weighting.frequency import ClassTable, Values
from reweigh.weighting.schedules import Schedule
from reweigh.weighting.terms import LossTerms

from ..logits import LogitTransform
from .base import _kind, is_index, upcast
from .element import SoftmaxCriterion
from .pair import unit
from .tiles import full_precision

Vectors = Sequence[Sequence[float]] | Tensor


@final
class ProxyCrossEntropy(SoftmaxCriterion):
    r"""Softmax cross-entropy over cosine similarities to a learned proxy of each class.

    .. math:: \ell_i = -\log \mathrm{softmax}\big(f(s_i, y_i)\big)_{y_i}, \qquad
              s_{ic} = \frac{\langle x_i, p_c\rangle}{|x_i||p_c|}

    - :math:`x`: embeddings; :math:`p`: ``proxies``, a parameter ``(C, D)``; :math:`f`: ``logits``

    The proxies are parameters of the model like those of any last layer, not learned weights: hand them to the
    optimizer with ``loss.parameters()`` (``parameter_groups`` has the learned weights only), and save the loss with the
    model.

    Provides ``loss``, ``log_pt``, ``target``, ``category``; ``log_qt`` exactly for two classes.

    Args:
        num_classes: Number of classes C.
        embedding_dim: Length D of the embeddings.
        logits: A transform of the similarities, usually with a scale (:class:`~reweigh.losses.CircleLogits`,
            :class:`~reweigh.losses.Temperature`); without one they stay in [-1, 1].
        weight: Per-class weights with torch's meaning, as in :class:`~reweigh.losses.CrossEntropy`.
        ignore_index: Labels with this value are removed.
        label_smoothing: In [0, 1], or a schedule.
        proxies: ``(C, D)`` initial proxies; random directions by default.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.

    Shapes:
        ``embeddings (N, D)``, ``labels (N,)``; terms ``(N,)``.

    Raises:
        TypeError: If ``embeddings`` is not floating-point or ``labels`` not integer.
        ValueError: If shapes do not fit or a label is out of range.

    Example:
        >>> import torch
        >>> criterion = ProxyCrossEntropy(2, 2, proxies=[[1.0, 0.0], [0.0, 1.0]])
        >>> criterion.terms(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).loss.detach()
        tensor([0.3133])
    """

    provides = frozenset({"loss", "log_pt", "target", "category"})
    target_name = "labels"

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        logits: LogitTransform | None = None,
        weight: Values | str | ClassTable | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        proxies: Vectors | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, label_smoothing, logits, validate)
        self.num_classes = check_whole(self, "num_classes", num_classes, low=1)
        self.embedding_dim = check_whole(self, "embedding_dim", embedding_dim, low=1)
        shape = (num_classes, embedding_dim)
        if proxies is None:
            start = torch.randn(shape) / math.sqrt(embedding_dim)
        else:
            start = torch.as_tensor(proxies).detach().clone()
            start = start if start.is_floating_point() else start.float()
            if start.shape != shape:
                raise ValueError(f"ProxyCrossEntropy: proxies must have shape {shape}, got {tuple(start.shape)}")
        self.proxies = nn.Parameter(start)

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        if len(inputs) != 2:
            raise TypeError(f"ProxyCrossEntropy: takes (embeddings, labels), got {len(inputs)} inputs")
        embeddings, labels = upcast(self, "embeddings", inputs[0]), inputs[1]
        if not is_index(labels):
            raise TypeError(f"ProxyCrossEntropy: labels must be an integer tensor, got {_kind(labels)}")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embedding_dim or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"ProxyCrossEntropy: embeddings must be (N, {self.embedding_dim}) and labels (N,), "
                f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
            )
        if mask is not None and mask.shape != labels.shape:
            raise ValueError(f"ProxyCrossEntropy: mask must have shape {tuple(labels.shape)}, got {tuple(mask.shape)}")
        valid = self._valid(labels, mask)
        return self._indexed(cosines(embeddings, self.proxies, valid), labels, valid, 1)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(batch, self.embedding_dim, generator=generator, dtype=torch.float64)
        return embeddings.to(dtype), torch.randint(self.num_classes, (batch,), generator=generator)


def cosines(embeddings: Tensor, proxies: Tensor, valid: Tensor | None = None) -> Tensor:
    """``(N, C)`` cosine similarities, 0 for samples that do not count."""
    if valid is not None:
        embeddings = embeddings.masked_fill(~valid.unsqueeze(1), 0.0)
    dtype = torch.promote_types(embeddings.dtype, proxies.dtype)
    with full_precision(embeddings):
        return unit(embeddings.to(dtype)) @ unit(proxies.to(dtype)).T
