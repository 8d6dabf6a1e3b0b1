"""Weights from how hard a term is."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from .base import Scope, Weighting, lookup, method, tally
from .config import check_choice, check_number, check_whole
from .dynamics import Event
from .functional import focal_weight, hard_negative_weight, inverse_loss_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


@method(
    "focal",
    paper="Focal Loss for Dense Object Detection",
    venue="ICCV 2017",
    official="pytorch/vision torchvision/ops/focal_loss.py",
    defaults={"gamma": ("2.0", "paper"), "detach": ("False", "paper: the modulator is differentiated")},
    deviations=(
        "The power is taken in log space with the criterion's exact log(1 - p_t) where it has one, so gradients stay "
        "finite for 0 < gamma < 1 on saturated terms, where the common implementations return NaN.",
    ),
    neutral={"gamma": 0.0},
    examples=({}, {"gamma": 0.5}, {"gamma": 2.0, "detach": True}),
)
@final
class Focal(Weighting):
    r"""Turn down the terms that the model already gets right.

    .. math:: w_i = (1 - p_i)^\gamma

    - :math:`p_i`: probability the model gives to the target of term :math:`i`
    - :math:`\gamma`: ``gamma``, the focusing exponent

    Weights:
        In [0, 1], decreasing in p. Differentiated (paper); ``detach=True`` uses them as constants, which is another
        objective. ``gamma=0`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``gamma`` may be a schedule.

    Use when:
        Very many easy negatives drown the rest, as in dense detection, or a classifier trained on clean labels is
        overconfident; composes with class weights.
    Avoid when:
        Labels are noisy: wrong labels are the hardest terms. The tail of a long-tailed problem is the aim: the
        long-tail suites show no certain gain there, but clear ones of class weights and logit adjustment.

    Deviations:
        Values equal the paper's; gradients are finite where the usual code has NaN (0 < gamma < 1, p = 1).

    Args:
        gamma: Finite and >= 0, or a schedule. Default 2.0 (paper).
        detach: Use the weights as constants. Default False (paper).

    Shapes:
        Reads ``log_pt`` (and ``log_qt`` where the criterion has it) of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), Focal(2.0))
        >>> logits = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
        >>> objective.weights(logits, torch.tensor([0, 1]))
        tensor([0.2500, 0.0100])

    References:
        T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017.
    """

    needs = frozenset({"log_pt"})
    detached = False
    scope: Scope = "local"

    def __init__(self, gamma: float | Schedule = 2.0, *, detach: bool = False) -> None:
        super().__init__()
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)
        self.detached = detach

    def weigh(self, terms: LossTerms) -> Tensor:
        weights = focal_weight(terms.need("log_pt", self), value_of(self.gamma), terms.log_qt)
        return weights.detach() if self.detached else weights


@method(
    "inverse_class_loss",
    paper="Multi-Label Sentiment Analysis on 100 Languages with Dynamic Weighting for Label Imbalance",
    venue="IEEE TNNLS 2021",
    official="selimfirat/multilingual-sentiment-analysis@5982dff loss.py (dynamic_loss_size)",
    defaults={
        "smoothing": ("0.05", "authors' scripts"),
        "eps": ("1e-5", "authors' code"),
        "cadence": ("'step'", "ours: the weights are a constant of the batch; the authors' order is 'forward'"),
        "to": ("'sum'", "authors' code: weights sum to 1"),
    },
    deviations=(
        "The authors refresh the weights inside every forward, evaluation with reduction included; here once per "
        "optimizer step and in training only, so that gradient accumulation and several ranks give the same weights. "
        "cadence='forward' is their order.",
        "A class without terms in the batch keeps its running loss; the authors' mean over the batch never lacks one, "
        "because every sample has a term for every label.",
    ),
    neutral={"num_classes": 4, "to": "mean", "eps": 1e12},
    examples=({"num_classes": 4}, {"num_classes": 4, "to": "mean", "smoothing": 0.5}),
)
@final
class InverseClassLoss(Weighting):
    r"""Balance what each class contributes, by the inverse of its running mean loss.

    .. math::
        w_i = \frac{1/(\epsilon + \bar L_{c_i})}{\sum_k 1/(\epsilon + \bar L_k)}, \qquad
        \bar L_c \leftarrow (1-s)\,\bar L_c + s\,\mathrm{mean}_{i:\,c_i=c}\,\ell_i

    - :math:`\bar L_c`: running mean loss of class c, starting at 1/C
    - :math:`c_i`: category of term :math:`i` (the label's column for sigmoid criteria)
    - :math:`s`: ``smoothing``; :math:`\epsilon`: ``eps``

    Weights:
        Positive, summing to 1 over classes (``to="sum"``, the paper: the loss shrinks by C) or averaging 1
        (``to="mean"``). Detached. Equal class losses are neutral up to that factor.

    State and cadence:
        ``class_loss``: ``(C,)`` float64 buffer, equal on all ranks. Observes unweighted training losses into pending
        sums, adds them over ranks and commits at every optimizer step (``cadence="step"``) or inside every training
        forward, before weighing (``"forward"``, the authors' order). A class whose losses are not all finite keeps its
        value.

    Use when:
        Multi-label data in which a few labels own the loss and all can be learned: each label's share is balanced by
        its running mean loss.
    Avoid when:
        Some labels cannot be learned: a high loss keeps their weight low, which hides them, while nearly solved labels
        gain weight. Weights by counts have no such feedback.

    Deviations:
        Updated once per optimizer step and only in training, not in every forward.

    Args:
        num_classes: Number of classes or labels C.
        smoothing: Share of the new batch, in (0, 1], or a schedule. Default 0.05 (authors' scripts).
        eps: Added to the running loss, > 0. Default 1e-5 (authors' code).
        to: ``"sum"``: weights sum to 1; ``"mean"``: they average 1.
        cadence: ``"step"`` or ``"forward"``.

    Shapes:
        Reads ``loss`` and ``category`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import BinaryCrossEntropy, Objective
        >>> weighting = InverseClassLoss(2, smoothing=1.0, to="mean")
        >>> objective = Objective(BinaryCrossEntropy(), weighting)
        >>> _ = objective(torch.tensor([[0.0, -3.0]]), torch.tensor([[1.0, 0.0]]))
        >>> objective.update("step")
        >>> weighting.summary()["class_weight"]
        tensor([0.1310, 1.8690], dtype=torch.float64)

    References:
        S. F. Yilmaz, E. B. Kaynak, A. Koc, H. Dibeklioglu, S. S. Kozat, "Multi-Label Sentiment Analysis on 100
        Languages with Dynamic Weighting for Label Imbalance", IEEE TNNLS 2021.
    """

    needs = frozenset({"category"})
    detached = True
    scope: Scope = "local"
    update_on: Event = "step"

    def __init__(
        self,
        num_classes: int,
        *,
        smoothing: float | Schedule = 0.05,
        eps: float = 1e-5,
        to: Literal["sum", "mean"] = "sum",
        cadence: Literal["step", "forward"] = "step",
    ) -> None:
        super().__init__()
        self.num_classes = check_whole(self, "num_classes", num_classes, low=1)
        self.smoothing = check_hyper(self, "smoothing", smoothing, low=0.0, high=1.0, open_low=True)
        self.eps = check_number(self, "eps", eps, low=0.0, open_low=True)
        self.to_sum = check_choice(self, "to", to, ("sum", "mean")) == "sum"
        if check_choice(self, "cadence", cadence, ("step", "forward")) == "forward":
            self.update_on, self.scope = "forward", "global"
        self.add_state("class_loss", torch.full((num_classes,), 1.0 / num_classes, dtype=torch.float64))
        self.add_pending("loss_sum", num_classes)
        self.add_pending("loss_count", num_classes)

    def table(self) -> Tensor:
        """``(C,)`` class weights now."""
        weights = inverse_loss_weight(self.get_buffer("class_loss"), self.eps)
        return weights if self.to_sum else weights * self.num_classes

    def weigh(self, terms: LossTerms) -> Tensor:
        return lookup(self, self.table(), terms)

    def observe(self, terms: LossTerms) -> None:
        counts = terms.counts().double()
        self.accumulate("loss_sum", tally(self, counts * terms.loss, terms, self.num_classes))
        self.accumulate("loss_count", tally(self, counts, terms, self.num_classes))

    def commit(self, sums: dict[str, Tensor]) -> None:
        running = self.get_buffer("class_loss")
        mean = sums["loss_sum"] / sums["loss_count"].clamp_min(torch.finfo(torch.float64).tiny)
        mixed = running + value_of(self.smoothing) * (mean - running)
        # a step that is not finite (skipped by a gradient scaler, say) must not stay in the state for good
        running.copy_(torch.where((sums["loss_count"] > 0) & mean.isfinite(), mixed, running))

    def reset(self) -> None:
        super().reset()
        self.get_buffer("class_loss").fill_(1.0 / self.num_classes)

    def summary(self) -> dict[str, Tensor]:
        return {"class_weight": self.table(), "class_loss": self.get_buffer("class_loss").clone()}


@method(
    "hard_negatives",
    paper="SSD: Single Shot MultiBox Detector",
    venue="ECCV 2016",
    acts_on="binary",
    official="weiliu89/caffe branch ssd, multibox_loss_layer (mining_type: MAX_NEGATIVE)",
    defaults={
        "ratio": ("3.0", "paper: at most three negatives per positive"),
        "minimum": ("0", "paper: an image without positives has no negatives"),
    },
    deviations=(
        "Counted over the batch, not per image.",
        "Equal losses share what is left for them, so the weights do not depend on the order of terms.",
    ),
    neutral={"minimum": 1_000_000},
    examples=({"ratio": 1.0}, {"ratio": 0.3}, {"ratio": 0.0, "minimum": 2}),
)
@final
class HardNegatives(Weighting):
    r"""Keep all positives and only the hardest negatives, so many per positive (OHEM, hard negative mining).

    .. math::
        w_i = \begin{cases} 1 & i \text{ positive} \\
        \mathrm{clamp}\big((k - h_i) / t_i,\; 0,\; 1\big) & i \text{ negative} \end{cases}
        \qquad k = \max(m, \lfloor r\, n_+ \rfloor)

    - :math:`n_+`: number of positives; :math:`r`: ``ratio``; :math:`m`: ``minimum``
    - :math:`h_i`: number of negatives with a larger loss than :math:`i`; :math:`t_i`: with the same loss, itself
      included. Numbers count ``sample_weight``

    Weights:
        In [0, 1]; 1 or 0 but for ties at the edge, which share. Detached. ``minimum`` above the number of negatives is
        neutral.

    State and cadence:
        None; ``update_on = "never"``. Looks at the batch it is given, so micro-batches select their own negatives.

    Use when:
        Background is nearly everything, as with detection anchors, rare pixels or rare labels, and a fixed number of
        negatives per positive says enough.
    Avoid when:
        Positives may be unlabelled: they are the hardest negatives, and are kept. Under a plain mean the dropped
        negatives stay in the denominator; take the weighted mean.

    Deviations:
        Per batch, not per image; ties share.

    Args:
        ratio: Negatives per positive, >= 0. Default 3.0 (paper).
        minimum: Least number of negatives kept, >= 0. Default 0 (paper).
        background: Class index that is negative, for index targets. A float target is negative where it is 0.

    Shapes:
        Reads ``loss`` and ``target`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import BinaryCrossEntropy, Objective
        >>> objective = Objective(BinaryCrossEntropy(), HardNegatives(1.0))
        >>> objective.weights(torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([1., 1., 0., 0.])

    References:
        W. Liu, D. Anguelov, D. Erhan, C. Szegedy, S. Reed, C.-Y. Fu, A. C. Berg, "SSD: Single Shot MultiBox Detector",
        ECCV 2016.
    """

    needs = frozenset({"target"})
    detached = True
    scope: Scope = "global"

    def __init__(self, ratio: float = 3.0, *, minimum: int = 0, background: int = 0) -> None:
        super().__init__()
        self.ratio = check_number(self, "ratio", ratio, low=0.0)
        self.minimum = check_whole(self, "minimum", minimum)
        self.background = check_whole(self, "background", background)

    def weigh(self, terms: LossTerms) -> Tensor:
        target = terms.need("target", self)
        negative = target == (0 if target.is_floating_point() else self.background)
        loss = terms.loss.detach()
        weights = hard_negative_weight(loss, negative, terms.counts().detach(), self.ratio, float(self.minimum))
        return weights.to(loss.dtype)
