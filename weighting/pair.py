"""Weights of pairs from how far their similarity is from where it should be."""

from __future__ import annotations

from typing import final

from torch import Tensor

from .base import Scope, Weighting, method
from .functional import circle_pace
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


@method(
    "circle",
    paper="Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    venue="CVPR 2020",
    acts_on="pair",
    official="none; TinyZeaMays/CircleLoss@d002ecd0 and KevinMusgrave/pytorch-metric-learning agree",
    defaults={"m": ("0.25", "paper, face recognition"), "detach": ("True", "every published implementation")},
    neutral=None,
    examples=({}, {"m": 0.4}, {"m": 0.4, "detach": False}),
)
@final
class CirclePacing(Weighting):
    r"""Weigh each pair by how far its similarity is from an optimum beyond the margin.

    .. math:: \alpha_{ij} = \begin{cases} [1 + m - s_{ij}]_+ & \text{positive pair} \\
                                          [s_{ij} + m]_+ & \text{negative pair} \end{cases}

    - :math:`s_{ij}`: similarity of the pair; :math:`m`: ``m``

    Weights:
        In [0, 2 + m] for similarities in [-1, 1]; 0 for negatives below -m. Detached (every published
        implementation); ``detach=False`` differentiates them, which is another objective. No argument is neutral:
        the weights of a pair of similarity 0 and one of 1 differ for every m.

    State and cadence:
        None; ``update_on = "never"``. ``m`` may be a schedule.

    Use when:
        Pair losses on labelled embeddings in which pairs that are nearly right and pairs that are far off should move
        at different paces, with budget to tune gamma and the margin.
    Avoid when:
        Pair labels are noisy: a wrong pair is always the one furthest off. Without tuning: in the retrieval suite a
        large gamma shows no gain over the pair loss without weights.

    Deviations:
        None.

    Args:
        m: Relaxation in [0, 1], or a schedule: optima lie at 1 + m and -m. Default 0.25 (paper, face recognition).
        detach: Use the weights as constants. Default True.

    Shapes:
        Reads ``score`` and ``target`` (1 for positive, 0 for negative pairs) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import Objective, PairSimilarity
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> Objective(PairSimilarity(), CirclePacing()).weights(embeddings, torch.tensor([0, 0, 1]))
        tensor([[0.0000, 1.2500, 0.2500],
                [1.2500, 0.0000, 1.2500],
                [0.2500, 1.2500, 0.0000]])

    References:
        Y. Sun, C. Cheng, Y. Zhang, C. Zhang, L. Zheng, Z. Wang, Y. Wei, "Circle Loss: A Unified Perspective of Pair
        Similarity Optimization", CVPR 2020.
    """

    needs = frozenset({"score", "target"})
    detached = True
    scope: Scope = "local"

    def __init__(self, m: float | Schedule = 0.25, *, detach: bool = True) -> None:
        super().__init__()
        self.m = check_hyper(self, "m", m, low=0.0, high=1.0)
        self.detached = detach

    def weigh(self, terms: LossTerms) -> Tensor:
        weights = circle_pace(terms.need("score", self), terms.need("target", self) > 0, value_of(self.m))
        return weights.detach() if self.detached else weights
