"""Distributionally robust weights of instances: an adversary moves weight to the terms that lose most."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from .base import Scope, Weighting, method
from .config import check_choice, check_whole
from .dynamics import Event
from .functional import chi_square_weight, mean_one_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


@method(
    "kl_dro",
    paper="Doubly Robust Instance-Reweighted Adversarial Training",
    venue="ICLR 2024",
    defaults={"temperature": ("1.0", "ours: the paper tunes it")},
    deviations=("The paper's authors have published no code.",),
    examples=({}, {"temperature": 0.2}),
)
@final
class KLDRO(Weighting):
    r"""Weigh terms by a softmax of their losses: the worst distribution within reach of a KL penalty.

    .. math::
        w_i = N\,\frac{e^{\ell_i / r}}{\sum_j e^{\ell_j / r}}, \qquad
        p = \arg\max_{p \in \Delta} \sum_i p_i \ell_i - r \sum_i p_i \log(N p_i), \quad w_i = N p_i

    - :math:`r`: ``temperature``: to infinity all terms count the same, to 0 only the largest loss does
    - :math:`N`: number of terms that count

    Weights:
        Positive, averaging 1. Detached, and by that the exact gradient of the robust value
        :math:`r \log \frac1N \sum_i e^{\ell_i/r}` (:class:`~reweigh.losses.LogMeanExp` gives the value itself).
        No argument is neutral; equal losses are.

    State and cadence:
        None; ``update_on = "never"``. Looks at the batch it is given; ``gathered()`` at those of all ranks.

    Use when:
        The hardest instances are what you are judged by, as in adversarial training, labels are clean, and batches are
        large enough for a softmax over their losses.
    Avoid when:
        Labels are noisy, or the weak groups are known: the shortcut suite shows no gain for the worst group over plain
        training, where group weights gain.

    Deviations:
        None in the formula.

    Args:
        temperature: :math:`r` > 0, in units of the loss, or a schedule. Default 1.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> KLDRO(1.0).weigh(LossTerms(torch.tensor([0.0, 3.0]).log1p()))
        tensor([0.4000, 1.6000])

    References:
        D. Sow, S. Lin, Z. Wang, Y. Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024.
    """

    detached = True
    scope: Scope = "scaled"

    def __init__(self, temperature: float | Schedule = 1.0) -> None:
        super().__init__()
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss = terms.loss.detach()
        return mean_one_weight(loss.double() / value_of(self.temperature), terms.counts().detach()).to(loss.dtype)


@method(
    "tilted",
    paper="Tilted Empirical Risk Minimization",
    venue="ICLR 2021",
    official="litian96/TERM",
    defaults={"tilt": ("1.0", "ours: the paper tunes it, 0.1 to 10 for fairness, -1 to -10 for outliers")},
    deviations=("The weights average 1; the paper's add up to 1.",),
    neutral={"tilt": 0.0},
    examples=({}, {"tilt": -2.0}),
)
@final
class Tilted(Weighting):
    r"""Tilt the mean towards large losses, or away from them (TERM).

    .. math:: w_i = N\,\frac{e^{t \ell_i}}{\sum_j e^{t \ell_j}}, \qquad
              \text{the gradient of } \tfrac1t \log \tfrac1N \sum_i e^{t \ell_i}

    - :math:`t`: ``tilt``: above 0 towards the worst terms (:class:`KLDRO` with temperature 1/t), below 0 away from
      outliers, 0 the mean

    Weights:
        Positive, averaging 1. Detached. ``tilt=0`` is neutral, and so are equal losses.

    State and cadence:
        None; ``update_on = "never"``. ``tilt`` may be a schedule.

    Use when:
        One number should trade the mean for more even losses (positive tilt) or for less pull of outliers (negative
        tilt).
    Avoid when:
        The tilt is negative from the start, when terms are chosen by luck: warm it up. A positive tilt favours wrong
        labels, and does not know groups as group weights do.

    Deviations:
        Averaging 1 instead of adding up to 1.

    Args:
        tilt: :math:`t`, of any sign, in units of 1/loss, or a schedule. Default 1.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> Tilted(-1.0).weigh(LossTerms(torch.tensor([0.0, 3.0]).log1p()))
        tensor([1.6000, 0.4000])

    References:
        T. Li, A. Beirami, M. Sanjabi, V. Smith, "Tilted Empirical Risk Minimization", ICLR 2021.
    """

    detached = True
    scope: Scope = "scaled"

    def __init__(self, tilt: float | Schedule = 1.0) -> None:
        super().__init__()
        self.tilt = check_hyper(self, "tilt", tilt)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss = terms.loss.detach()
        return mean_one_weight(loss.double() * value_of(self.tilt), terms.counts().detach()).to(loss.dtype)


@method(
    "chi_square_dro",
    paper="Variance-based Regularization with Convex Objectives",
    venue="NeurIPS 2017, JMLR 2019",
    defaults={"rho": ("1.0", "ours: the radius is tuned")},
    deviations=("Solved exactly by sums over the sorted losses, instead of by bisection.",),
    neutral={"rho": 0.0},
    examples=({}, {"rho": 0.1}, {"rho": 3.0}),
)
@final
class ChiSquareDRO(Weighting):
    r"""The worst distribution in a chi-square ball around the batch.

    .. math::
        w = \arg\max_{w \ge 0,\; \bar w = 1} \frac1N \sum_i w_i \ell_i \quad \text{with} \quad
        \frac{1}{2N} \sum_i (w_i - 1)^2 \le \rho

    - :math:`\rho`: ``rho``: 0 leaves all terms alone; from :math:`(N/k - 1)/2` on, k equal largest losses have all

    Weights:
        >= 0, averaging 1: linear in the loss above a threshold, 0 below. Detached, and by that the exact gradient of
        the robust value. ``rho=0`` is neutral, and so are equal losses.

    State and cadence:
        None; ``update_on = "never"``. ``rho`` may be a schedule.

    Use when:
        Labels are clean and hard instances should count more, in proportion to their loss: a small radius adds a
        multiple of the standard deviation of the losses to their mean.
    Avoid when:
        Labels are noisy: wrong labels have the largest losses and gain weight. A weak group that is known is better
        reached by group weights than by loss.

    Deviations:
        None in the formula.

    Args:
        rho: Radius >= 0, or a schedule. Default 1.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> ChiSquareDRO(0.125).weigh(LossTerms(torch.tensor([1.0, 2.0])))
        tensor([0.5000, 1.5000])

    References:
        J. Duchi, H. Namkoong, "Variance-based Regularization with Convex Objectives", JMLR 2019.
    """

    detached = True
    scope: Scope = "global"

    def __init__(self, rho: float | Schedule = 1.0) -> None:
        super().__init__()
        self.rho = check_hyper(self, "rho", rho, low=0.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss = terms.loss.detach()
        return chi_square_weight(loss, terms.counts().detach(), value_of(self.rho)).to(loss.dtype)


@method(
    "compositional_dro",
    paper="Doubly Robust Instance-Reweighted Adversarial Training",
    venue="ICLR 2024",
    official="qiqi-helloworld/ABSGD@a2b26f5e mylosses.py has the same estimator (Attentional-Biased SGD, TMLR 2023)",
    defaults={"temperature": ("1.0", "ABSGD's script (myLambda)"), "smoothing": ("0.1", "ABSGD's script (drogamma)")},
    deviations=(
        "u is kept as a logarithm and starts at the first batch; ABSGD's starts at 0 and overflows, so that its first "
        "weights add up to 20.",
        "u holds no graph and moves once per optimizer step, on all micro-batches and ranks.",
        "The script's factor alpha on u is left out: it only rescales the loss.",
        "Where the temperature changes, r log u is carried over; the script keeps u, so that weights jump tenfold when "
        "lambda goes from 10 to 1.",
    ),
    examples=({}, {"temperature": 0.5, "smoothing": 0.5}),
)
@final
class CompositionalDRO(Weighting):
    r"""KL-robust weights over the whole data, with a running normaliser instead of the batch's.

    .. math::
        w_i = \frac{e^{\ell_i / r}}{u}, \qquad
        u = (1 - \beta)\,u^{\mathrm{before}} + \beta\, \frac1N \sum_j e^{\ell_j / r}

    - :math:`r`: ``temperature``; :math:`\beta`: ``smoothing``
    - :math:`u`: the estimate that this batch is already part of, so that weights stay below :math:`N/\beta`

    Weights:
        Positive, averaging 1 over training (not over each batch: hard batches count more). Detached.
        No argument is neutral; ``smoothing=1`` is :class:`KLDRO` on the batch.

    State and cadence:
        ``log_u``, the temperature it was ``taken_at`` and ``seen``, 0-d buffers, equal on all ranks. Training forwards
        note the log-sum-exp of their losses; every optimizer step joins those of all micro-batches and ranks. The
        first step sets u, and until then it is the batch's own.

    Use when:
        Weights of KL-robust training are wanted over the whole data although batches are small: a running normaliser
        stands in for the softmax over the batch.
    Avoid when:
        Losses still fall fast, as at the start: the normaliser lags and weights are too small. Labels are noisy, or the
        weak groups are known, for which group weights are made.

    Deviations:
        Log space, a start at the first batch, no factor alpha (ABSGD's).

    Args:
        temperature: :math:`r` > 0, or a schedule: :math:`r \log u` is carried over. Default 1.
        smoothing: :math:`\beta` in (0, 1], or a schedule. Default 0.1.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> weighting, easy, hard = CompositionalDRO(smoothing=0.5), torch.tensor([0.0]), torch.tensor([3.0]).log1p()
        >>> weighting.observe(LossTerms(easy))
        >>> weighting.update("step")
        >>> weighting.weigh(LossTerms(hard))
        tensor([1.6000])

    References:
        D. Sow, S. Lin, Z. Wang, Y. Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024.
        Q. Qi, Y. Xu, R. Jin, W. Yin, T. Yang, "Attentional-Biased Stochastic Gradient Descent", TMLR 2023.
    """

    detached = True
    scope: Scope = "scaled"
    update_on: Event = "step"

    def __init__(self, temperature: float | Schedule = 1.0, *, smoothing: float | Schedule = 0.1) -> None:
        super().__init__()
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        self.smoothing = check_hyper(self, "smoothing", smoothing, low=0.0, high=1.0, open_low=True)
        self.add_state("log_u", torch.zeros((), dtype=torch.float64))
        self.add_state("taken_at", torch.ones((), dtype=torch.float64))
        self.add_state("seen", torch.zeros((), dtype=torch.bool))
        self.add_rows("pieces", 2)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss = terms.loss.detach()
        total, size = self._piece(terms)
        log_u = self._moved(total, size)
        weights = torch.exp(loss.double() / value_of(self.temperature) - log_u)
        return torch.where(terms.counts() > 0, weights, torch.zeros_like(weights)).to(loss.dtype)

    def _piece(self, terms: LossTerms) -> tuple[Tensor, Tensor]:
        """Log of the sum of exponentials, and number of terms."""
        counts = terms.counts().detach().double()
        score = torch.where(counts > 0, terms.loss.detach().double() / value_of(self.temperature), -torch.inf)
        return (score + counts.log()).reshape(-1).logsumexp(0), counts.sum()

    def _moved(self, total: Tensor, size: Tensor) -> Tensor:
        """Logarithm of u after a batch; as it was where that holds nothing or nothing finite."""
        seen, hotter = self.get_buffer("seen"), self.get_buffer("taken_at") / value_of(self.temperature)
        log_u = self.get_buffer("log_u") * hotter  # r log u is a loss, and stays what it is at another r
        new = total - size.log()
        share = torch.as_tensor(value_of(self.smoothing), dtype=new.dtype, device=new.device)
        fine = (size > 0) & new.isfinite()
        held = torch.where(fine, new, torch.zeros_like(new))
        mixed = torch.where(seen, torch.logaddexp(torch.log1p(-share) + log_u, share.log() + held), held)
        return torch.where(fine, mixed, log_u)

    def observe(self, terms: LossTerms) -> None:
        total, size = self._piece(terms)
        fine = (size > 0) & total.isfinite()
        row = torch.stack([torch.where(fine, total, torch.zeros_like(total)), torch.where(fine, size, 0.0)])
        self.collect("pieces", row.unsqueeze(0))

    def commit(self, sums: dict[str, Tensor]) -> None:
        totals, sizes = sums["pieces"].unbind(1)
        size = sizes.sum()
        total = torch.where(sizes > 0, totals, -torch.inf).logsumexp(0)
        fine, log_u, taken_at = (size > 0) & total.isfinite(), self.get_buffer("log_u"), self.get_buffer("taken_at")
        log_u.copy_(torch.where(fine, self._moved(total, size), log_u))
        taken_at.copy_(torch.where(fine, value_of(self.temperature), taken_at))
        self.get_buffer("seen").logical_or_(fine)

    def reset(self) -> None:
        super().reset()
        self.get_buffer("log_u").zero_()
        self.get_buffer("taken_at").fill_(1.0)
        self.get_buffer("seen").zero_()

    def summary(self) -> dict[str, Tensor]:
        return {"log_u": self.get_buffer("log_u").clone()}


@method(
    "loss_range",
    paper="Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
    venue="ICLR 2025",
    official="sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025 src/trainer.py",
    defaults={
        "strategy": ("'linupper'", "the paper's recommendation"),
        "temperature": ("1.0", "authors' code (kl_reg)"),
        "delta": ("1.0", "authors' code"),
        "burn_in": ("1000", "authors' code (burnout)"),
    },
    deviations=(
        "The weights average 1 over the terms; the authors' add up to 1 and are multiplied by the batch size and by "
        "each sample's share of tokens, which is a factor of its own here.",
        "'linupper' and 'upper' follow the README, min(h + delta, delta) and (h + delta) / 2; the code has delta 1.",
    ),
    neutral={"burn_in": 1_000_000},
    examples=(
        {"burn_in": 0},
        {"strategy": "quadratic", "temperature": 0.3, "burn_in": 2},
        {"strategy": "extremes", "delta": 0.5, "burn_in": 0},
        {"strategy": "upper", "burn_in": 1},
    ),
)
@final
class LossRange(Weighting):
    r"""Weigh samples by where their loss lies between the batch's smallest and largest.

    .. math::
        w_i = N\,\mathrm{softmax}_i(f(h_i)/r), \qquad
        h_i = \delta\Big(2\,\frac{\ell_i - \min_j \ell_j}{\max_j \ell_j - \min_j \ell_j} - 1\Big) \in [-\delta, \delta]

    - ``"linupper"``: :math:`f = \min(h + \delta, \delta)`: easy samples count less; ``"upper"``:
      :math:`f = (h + \delta)/2`; ``"quadratic"``: :math:`f = 1 - h^2/\delta^2`, the middle; ``"extremes"``:
      :math:`f = |h|`
    - :math:`r`: ``temperature``; :math:`\delta`: ``delta``

    Weights:
        Positive, averaging 1, within a factor of :math:`e^{\delta/r}` (``"linupper"``). Detached. ``burn_in`` beyond
        the end of training is neutral, and so are equal losses.

    State and cadence:
        The number of optimizer steps so far; 1 for all during the first ``burn_in``. ``gathered()`` takes the range
        over the batches of all ranks, as the authors do.

    Use when:
        A language model is pre-trained on text of mixed quality, and whole sequences should be weighed by where their
        loss lies in the batch, without another model.
    Avoid when:
        Batches hold a few samples per device and are not gathered: smallest and largest loss are then noise, and
        weights follow it. Terms are single tokens and not sequences.

    Deviations:
        See the record: scale.

    Args:
        strategy: ``"linupper"``, ``"upper"``, ``"quadratic"`` or ``"extremes"``.
        temperature: :math:`r` > 0, or a schedule. Default 1.
        delta: :math:`\delta` > 0. Default 1.
        burn_in: Steps of plain training at first, >= 0. Default 1000.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> LossRange(burn_in=0).weigh(LossTerms(torch.tensor([1.0, 2.0, 3.0])))
        tensor([0.4661, 1.2670, 1.2670])

    References:
        D. Sow, H. Woisetschlaeger, S. Bulusu, S. Wang, H.-A. Jacobsen, Y. Liang, "Dynamic Loss-Based Sample Reweighting
        for Improved Large Language Model Pretraining", ICLR 2025.
    """

    detached = True
    scope: Scope = "global"
    update_on: Event = "step"

    def __init__(
        self,
        strategy: Literal["linupper", "upper", "quadratic", "extremes"] = "linupper",
        *,
        temperature: float | Schedule = 1.0,
        delta: float | Schedule = 1.0,
        burn_in: int = 1000,
    ) -> None:
        super().__init__()
        self.strategy = check_choice(self, "strategy", strategy, ("linupper", "upper", "quadratic", "extremes"))
        self.temperature = check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        self.delta = check_hyper(self, "delta", delta, low=0.0, open_low=True)
        self.burn_in = check_whole(self, "burn_in", burn_in)

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, counts = terms.loss.detach().double(), terms.counts().detach()
        if not loss.numel():
            return torch.ones_like(terms.loss)
        valid, delta = counts > 0, value_of(self.delta)
        low = torch.where(valid, loss, torch.inf).amin()
        high = torch.where(valid, loss, -torch.inf).amax()
        width = (high - low).clamp_min(1e-6)
        held = torch.where(valid, loss, low)
        h = delta * ((held - low) - (high - held)) / width  # 0 in the middle, however narrow the range
        if self.strategy == "linupper":
            score = torch.minimum(h + delta, torch.as_tensor(delta, dtype=h.dtype, device=h.device))
        elif self.strategy == "upper":
            score = 0.5 * (h + delta)
        elif self.strategy == "quadratic":
            score = 1.0 - (h / delta).square()
        else:
            score = h.abs()
        weights = mean_one_weight(score / value_of(self.temperature), counts)
        return torch.where(self.position("step") >= self.burn_in, weights, 1.0).to(terms.loss.dtype)
