"""Losses for partial labels: sets of candidates, of which one is true, or none."""

from __future__ import annotations

from typing import final

from reweigh.weighting.schedules import Schedule

from ..criteria.partial_labels import PartialLabelCrossEntropy, Pseudo
from ..objective import Objective
from ..reductions import Reduction, ReductionName
from ..registry import method


@method(
    "alim",
    paper="ALIM: Adjusting Label Importance Mechanism for Noisy Partial Label Learning",
    venue="NeurIPS 2023",
    official="zeroQiaoba/ALIM@5c4e46a6 utils/utils_loss.py, train_merge.py",
    defaults={
        "mixing": ("0.0", "authors' code, until epoch start"),
        "noise_rate": ("None", "ours: the authors' option is 0, which leaves mixing at 0"),
        "start": ("0", "authors' code; their scripts 80 to 140 of 1000 epochs"),
        "pseudo": ("'onehot'", "authors' code"),
        "ema": ("0.95", "authors' code, which falls to 0.8 over all epochs"),
        "reduction": ("'mean'", "authors' code"),
    },
    deviations=(
        "The belief table is written at the step, copies of a sample averaged; the authors write it in every forward, "
        "and the last copy wins.",
        "The quantile is over samples, each with its last ratio, and always at most 1; the authors' is over the "
        "forwards of an epoch, and at most 1 by an option that all their scripts set.",
        "q is the classifier's own softmax unless votes= brings the prototypes', which are the authors' default.",
        "Beliefs move from the first epoch on; the authors' stay uniform for one: ema=Piecewise([1.0, 0.95], [1]).",
        "Mixup and the contrastive loss are the caller's.",
    ),
    examples=(
        {"num_samples": 8, "num_classes": 4},
        {"num_samples": 8, "num_classes": 4, "mixing": 0.5, "pseudo": "scale", "ema": 0.6},
        {"num_samples": 8, "num_classes": 4, "noise_rate": 0.3, "ema": 0.5},
    ),
)
@final
class ALIMLoss(Objective):
    r"""Cross-entropy for candidate sets that may miss the true label (ALIM).

    .. math:: \ell_i = -\sum_c b_{ic} \log p_{ic}, \qquad b_i \leftarrow \phi\, b_i + (1 - \phi)\, t_i, \qquad
              t_i = \mathrm{onehot}\big(\arg\max_c q_{ic}\,(s_{ic} + \lambda (1 - s_{ic}))\big)

    - :math:`s`: the candidate set; :math:`p`: softmax of the logits; :math:`q`: the same, detached, or of ``votes=``
    - :math:`b`: belief, uniform over the candidates at first; :math:`\phi`: ``ema``; :math:`\lambda`: ``mixing``

    Weights:
        None: one criterion; beliefs are constants to the gradient. No argument is neutral: ``mixing=0`` trusts the
        candidate sets, ``mixing=1`` is self-training; a set of one label and ``mixing=0`` is cross-entropy.

    State and cadence:
        A table of ``num_samples`` rows of C + 1 float32 numbers (beliefs, last ratio), read by ``index=``;
        ``update_on = "step"``. The loss uses the belief after this forward's own visit, the table takes it over at the
        step, averaged over copies, micro-batches and ranks. With ``noise_rate`` one saved number more, :math:`\lambda`,
        set by the ``epoch`` event. Evaluation writes nothing, and needs no index.

    Use when:
        Each sample has several candidate labels of which one is meant and may be missing, samples have an index, and a
        table of samples times classes fits.
    Avoid when:
        Each sample has one label: a loss for noisy labels is simpler. Samples have no stable index, or the share of
        sets without the true label is a mere guess.

    Deviations:
        The table is written at the step. The quantile counts each sample once. :math:`q` is the classifier's unless
        ``votes=`` is given. Beliefs move from the first epoch on.

    Args:
        num_samples: Length of the training set.
        num_classes: Number of classes C, at least 2.
        mixing: :math:`\lambda` in [0, 1], or a schedule. Default 0.0 (authors' code).
        noise_rate: Share of samples whose set misses the true label, in [0, 1): :math:`\lambda` becomes that quantile
            of :math:`\max_{s_c=1} q_c / \max_{s_c=0} q_c`, at most 1, at the end of each epoch. Default ``None``: no.
        start: First epoch, from 0, at whose end it does. Default 0 (authors' code; scripts 80 to 140).
        pseudo: ``"onehot"``, or ``"scale"`` for the whole distribution. Default "onehot" (authors' code).
        ema: :math:`\phi` in [0, 1], or a schedule; the authors' is ``Linear(0.95, 0.8, duration=epochs)``. Default 0.95
            (where that starts).
        device: Where the table stays; ``None``: it moves with the module.
        storage: A folder for a memory-mapped table, as in :class:`~reweigh.weighting.SampleTable`.
        reduction: See :mod:`reweigh.losses.reductions`.

    Shapes:
        ``(logits (N, C), candidates (N, C))``, bool or 0/1, with ``index=`` ``(N,)`` and, if wanted, ``votes=``
        ``(N, C)``, logits of another head; scalar unless ``"none"``. Samples without a candidate are removed.

    Example:
        >>> import torch
        >>> loss = ALIMLoss(100, 3, ema=0.5)
        >>> logits, candidates = torch.tensor([[2.0, 0.0, 3.0]]), torch.tensor([[1, 1, 0]])
        >>> round(loss(logits, candidates, index=torch.tensor([42])).item(), 4)
        1.849

    References:
        M. Xu, Z. Lian, L. Feng, B. Liu, J. Tao, "ALIM: Adjusting Label Importance Mechanism for Noisy Partial Label
        Learning", NeurIPS 2023.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        mixing: float | Schedule = 0.0,
        noise_rate: float | None = None,
        start: int = 0,
        pseudo: Pseudo = "onehot",
        ema: float | Schedule = 0.95,
        device: str | None = None,
        storage: str | None = None,
        reduction: Reduction | ReductionName = "mean",
    ) -> None:
        criterion = PartialLabelCrossEntropy(
            num_samples,
            num_classes,
            mixing=mixing,
            noise_rate=noise_rate,
            start=start,
            pseudo=pseudo,
            ema=ema,
            device=device,
            storage=storage,
        )
        super().__init__(criterion, None, reduction)
