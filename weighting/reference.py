"""Weights from a reference model: what it already knows is no news."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from .adversarial import example_numbers, given
from .base import Scope, Weighting, method
from .functional import mean_one_weight, top_share
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms


@method(
    "reference_excess",
    acts_on="token",
    paper="Rho-1: Not All Tokens Are What You Need",
    venue="NeurIPS 2024",
    official="microsoft/rho has the evaluation alone; the formula is the paper's",
    defaults={"keep": ("0.6", "paper, mathematics (0.7 for general text)"), "temperature": ("None", "ours: off")},
    deviations=(
        "The share is of the tokens that count in the call; equal excesses at the edge share what is left for them.",
        "temperature= is ours: the soft form, a softmax of the excess.",
    ),
    neutral={"keep": 1.0},
    examples=({}, {"keep": 0.3}, {"keep": None, "temperature": 0.5}),
)
@final
class ReferenceExcess(Weighting):
    r"""Keep the tokens on which the model is furthest behind a reference model (selective language modelling).

    .. math:: w_i = \big[\,e_i \text{ among the largest } qN\,\big] \quad\text{or}\quad
              w_i = \frac{N e^{e_i/\tau}}{\sum_j e^{e_j/\tau}}, \qquad e_i = \ell_i - \ell^\text{ref}_i

    - :math:`\ell_i`: loss of term i; :math:`\ell^\text{ref}_i`: ``reference_loss=`` of the call, the same under a model
      trained on text of the wanted kind
    - q: ``keep``; :math:`\tau`: ``temperature``; N: number of terms that count

    Weights:
        0 or 1 (parts of 1 for ties at the edge), or >= 0 with mean 1. Detached. ``keep=1`` is neutral. With a reference
        loss of 0 it is the selection of the largest losses (:class:`~reweigh.weighting.CVaR` without its factor). The
        paper's mean over kept tokens is ``reduction="weighted_mean"``.

    State and cadence:
        None; ``update_on = "never"``. ``keep`` and ``temperature`` may be schedules.

    Use when:
        Pre-training text is mixed, and a small model trained on good text gives a reference loss for each token or
        sample, which tells what is worth learning.
    Avoid when:
        The reference is worse than the model or comes from other text: what it cannot predict is left out as if it were
        learned. Without a good reference stay with cross-entropy.

    Deviations:
        Ties share; the soft form is ours.

    Args:
        keep: Share q of the terms, in (0, 1], or a schedule; ``None`` for the soft form. Default 0.6 (paper).
        temperature: :math:`\tau` > 0, or a schedule, for the soft form; exactly one of the two. Default ``None``.

    Shapes:
        Reads ``loss (*S)`` and ``reference_loss`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Raises:
        ValueError: If both of ``keep`` and ``temperature``, or neither, are given.

    Example:
        >>> import torch
        >>> from reweigh.losses import CausalLM, Objective
        >>> objective = Objective(CausalLM(shift=False), ReferenceExcess(0.5), "weighted_mean")
        >>> known = torch.tensor([[1.3, 0.2, 1.4, 1.0]])
        >>> objective.weights(torch.zeros(1, 4, 4), torch.tensor([[0, 1, 2, 3]]), reference_loss=known)
        tensor([[0., 1., 0., 1.]])

    References:
        Z. Lin, Z. Gou, Y. Gong, X. Liu, Y. Shen, R. Xu, C. Lin, Y. Yang, J. Jiao, N. Duan, W. Chen, "Rho-1: Not All
        Tokens Are What You Need", NeurIPS 2024. S. Mindermann, J. Brauner, M. Razzak, M. Sharma, A. Kirsch, W. Xu,
        B. Höltgen, A. N. Gomez, A. Morisot, S. Farquhar, Y. Gal, "Prioritized Training on Points that are Learnable,
        Worth Learning, and Not Yet Learnt", ICML 2022 (samples).
    """

    needs = frozenset({"loss", "reference_loss"})
    detached = True

    def __init__(self, keep: float | Schedule | None = 0.6, *, temperature: float | Schedule | None = None) -> None:
        super().__init__()
        if (keep is None) == (temperature is None):
            raise ValueError(
                "ReferenceExcess: exactly one of keep and temperature must be given, "
                f"got keep={keep!r} and temperature={temperature!r}"
            )
        self.keep = None if keep is None else check_hyper(self, "keep", keep, low=0.0, high=1.0, open_low=True)
        self.temperature = (
            None if temperature is None else check_hyper(self, "temperature", temperature, low=0.0, open_low=True)
        )
        self.scope: Scope = "global" if temperature is None else "scaled"

    def weigh(self, terms: LossTerms) -> Tensor:
        excess, counts = terms.loss.detach() - given(self, terms, "reference_loss"), terms.counts().detach()
        if self.temperature is not None:
            return mean_one_weight(excess / value_of(self.temperature), counts)
        if self.keep is None or not excess.numel():
            return torch.ones_like(excess)
        return top_share(excess, counts, value_of(self.keep)).to(excess.dtype)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"reference_loss": example_numbers(batch, seed, dtype).abs()}
