"""Named objectives for segmentation and other set-level problems. Each is a composition of public parts."""

from __future__ import annotations

from typing import Literal, final

from reweigh.weighting.algebra import Constant, InClasses
from reweigh.weighting.base import Weighting
from reweigh.weighting.config import check_number
from reweigh.weighting.difficulty import Focal
from reweigh.weighting.frequency import ClassWeight, class_table
from reweigh.weighting.region import LossPower, VolumeBalance
from reweigh.weighting.schedules import Schedule, check_hyper

from .classification import PerClass
from .criteria.element import CrossEntropy
from .criteria.joint import Joint
from .criteria.region import Overlap
from .criteria.self_adjusting import SelfAdjustingDice
from .objective import Objective
from .reductions import Reduction, ReductionName, SequenceMean
from .registry import method

Activation = Literal["softmax", "sigmoid", "none"]
Over = Literal["sample", "batch"]
Absent = Literal["skip", "keep", "zero", "one"]

EVEN = [1.0, 1.0, 1.0, 1.0]


@method(
    "dice",
    paper="V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation",
    venue="3DV 2016",
    acts_on="region",
    official="faustomilletari/VNet; the unsquared form is the usual one",
    defaults={
        "smooth_nr": ("1e-5", "MONAI"),
        "smooth_dr": ("1e-5", "MONAI"),
        "empty": ("'skip'", "ours: a class that is not there has no dice"),
        "square": ("False", "MONAI; the paper has squares"),
    },
    deviations=(
        "A class without a target element in its set is left out of the mean; MONAI keeps it with a loss near 1.",
        "smooth_nr above smooth_dr is refused: it makes the loss of small sets negative.",
    ),
    neutral={"class_weight": EVEN},
    examples=(
        {},
        {"over": "batch", "activation": "sigmoid", "empty": "keep", "smooth_nr": 1.0, "smooth_dr": 1.0},
        {"square": True, "class_weight": [0.5, 1.0, 2.0, 4.0], "include_background": False, "empty": "one"},
    ),
)
@final
class DiceLoss(Objective):
    r"""Soft dice: one minus the overlap of predicted and target region, per class and sample (or batch).

    .. math:: \ell_c = 1 - \frac{2 I_c + s_n}{P_c + T_c + s_d}, \qquad
              I = \sum_i p_i y_i, \quad P = \sum_i p_i, \quad T = \sum_i y_i

    - :math:`p`: predicted probability; :math:`y`: target; squared in P and T with ``square``
    - :math:`s_n, s_d`: ``smooth_nr``, ``smooth_dr``

    Weights:
        ``class_weight``, detached; it only multiplies. All ones (or ``None``) is neutral.

    State and cadence:
        None, unless ``class_weight`` is a name such as ``"balanced"``: then the class counts, set by the ``fit`` event.

    Use when:
        Segmentation of a region that is small against its surroundings and judged by overlap, usually as a sum with
        cross-entropy.
    Avoid when:
        Probabilities have to be calibrated, or labels are soft. In the token-tagging suite dice alone is clearly worse
        than cross-entropy, and the sum of both shows no gain.

    Deviations:
        A class that its set lacks is left out (``empty``), and ``smooth_nr`` may not exceed ``smooth_dr``.

    Args:
        activation: ``"softmax"`` over dimension 1, ``"sigmoid"``, or ``"none"`` for probabilities.
        over: A term per ``"sample"``, averaged, or per class of the whole ``"batch"``: two objectives, see
            :class:`~reweigh.losses.Overlap`.
        square: Squares in the denominator.
        smooth_nr: Added to the numerator, in [0, ``smooth_dr``]. Default 1e-5 (MONAI).
        smooth_dr: Added to the denominator. Default 1e-5 (MONAI).
        class_weight: Factor per class: a sequence or tensor, ``"balanced"``, ``"sqrt"``, ``"effective"``, or a class
            table; one entry for every class, the background too.
        include_background: Whether class 0 counts.
        empty: A class without a target element: ``"skip"``, ``"keep"`` the formula, or a loss of ``"zero"`` or
            ``"one"``. Default "skip" (ours).
        ignore_index: Elements with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, d1, ...), target (N, d1, ...))`` or multi-hot ``(N, C, d1, ...)``; scalar unless ``"none"``:
        ``(N, C)`` or ``(1, C)``.

    Example:
        >>> import torch
        >>> loss = DiceLoss(activation="none", smooth_nr=0.0, smooth_dr=0.0)
        >>> round(loss(torch.tensor([[[0.8, 0.6, 0.1]]]), torch.tensor([[[1, 1, 0]]])).item(), 4)
        0.2

    References:
        F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
        Segmentation", 3DV 2016.
    """

    def __init__(
        self,
        *,
        activation: Activation = "softmax",
        over: Over = "sample",
        square: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        class_weight: PerClass | None = None,
        include_background: bool = True,
        empty: Absent = "skip",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        above, below = _smoothing(self, smooth_nr, smooth_dr)
        criterion = Overlap(
            activation=activation,
            over=over,
            square=square,
            smooth_nr=above / 2.0,
            smooth_dr=below / 2.0,
            include_background=include_background,
            empty=empty,
            ignore_index=ignore_index,
        )
        weighting = None if class_weight is None else class_table(self, "class_weight", class_weight)
        super().__init__(criterion, weighting, reduction)


@method(
    "tversky",
    paper="Tversky Loss Function for Image Segmentation Using 3D Fully Convolutional Deep Networks",
    venue="MLMI 2017",
    acts_on="region",
    official="none by the authors; gamma: nabsabraham/focal-tversky-unet losses.py",
    defaults={
        "alpha": ("0.3", "paper, best of its table"),
        "beta": ("0.7", "paper, best of its table"),
        "gamma": ("1.0", "paper; the focal form uses 0.75"),
        "smooth_nr": ("1e-5", "MONAI"),
        "smooth_dr": ("1e-5", "MONAI"),
    },
    deviations=(
        "A class without a target element in its set is left out of the mean.",
        "gamma applies to each class's loss, as in the focal Tversky paper, not to their mean.",
    ),
    neutral={"gamma": 1.0, "class_weight": EVEN},
    examples=(
        {},
        {"gamma": 0.75, "over": "batch", "empty": "keep"},
        {"alpha": 1.0, "beta": 1.0, "gamma": 2.0, "activation": "sigmoid", "class_weight": [0.5, 1.0, 2.0, 4.0]},
    ),
)
@final
class TverskyLoss(Objective):
    r"""Dice with false positives and false negatives weighed apart, and the focal form of it.

    .. math:: \ell_c = \Big( 1 - \frac{I_c + s_n}{I_c + \alpha\,FP_c + \beta\,FN_c + s_d} \Big)^\gamma, \qquad
              FP = P - I, \quad FN = T - I

    - :math:`I, P, T`: overlap, predicted and target volume, as in :class:`DiceLoss`
    - :math:`\alpha, \beta`: ``alpha`` (false positives), ``beta`` (false negatives); :math:`\gamma`: ``gamma``
    - :math:`s_n, s_d`: ``smooth_nr``, ``smooth_dr``: half of dice's at equal meaning

    Weights:
        :math:`\ell^{\gamma-1}` (:class:`~reweigh.weighting.LossPower`, differentiated) times ``class_weight``
        (detached). ``gamma=1, class_weight=None`` is neutral.

    State and cadence:
        As :class:`DiceLoss`; ``gamma`` may be a schedule.

    Use when:
        Segmentation in which missing a small structure is worse than a false alarm, or the other way round, and two
        factors can say by how much.
    Avoid when:
        You report dice or Jaccard: train that, with both factors one half or 1. Probabilities have to be calibrated:
        cross-entropy does more for them.

    Deviations:
        As :class:`DiceLoss`; and the power of the focal form is per class, not of the mean.

    Args:
        alpha: Weight of false positives, >= 0. Default 0.3 (paper).
        beta: Weight of false negatives, >= 0. Default 0.7 (paper).
        gamma: Exponent of the loss, >= 0, or a schedule. Default 1.0 (paper); 0.75 is focal Tversky.
        activation: As in :class:`DiceLoss`.
        over: As in :class:`DiceLoss`.
        square: Squares in P and T. Needs ``alpha <= beta``.
        smooth_nr: Added to the numerator, in [0, ``smooth_dr``]. Default 1e-5 (MONAI).
        smooth_dr: Added to the denominator. Default 1e-5 (MONAI).
        class_weight: Factor per class, as in :class:`DiceLoss`.
        include_background: Whether class 0 counts.
        empty: As in :class:`DiceLoss`.
        ignore_index: Elements with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        As :class:`DiceLoss`.

    Example:
        >>> import torch
        >>> loss = TverskyLoss(1.0, 1.0, activation="none", smooth_nr=0.0, smooth_dr=0.0)
        >>> round(loss(torch.tensor([[[1.0, 1.0, 0.0]]]), torch.tensor([[[1, 0, 1]]])).item(), 4)
        0.6667

    References:
        S. S. M. Salehi, D. Erdogmus, A. Gholipour, "Tversky Loss Function for Image Segmentation Using 3D Fully
        Convolutional Deep Networks", MLMI 2017. N. Abraham, N. M. Khan, "A Novel Focal Tversky Loss Function with
        Improved Attention U-Net for Lesion Segmentation", ISBI 2019.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        *,
        gamma: float | Schedule = 1.0,
        activation: Activation = "softmax",
        over: Over = "sample",
        square: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        class_weight: PerClass | None = None,
        include_background: bool = True,
        empty: Absent = "skip",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        above, below = _smoothing(self, smooth_nr, smooth_dr)
        criterion = Overlap(
            activation=activation,
            over=over,
            alpha=alpha,
            beta=beta,
            square=square,
            smooth_nr=above,
            smooth_dr=below,
            include_background=include_background,
            empty=empty,
            ignore_index=ignore_index,
        )
        weighting: Weighting | None = None if class_weight is None else class_table(self, "class_weight", class_weight)
        if isinstance(gamma, Schedule) or gamma != 1.0:
            power = LossPower(gamma)
            weighting = power if weighting is None else weighting * power
        super().__init__(criterion, weighting, reduction)


@method(
    "generalized_dice",
    paper="Generalised Dice Overlap as a Deep Learning Loss Function for Highly Unbalanced Segmentations",
    venue="DLMIA 2017",
    acts_on="region",
    official="NifTK/NiftyNet@v0.6.0 niftynet/layer/loss_segmentation.py",
    defaults={
        "power": ("2.0", "paper: one over the squared volume"),
        "smooth_nr": ("1e-5", "MONAI"),
        "smooth_dr": ("1e-5", "MONAI"),
        "empty": ("'keep'", "authors' code: an absent class takes part, with the weight of the rarest present one"),
    },
    deviations=(
        "The smoothing is per class, in units of elements, inside the weighted sums; MONAI adds it after weighting, "
        "where its size depends on the volumes. With smoothing 0 they are the same.",
        "A set without any target element has equal class factors; MONAI gives it loss 0.",
    ),
    examples=({}, {"over": "batch", "activation": "sigmoid"}, {"power": 1.0, "empty": "skip", "smooth_nr": 0.0}),
)
@final
class GeneralizedDiceLoss(Objective):
    r"""One dice over all classes, each weighed by the inverse square of its volume.

    .. math:: L = 1 - \frac{\sum_c T_c^{-a} (2 I_c + s_n)}{\sum_c T_c^{-a} (P_c + T_c + s_d)}, \qquad a = 2

    - :math:`I, P, T`: overlap, predicted and target volume, as in :class:`DiceLoss`, of each sample (or the batch)

    It *is* the mean of per-class dice, weighted by :class:`~reweigh.weighting.VolumeBalance`.

    Weights:
        :math:`(P_c + T_c + s_d) / T_c^a`, differentiated (paper), divided by their sum over the classes of a set.
        No argument is neutral.

    State and cadence:
        None.

    Use when:
        Multi-class segmentation whose classes differ in volume by orders of magnitude, each of them there in most
        samples, judged by overlap.
    Avoid when:
        A class has a few elements in some samples and many in others: the inverse square follows the few. Mean dice
        over classes is steadier.

    Deviations:
        Smoothing is per class, and a set without any target element still has a loss.

    Args:
        power: Exponent a of the target volume, >= 0. Default 2.0 (paper); 1.0 is MONAI's ``"simple"``.
        activation: As in :class:`DiceLoss`.
        over: As in :class:`DiceLoss`.
        square: Squares in P and T.
        smooth_nr: Added to each class's numerator, in [0, ``smooth_dr``]. Default 1e-5.
        smooth_dr: Added to each class's denominator. Default 1e-5.
        include_background: Whether class 0 counts.
        empty: As in :class:`DiceLoss`. Default "keep" (authors' code): an absent class has the largest factor among the
            present ones.
        ignore_index: Elements with this value are removed.
        reduction: Of the losses of sets, one per sample (or one in all): ``"mean"``, ``"sum"``, ``"none"``, ...

    Shapes:
        As :class:`DiceLoss`; ``"none"`` gives ``(N,)``, or ``(1,)`` over the batch.

    Example:
        >>> import torch
        >>> loss = GeneralizedDiceLoss(activation="none", smooth_nr=0.0, smooth_dr=0.0)
        >>> p = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> round(loss(p, torch.tensor([[0, 1, 1]])).item(), 4)
        0.3333

    References:
        C. H. Sudre, W. Li, T. Vercauteren, S. Ourselin, M. J. Cardoso, "Generalised Dice Overlap as a Deep Learning
        Loss Function for Highly Unbalanced Segmentations", DLMIA 2017.
    """

    def __init__(
        self,
        *,
        power: float = 2.0,
        activation: Activation = "softmax",
        over: Over = "sample",
        square: bool = False,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        include_background: bool = True,
        empty: Absent = "keep",
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        above, below = _smoothing(self, smooth_nr, smooth_dr)
        criterion = Overlap(
            activation=activation,
            over=over,
            square=square,
            smooth_nr=above / 2.0,
            smooth_dr=below / 2.0,
            include_background=include_background,
            empty=empty,
            ignore_index=ignore_index,
        )
        sets = Objective(criterion, VolumeBalance(power, smooth=below), SequenceMean(weighted=True))
        super().__init__(sets, None, reduction)


@method(
    "self_adjusting_dice",
    paper="Dice Loss for Data-imbalanced NLP Tasks",
    venue="ACL 2020",
    official="ShannonAI/dice_loss_for_NLP@d437bb99 loss/dice_loss.py",
    defaults={
        "alpha": ("0.01", "authors' training scripts"),
        "smooth": ("1.0", "authors' training scripts"),
        "square": ("True", "authors' training scripts"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=(
        "Per example throughout, as in the paper. The authors' class has two other modes: the set-level one is Overlap "
        "with focus, and the unsquared multi-class one divides each example by the whole batch.",
        "The factor is computed in log space: finite at p = 1, where the authors' code returns NaN.",
    ),
    examples=({}, {"alpha": 0.0, "square": False}, {"alpha": 0.1, "smooth": 0.5}),
)
@final
class SelfAdjustingDiceLoss(Objective):
    r"""Dice of single examples with a factor that turns down the easy ones, for imbalanced NLP tasks.

    .. math:: \ell_i = \sum_c \Big[ 1 - \frac{2 q_{ic} y_{ic} + s}{q_{ic}^2 + y_{ic}^2 + s} \Big], \qquad
              q = (1-p)^\alpha\, p

    - :math:`p`: softmax probability; :math:`y`: one-hot target, or probabilities; :math:`s`: ``smooth``
    - :math:`\alpha`: ``alpha``; with ``square=False`` the denominator is :math:`q + y + s`

    Weights:
        None: the factor is inside p, in numerator and denominator, and differentiated (paper). No argument is neutral.
        For other factors, ``Objective(SelfAdjustingDice(), ...)`` takes class weights, ``Focal``, ``HardNegatives``.

    State and cadence:
        None.

    Use when:
        Tokens or texts with very many easy negatives, judged by F1 (the paper's setting), with an alpha well below 1.
    Avoid when:
        Probabilities have to be calibrated, or alpha is near 1, where training stalls. Tuning the decision threshold of
        cross-entropy is the simpler first step towards F1.

    Deviations:
        Per example throughout; finite where the authors' code is not.

    Args:
        alpha: Exponent of the factor, >= 0, or a schedule; it warns above 0.1. Default 0.01 (authors' scripts).
        smooth: Added to numerator and denominator, >= 0. Default 1.0 (authors' scripts).
        square: Squares in the denominator. Default True (authors' scripts).
        ignore_index: Targets with this value are removed.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C, ...), target (N, ...))`` or probabilities ``(N, C, ...)``; scalar unless ``"none"``.

    Example:
        >>> import torch
        >>> round(SelfAdjustingDiceLoss(alpha=0.0)(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
        0.3111

    References:
        X. Li, X. Sun, Y. Meng, J. Liang, F. Wu, J. Li, "Dice Loss for Data-imbalanced NLP Tasks", ACL 2020.
    """

    def __init__(
        self,
        alpha: float | Schedule = 0.01,
        *,
        smooth: float = 1.0,
        square: bool = True,
        ignore_index: int = -100,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        criterion = SelfAdjustingDice(alpha, smooth=smooth, square=square, ignore_index=ignore_index)
        super().__init__(criterion, None, reduction)


@method(
    "unified_focal",
    paper="Unified Focal Loss: Generalising Dice and Cross Entropy-Based Losses to Handle Class Imbalanced Medical "
    "Image Segmentation",
    venue="Computerized Medical Imaging and Graphics 2022",
    acts_on="region",
    official="mlyg/unified-focal-loss loss_functions.py",
    defaults={
        "lam": ("0.5", "authors' code: weight"),
        "delta": ("0.6", "authors' code"),
        "gamma": ("0.5", "authors' code"),
        "empty": ("'keep'", "authors' code: the mean is over all classes"),
    },
    deviations=(
        "Any number of classes: all but class 0 are foreground. The authors' code has two.",
        "Probabilities are not clipped: logarithms are exact, and the power of the Tversky part is held at the dtype's "
        "eps (LossPower).",
    ),
    examples=({}, {"symmetric": True, "over": "batch"}, {"lam": 0.3, "delta": 0.8, "gamma": 0.2, "empty": "skip"}),
)
@final
class UnifiedFocalLoss(Objective):
    r"""Focal cross-entropy plus focal Tversky, on one set of hyper-parameters.

    .. math:: L = \lambda\, \underset{n,c}{\mathrm{mean}}\, (1 - TI_{nc})^{e_c}
              + (1-\lambda)\, \underset{i}{\mathrm{mean}}\; d_{y_i} (1-p_i)^{f_{y_i}}\, \mathrm{CE}_i

    - :math:`TI = (I+s) / (I + \delta\,FN + (1-\delta)\,FP + s)`, per sample and class
    - class weights :math:`d_0 = 1-\delta` (background), :math:`d_c = \delta` (foreground)
    - asymmetric (default): :math:`e_0 = 1, f_0 = \gamma` and :math:`e_c = 1-\gamma, f_c = 0`, so the background is
      turned down in the cross-entropy and the foreground up in Tversky; ``symmetric``: both, for every class

    Weights:
        As above: constant factors, ``Focal`` and ``LossPower``, differentiated (paper). No argument is neutral.

    State and cadence:
        None; ``gamma`` may be a schedule.

    Use when:
        Medical images with small foreground and a background class 0, where a focal cross-entropy and a focal Tversky
        loss should share a few hyper-parameters.
    Avoid when:
        There is no background class 0. Cross-entropy plus dice is the simpler sum to beat, with one factor instead of
        exponents.

    Deviations:
        Any number of classes, and no clipping of probabilities.

    Args:
        lam: Share of the Tversky part, in [0, 1]. Default 0.5 (authors' code).
        delta: Weight of false negatives and of the foreground, in [0, 1]. Default 0.6 (authors' code).
        gamma: Strength of the focusing, in [0, 1), or a schedule. Default 0.5 (authors' code).
        symmetric: Focus every class in both parts. Default False.
        over: A set of the Tversky part is a ``"sample"`` (authors' code) or the ``"batch"``.
        smooth: Added to numerator and denominator of the index, >= 0. Default 1e-6 (authors' code).
        empty: As in :class:`DiceLoss`. Default "keep" (authors' code).
        ignore_index: Elements with this value are removed.

    Shapes:
        ``(logits (N, C, d1, ...), target (N, d1, ...))`` or probabilities ``(N, C, d1, ...)``; a scalar.

    Example:
        >>> import torch
        >>> round(UnifiedFocalLoss()(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 0, 1]])).item(), 4)
        0.4317

    References:
        M. Yeung, E. Sala, C.-B. Schoenlieb, L. Rundo, "Unified Focal Loss: Generalising Dice and Cross Entropy-Based
        Losses to Handle Class Imbalanced Medical Image Segmentation", Computerized Medical Imaging and Graphics 2022.
    """

    def __init__(
        self,
        *,
        lam: float = 0.5,
        delta: float = 0.6,
        gamma: float | Schedule = 0.5,
        symmetric: bool = False,
        over: Over = "sample",
        smooth: float = 1e-6,
        empty: Absent = "keep",
        ignore_index: int = -100,
    ) -> None:
        lam = check_number(self, "lam", lam, low=0.0, high=1.0)
        delta = check_number(self, "delta", delta, low=0.0, high=1.0)
        check_hyper(self, "gamma", gamma, low=0.0, high=1.0, open_high=True)
        smooth = check_number(self, "smooth", smooth, low=0.0)
        background = InClasses([0])
        focal: Weighting = (1.0 - delta) * Focal(gamma)
        if symmetric:
            focal = focal.where(background, otherwise=delta * Focal(gamma))
        else:
            focal = focal.where(background, otherwise=delta)
        raised: Weighting = LossPower(0.0) ** gamma  # (1 / loss) ** gamma
        overlap = Overlap(
            over=over,
            alpha=1.0 - delta,
            beta=delta,
            smooth_nr=smooth,
            smooth_dr=smooth,
            empty=empty,
            ignore_index=ignore_index,
        )
        tversky = Objective(overlap, raised if symmetric else Constant(1.0).where(background, otherwise=raised))
        pixels = Objective(CrossEntropy(ignore_index=ignore_index), focal)
        super().__init__(Joint(tversky, pixels), ClassWeight([lam, 1.0 - lam]), "sum")


def _smoothing(owner: object, smooth_nr: float, smooth_dr: float) -> tuple[float, float]:
    below = check_number(owner, "smooth_dr", smooth_dr, low=0.0)
    above = check_number(owner, "smooth_nr", smooth_nr, low=0.0)
    if above > below:
        raise ValueError(f"{type(owner).__name__}: smooth_nr must be <= smooth_dr ({below:g}), got {above:g}")
    return above, below
