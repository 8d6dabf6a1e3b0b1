"""Logit transforms for cosine similarities: margins between the target's class and the others."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from reweigh.weighting.base import Weighting
from reweigh.weighting.pair import CirclePacing
from reweigh.weighting.schedules import Schedule, check_hyper, value_of

from .criteria.pair import check_pacing
from .criteria.tiles import Law
from .logits import LogitTransform


@final
class CircleLogits(LogitTransform):
    r"""Cosine similarities to classes, as the logits of class-level circle loss.

    .. math:: z_c = \begin{cases} \gamma\,\alpha_c\,(s_c - 1 + m), \quad \alpha_c = [1 + m - s_c]_+ & c = y \\
                                  \gamma\,\alpha_c\,(s_c - m), \quad \alpha_c = [s_c + m]_+ & c \ne y \end{cases}

    They depend on the target, so they are for training only; at inference compare the similarities themselves.

    Args:
        m: Relaxation in [0, 1], or a schedule. Default 0.25 (paper, face recognition).
        gamma: Scale >= 0, or a schedule. Default 256 (paper, face recognition).
        pacing: Weighting of (sample, class) pairs in place of the detached :math:`\alpha`
            (:class:`~reweigh.weighting.CirclePacing`). ``Constant(1.0)`` gives additive-margin softmax with margin
            1 - 2m.

    Shapes:
        Similarities with the class dimension ``dim``; ``target`` without it (class indices) or with it ({0, 1}).

    Raises:
        ValueError: If there is no target.

    Example:
        >>> import torch
        >>> CircleLogits(0.25, 64.0)(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0]))
        tensor([[-12.,  12.,  -4.]])

    References:
        Y. Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020.
    """

    def __init__(
        self, m: float | Schedule = 0.25, gamma: float | Schedule = 256.0, *, pacing: Weighting | None = None
    ) -> None:
        super().__init__()
        self.m = check_hyper(self, "m", m, low=0.0, high=1.0)
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)
        self.pacing = CirclePacing(m) if pacing is None else check_pacing(self, pacing)
        held = self.pacing.detached and bool(self.pacing.needs & {"loss", "score"})
        self.exact_gradient = self.pacing.exact_gradient and not held

    def forward(self, logits: Tensor, target: Tensor | None = None, *, dim: int = 1) -> Tensor:
        if target is None:
            raise ValueError("CircleLogits: the logits depend on the target, got none; use similarities at inference")
        if target.ndim == logits.ndim:
            positive = target > 0
        else:
            shape = [1] * logits.ndim
            shape[dim] = -1
            classes = torch.arange(logits.shape[dim], device=logits.device).reshape(shape)
            positive = target.unsqueeze(dim) == classes
        exponent, _ = Law(self.pacing, value_of(self.m), value_of(self.gamma)).exponents(logits, positive)
        return torch.where(positive, -exponent, exponent)
