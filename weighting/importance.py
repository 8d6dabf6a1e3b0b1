"""Weights from what is known outside the loss: another distribution, a second prediction, a score of each sample."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from .adversarial import example_numbers, given
from .base import Scope, Weighting, method
from .config import check_number
from .functional import counted_quantile, effective_sample_size, mean_one_weight, top_share
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


def log_ratio_from_classifier(domain_logit: Tensor, n_train: float, n_test: float) -> Tensor:
    r"""Logarithm of the density ratio :math:`p_\text{test}(x) / p_\text{train}(x)` that a domain classifier implies.

    A classifier trained on ``n_train`` samples of one kind and ``n_test`` of the other has the logit
    :math:`\log\frac{p_\text{test}(x)}{p_\text{train}(x)} + \log\frac{n_\text{test}}{n_\text{train}}`; the prior is
    taken out.

    Args:
        domain_logit: Any shape, logit of "x is from the test distribution" (in an A/B test: from the treatment).
        n_train: Number of training samples the classifier saw, > 0.
        n_test: Number of test samples it saw, > 0.

    Example:
        >>> import torch
        >>> log_ratio_from_classifier(torch.tensor([0.0]), n_train=100, n_test=300).exp()
        tensor([0.3333])
    """
    few = check_number("log_ratio_from_classifier", "n_train", n_train, low=0.0, open_low=True)
    many = check_number("log_ratio_from_classifier", "n_test", n_test, low=0.0, open_low=True)
    return domain_logit - (math.log(many) - math.log(few))


@method(
    "importance",
    paper="Improving predictive inference under covariate shift by weighting the log-likelihood function",
    venue="Journal of Statistical Planning and Inference 90, 2000",
    official=None,
    defaults={
        "flatten": ("1.0", "the unbiased ratio"),
        "clip": ("None", "ours: off"),
        "clip_quantile": ("None", "ours: off"),
        "self_normalize": ("True", "ours; the paper's estimator is without"),
    },
    deviations=(
        "Self-normalised over the batch by default, which trades a bias of order 1/N for much less variance.",
        "Without normalisation weights are held below the square root of the dtype's largest number, so that weight "
        "times loss stays finite.",
    ),
    neutral={"flatten": 0.0},
    examples=(
        {},
        {"flatten": 0.5, "clip": 1.5},
        {"clip_quantile": 0.7},
        {"flatten": 0.5, "clip": 2.0, "self_normalize": False},
    ),
)
@final
class ImportanceWeight(Weighting):
    r"""Train for another distribution than the data's, by the ratio of the two.

    .. math:: w_i = \frac{N\,u_i}{\sum_j u_j}, \qquad u_i = \min\big(e^{a\,r_i},\; c\big)

    - :math:`r_i`: ``log_ratio=`` of the call, :math:`\log p_\text{test}(x_i) - \log p_\text{train}(x_i)`, such as
      :func:`~reweigh.weighting.log_ratio_from_classifier` gives of a domain classifier
    - :math:`a`: ``flatten``; :math:`c`: ``clip``, or the batch's quantile of :math:`u` at ``clip_quantile``

    Weights:
        >= 0, mean 1 over the terms that count (``self_normalize=True``), or u itself. Detached. ``flatten=0`` is
        neutral.

    State and cadence:
        None; ``update_on = "never"``. ``flatten`` may be a schedule.

    Use when:
        Covariate shift with known or estimated density ratios, off-policy data, or a loop that trains on both arms of
        an A/B test and should learn from one.
    Avoid when:
        The effective sample size is a small part of the data: flatten or clip first. The model can fit both
        distributions: weights then only add variance to plain training.

    Deviations:
        Self-normalised; held where it would overflow.

    Args:
        flatten: Exponent a >= 0, or a schedule; below 1 for less variance and more bias. Default 1.0.
        clip: Largest u, > 0. Default ``None``, off.
        clip_quantile: Share of the batch's terms, in (0, 1), above whose u the rest is clipped. Default ``None``, off.
        self_normalize: Scale to mean 1. Default True.

    Shapes:
        Reads ``log_ratio`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), ImportanceWeight())
        >>> logits, target = torch.zeros(2, 4), torch.tensor([0, 1])
        >>> objective.weights(logits, target, log_ratio=torch.tensor([3.0, 1.0]).log())
        tensor([1.5000, 0.5000])

    References:
        H. Shimodaira, "Improving predictive inference under covariate shift by weighting the log-likelihood function",
        Journal of Statistical Planning and Inference 90, 2000. S. Bickel, M. Brueckner, T. Scheffer, "Discriminative
        Learning Under Covariate Shift", JMLR 10, 2009.
    """

    needs = frozenset({"log_ratio"})
    detached = True

    def __init__(
        self,
        *,
        flatten: float | Schedule = 1.0,
        clip: float | None = None,
        clip_quantile: float | None = None,
        self_normalize: bool = True,
    ) -> None:
        super().__init__()
        self.flatten = check_hyper(self, "flatten", flatten, low=0.0)
        self.clip_at = None if clip is None else check_number(self, "clip", clip, low=0.0, open_low=True)
        self.clip_quantile = (
            None
            if clip_quantile is None
            else check_number(self, "clip_quantile", clip_quantile, low=0.0, high=1.0, open_low=True, open_high=True)
        )
        if clip is not None and clip_quantile is not None:
            raise ValueError(
                f"ImportanceWeight: clip and clip_quantile exclude each other, got {clip!r} and {clip_quantile!r}"
            )
        self.self_normalize = self_normalize
        self.scope: Scope = "global" if clip_quantile is not None else "scaled" if self_normalize else "local"

    def _log_weight(self, log_ratio: Tensor, counts: Tensor) -> Tensor:
        value = log_ratio * value_of(self.flatten)
        if self.clip_at is not None:
            return value.clamp_max(math.log(self.clip_at))
        if self.clip_quantile is not None:
            return torch.minimum(value, counted_quantile(value, counts, self.clip_quantile))
        return value

    def weigh(self, terms: LossTerms) -> Tensor:
        counts = terms.counts().detach()
        value = self._log_weight(given(self, terms, "log_ratio"), counts)
        if self.self_normalize:
            return mean_one_weight(value, counts)
        return value.clamp_max(0.5 * math.log(torch.finfo(value.dtype).max)).exp()

    @torch.no_grad()
    def effective_sample_size(self, log_ratio: Tensor) -> Tensor:
        r"""How many equally weighted samples the ratios (any shape) are worth: :math:`(\sum w)^2 / \sum w^2`."""
        value = log_ratio.double()
        ones = torch.ones_like(value)
        return effective_sample_size(mean_one_weight(self._log_weight(value, ones), ones))

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"log_ratio": example_numbers(batch, seed, dtype)}


@method(
    "prediction_agreement",
    paper="Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward Modeling",
    venue="ICLR 2025",
    official="grenoble-zhang/Ctrl-U@704d51d train/ctrlu-reward.py, ctrlu-depth.py",
    defaults={
        "scale": ("1.0", "authors' script for ADE20k; 0.1 elsewhere"),
        "strength": ("1.0", "authors' reward script"),
        "detach": ("False", "authors' code: gradient flows into the disagreement"),
    },
    deviations=(
        "One order of scales for both of the authors' scripts: the reward script scales u before the exponential and "
        "adds the scaled u (strength 1); the depth script scales only what it adds (scale 1, strength u_scale).",
    ),
    neutral={"scale": 0.0},
    examples=({}, {"scale": 0.1, "strength": 0.5}, {"scale": 2.0, "detach": True}),
)
@final
class PredictionAgreement(Weighting):
    r"""Turn down what two predictions disagree about, and make disagreement cost something.

    .. math:: L = \mathrm{reduce}_i\big(e^{-v_i}\,\ell_i + b\,v_i\big), \qquad v_i = a\,u_i

    - :math:`u_i \geq 0`: ``disagreement=`` of the call, such as the KL divergence or the absolute difference between
      two predictions for the same sample
    - :math:`a`: ``scale``; :math:`b`: ``strength``

    Weights:
        :math:`e^{-v}`, in (0, 1]. Differentiated: gradient flows into the disagreement (authors), whose optimum is
        :math:`v = \log(\ell / b)` where that is positive. The penalty :math:`b v` is one number per term and reduced
        like the losses. ``detach=True`` holds u constant. ``scale=0`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``scale`` and ``strength`` may be schedules.

    Use when:
        Labels or rewards come from a model that is unsure in places, and a second prediction of the same terms shows
        where.
    Avoid when:
        Both predictions agree by construction, as without dropout or noise, or losses are far below the strength: then
        nothing is weighed, and the second prediction is wasted.

    Deviations:
        Values are the authors'; see the record for which script is which setting.

    Args:
        scale: a >= 0, or a schedule. Default 1.0 (authors, ADE20k).
        strength: b >= 0, or a schedule. Default 1.0 (authors).
        detach: Use the disagreement as a constant, in weight and penalty. Default False (authors).

    Shapes:
        Reads ``disagreement`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import FromLoss, Objective
        >>> objective = Objective(FromLoss(torch.nn.L1Loss(reduction="none")), PredictionAgreement())
        >>> u = torch.tensor([2.0]).log().requires_grad_()  # the logarithm of the loss: the optimum
        >>> objective(torch.tensor([2.0]), torch.zeros(1), disagreement=u).backward()
        >>> u.grad.abs() < 1e-6
        tensor([True])

    References:
        G. Zhang, H. Gao, Z. Jiang, H. Zhao, Z. Zheng, "Ctrl-U: Robust Conditional Image Generation via
        Uncertainty-aware Reward Modeling", ICLR 2025.
    """

    needs = frozenset({"disagreement"})
    detached = False
    scope: Scope = "local"

    def __init__(
        self, scale: float | Schedule = 1.0, *, strength: float | Schedule = 1.0, detach: bool = False
    ) -> None:
        super().__init__()
        self.scale = check_hyper(self, "scale", scale, low=0.0)
        self.strength = check_hyper(self, "strength", strength, low=0.0)
        self.detached = detach

    def _scaled(self, terms: LossTerms) -> Tensor:
        value = terms.spread(terms.need("disagreement", self)).to(terms.loss.dtype).expand_as(terms.loss)
        value = value if terms.mask is None else value.masked_fill(~terms.mask, 0.0)
        return value_of(self.scale) * (value.detach() if self.detached else value)

    def weigh(self, terms: LossTerms) -> Tensor:
        return torch.exp(-self._scaled(terms))

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        return value_of(self.strength) * self._scaled(terms)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"disagreement": example_numbers(batch, seed, dtype).abs()}


@method(
    "self_influence",
    paper="Self-Influence Guided Data Reweighting for Language Model Pre-training",
    venue="EMNLP 2023",
    official=None,
    defaults={
        "temperature": ("1.0", "ours; the paper's is not verified"),
        "sign": ("1.0", "the paper's first stage"),
    },
    deviations=(
        "Not verified against the paper or code: the two stages (large self-influence first, small later) are a "
        "schedule of sign, and when to change over is the caller's.",
        "Mean 1 over the batch instead of sum 1.",
    ),
    neutral={"sign": 0.0},
    examples=({}, {"temperature": 0.5, "sign": -1.0}),
)
@final
class SelfInfluence(Weighting):
    r"""Weigh samples by the influence that training on them has on themselves (PRESENCE).

    .. math:: w_i = \frac{N\, e^{s\,\mathrm{SI}_i / T}}{\sum_j e^{s\,\mathrm{SI}_j / T}}

    - :math:`\mathrm{SI}_i`: ``influence=`` of the call, the squared norm of the sample's own gradient (see
      :mod:`reweigh.losses.scores`)
    - :math:`s`: ``sign``, 1 for samples that teach most, -1 against noisy ones; :math:`T`: ``temperature``

    Weights:
        Positive, mean 1 over the terms that count. Detached. ``sign=0`` and equal influences are neutral.

    State and cadence:
        None; ``update_on = "never"``. Both numbers may be schedules: ``sign=Piecewise([1.0, -1.0], [2])`` is the
        paper's two stages, with two epochs of the first.

    Use when:
        Large, uncurated pre-training text with gradient norms per sample: high self-influence first, to learn much
        early, low later, to avoid noise.
    Avoid when:
        Influences differ by more than the temperature: one sample owns the batch; standardise or clip them. When to
        change over is not verified against the paper, and yours to tune.

    Deviations:
        Not verified (see the record); mean 1 instead of sum 1.

    Args:
        temperature: T > 0, or a schedule. Default 1.0 (not verified).
        sign: s in [-1, 1], or a schedule. Default 1.0.

    Shapes:
        Reads ``influence`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), SelfInfluence(sign=-1.0))
        >>> objective.weights(torch.zeros(2, 4), torch.tensor([0, 1]), influence=torch.tensor([0.0, 2.0]))
        tensor([1.7616, 0.2384])

    References:
        M. Thakkar, T. Bolukbasi, S. Ganapathy, S. Vashishth, S. Chandar, P. Talukdar, "Self-Influence Guided Data
        Reweighting for Language Model Pre-training", EMNLP 2023.
    """

    needs = frozenset({"influence"})
    detached = True
    scope: Scope = "scaled"

    def __init__(self, temperature: float | Schedule = 1.0, *, sign: float | Schedule = 1.0) -> None:
        super().__init__()
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        self.sign = check_hyper(self, "sign", sign, low=-1.0, high=1.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        value = given(self, terms, "influence") * (value_of(self.sign) / value_of(self.temperature))
        return mean_one_weight(value, terms.counts())

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"influence": example_numbers(batch, seed, dtype).square()}


@method(
    "score",
    paper="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    venue="NeurIPS 2021",
    official="mansheej/data_diet@aee462e data_diet/scores.py (the scores; it prunes the data set)",
    defaults={
        "power": ("1.0", "ours"),
        "keep": ("None", "ours: off"),
        "largest": ("True", "paper: the hardest are kept"),
    },
    deviations=(
        "The paper keeps or drops samples of the data set; here the same is a weight of the batch, and a power of the "
        "score is the soft form.",
        "Equal scores at the edge share what is left for them.",
    ),
    neutral={"power": 0.0},
    examples=({}, {"power": 0.5, "keep": 0.6}, {"power": 0.0, "keep": 0.3, "largest": False}),
)
@final
class ScoreWeight(Weighting):
    r"""Weigh samples by a score of their difficulty, or keep only the highest.

    .. math:: w_i = \frac{N\,\omega_i}{\sum_j \omega_j}, \qquad
              \omega_i = d_i^{\,a}\; [\,i \text{ among the first } qN\,]

    - :math:`d_i \geq 0`: ``difficulty=`` of the call: EL2N, GraNd, forgetting counts (:mod:`reweigh.losses.scores`),
      or a number of your own
    - :math:`a`: ``power``; :math:`q`: ``keep``

    Weights:
        >= 0, mean 1 over the terms that count. Detached. ``power=0`` without ``keep`` is neutral, and so are equal
        scores.

    State and cadence:
        None; ``update_on = "never"``. ``power`` and ``keep`` may be schedules.

    Use when:
        Difficulty scores of an earlier run, averaged over seeds, say which samples matter, and weights or a share to
        keep should follow them.
    Avoid when:
        Labels are noisy: wrong labels have the highest scores, so keep the lowest then. Pruning the data set by the
        same scores saves the computation, which a weight of 0 does not.

    Deviations:
        A weight of the batch instead of a pruned data set; ties share.

    Args:
        power: a, finite, or a schedule. Default 1.0. A score of 0 counts as the smallest positive number.
        keep: Share q of the batch that is kept, in (0, 1], or a schedule. Default ``None``, all.
        largest: Keep the largest scores; otherwise the smallest. Default True.

    Shapes:
        Reads ``difficulty`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), ScoreWeight(power=1.0, keep=0.5))
        >>> call = {"difficulty": torch.tensor([0.1, 1.2, 0.4, 0.3])}
        >>> objective.weights(torch.zeros(4, 4), torch.tensor([0, 1, 2, 3]), **call)
        tensor([0.0000, 3.0000, 1.0000, 0.0000])

    References:
        M. Paul, S. Ganguli, G. K. Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in
        Training", NeurIPS 2021.
    """

    needs = frozenset({"difficulty"})
    detached = True

    def __init__(
        self, *, power: float | Schedule = 1.0, keep: float | Schedule | None = None, largest: bool = True
    ) -> None:
        super().__init__()
        self.power = check_hyper(self, "power", power)
        self.keep = None if keep is None else check_hyper(self, "keep", keep, low=0.0, high=1.0, open_low=True)
        self.largest = largest
        self.scope: Scope = "scaled" if keep is None else "global"

    def weigh(self, terms: LossTerms) -> Tensor:
        score, counts = given(self, terms, "difficulty"), terms.counts().detach()
        value = value_of(self.power) * score.clamp_min(torch.finfo(score.dtype).tiny).log()
        if self.keep is not None and score.numel():
            kept = top_share(score, counts, value_of(self.keep), largest=self.largest)
            value = value + kept.log().to(value.dtype)
        return mean_one_weight(value, counts)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"difficulty": example_numbers(batch, seed, dtype).abs()}
