"""Weights by how undecided the model is: the entropy of its prediction, which criteria offer where it is needed."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from .base import Scope, Weighting, method
from .config import check_number
from .functional import mean_one_weight
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms

TOP = 20
"""Classes that ``top_entropy`` looks at."""


@method(
    "entropy_adaptive",
    acts_on="token",
    paper="Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting",
    venue="arXiv 2601.02151, 2026",
    official="hiyouga/LLaMA-Factory src/llamafactory/train/trainer_utils.py",
    defaults={"alpha": ("1.0", "authors' code"), "scale": ("3.0", "authors' code, about ln 20")},
    deviations=(
        "Fewer than 20 classes are no error: all are looked at.",
        "scale=None is ours: the largest entropy there can be.",
    ),
    neutral={"alpha": 0.0},
    examples=({}, {"alpha": 0.5, "scale": 1.0}, {"scale": None}),
)
@final
class EntropyAdaptive(Weighting):
    r"""Turn down the tokens of which the model is sure: fine-tuning that would have to change its mind forgets (EAFT).

    .. math:: w_i = \Big(\frac{H_i}{h}\Big)^{\alpha}

    - :math:`H_i`: entropy of the softmax over the 20 largest logits of term i
    - h: ``scale``, about the largest :math:`\ln 20`, or :math:`\ln\min(20, C)` for C classes; :math:`\alpha`: ``alpha``

    Weights:
        In [0, about 1]. Detached. ``alpha=0`` is neutral. A sure token weighs 0, whether it is right or wrong.

    State and cadence:
        None; ``update_on = "never"``. ``alpha`` may be a schedule.

    Use when:
        A model that knows much is fine-tuned on little text and must not forget: tokens of which it is sure, whether
        right or wrong, are turned down.
    Avoid when:
        The model is confidently wrong and training is meant to mend that. In training from nothing, where entropy is
        high everywhere, it is nearly plain cross-entropy.

    Deviations:
        Fewer classes than 20 are allowed, for which ``scale=None`` is meant.

    Args:
        alpha: :math:`\alpha` >= 0, or a schedule. Default 1.0 (authors).
        scale: h > 0; ``None`` for :math:`\ln\min(20, C)`, with which weights reach 1 and never exceed it. Default 3.0
            (authors).

    Shapes:
        Reads ``top_entropy`` of shape ``(*S)``, which :class:`~reweigh.losses.CausalLM`,
        :class:`~reweigh.losses.LinearCausalLM` and :class:`~reweigh.losses.CrossEntropy` compute for it; returns
        ``(*S)``.

    Raises:
        ValueError: If ``scale`` is ``None`` and the criterion has no classes.

    Example:
        >>> import torch
        >>> from reweigh.losses import CausalLM, Objective
        >>> objective = Objective(CausalLM(shift=False), EntropyAdaptive(scale=None))
        >>> objective.weights(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [999.0, 0.0, 0.0, 0.0]]]), torch.tensor([[0, 1]]))
        tensor([[1., 0.]])

    References:
        M. Diao, L. Yang, W. Gong, Y. Zhang, Z. Yan, Y. Han, K. Liang, W. Xu, Z. Ma, "Entropy-Adaptive Fine-Tuning:
        Resolving Confident Conflicts to Mitigate Forgetting", arXiv 2601.02151, 2026.
    """

    needs = frozenset({"top_entropy"})
    detached = True
    scope: Scope = "local"

    def __init__(self, alpha: float | Schedule = 1.0, *, scale: float | None = 3.0) -> None:
        super().__init__()
        self.alpha = check_hyper(self, "alpha", alpha, low=0.0)
        self.scale = None if scale is None else check_number(self, "scale", scale, low=0.0, open_low=True)

    def weigh(self, terms: LossTerms) -> Tensor:
        entropy = terms.need("top_entropy", self).detach().clamp_min(0.0)
        return (terms.spread(entropy) / self._largest(terms)).to(terms.loss.dtype) ** value_of(self.alpha)

    def _largest(self, terms: LossTerms) -> float:
        if self.scale is not None:
            return self.scale
        if terms.num_classes is None:
            raise ValueError("EntropyAdaptive: scale must be a number where the criterion has no classes, got None")
        return math.log(max(2, min(TOP, terms.num_classes)))  # one class has entropy 0


@method(
    "mile",
    acts_on="token",
    paper="MiLe Loss: a New Loss for Mitigating the Bias of Learning Difficulties in Generative Language Models",
    venue="Findings of NAACL 2024",
    official="suu990901/LLaMA-MiLe-Loss@4930a02f utils/trainer.py (InfoEntropyLoss)",
    defaults={"gamma": ("1.0", "authors' code")},
    deviations=(
        "Ignored tokens take no part in the mean that weights are divided by; in the authors' code they do.",
        "The mean is this rank's (.gathered() takes the joined batch's); the authors average the ranks' inverse means.",
        "Probabilities are not held at 1e-8 from below.",
    ),
    neutral={"gamma": 0.0},
    examples=({}, {"gamma": 2.0}),
)
@final
class MiLe(Weighting):
    r"""Turn to the tokens about which the model is undecided, whatever their label (MiLe loss).

    .. math:: w_i = \frac{(1 + H_i)^{\gamma}}{\operatorname{mean}_j (1 + H_j)^{\gamma}}

    - :math:`H_i`: entropy of the whole prediction for term i; :math:`\gamma`: ``gamma``

    Weights:
        Positive, mean 1 over the terms that count. Detached. ``gamma=0`` is neutral.

    State and cadence:
        None; ``update_on = "never"``. ``gamma`` may be a schedule.

    Use when:
        Language-model pre-training in which frequent, easy tokens make the gradient: entropy decides and not the label,
        so several likely next words are no error.
    Avoid when:
        Text is noisy: where nothing can be learned the entropy, and with it the weight, stays large. Plain
        cross-entropy does not favour such tokens.

    Deviations:
        The mean is over terms that count, on this rank; ``.gathered()`` makes it that of all ranks.

    Args:
        gamma: :math:`\gamma` >= 0, or a schedule. Default 1.0 (authors).

    Shapes:
        Reads ``entropy`` of shape ``(*S)``, which the softmax criteria compute for it; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CausalLM, Objective
        >>> objective = Objective(CausalLM(shift=False), MiLe())
        >>> objective.weights(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [999.0, 0.0, 0.0, 0.0]]]), torch.tensor([[0, 1]]))
        tensor([[1.4094, 0.5906]])

    References:
        Z. Su, Z. Lin, X. Bai, H. Chen, S. Hu, W. Zhou, G. Ding, X. Wu, "MiLe Loss: a New Loss for Mitigating the Bias
        of Learning Difficulties in Generative Language Models", Findings of NAACL 2024.
    """

    needs = frozenset({"entropy"})
    detached = True
    scope: Scope = "scaled"

    def __init__(self, gamma: float | Schedule = 1.0) -> None:
        super().__init__()
        self.gamma = check_hyper(self, "gamma", gamma, low=0.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        entropy = terms.spread(terms.need("entropy", self).detach().clamp_min(0.0)).to(terms.loss.dtype)
        raised = (value_of(self.gamma) * entropy.log1p()).expand_as(terms.loss)
        return mean_one_weight(raised, terms.counts().detach())
