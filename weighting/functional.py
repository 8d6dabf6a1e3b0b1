"""Pure formulas of the weightings: usable alone, in kernels, and as the readable form of each class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Hyper = float | Tensor


def log1mexp(log_p: Tensor) -> Tensor:
    r"""``log(1 - exp(log_p))`` for ``log_p <= 0``, with a finite value and gradient at ``log_p = 0``."""
    return complement(log_p).log()


def complement(log_p: Tensor) -> Tensor:
    """``1 - exp(log_p)``, held at the smallest normal number from below, where its gradient is 0.

    Its gradient is 0 at vanishing p too, instead of an overflowing loss times 0.
    """
    tiny = torch.finfo(log_p.dtype).tiny
    return (-torch.expm1(log_p.clamp_min(math.log(tiny)))).clamp_min(tiny)


def focal_weight(log_pt: Tensor, gamma: Hyper, log_qt: Tensor | None = None) -> Tensor:
    r"""Focal modulator :math:`(1 - p_t)^\gamma`, from the logarithm of the probability.

    Args:
        log_pt: ``(*S)`` log-probability of the target.
        gamma: Focusing exponent, >= 0.
        log_qt: ``(*S)`` exact ``log(1 - p_t)`` where known; otherwise derived from ``log_pt``.

    Returns:
        ``(*S)`` weights in [0, 1], differentiable; finite gradients for every gamma, at p = 1 too.
    """
    if not isinstance(gamma, Tensor) and gamma == 0.0:
        return torch.ones_like(log_pt)
    if log_qt is None:
        return complement(log_pt).pow(gamma)
    held = torch.finfo(log_qt.dtype)  # gamma 0 times minus infinity is 0, and p = 0 has no gradient
    return torch.exp(gamma * log_qt.clamp(held.min, -held.tiny))


def inverse_frequency_weight(counts: Tensor, power: Hyper = 1.0) -> Tensor:
    r"""Class weights :math:`n_c^{-a}`, before any rescaling."""
    return torch.exp(-power * floor_counts(counts).log())


def effective_number_weight(counts: Tensor, beta: Hyper) -> Tensor:
    r"""Class-balanced weights :math:`(1-\beta)/(1-\beta^{n_c})`, before any rescaling; ones for ``beta = 0``."""
    beta = torch.as_tensor(beta, dtype=counts.dtype, device=counts.device)
    return (1.0 - beta) / -torch.expm1(floor_counts(counts) * beta.log())


def power_law_decay_weight(counts: Tensor, alpha: Hyper, eps: float = 1.0) -> Tensor:
    r"""Token weights :math:`(n_v + \epsilon)^{-\alpha}`, before any rescaling."""
    return torch.exp(-alpha * (counts + eps).log())


def tldr_weight(not_pt: Tensor) -> Tensor:
    r"""TLDR's :math:`\cos(\pi p) + 1`, from ``1 - p``: :math:`2\sin^2(\pi(1-p)/2)`, which does not cancel."""
    return 2.0 * torch.sin(0.5 * math.pi * not_pt).square()


def floor_counts(counts: Tensor) -> Tensor:
    """Counts with zeros raised to the smallest positive count (1 where there is none)."""
    positive = torch.where(counts > 0, counts, torch.full_like(counts, torch.inf))
    smallest = positive.min()
    return torch.maximum(counts, torch.where(torch.isfinite(smallest), smallest, torch.ones_like(smallest)))


