"""Weights that select: the hardest terms, the easiest ones, and curricula from one to the other."""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor

from .base import Scope, Weighting, method
from .config import check_choice, check_number
from .dynamics import Event
from .functional import super_loss_confidence, top_share
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


class _Share(Weighting):
    """Common part: a share of the terms at one end of the losses, scaled so that the mean over terms is theirs."""

    detached = True
    scope: Scope = "global"

    def _select(self, terms: LossTerms, share: float | Schedule, *, largest: bool) -> Tensor:
        loss, kept = terms.loss.detach(), value_of(share)
        return (top_share(loss, terms.counts().detach(), kept, largest=largest) / kept).to(loss.dtype)


@method(
    "cvar",
    paper="Training Region-based Object Detectors with Online Hard Example Mining",
    venue="CVPR 2016; CVaR: Rockafellar and Uryasev, Journal of Risk 2000",
    defaults={"alpha": ("0.2", "ours: tuned")},
    deviations=("Equal losses share what is left for them, so the weights do not depend on the order of terms.",),
    neutral={"alpha": 1.0},
    examples=({}, {"alpha": 0.5}),
)
@final
class CVaR(_Share):
    r"""Train on the worst share of the terms: conditional value at risk, top-k losses, online hard example mining.

    .. math:: w_i = \frac{1}{\alpha}\,\mathrm{clamp}\Big(\frac{\alpha N - h_i}{t_i},\; 0,\; 1\Big)

    - :math:`\alpha`: ``alpha``, share of the terms; :math:`N`: number of terms that count
    - :math:`h_i`: number of terms with a larger loss than :math:`i`; :math:`t_i`: with the same loss, itself included

    Weights:
        0 or :math:`1/\alpha` but for ties and a fraction at the edge, averaging 1: the weighted mean is the mean over
        the kept terms. Detached, and by that the exact gradient of the CVaR. ``alpha=1`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``alpha`` may be a schedule. Looks at the batch it is given; ``gathered()`` at
        those of all ranks.

    Use when:
        Most terms are easy and solved, as pixels or detection anchors are, and training should go on with the worst
        share of them.
    Avoid when:
        Labels are noisy, since wrong labels have the largest losses. The shortcut suite shows harm to the worst group,
        and the skewed-target suite no gain over the plain mean.

    Deviations:
        Ties share.

    Args:
        alpha: Share in (0, 1], or a schedule. Default 0.2.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> CVaR(0.5).weigh(LossTerms(torch.tensor([0.1, 3.0, 1.0, 0.2])))
        tensor([0., 2., 2., 0.])

    References:
        R. T. Rockafellar, S. Uryasev, "Optimization of Conditional Value-at-Risk", Journal of Risk 2000.
        A. Shrivastava, A. Gupta, R. Girshick, "Training Region-based Object Detectors with Online Hard Example
        Mining", CVPR 2016.
    """

    def __init__(self, alpha: float | Schedule = 0.2) -> None:
        super().__init__()
        self.alpha = check_hyper(self, "alpha", alpha, low=0.0, high=1.0, open_low=True)

    def weigh(self, terms: LossTerms) -> Tensor:
        return self._select(terms, self.alpha, largest=True)


