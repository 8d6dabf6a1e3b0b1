"""Weights for labels that passed through a known noise: the transition matrix says how often which class is renamed."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from .base import Scope, Weighting, method
from .config import check_number, check_whole, readable
from .functional import mean_one_weight
from .terms import LossTerms


@method(
    "transition",
    paper="Classification with Noisy Labels by Importance Reweighting",
    venue="IEEE TPAMI 38(3), 2016",
    acts_on="transition",
    official="BaeHeeSun/RENT@d40f3c4 DWS/library/method_utils.py (reweight_loss)",
    defaults={"normalize": ("True", "authors of RENT/DWS, who divide by the sum; here to mean 1")},
    deviations=(
        "Mean 1 over the batch instead of sum 1, so that reduction 'mean' is their sum.",
        "A difference of logarithms: no 1e-12 in numerator and denominator.",
        "The orientation is fixed: T[k, j] = P(label j | clean k), of which a sample uses column y. The DWS code uses "
        "row y, which is the same for symmetric T only.",
    ),
    neutral=None,
    examples=({}, {"normalize": False}),
)
@final
class TransitionWeight(Weighting):
    r"""Weigh noisy labels by how likely they are to be the clean ones.

    .. math:: w_i \propto \frac{P(Y = y_i \mid x_i)}{P(\tilde Y = y_i \mid x_i)}
              = \frac{f_{y_i}(x_i)}{\sum_k f_k(x_i)\, T_{k, y_i}}

    - :math:`f`: the model's probabilities; :math:`y_i`: the label given, which may be wrong
    - :math:`T_{k,j}`: probability that class k is labelled j, held by
      :class:`~reweigh.losses.NoisyCrossEntropy`, which provides ``log_pt`` and ``log_noisy_pt``

    Weights:
        >= 0, mean 1 over the terms that count (``normalize=True``), or the ratio itself, at most :math:`1 / T_{y,y}`.
        Detached. No argument is neutral; a transition matrix that changes no label is: weights are 1.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        Label noise depends on the class alone, with a transition matrix that is known or estimated, and the correction
        should be a weight that combines with others.
    Avoid when:
        Noise depends on the sample, or the matrix is a guess: its errors become bias. Forward correction does not rest
        on the model's probabilities of the moment.

    Deviations:
        Mean 1 instead of sum 1; computed from logarithms; the column of T that belongs to the label.

    Args:
        normalize: Scale to mean 1 over the batch. Default True.

    Shapes:
        Reads ``log_pt`` and ``log_noisy_pt`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import NoisyCrossEntropy, Objective
        >>> objective = Objective(NoisyCrossEntropy([[0.8, 0.2], [0.0, 1.0]]), TransitionWeight(normalize=False))
        >>> objective.weights(torch.zeros(2, 2), torch.tensor([0, 1]))  # 0.5 / 0.4 and 0.5 / 0.6
        tensor([1.2500, 0.8333])

    References:
        T. Liu, D. Tao, "Classification with Noisy Labels by Importance Reweighting", IEEE TPAMI 38(3), 2016. H. Bae, S.
        Shin, B. Na, I.-C. Moon, "Dirichlet-based Per-Sample Weighting by Transition Matrix for Noisy Label Learning",
        ICLR 2024.
    """

    needs = frozenset({"log_pt", "log_noisy_pt"})
    detached = True

    def __init__(self, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize_batch = normalize
        self.scope: Scope = "scaled" if normalize else "local"

    def weigh(self, terms: LossTerms) -> Tensor:
        ratio = (terms.need("log_pt", self) - terms.need("log_noisy_pt", self)).detach()
        if self.normalize_batch:
            return mean_one_weight(ratio, terms.counts().detach())
        return ratio.clamp_max(0.5 * math.log(torch.finfo(ratio.dtype).max)).exp()  # T[y, y] = 0 has no bound


def resample_weights(weights: Tensor, *, generator: torch.Generator, num_samples: int | None = None) -> Tensor:
    r"""How often each sample is drawn in ``num_samples`` draws with replacement, in proportion to its weight (RENT).

    Pass the result as ``sample_weight=``: the mean over the resampled batch, whose expectation is the weighted mean.

    Args:
        weights: ``(N,)`` numbers >= 0, some of them positive. Constants.
        generator: Where the random numbers come from, on the weights' device.
        num_samples: Number of draws. Default N.

    Returns:
        ``(N,)`` whole numbers in the weights' dtype, summing to ``num_samples``.

    Example:
        >>> import torch
        >>> resample_weights(torch.tensor([0.0, 2.0]), generator=torch.Generator().manual_seed(0))
        tensor([0., 2.])
    """
    weights = _vector("resample_weights", weights)
    draws = len(weights) if num_samples is None else check_whole("resample_weights", "num_samples", num_samples)
    if not draws:
        return torch.zeros_like(weights)
    drawn = torch.multinomial(weights.double(), draws, replacement=True, generator=generator)
    return torch.zeros_like(weights).index_add(0, drawn, torch.ones(draws, dtype=weights.dtype, device=weights.device))


def dirichlet_weights(weights: Tensor, concentration: float, *, generator: torch.Generator) -> Tensor:
    r"""Random weights with mean 1 around given ones: N times a Dirichlet sample (DWS).

    .. math:: w' \sim N\,\mathrm{Dirichlet}(\alpha\,\bar w), \qquad \bar w_i = w_i / \textstyle\sum_j w_j

    Their expectation is :math:`N \bar w`; the larger :math:`\alpha`, the nearer they are to it, and as it goes to 0 one
    sample gets everything.

    Args:
        weights: ``(N,)`` numbers >= 0, some of them positive. Constants.
        concentration: :math:`\alpha > 0`.
        generator: Where the random numbers come from, on the weights' device.

    Returns:
        ``(N,)`` numbers >= 0 of mean 1, in the weights' dtype.

    Example:
        >>> import torch
        >>> dirichlet_weights(torch.tensor([1.0, 0.0]), 3.0, generator=torch.Generator().manual_seed(0))
        tensor([2., 0.])
    """
    weights = _vector("dirichlet_weights", weights)
    alpha = check_number("dirichlet_weights", "concentration", concentration, low=0.0, open_low=True)
    if not len(weights):
        return weights.clone()
    shape = alpha * weights.double() / weights.double().sum()
    # log of a gamma number of shape a is that of shape a + 1 plus log(u) / a: small shapes do not underflow
    raised = torch._standard_gamma(shape + 1.0, generator=generator).log()
    uniform = torch.rand(len(shape), dtype=torch.float64, device=shape.device, generator=generator)
    uniform = uniform.clamp_min(torch.finfo(torch.float64).tiny)
    log_weight = torch.where(shape > 0, raised + uniform.log() / shape, torch.full_like(shape, -torch.inf))
    return mean_one_weight(log_weight, torch.ones_like(shape)).to(weights.dtype)


def _vector(owner: str, weights: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        found = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"{owner}: weights must be a floating-point tensor, got {found}")
    if weights.ndim != 1:
        raise ValueError(f"{owner}: weights must be a vector, one number per sample, got shape {tuple(weights.shape)}")
    weights = weights.detach()
    if readable(weights) and len(weights):
        low, total = float(weights.min()), float(weights.double().sum())
        if not (low >= 0.0 and 0.0 < total < math.inf):
            raise ValueError(
                f"{owner}: weights must be finite, >= 0 and some of them positive, got least {low:g}, sum {total:g}"
            )
    return weights
