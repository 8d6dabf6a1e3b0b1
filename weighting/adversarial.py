"""Weights for adversarial training: which attacked samples, and which classes, the model should care about.

The attack is the caller's. What these weightings read of it arrives with the call, beside ``group=`` and ``index=``.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import Scope, Weighting, lookup, method
from .config import check_number, check_whole
from .dynamics import Event
from .functional import mean_one_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


def given(owner: object, terms: LossTerms, name: str) -> Tensor:
    """A statistic of the call as a constant of the terms' shape and dtype, 0 where nothing counts.

    Raises:
        ValueError: If the call did not bring it.
    """
    value = terms.spread(terms.need(name, owner).detach()).to(terms.loss.dtype).expand_as(terms.loss)
    return value if terms.mask is None else value.masked_fill(~terms.mask, 0.0)


def example_numbers(batch: int, seed: int, dtype: torch.dtype) -> Tensor:
    """``(batch,)`` standard normal numbers for a weighting's ``example_stats``."""
    return torch.randn(batch, generator=torch.Generator().manual_seed(seed + 17), dtype=torch.float64).to(dtype)


@method(
    "gairat",
    paper="Geometry-aware Instance-reweighted Adversarial Training",
    venue="ICLR 2021",
    official="zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training@16813b5 GAIR.py (Tanh)",
    defaults={
        "num_steps": ("10", "authors' script"),
        "shift": ("-1.0", "authors' script, after the epochs of plain training (shift infinite) that open a run"),
    },
    deviations=(
        "K / 2 is not rounded down, so that an odd number of steps gives the paper's formula.",
        "Computed from logarithms: a batch in which every weight of the authors' code rounds to 0 is not 0 / 0.",
    ),
    neutral={"shift": math.inf},
    examples=({}, {"num_steps": 7, "shift": 2.0}),
)
@final
class GAIRAT(Weighting):
    r"""Turn up the samples that an attack carries over the decision boundary in few steps.

    .. math:: w_i = \frac{N\,\omega_i}{\sum_j \omega_j}, \qquad
              \omega_i = \frac{1 + \tanh\big(\Lambda + 5\,(1 - 2\kappa_i / K)\big)}{2}

    - :math:`\kappa_i`: ``steps_to_cross=`` of the call: at how many of the attack's K steps the model is still right
      about sample :math:`i` before the step is taken; 0 where it was wrong from the start, K where it never is
    - :math:`K`: ``num_steps``; :math:`\Lambda`: ``shift``

    Weights:
        Positive, mean 1 over the terms that count, decreasing in :math:`\kappa`. Detached. Equal :math:`\kappa`, and
        ``shift=inf`` (plain adversarial training), are neutral.

    State and cadence:
        None; ``update_on = "never"``. ``shift`` may be a schedule: ``Piecewise([100.0, -1.0], [60])`` is the authors'
        sixty epochs of plain training (at 100 all weights are 1).

    Use when:
        Adversarial training of a model too small to fit every attacked sample, with an attack that reports in how many
        steps each sample crossed the boundary.
    Avoid when:
        Robustness is measured by attacks stronger than that of training, under which it can lose what it gained. Labels
        are noisy: wrong labels cross first.

    Deviations:
        K / 2 is not rounded down; no 0 / 0.

    Args:
        num_steps: Number of steps K of the attack. Default 10 (authors).
        shift: :math:`\Lambda`, a number, ``inf``, or a schedule. Default -1.0 (authors).

    Shapes:
        Reads ``steps_to_cross`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), GAIRAT(10))
        >>> logits, target = torch.zeros(2, 4), torch.tensor([0, 1])
        >>> objective.weights(logits, target, steps_to_cross=torch.tensor([0, 5]))
        tensor([1.7869, 0.2131])

    References:
        J. Zhang, J. Zhu, G. Niu, B. Han, M. Sugiyama, M. Kankanhalli, "Geometry-aware Instance-reweighted Adversarial
        Training", ICLR 2021.
    """

    needs = frozenset({"steps_to_cross"})
    detached = True
    scope: Scope = "scaled"

    def __init__(self, num_steps: int = 10, *, shift: float | Schedule = -1.0) -> None:
        super().__init__()
        self.num_steps = check_whole(self, "num_steps", num_steps, low=1)
        endless = isinstance(shift, float) and shift == math.inf
        self.shift = shift if endless else check_hyper(self, "shift", shift)

    def weigh(self, terms: LossTerms) -> Tensor:
        share = given(self, terms, "steps_to_cross") / self.num_steps
        # (1 + tanh z) / 2 is the sigmoid of 2 z
        return mean_one_weight(logsigmoid(2.0 * (value_of(self.shift) + 5.0 * (1.0 - 2.0 * share))), terms.counts())

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"steps_to_cross": torch.randint(self.num_steps + 1, (batch,), generator=generator)}