@method(
    "small_loss",
    paper="Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels",
    venue="NeurIPS 2018",
    official="bhanML/Co-teaching loss.py",
    defaults={"keep": ("0.7", "ours; the paper's is 1 - noise rate, reached over ten epochs")},
    deviations=(
        "One network selects for itself; the paper's two select for each other.",
        "Equal losses share what is left for them.",
    ),
    neutral={"keep": 1.0},
    examples=({}, {"keep": 0.4}),
)
@final
class SmallLoss(_Share):
    r"""Train on the terms with the smallest losses, which noisy labels seldom have.

    .. math:: w_i = \frac{1}{k}\,\mathrm{clamp}\Big(\frac{k N - e_i}{t_i},\; 0,\; 1\Big)

    - :math:`k`: ``keep``, share of the terms; :math:`N`: number of terms that count
    - :math:`e_i`: number of terms with a smaller loss than :math:`i`; :math:`t_i`: with the same loss, itself included

    Weights:
        0 or :math:`1/k` but for ties and a fraction at the edge, averaging 1. Detached. ``keep=1`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``keep`` may be a schedule: ``Linear(1.0, 0.6, duration=10)`` is the paper's.

    Use when:
        A known share of the labels is wrong and classes are balanced, so that a large loss means a wrong label and not
        a rare class.
    Avoid when:
        Classes are imbalanced, since rare ones are left out first, or the share is a guess. The noisy-label suite shows
        no certain gain over cross-entropy, and more wrong labels learned.

    Deviations:
        One network; ties share.

    Args:
        keep: Share in (0, 1], or a schedule. Default 0.7.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> SmallLoss(0.5).weigh(LossTerms(torch.tensor([0.1, 3.0, 1.0, 0.2])))
        tensor([2., 0., 0., 2.])

    References:
        B. Han, Q. Yao, X. Yu, G. Niu, M. Xu, W. Hu, I. Tsang, M. Sugiyama, "Co-teaching: Robust Training of Deep Neural
        Networks with Extremely Noisy Labels", NeurIPS 2018.
    """

    def __init__(self, keep: float | Schedule = 0.7) -> None:
        super().__init__()
        self.keep = check_hyper(self, "keep", keep, low=0.0, high=1.0, open_low=True)

    def weigh(self, terms: LossTerms) -> Tensor:
        return self._select(terms, self.keep, largest=False)