def inverse_loss_weight(class_loss: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Class weights :math:`1/(\epsilon + \bar L_c)` from running class losses, rescaled to sum 1."""
    weights = 1.0 / (eps + class_loss)
    return weights / weights.sum()


def positive_balance_weight(target: Tensor, alpha: Hyper) -> Tensor:
    r"""Side weights :math:`\alpha y + (1-\alpha)(1-y)` of binary targets ``y``."""
    return alpha * target + (1.0 - alpha) * (1.0 - target)


def loss_power_weight(loss: Tensor, gamma: Hyper) -> Tensor:
    r"""Weights :math:`\ell^{\gamma-1}`, so that weight times loss is :math:`\ell^\gamma`; held at the dtype's eps."""
    return torch.exp((gamma - 1.0) * loss.clamp_min(torch.finfo(loss.dtype).eps).log())


def hard_negative_weight(loss: Tensor, negative: Tensor, counts: Tensor, ratio: float, minimum: float) -> Tensor:
    r"""1 for positives and for the hardest :math:`\max(m, \lfloor r\,n_+ \rfloor)` negatives, 0 for the others.

    Args:
        loss: ``(*S)`` what hard means; constants.
        negative: ``(*S)`` bool.
        counts: ``(*S)`` how many equal terms each stands for; 0 leaves a term out.
        ratio: Negatives per positive :math:`r`.
        minimum: Least number of negatives :math:`m`.

    Returns:
        ``(*S)`` float64 weights in [0, 1]; equal losses share what is left for them.
    """
    counts = counts.double()
    chosen = counts * negative
    slack = 1.0 + 4.0 * torch.finfo(torch.float64).eps  # 0.29 * 100 is 29
    wanted = (ratio * (counts - chosen).sum() * slack).floor().clamp_min(minimum)
    return torch.where(negative, first_share(-loss.double(), chosen, wanted), torch.ones_like(counts))


def first_share(key: Tensor, counts: Tensor, wanted: Tensor | float) -> Tensor:
    r"""How much of each term is among the first ``wanted`` in ascending order of ``key``; equal keys share.

    Args:
        key: ``(*S)`` float64; constants.
        counts: ``(*S)`` float64, how many equal terms each stands for; 0 leaves a term out.
        wanted: How many terms are taken; need not be whole.

    Returns:
        ``(*S)`` float64 shares in [0, 1]; 1 or 0 but for the edge.
    """
    if not key.numel():
        return torch.zeros_like(key)
    place = torch.where(counts > 0, key, torch.full_like(key, torch.inf))
    ordered, order = place.reshape(-1).sort()
    whole = (counts.reshape(-1)[order].cumsum(0) <= wanted).sum()
    edge = ordered.gather(0, whole.clamp_max(len(ordered) - 1).reshape(1)).reshape(())  # where not all fit
    before, tied = (counts * (place < edge)).sum(), (counts * (place == edge)).sum()
    left = ((wanted - before) / torch.where(tied > 0, tied, torch.ones_like(tied))).clamp(0.0, 1.0)
    return torch.where(place == edge, left, (place < edge).to(key.dtype))


def chi_square_weight(loss: Tensor, counts: Tensor, rho: Hyper) -> Tensor:
    r"""The weights that maximise :math:`\frac1N\sum w\ell` with mean 1 and :math:`\frac1{2N}\sum (w-1)^2 \le \rho`.

    They are :math:`[1 + (\ell - \bar\ell_m) / d]_+ N/m` over the m largest losses; m and d follow from sums over the
    sorted losses, without iteration.

    Args:
        loss: ``(*S)`` losses; constants.
        counts: ``(*S)`` how many equal terms each stands for; 0 leaves a term out.
        rho: Radius of the ball, >= 0.

    Returns:
        ``(*S)`` float64 weights.
    """
    counts = counts.double().reshape(-1)
    if not counts.numel():
        return counts.reshape(loss.shape)
    valid, loss = counts > 0, loss.double()
    x = torch.where(valid, loss.reshape(-1), -torch.inf)
    top = x.amax()
    x = x - torch.where(top.isfinite(), top, torch.zeros_like(top))  # from the largest down: what matters is exact
    least = torch.where(valid, x, torch.inf).amin()
    x = torch.where(valid, x, torch.where(least.isfinite(), least, torch.zeros_like(least)))
    x, order = x.sort(descending=True)
    n = counts[order]
    size, reach = n.sum(), 1.0 + 2.0 * rho
    mass, first, second = n.cumsum(0), (n * x).cumsum(0), (n * x * x).cumsum(0)
    # the ratio of second to squared first moment if the edge were at each loss in turn; it falls along the order
    lean, square = first - mass * x, second - 2.0 * x * first + mass * x * x
    ratio = torch.where(lean > 0, size * square / torch.where(lean > 0, lean, 1.0).square(), torch.inf)
    last = (ratio > reach).sum() - 1
    m = mass.gather(0, last.reshape(1))
    mean = first.gather(0, last.reshape(1)) / torch.where(m > 0, m, torch.ones_like(m))
    active = torch.arange(len(x), device=x.device) <= last
    spread = (n * active * (x - mean).square()).sum() / torch.where(m > 0, m, torch.ones_like(m))
    slope = ((2.0 * rho * m - (size - m)).clamp_min(0.0) / torch.where(spread > 0, size * spread, torch.inf)).sqrt()
    found = torch.where(active, (1.0 + (x - mean) * slope).clamp_min(0.0), 0.0)
    found = found * size / torch.where(m > 0, m, torch.ones_like(m))
    return torch.zeros_like(found).index_copy(0, order, found).reshape(loss.shape)


_INVERSE_E = (0.36787944117144233, -1.2428753672788363e-17)
"""1/e, and what float64 leaves of it."""
_AT_THE_BRANCH = (
    -1.0,
    1.0,
    -1.0 / 3.0,
    11.0 / 72.0,
    -43.0 / 540.0,
    769.0 / 17280.0,
    -221.0 / 8505.0,
    680863.0 / 43545600.0,
    -1963.0 / 204120.0,
    226287557.0 / 37623398400.0,
)
"""Coefficients of W in powers of sqrt(2 (e z + 1))."""


def lambert_w(z: Tensor) -> Tensor:
    r"""Principal branch of Lambert's W, :math:`W e^W = z`, for :math:`z \ge -1/e`; held there from below.

    To the last digits of float64, at the branch point (a series in the distance from it) and for the largest numbers
    (Newton's method for :math:`W + \log W = \log z`, always five steps). Constants only.
    """
    x = z.detach().double()
    root = (2.0 * math.e * ((x + _INVERSE_E[0]) + _INVERSE_E[1]).clamp_min(0.0)).sqrt()
    near = torch.zeros_like(x)
    for coefficient in reversed(_AT_THE_BRANCH):
        near = near * root + coefficient
    log = torch.log1p(x.clamp_min(-0.5))
    w = torch.where(x < -0.25, near, log * (1.0 - torch.log1p(log) / (2.0 + log)))
    plain = (x != 0) & (root > 0.05) & x.isfinite()  # elsewhere z / W is not a number, or rounding is what it shows
    held, exact = torch.where(plain, x, 1.0), torch.where(plain, w, 1.0)
    for _ in range(5):
        exact = exact / (1.0 + exact) * (1.0 + (held / exact).log())
    w = torch.where(plain, exact, w)
    w = torch.where(root > 0.05, w, near)
    return torch.where(x.isposinf(), x, w).to(z.dtype)


def super_loss_confidence(loss: Tensor, tau: Hyper, lam: Hyper) -> Tensor:
    r"""SuperLoss's :math:`\log\sigma = -W\big(\tfrac12\max(-2/e, (\ell - \tau)/\lambda)\big)`."""
    return -lambert_w(0.5 * ((loss.double() - tau) / lam).clamp_min(-2.0 / math.e))


def effective_sample_size(weights: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Kish's effective sample size :math:`(\sum w)^2 / \sum w^2`; 0 where all weights are 0.

    Args:
        weights: ``(*S)`` non-negative weights.
        counts: ``(*S)`` how many equal terms each weight stands for; 0 leaves a term out.
    """
    counts = torch.ones_like(weights) if counts is None else counts.to(weights.dtype)
    total, squares = (counts * weights).sum(), (counts * weights.square()).sum()
    return total.square() / torch.where(squares > 0, squares, torch.ones_like(squares))


def circle_pace(score: Tensor, positive: Tensor, m: Hyper) -> Tensor:
    r"""Circle loss's weights of pairs: :math:`[1 + m - s]_+` where ``positive`` (bool), :math:`[s + m]_+` elsewhere."""
    return (torch.where(positive, 1.0 - score, score) + m).clamp_min(0.0)


def mean_one_weight(log_weight: Tensor, counts: Tensor) -> Tensor:
    r"""Weights :math:`e^{v_i}` rescaled to mean 1 over the terms that count, whatever the size of :math:`v`.

    Args:
        log_weight: ``(*S)`` logarithms :math:`v`; minus infinity for weight 0.
        counts: ``(*S)`` how many equal terms each stands for; 0 leaves a term out.

    Returns:
        ``(*S)`` weights, 0 where nothing counts, and everywhere if all weights that count are 0.
    """
    if not log_weight.numel():
        return torch.ones_like(log_weight)
    held = torch.where(counts > 0, log_weight, torch.full_like(log_weight, -torch.inf))
    top = held.amax()
    raised = torch.exp(held - torch.where(top.isneginf(), torch.zeros_like(top), top))
    total, size = (counts * raised).sum(), counts.sum()
    return raised * size / torch.where(total > 0, total, torch.ones_like(total))


def top_share(value: Tensor, counts: Tensor, keep: Hyper, *, largest: bool = True) -> Tensor:
    r"""1 for the share ``keep`` of terms with the largest (or smallest) values, 0 for the others.

    Args:
        value: ``(*S)`` what they are ranked by; constants.
        counts: ``(*S)`` how many equal terms each stands for; 0 leaves a term out.
        keep: Share of the terms that count, in [0, 1].
        largest: Keep the largest; otherwise the smallest.

    Returns:
        ``(*S)`` float64 numbers in [0, 1], whose sum over terms is ``keep`` times their number; equal values share
        what is left for them.
    """
    counts, value = counts.double(), value.double()
    share = first_share(-value if largest else value, counts, keep * counts.sum())
    return torch.where(counts > 0, share, torch.zeros_like(value))


def counted_quantile(value: Tensor, counts: Tensor, level: float) -> Tensor:
    r"""Smallest value that at least the share ``level`` of terms does not exceed, 0-d; plus infinity for no terms.

    Args:
        value: ``(*S)`` constants.
        counts: ``(*S)`` how many equal terms each stands for; 0 leaves a term out.
        level: In (0, 1].
    """
    if not value.numel():
        return value.new_full((), torch.inf)
    counts = counts.double().reshape(-1)
    flat = torch.where(counts > 0, value.reshape(-1), torch.full_like(value.reshape(-1), torch.inf))
    ordered, order = flat.sort()
    slack = 1.0 - 4.0 * torch.finfo(torch.float64).eps * flat.numel()  # 0.29 of 100 are 29
    below = (counts[order].cumsum(0) < level * counts.sum() * slack).sum()
    return ordered.gather(0, below.clamp_max(flat.numel() - 1).reshape(1)).reshape(())


def probability_margin(logits: Tensor, target: Tensor, dim: int = 1) -> Tensor:
    r"""Probability of the target minus the largest other one, :math:`p_y - \max_{j \neq y} p_j`, in [-1, 1].

    Args:
        logits: ``(N, C, ...)`` floating-point; float16 and bfloat16 are computed in float32.
        target: ``(N, ...)`` class indices; an index outside the classes (an ignored one) gives the nearest class's.
        dim: Class dimension.

    Example:
        >>> import torch
        >>> probability_margin(torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([1]))
        tensor([-0.5000])
    """
    p = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits).softmax(dim)
    at = target.clamp(0, logits.shape[dim] - 1).unsqueeze(dim)
    return (p.gather(dim, at) - p.scatter(dim, at, 0.0).amax(dim, keepdim=True)).squeeze(dim)