@method(
    "mail",
    paper="Probabilistic Margins for Instance Reweighting in Adversarial Training",
    venue="NeurIPS 2021",
    official="QizhouWang/MAIL@8367c64 mail_loss.py (weight_assign)",
    defaults={
        "gamma": ("10.0", "the paper's, for MAIL-AT, from memory: not verified; the authors' script has slope 1.0"),
        "beta": ("-0.5", "the paper's, for MAIL-AT, from memory: not verified; the authors' script has bias -1.5"),
    },
    deviations=(
        "gamma and beta are not verified against the paper; those of the authors' script are gamma=1.0, beta=-1.5.",
        "Scaled to mean 1; the authors' code multiplies the sigmoid by 3 instead.",
    ),
    neutral={"gamma": 0.0},
    examples=({}, {"gamma": 5.0, "beta": 0.05}),
)
@final
class MAIL(Weighting):
    r"""Turn up attacked samples whose probability margin is small or negative.

    .. math:: w_i = \frac{N\,\omega_i}{\sum_j \omega_j}, \qquad
              \omega_i = \sigma\big(-\gamma\,(\mathrm{PM}_i - \beta)\big)

    - :math:`\mathrm{PM}_i`: ``margin=`` of the call, :math:`p_y - \max_{j \neq y} p_j`, such as
      :func:`~reweigh.weighting.probability_margin` gives of attacked (or natural) logits
    - :math:`\gamma`: ``gamma``; :math:`\beta`: ``beta``

    Weights:
        Positive, mean 1 over the terms that count, decreasing in the margin. Detached. Equal margins and ``gamma=0``
        are neutral.

    State and cadence:
        None; ``update_on = "never"``. Both numbers may be schedules; ``gamma=Piecewise([0.0, 10.0], [75])`` is the
        authors' 75 epochs of plain training.

    Use when:
        Adversarial training of a small model in which samples near the boundary should count more, measured by a smooth
        probability margin instead of counted attack steps.
    Avoid when:
        Robustness is measured by attacks other than that of training, or labels are noisy, with the lowest margins of
        all. The defaults are not verified: tune them against equal weights.

    Deviations:
        The defaults are not verified (see the record); scaled to mean 1 instead of times 3.

    Args:
        gamma: Steepness >= 0, or a schedule. Default 10.0 (not verified).
        beta: Margin at which the sigmoid is one half, or a schedule. Default -0.5 (not verified).

    Shapes:
        Reads ``margin`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> from reweigh.weighting import probability_margin
        >>> logits, target = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), torch.tensor([0, 0])
        >>> margin = probability_margin(logits, target)
        >>> Objective(CrossEntropy(), MAIL(5.0, beta=0.0)).weights(logits, target, margin=margin)
        tensor([0.0371, 1.9629])

    References:
        Q. Wang, F. Liu, B. Han, T. Liu, C. Gong, G. Niu, M. Zhou, M. Sugiyama, "Probabilistic Margins for Instance
        Reweighting in Adversarial Training", NeurIPS 2021.
    """

    needs = frozenset({"margin"})
    detached = True
    scope: Scope = "scaled"

    def __init__(self, gamma: float | Schedule = 10.0, *, beta: float | Schedule = -0.5) -> None:
        super().__init__()
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)
        self.beta = check_hyper(self, "beta", beta)

    def weigh(self, terms: LossTerms) -> Tensor:
        beyond = given(self, terms, "margin") - value_of(self.beta)
        return mean_one_weight(logsigmoid(-value_of(self.gamma) * beyond), terms.counts())

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"margin": example_numbers(batch, seed, dtype).tanh()}