@method(
    "super_loss",
    paper="SuperLoss: A Generic Loss for Robust Curriculum Learning",
    venue="NeurIPS 2020",
    official="AlanChou/Super-Loss SuperLoss.py (not by the authors)",
    defaults={
        "lam": ("1.0", "paper, CIFAR-10; 0.25 for CIFAR-100"),
        "tau": ("'mean'", "paper: the running mean; or log C"),
        "smoothing": ("0.1", "ours"),
    },
    deviations=(
        "Lambert's W in torch, on the terms' device; the common code goes through SciPy on the CPU and divides by a "
        "fixed batch size.",
        "The running mean starts with the first optimizer step, in which all terms count the same; one move per step.",
    ),
    examples=({}, {"lam": 0.25, "tau": 1.386}),
)
@final
class SuperLoss(Weighting):
    r"""Trust terms with a small loss more, and turn hard ones down without dropping them.

    .. math::
        w_i = \sigma_i = \arg\min_\sigma\; (\ell_i - \tau)\,\sigma + \lambda (\log \sigma)^2
            = \exp\Big(-W\big(\tfrac12 \max(-\tfrac2e, \tfrac{\ell_i - \tau}{\lambda})\big)\Big)

    - :math:`\tau`: ``tau``, the loss that is neither easy nor hard; :math:`\lambda`: ``lam``
    - :math:`W`: principal branch of Lambert's function

    Weights:
        In (0, e], 1 at :math:`\ell = \tau`, falling. Detached: :math:`\sigma` is a minimiser, so the gradient is
        right. :math:`-\tau\sigma + \lambda(\log\sigma)^2` is added to each term as a constant, so that the value is
        the paper's, and may be negative. No argument is neutral; ``lam`` to infinity gives 1.

    State and cadence:
        With ``tau="mean"``: ``mean`` and ``seen``, 0-d buffers, equal on all ranks, moved at every optimizer step;
        in the first one all weights are 1. With a number: none.

    Use when:
        Labels are noisy and nobody knows how many: hard terms are turned down, not dropped. Accuracy rises in the
        noisy-label suite.
    Avoid when:
        Labels are clean and hard terms are the rare ones. In the noisy-label suite frequent classes lose recall, and
        more wrong labels are learned than by plain cross-entropy.

    Deviations:
        None in the formula.

    Args:
        lam: :math:`\lambda` > 0, or a schedule. Default 1.0 (paper).
        tau: A number, in units of the loss (``log C`` in the paper's classification), or ``"mean"``.
        smoothing: Share of the new batch in the running mean, in (0, 1]. Default 0.1.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> SuperLoss(1.0, tau=1.0).weigh(LossTerms(torch.tensor([1.0, 1.0 + 2.0 * 2.718281828])))
        tensor([1.0000, 0.3679])

    References:
        T. Castells, P. Weinzaepfel, J. Revaud, "SuperLoss: A Generic Loss for Robust Curriculum Learning",
        NeurIPS 2020.
    """

    detached = True
    scope: Scope = "local"

    def __init__(
        self,
        lam: float | Schedule = 1.0,
        *,
        tau: float | Literal["mean"] = "mean",
        smoothing: float | Schedule = 0.1,
    ) -> None:
        super().__init__()
        self.lam = check_hyper(self, "lam", lam, low=0.0, open_low=True)
        self.smoothing = check_hyper(self, "smoothing", smoothing, low=0.0, high=1.0, open_low=True)
        self.running = isinstance(tau, str)
        if not self.running:
            self.tau = check_number(self, "tau", tau)
            return
        check_choice(self, "tau", tau, ("mean",))
        self.update_on: Event = "step"
        self.add_state("mean", torch.zeros((), dtype=torch.float64))
        self.add_state("seen", torch.zeros((), dtype=torch.bool))
        self.add_pending("loss_sum")
        self.add_pending("loss_count")

    def _log_sigma(self, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
        """Logarithm of the weights, and tau; 0 and 0 before there is one."""
        lam = value_of(self.lam)
        if not self.running:
            return super_loss_confidence(terms.loss.detach(), self.tau, lam), self.tau
        seen, tau = self.get_buffer("seen"), self.get_buffer("mean")
        found = super_loss_confidence(terms.loss.detach(), tau, lam)
        return torch.where(seen, found, torch.zeros_like(found)), tau

    def weigh(self, terms: LossTerms) -> Tensor:
        return self._log_sigma(terms)[0].exp().to(terms.loss.dtype)

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        log_sigma, tau = self._log_sigma(terms)
        return (value_of(self.lam) * log_sigma.square() - tau * log_sigma.exp()).to(terms.loss.dtype)

    def observe(self, terms: LossTerms) -> None:
        if self.running:
            counts = terms.counts().double()
            loss = torch.where(counts > 0, terms.loss.double(), torch.zeros_like(counts))
            self.accumulate("loss_sum", (counts * loss).sum())
            self.accumulate("loss_count", counts.sum())

    def commit(self, sums: dict[str, Tensor]) -> None:
        if not self.running:
            return
        count, running, seen = sums["loss_count"], self.get_buffer("mean"), self.get_buffer("seen")
        new = sums["loss_sum"] / torch.where(count > 0, count, torch.ones_like(count))
        fine = (count > 0) & new.isfinite()
        mixed = torch.where(seen, running + value_of(self.smoothing) * (new - running), new)
        running.copy_(torch.where(fine, mixed, running))
        seen.logical_or_(fine)

    def reset(self) -> None:
        super().reset()
        if self.running:
            self.get_buffer("mean").zero_()
            self.get_buffer("seen").zero_()

    def summary(self) -> dict[str, Tensor]:
        return {"tau": self.get_buffer("mean").clone()} if self.running else {}


@method(
    "self_paced",
    paper="Self-Paced Learning for Latent Variable Models",
    venue="NeurIPS 2010; soft forms: Jiang et al., ACM MM 2014",
    defaults={"kind": ("'hard'", "Kumar et al. 2010"), "growth": ("1.1", "ours")},
    deviations=(
        "The threshold grows per epoch in closed form, threshold * growth ** epochs: right after a resume, too.",
        "For 'log' the threshold is held below 1, where its formula ends.",
    ),
    neutral={"threshold": 1e9},
    examples=(
        {"threshold": 1.0},
        {"threshold": 1.5, "kind": "linear", "growth": 1.5},
        {"threshold": 0.8, "kind": "log", "growth": 1.0},
    ),
)
@final
class SelfPaced(Weighting):
    r"""Begin with the easy terms and let harder ones in, epoch by epoch.

    .. math::
        w = [\ell < \lambda], \qquad w = \Big[1 - \frac{\ell}{\lambda}\Big]_+, \qquad
        w = \frac{\log(\ell + 1 - \lambda)}{\log(1 - \lambda)}\,[\ell < \lambda], \qquad
        \lambda = \lambda_0\, g^{\,\mathrm{epochs}}

    - the three ``kind`` s ``"hard"``, ``"linear"`` and ``"log"`` (:math:`0 < \lambda < 1`)
    - :math:`\lambda_0`: ``threshold``; :math:`g`: ``growth``

    Weights:
        In [0, 1], falling in the loss. Detached: they minimise the self-paced objective, whose regulariser is a
        constant and is left out. A ``threshold`` above every loss is neutral for ``"hard"``.

    State and cadence:
        The number of epochs so far (``update("epoch")``).

    Use when:
        Data of very mixed difficulty or with wrong labels, and training long enough for a curriculum that lets harder
        terms in epoch by epoch.
    Avoid when:
        Hard means rare: the tail comes in last. A threshold below all losses leaves nothing to learn from. The
        noisy-label suite shows no certain gain over cross-entropy.

    Deviations:
        See the record: growth per epoch, ``"log"`` held below 1.

    Args:
        threshold: :math:`\lambda_0` > 0, in units of the loss.
        kind: ``"hard"``, ``"linear"`` or ``"log"``.
        growth: Factor per epoch, >= 1. Default 1.1.

    Shapes:
        Reads ``loss`` of shape ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.weighting import LossTerms
        >>> weighting = SelfPaced(1.0, kind="linear", growth=2.0)
        >>> terms = LossTerms(torch.tensor([0.5, 1.5]))
        >>> first = weighting.weigh(terms)
        >>> weighting.update("epoch")
        >>> first, weighting.weigh(terms)
        (tensor([0.5000, 0.0000]), tensor([0.7500, 0.2500]))

    References:
        M. P. Kumar, B. Packer, D. Koller, "Self-Paced Learning for Latent Variable Models", NeurIPS 2010. L. Jiang,
        D. Meng, T. Mitamura, A. Hauptmann, "Easy Samples First: Self-paced Reranking for Zero-Example Multimedia
        Search", ACM MM 2014.
    """

    detached = True
    scope: Scope = "local"
    update_on: Event = "epoch"

    def __init__(
        self, threshold: float, *, kind: Literal["hard", "linear", "log"] = "hard", growth: float = 1.1
    ) -> None:
        super().__init__()
        self.threshold = check_number(self, "threshold", threshold, low=0.0, open_low=True)
        self.kind = check_choice(self, "kind", kind, ("hard", "linear", "log"))
        self.growth = check_number(self, "growth", growth, low=1.0)

    def level(self) -> Tensor:
        """The threshold now, 0-d float64."""
        epochs = self.position("epoch").double()
        level = torch.exp(math.log(self.threshold) + epochs * math.log(self.growth))
        return level.clamp_max(1.0 - 1e-6) if self.kind == "log" else level

    def weigh(self, terms: LossTerms) -> Tensor:
        loss, level = terms.loss.detach().double(), self.level()
        if self.kind == "hard":
            weights = (loss < level).double()
        elif self.kind == "linear":
            weights = (1.0 - loss / level).clamp(0.0, 1.0)
        else:
            soft = torch.log(torch.minimum(loss, level).clamp_min(0.0) + 1.0 - level) / torch.log1p(-level)
            weights = soft.clamp(0.0, 1.0)
        return weights.to(terms.loss.dtype)

    def summary(self) -> dict[str, Tensor]:
        return {"threshold": self.level()}
