"""Named objectives for metric learning. Each is nothing but a composition of public parts."""

from __future__ import annotations

from typing import Literal, final

from reweigh.weighting.base import Weighting
from reweigh.weighting.pair import CirclePacing
from reweigh.weighting.schedules import Schedule

from .classification import PerClass
from .criteria.pair import PairLogSumExp
from .criteria.proxy import ProxyCrossEntropy, Vectors
from .margins import CircleLogits
from .objective import Objective
from .reductions import Reduction, ReductionName
from .registry import method

_PROXIES = [[1.0, 0.25, -0.5], [-0.5, 1.0, 0.125], [0.25, -1.0, 0.75], [-0.25, 0.5, -1.0]]


@method(
    "circle",
    paper="Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    venue="CVPR 2020",
    acts_on="pair",
    official="none; KevinMusgrave/pytorch-metric-learning@216a792c losses/circle_loss.py (per anchor), "
    "TinyZeaMays/CircleLoss@d002ecd0 circle_loss.py (pooled)",
    defaults={
        "m": ("0.4", "paper, fine-grained retrieval; pytorch-metric-learning"),
        "gamma": ("80.0", "paper, fine-grained retrieval; pytorch-metric-learning"),
        "over": ("'anchor'", "pytorch-metric-learning"),
        "reduction": ("'mean'", "over anchors whose loss is not 0, as pytorch-metric-learning's reducer"),
    },
    deviations=(
        "A zero embedding has similarity 0 and no gradient.",
        "A sample never pairs with itself, also where a given mask or index list says so.",
        "sample_weight, masks and groups act on anchors; integer weights equal copies.",
    ),
    neutral=None,
    examples=(
        {},
        {"m": 0.25, "gamma": 2.0},
        {"m": 0.25, "gamma": 4.0, "over": "batch"},
        {"m": 0.1, "gamma": 8.0, "tile": 3, "drop_satisfied": True},
    ),
)
@final
class CircleLoss(Objective):
    r"""Circle loss on pairs of labelled embeddings: each pair is pulled at a pace of its own.

    .. math::
        \ell_i = \log\Big(1 + \sum_{j:\,y_j \ne y_i} e^{\gamma \alpha_{ij} (s_{ij} - m)}
                 \sum_{k \ne i:\,y_k = y_i} e^{-\gamma \alpha_{ik} (s_{ik} - 1 + m)}\Big), \qquad
        L = \frac{\sum_i m_i \ell_i}{\sum_{i:\,\ell_i \ne 0} m_i}

    - :math:`s`: cosine similarity; :math:`\gamma`: ``gamma``; :math:`m`: ``m``
    - :math:`\alpha`: :math:`[1 + m - s]_+` for positive and :math:`[s + m]_+` for negative pairs, detached
    - :math:`m_i`: 1, 0 where masked, ``sample_weight`` where given

    ``over="batch"`` is the pooled form: one loss over all unordered pairs of the batch. The two differ in their
    numbers, not only in a factor. For the class-level form see :class:`CircleClassificationLoss`.

    Weights:
        In [0, 2 + m], detached (every published implementation). No argument is neutral;
        ``pacing=Constant(1.0)`` is the unweighted pair loss.

    State and cadence:
        None; ``m`` and ``gamma`` may be schedules.

    Use when:
        Retrieval or verification with several samples per class in a batch, and budget to tune gamma. At a moderate
        gamma the retrieval suite shows a gain over the pair loss without weights.
    Avoid when:
        Batches have one sample per class: every anchor drops out. Classes are few and fixed: a classifier is simpler.
        Gamma is large: the retrieval suite shows no gain.

    Deviations:
        None in value where embeddings are not 0. Anchors without a positive or a negative, and those whose loss has
        underflowed to 0, leave the mean. A negative with similarity below -m adds the constant 1 to its sum, which
        keeps the loss from 0; ``drop_satisfied=True`` leaves such pairs out.

    Args:
        m: Relaxation in [0, 1], or a schedule. The paper's settings: faces m 0.25 with gamma 256, re-identification
            0.25 with 128, fine-grained retrieval 0.4 with 80. Default 0.4.
        gamma: Scale >= 0, or a schedule. Default 80.
        over: ``"anchor"``: a loss per sample; ``"batch"``: one over all pairs.
        pacing: Another weighting of pairs in place of :math:`\alpha`, for instance ``CirclePacing(m, detach=False)``
            or one times a class balance.
        drop_satisfied: Leave out negatives of weight 0.
        normalize: Bring embeddings to length 1. False where they have it already.
        tile: Rows of the similarity matrix that are held at once; ``None`` chooses by the size of the batch.
        gather: Join the batches of all ranks of ``torch.distributed``; see :class:`~reweigh.losses.PairLogSumExp`.
        ignore_index: Samples with this label are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(embeddings (N, D), labels (N,))``, optionally ``pairs=``: index vectors as miners give them, or two bool
        matrices; scalar unless ``"none"``, which gives ``(N,)`` (``(1,)`` over the batch).

    Example:
        >>> import torch
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> round(CircleLoss(0.25, gamma=8.0)(embeddings, torch.tensor([0, 0, 1, 1])).item(), 4)
        1.6027

    References:
        Y. Sun, C. Cheng, Y. Zhang, C. Zhang, L. Zheng, Z. Wang, Y. Wei, "Circle Loss: A Unified Perspective of Pair
        Similarity Optimization", CVPR 2020.
    """

    def __init__(
        self,
        m: float | Schedule = 0.4,
        *,
        gamma: float | Schedule = 80.0,
        over: Literal["anchor", "batch"] = "anchor",
        pacing: Weighting | None = None,
        drop_satisfied: bool = False,
        normalize: bool = True,
        tile: int | None = None,
        gather: bool = False,
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        criterion = PairLogSumExp(
            CirclePacing(m) if pacing is None else pacing,
            m=m,
            gamma=gamma,
            over=over,
            drop_satisfied=drop_satisfied,
            normalize=normalize,
            tile=tile,
            gather=gather,
            ignore_index=ignore_index,
        )
        super().__init__(criterion, None, reduction)


@method(
    "circle_classification",
    paper="Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    venue="CVPR 2020",
    official="none; TinyZeaMays/CircleLoss@d002ecd0 circle_loss_early.py, xialuxi/CircleLoss_Face@05e732dd",
    defaults={
        "m": ("0.25", "paper, face recognition"),
        "gamma": ("256.0", "paper, face recognition"),
        "reduction": ("'mean'", "published implementations"),
    },
    deviations=("A zero embedding has similarity 0 to every class and no gradient.",),
    neutral=None,
    examples=(
        {"num_classes": 4, "embedding_dim": 3, "proxies": _PROXIES, "gamma": 8.0},
        {"num_classes": 4, "embedding_dim": 3, "proxies": _PROXIES, "m": 0.4, "gamma": 2.0, "label_smoothing": 0.1},
    ),
)
@final
class CircleClassificationLoss(Objective):
    r"""Class-level circle loss: softmax cross-entropy over paced similarities to a learned proxy of each class.

    .. math::
        \ell_i = -\log \frac{e^{z_{iy_i}}}{\sum_c e^{z_{ic}}}, \qquad
        z_{ic} = \begin{cases} \gamma\,[1 + m - s_{ic}]_+\,(s_{ic} - 1 + m) & c = y_i \\
                               \gamma\,[s_{ic} + m]_+\,(s_{ic} - m) & c \ne y_i \end{cases}

    - :math:`s_{ic}`: cosine similarity of embedding i and the proxy of class c
    - :math:`\gamma`: ``gamma``; :math:`m`: ``m``; the factors in brackets are detached

    Weights:
        In [0, 2 + m], detached (every published implementation). No argument is neutral.

    State and cadence:
        None, unless ``weight`` is a name such as ``"balanced"``: then the class counts, set by the ``fit`` event. The
        proxies are ordinary parameters: give ``loss.parameters()`` to the optimizer and save the loss with the model.

    Use when:
        Faces and other identities: all classes are known in training, a learned proxy of each fits in memory, and
        embeddings are compared at test time.
    Avoid when:
        Classes are too many for proxies, or change: take pairs. No embeddings are compared: softmax cross-entropy needs
        no margin and no scale.

    Deviations:
        None.

    Args:
        num_classes: Number of classes C.
        embedding_dim: Length D of the embeddings.
        m: Relaxation in [0, 1], or a schedule. Default 0.25 (paper, face recognition).
        gamma: Scale >= 0, or a schedule. Default 256 (paper, face recognition).
        weight: Per-class weights with torch's meaning and denominator, as in :class:`FocalLoss`.
        ignore_index: Samples with this label are removed.
        label_smoothing: In [0, 1], or a schedule.
        proxies: ``(C, D)`` initial proxies; random directions by default.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(embeddings (N, D), labels (N,))``; scalar unless ``"none"``, which gives ``(N,)``.

    Example:
        >>> import torch
        >>> loss = CircleClassificationLoss(2, 2, proxies=[[1.0, 0.0], [0.0, 1.0]])
        >>> round(loss(torch.tensor([[0.6, 0.8]]), torch.tensor([0])).item(), 4)
        172.8

    References:
        Y. Sun, C. Cheng, Y. Zhang, C. Zhang, L. Zheng, Z. Wang, Y. Wei, "Circle Loss: A Unified Perspective of Pair
        Similarity Optimization", CVPR 2020.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        m: float | Schedule = 0.25,
        gamma: float | Schedule = 256.0,
        weight: PerClass | None = None,
        ignore_index: int = -100,
        label_smoothing: float | Schedule = 0.0,
        proxies: Vectors | None = None,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        criterion = ProxyCrossEntropy(
            num_classes,
            embedding_dim,
            logits=CircleLogits(m, gamma),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            proxies=proxies,
        )
        super().__init__(criterion, None, reduction)