@method(
    "lrat",
    paper="Local Reweighting for Adversarial Training",
    venue="arXiv 2106.15776, 2021",
    official=None,
    defaults={"temperature": ("1.0", "ours; no constant of the paper is verified")},
    deviations=(
        "The functional form is ours: known of the paper is only that weights compare the members of one (natural, "
        "variants) pair and decrease in the safety margin. Here: a softmax of minus margin over temperature.",
        "Mean 1 within each pair, so that pairs keep their weight against one another.",
    ),
    neutral={"temperature": 1e12},
    examples=({}, {"temperature": 0.2}),
)
@final
class LRAT(Weighting):
    r"""Weigh the attacks on one sample against each other, not against those on other samples.

    .. math:: w_i = \frac{n_{q_i}\, e^{-m_i / T}}{\sum_{j:\,q_j = q_i} e^{-m_j / T}}

    - :math:`q_i`: ``pair=`` of the call, an integer that names the natural sample that term :math:`i` belongs to (the
      sample itself and its attacked variants have the same one)
    - :math:`m_i`: ``margin=`` of the call, larger where the term is safer
    - :math:`n_q`: number of terms of pair q; :math:`T`: ``temperature``

    Weights:
        Positive, mean 1 within each pair, decreasing in the margin. Detached. Equal margins within pairs are neutral,
        and so is a very large ``temperature``.

    State and cadence:
        None; ``update_on = "never"``. All members of a pair belong in one batch; ``temperature`` may be a schedule.

    Use when:
        Several attacks or radii are trained on together, and weight should move between the variants of one sample, not
        between samples.
    Avoid when:
        There is one attack per sample and nothing beside it: all weights are 1. The functional form is not verified
        against the paper; compare with adversarial training without weights.

    Deviations:
        The functional form is not verified, and ours (see the record).

    Args:
        temperature: T > 0, or a schedule. Default 1.0 (ours).

    Shapes:
        Reads ``pair`` (integers) and ``margin`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> call = {"pair": torch.tensor([7, 7, 8]), "margin": torch.tensor([1.0, 0.0, 5.0])}
        >>> Objective(CrossEntropy(), LRAT()).weights(torch.zeros(3, 4), torch.tensor([0, 0, 1]), **call)
        tensor([0.5379, 1.4621, 1.0000])

    References:
        R. Gao, F. Liu, K. Zhou, G. Niu, B. Han, J. Cheng, "Local Reweighting for Adversarial Training", arXiv
        2106.15776, 2021.
    """

    needs = frozenset({"pair", "margin"})
    detached = True
    scope: Scope = "global"

    def __init__(self, temperature: float | Schedule = 1.0) -> None:
        super().__init__()
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)

    def weigh(self, terms: LossTerms) -> Tensor:
        pair = terms.need("pair", self)
        if pair.is_floating_point() or pair.is_complex() or pair.dtype == torch.bool:
            raise TypeError(f"LRAT: pair must hold integers, got {pair.dtype}")
        value = -given(self, terms, "margin") / value_of(self.temperature)
        if not value.numel():
            return torch.ones_like(value)
        counts = terms.counts().reshape(-1)
        key = terms.spread(pair).expand_as(value).reshape(-1)
        held = torch.where(counts > 0, value.reshape(-1), torch.full_like(counts, -torch.inf))
        at = torch.searchsorted(key.sort().values, key.contiguous())  # one slot per distinct pair
        top = torch.full_like(held, -torch.inf).scatter_reduce(0, at, held, "amax")[at]
        raised = torch.exp(held - torch.where(top.isneginf(), torch.zeros_like(top), top))
        zeros = torch.zeros_like(held)
        total, size = zeros.index_add(0, at, counts * raised)[at], zeros.index_add(0, at, counts)[at]
        return (raised * size / torch.where(total > 0, total, torch.ones_like(total))).reshape(value.shape)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"pair": 5 - torch.arange(batch) % 3, "margin": example_numbers(batch, seed, dtype)}


@method(
    "dafa",
    paper="DAFA: Distance-Aware Fair Adversarial Training",
    venue="ICLR 2024",
    official="rucy74/DAFA@c60ba83 utils.py (calculate_class_weights), losses.py",
    defaults={
        "strength": ("1.0", "authors' script, CIFAR-10; 1.5 for CIFAR-100 and STL-10"),
        "warmup": ("70", "authors' script"),
        "recompute": ("False", "authors' code: once, after the warm-up"),
    },
    deviations=(
        "Two classes with equal probability of their own leave each other alone; the authors' code takes from both, so "
        "that weights add up to less than C.",
        "Held at 0 from below and rescaled to sum C, where a large strength makes the authors' weights negative.",
        "Similarities are running sums, added over ranks; the authors keep every sample's probabilities.",
    ),
    neutral={"num_classes": 4, "strength": 0.0},
    examples=(
        {"num_classes": 4, "warmup": 1},
        {"num_classes": 4, "warmup": 2, "strength": 20.0, "recompute": True},
        {"num_classes": 4, "warmup": None},
    ),
)
@final
class DAFA(Weighting):
    r"""Move weight and attack radius from classes that are robust to those that are mistaken for them.

    .. math::
        w_c = 1 + \lambda \sum_{j:\,S_{jj} > S_{cc}} S_{cj} S_{jj} - \lambda \sum_{j:\,S_{jj} < S_{cc}} S_{jc} S_{cc}
        \qquad S_{cj} = \mathrm{mean}_{i:\,y_i = c}\; p_j(x_i + \delta_i)

    - :math:`S_{cj}`: mean probability that the model gives to class j on attacked samples of class c, from
      ``probabilities=`` of the call
    - :math:`\lambda`: ``strength``

    Weights:
        >= 0, summing to C over classes: what a class gets, others give. Detached. 1 before the warm-up has ended;
        ``strength=0`` is neutral.

    State and cadence:
        ``class_weight`` ``(C,)``, ``fitted``, and the epoch's ``probability_sum`` ``(C, C)`` and ``count`` ``(C,)``:
        float64 buffers, equal on all ranks. The ``epoch`` event that ends the warm-up computes the weights from the
        training forwards of that epoch, once or (``recompute``) at every later one as well. :meth:`fit_similarity`
        sets them from a matrix of your own.

    Use when:
        Adversarial training judged by its worst class, with class probabilities of attacked samples at hand and an
        attack radius that may differ between classes.
    Avoid when:
        Classes are imbalanced, since it looks at probabilities and not at counts. The attack radius has to stay as it
        is: then only half of the method is left.

    Deviations:
        Ties exchange nothing; never negative.

    Args:
        num_classes: Number of classes C.
        strength: :math:`\lambda \geq 0`. Default 1.0 (authors, CIFAR-10).
        warmup: Epochs, >= 1, before weights are computed. Default 70 (authors). ``None``: never by itself, only by
            :meth:`fit_similarity`, and no ``probabilities`` are read.
        recompute: Compute the weights anew after every epoch from then on. Default False (authors).

    Shapes:
        Reads ``category`` ``(S[0],)`` and, in training, ``probabilities`` ``(S[0], C)``; returns ``(S[0],)``.

    Example:
        >>> import torch
        >>> dafa = DAFA(2, warmup=None)
        >>> dafa.fit_similarity([[0.6, 0.4], [0.1, 0.9]])  # class 0 is mistaken for class 1
        >>> dafa.class_margins(8 / 255) * 255
        tensor([10.8800,  5.1200], dtype=torch.float64)

    References:
        H. Lee, S. Lee, H. Jang, J. Park, H. Bae, S. Yoon, "DAFA: Distance-Aware Fair Adversarial Training", ICLR 2024.
    """

    needs = frozenset({"category", "probabilities"})
    rows = frozenset({"probabilities"})
    detached = True
    scope: Scope = "local"
    update_on: Event = "epoch"

    def __init__(
        self, num_classes: int, *, strength: float = 1.0, warmup: int | None = 70, recompute: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = check_whole(self, "num_classes", num_classes, low=1)
        self.strength = check_number(self, "strength", strength, low=0.0)
        self.warm_epochs = None if warmup is None else check_whole(self, "warmup", warmup, low=1)
        self.recompute = recompute
        if warmup is None:
            self.needs = frozenset({"category"})
        self.add_state("class_weight", torch.ones(num_classes, dtype=torch.float64))
        self.add_state("fitted", torch.zeros((), dtype=torch.float64))
        self.add_state("probability_sum", torch.zeros(num_classes, num_classes, dtype=torch.float64))
        self.add_state("count", torch.zeros(num_classes, dtype=torch.float64))
        self.add_pending("probability", num_classes, num_classes)
        self.add_pending("seen", num_classes)

    def eps_scale(self) -> Tensor:
        """``(C,)`` factors, mean 1, of each class's attack radius and step; the class weights themselves."""
        return self.get_buffer("class_weight").clone()

    def class_margins(self, eps: float) -> Tensor:
        """``(C,)`` attack radius of each class where the mean radius is ``eps``; index it by the target."""
        return self.eps_scale() * check_number(self, "eps", eps, low=0.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        return lookup(self, self.get_buffer("class_weight"), terms)

    def observe(self, terms: LossTerms) -> None:
        if self.warm_epochs is None:
            return
        probabilities, category = terms.need("probabilities", self), terms.need("category", self)
        if category.ndim != 1 or probabilities.shape != (len(category), self.num_classes):
            raise ValueError(
                f"DAFA: probabilities must hold one number per sample and class, ({terms.loss.shape[0]}, "
                f"{self.num_classes}), for one term per sample, got {tuple(probabilities.shape)} for terms "
                f"{tuple(terms.loss.shape)}"
            )
        counts = terms.counts().double()
        rows = torch.where(counts.unsqueeze(1) > 0, probabilities.double(), 0.0) * counts.unsqueeze(1)
        zeros = rows.new_zeros(self.num_classes, self.num_classes)
        self.accumulate("probability", zeros.index_add(0, category, rows))
        self.accumulate("seen", zeros[0].index_add(0, category, counts))

    def commit(self, sums: dict[str, Tensor]) -> None:
        fine = sums["probability"].isfinite().all() & sums["seen"].isfinite().all()
        for name, part in (("probability_sum", "probability"), ("count", "seen")):
            self.get_buffer(name).add_(torch.where(fine, sums[part], torch.zeros_like(sums[part])))

    def refresh(self, event: Event, **signals: Any) -> None:
        if event != "epoch" or self.warm_epochs is None:
            return
        count, total, fitted = self.get_buffer("count"), self.get_buffer("probability_sum"), self.get_buffer("fitted")
        due = (self.position("epoch") + 1 >= self.warm_epochs) & (count.sum() > 0)
        if not self.recompute:
            due = due & (fitted == 0)
        known = count > 0
        mean = total / torch.where(known, count, torch.ones_like(count)).unsqueeze(1)
        table = self.get_buffer("class_weight")
        table.copy_(torch.where(due, _exchanged(mean, known, self.strength), table))
        fitted.copy_(torch.where(due, torch.ones_like(fitted), fitted))
        count.zero_()
        total.zero_()

    @torch.no_grad()
    def fit_similarity(self, similarity: Any) -> None:
        """Set the weights from ``(C, C)`` mean probabilities, row c those of samples of class c.

        Every process must call it with the same numbers.

        Raises:
            ValueError: If the shape or a number does not fit.
        """
        matrix = torch.as_tensor(similarity, dtype=torch.float64, device=self.get_buffer("class_weight").device)
        if tuple(matrix.shape) != (self.num_classes, self.num_classes):
            raise ValueError(
                f"DAFA: similarity must have shape {(self.num_classes, self.num_classes)}, got {tuple(matrix.shape)}"
            )
        if not bool(((matrix >= 0) & (matrix <= 1)).all()):
            raise ValueError("DAFA: similarity must hold probabilities, numbers in [0, 1]")
        known = torch.ones(self.num_classes, dtype=torch.bool, device=matrix.device)
        self.get_buffer("class_weight").copy_(_exchanged(matrix, known, self.strength))
        self.get_buffer("fitted").fill_(1.0)

    def reset(self) -> None:
        super().reset()
        self.get_buffer("class_weight").fill_(1.0)
        for name in ("fitted", "probability_sum", "count"):
            self.get_buffer(name).zero_()

    def summary(self) -> dict[str, Tensor]:
        return {"class_weight": self.eps_scale()}

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        if self.warm_epochs is None:
            return {}
        generator = torch.Generator().manual_seed(seed + 17)
        logits = torch.randn(batch, self.num_classes, generator=generator, dtype=torch.float64)
        return {"probabilities": logits.softmax(1).to(dtype)}


def _exchanged(similarity: Tensor, known: Tensor, strength: float) -> Tensor:
    """Class weights, summing to the number of classes, of mean probabilities; unknown classes exchange nothing."""
    own = similarity.diagonal()
    weaker = (own.unsqueeze(1) < own.unsqueeze(0)) & known.unsqueeze(1) & known.unsqueeze(0)
    moved = torch.where(weaker, strength * similarity * own.unsqueeze(0), torch.zeros_like(similarity))
    weights = (1.0 + moved.sum(1) - moved.sum(0)).clamp_min(0.0)
    return weights * (len(own) / weights.sum())
