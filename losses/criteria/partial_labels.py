"""Cross-entropy against what is believed of a set of candidate labels, which may not hold the true one."""

from __future__ import annotations

import math
from typing import Any, Literal, final

import torch
from torch import Tensor

from reweigh.weighting.config import check_choice, check_number, check_whole
from reweigh.weighting.dynamics import Event
from reweigh.weighting.schedules import Schedule, check_hyper, value_of
from reweigh.weighting.terms import NEUTRAL_LOG_PT, LossTerms, mask_out

from .base import _kind, expand_mask, upcast
from .probability import expected, times
from .remembering import Remembering

Pseudo = Literal["onehot", "scale"]
PSEUDO: tuple[Pseudo, ...] = ("onehot", "scale")


def adjusted_log_odds(log_q: Tensor, candidates: Tensor, mixing: float | Tensor) -> Tensor:
    r""":math:`\ln(q_c (s_c + \lambda (1 - s_c)))`: minus infinity for labels outside the set at :math:`\lambda = 0`."""
    outside: float | Tensor
    if isinstance(mixing, Tensor):
        outside = mixing.to(log_q.dtype).log()
    else:
        outside = math.log(mixing) if mixing > 0.0 else -math.inf
    return torch.where(candidates, log_q, log_q + outside)


def pseudo_target(log_q: Tensor, candidates: Tensor, mixing: float | Tensor, pseudo: Pseudo) -> Tensor:
    r"""The label distribution that a prediction and a candidate set agree on.

    Args:
        log_q: ``(N, C)`` log-probabilities.
        candidates: ``(N, C)`` bool :math:`s`, at least one per row.
        mixing: :math:`\lambda` in [0, 1].
        pseudo: ``"onehot"`` for the largest, the first of equal ones, ``"scale"`` for all, to sum 1.
    """
    odds = adjusted_log_odds(log_q, candidates, mixing)
    if pseudo == "scale":
        return odds.softmax(1)
    return torch.zeros_like(odds).scatter(1, odds.argmax(1, keepdim=True), 1.0)


def moved_belief(
    before: Tensor, log_q: Tensor, candidates: Tensor, mixing: float | Tensor, pseudo: Pseudo, ema: float | Tensor
) -> Tensor:
    """Beliefs ``(N, C)`` after a visit; rows of zeros have none yet and start uniform over the candidates."""
    uniform = candidates.to(log_q.dtype) / candidates.sum(1, keepdim=True)
    start = torch.where(before.sum(1, keepdim=True) > 0.0, before, uniform)
    return ema * start + (1.0 - ema) * pseudo_target(log_q, candidates, mixing, pseudo)


def candidate_margin(log_q: Tensor, candidates: Tensor) -> Tensor:
    r"""``(N,)`` :math:`\min(1, \max_{s_c=1} q_c / \max_{s_c=0} q_c)`: the mixing from which the set is overruled."""
    inside = log_q.masked_fill(~candidates, -torch.inf).amax(1)
    outside = log_q.masked_fill(candidates, torch.finfo(log_q.dtype).min).amax(1)
    return (inside - outside).clamp_max(0.0).exp()


@final
class PartialLabelCrossEntropy(Remembering):
    r"""Soft cross-entropy against a running belief over labels, learned from noisy candidate sets.

    .. math:: \ell_i = -\sum_c b_{ic} \log p_{ic}, \qquad b_i \leftarrow \phi\, b_i + (1 - \phi)\, t_i

    .. math:: t_i = \mathrm{onehot}\big(\arg\max_c u_{ic}\big) \text{ or } u_i / \textstyle\sum_c u_{ic}, \qquad
              u_{ic} = q_{ic}\,\big(s_{ic} + \lambda (1 - s_{ic})\big)

    - :math:`s`: ``candidates``, 1 for the labels of the set; :math:`p`: softmax of the logits
    - :math:`q`: the same without gradient, or the softmax of ``votes=``
    - :math:`b`: what is believed of the sample, uniform over its candidates at first; :math:`\phi`: ``ema``
    - :math:`\lambda`: ``mixing``, or the ``noise_rate`` quantile of
      :math:`\max_{s_c=1} q_c / \max_{s_c=0} q_c` over the samples seen, taken at each ``epoch`` event from ``start`` on

    Beliefs are constants to the gradient. They are held in a table ``(num_samples, C + 1)`` of float32, with each
    sample's last ratio, written at the ``step`` event: what all micro-batches and ranks saw, copies of a sample
    averaged. The loss of a training forward uses the belief after this visit. Calls that learn nothing take the step
    for their own loss only, and may leave ``index`` out: then the sample is new. Samples without any candidate are
    removed.

    Provides ``loss``, ``log_pt`` (:math:`\ln \sum_c b_c p_c`), ``target`` and ``category`` (the label most believed in)
    and the extras ``belief`` ``(N, C)`` and ``candidate_margin`` ``(N,)``.

    Args:
        num_samples: Length of the training set.
        num_classes: Number of classes C, at least 2.
        mixing: :math:`\lambda` in [0, 1], or a schedule. 0 trusts the set, 1 the model.
        noise_rate: Share of samples whose true label is outside their set, in [0, 1): sets :math:`\lambda`, at most 1,
            in the place of ``mixing`` once epoch ``start`` has ended. ``None``: never.
        start: First epoch, from 0, at whose end the quantile is taken.
        pseudo: ``"onehot"`` or ``"scale"``.
        ema: :math:`\phi` in [0, 1], or a schedule: ``Linear(0.95, 0.8, duration=epochs)`` is the authors'.
        validate: As in :class:`~reweigh.losses.CrossEntropy`.
        device: Where the table stays, such as ``"cpu"``; ``None``: it moves with the module.
        storage: A folder for a memory-mapped table, as in :class:`~reweigh.weighting.SampleTable`.

    Shapes:
        ``logits (N, C)``, ``candidates (N, C)`` bool or 0/1, ``index=`` ``(N,)``; terms ``(N,)``. ``votes=`` ``(N, C)``
        are the logits of another head, such as similarities to prototypes; ``beliefs=`` ``(N, C)`` replace what the
        table holds.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``index`` not integer.
        ValueError: If shapes do not fit, a candidate is neither 0 nor 1, or ``index`` is missing in training.

    Example:
        >>> import torch
        >>> criterion = PartialLabelCrossEntropy(10, 3, ema=0.5)
        >>> candidates = torch.tensor([[1, 1, 0]])
        >>> logits = torch.tensor([[2.0, 0.0, 3.0]])
        >>> criterion.terms(logits, candidates, index=torch.tensor([4])).find("belief")
        tensor([[0.7500, 0.2500, 0.0000]])
    """

    provides = frozenset({"loss", "log_pt", "target", "category", "belief", "candidate_margin"})
    accepts = frozenset({"index", "votes", "beliefs"})

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
        validate: bool | None = None,
        device: str | None = None,
        storage: str | None = None,
    ) -> None:
        classes = check_whole(self, "num_classes", num_classes, low=2)
        super().__init__(num_samples, classes + 1, 0.0, -100, validate, device, storage)
        self.num_classes = classes
        self.mixing = check_hyper(self, "mixing", mixing, low=0.0, high=1.0)
        self.noise_rate = (
            None
            if noise_rate is None
            else check_number(self, "noise_rate", noise_rate, low=0.0, high=1.0, open_high=True)
        )
        self.start = check_whole(self, "start", start)
        check_choice(self, "pseudo", pseudo, PSEUDO)
        self.pseudo: Pseudo = pseudo
        self.ema = check_hyper(self, "ema", ema, low=0.0, high=1.0)
        if noise_rate is not None:
            self.add_state("quantile", torch.tensor(-1.0, dtype=torch.float64))

    def current_mixing(self) -> float | Tensor:
        r""":math:`\lambda` as it is now."""
        given = value_of(self.mixing)
        if self.noise_rate is None:
            return given
        found = self.get_buffer("quantile")
        return torch.where(found >= 0.0, found, given)

    def measure(
        self,
        *inputs: Any,
        mask: Tensor | None,
        index: Tensor | None = None,
        votes: Tensor | None = None,
        beliefs: Tensor | None = None,
    ) -> LossTerms:
        logits, candidates = self._read(inputs)
        shape, samples = logits.shape, logits.shape[:1]
        if mask is not None:
            mask = expand_mask(self, mask, samples)
            candidates = candidates.masked_fill(~mask.unsqueeze(1), 0)
        if self._may_look(candidates) and not bool(((candidates == 0) | (candidates == 1)).all()):
            raise ValueError("PartialLabelCrossEntropy: candidates must be 0 or 1, or bool")
        inside = candidates != 0
        valid = self._only_valid(inside.any(1))
        away = None if valid is None else ~valid.unsqueeze(1)
        if away is not None:
            logits, inside = logits.masked_fill(away, 0.0), inside | away
        log_p = logits.log_softmax(1)
        log_q = log_p.detach()
        if votes is not None:
            votes = self._constant("votes", votes, shape, logits)
            log_q = (votes if away is None else votes.masked_fill(away, 0.0)).log_softmax(1)
        if beliefs is None:
            before = self._recall(index, valid, logits)[:, : self.num_classes]
        else:
            before = self._constant("beliefs", beliefs, shape, logits)
        if away is not None:
            before = before.masked_fill(away, 0.0)
        belief = moved_belief(before, log_q, inside, self.current_mixing(), self.pseudo, value_of(self.ema))
        likely = belief.argmax(1)
        return LossTerms(
            loss=mask_out(-times(belief, log_p).sum(1), valid, 0.0),
            mask=valid,
            log_pt=mask_out(expected(belief, log_p, 1), valid, NEUTRAL_LOG_PT),
            target=likely,
            category=likely,
            num_classes=self.num_classes,
            extras={"belief": belief, "candidate_margin": candidate_margin(log_q, inside)},
        )

    def _read(self, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        if len(inputs) != 2:
            raise TypeError(f"PartialLabelCrossEntropy: takes (logits, candidates), got {len(inputs)} inputs")
        logits, candidates = upcast(self, "logits", inputs[0]), inputs[1]
        if not isinstance(candidates, Tensor) or candidates.is_complex():
            raise TypeError(f"PartialLabelCrossEntropy: candidates must be a real tensor, got {_kind(candidates)}")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"PartialLabelCrossEntropy: logits must have shape (N, {self.num_classes}), got {tuple(logits.shape)}"
            )
        if candidates.shape != logits.shape:
            raise ValueError(
                f"PartialLabelCrossEntropy: candidates must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(candidates.shape)}"
            )
        return logits, candidates

    def observe(self, terms: LossTerms) -> None:
        margin = terms.need("candidate_margin", self)
        self._remember(terms, torch.cat([terms.need("belief", self), margin.unsqueeze(1)], 1))

    def refresh(self, event: Event, **signals: Any) -> None:
        if event != "epoch" or self.noise_rate is None or self.completed("epoch") < self.start:
            return
        rows = self.table.rows
        margins = rows[rows[:, : self.num_classes].sum(1) > 0.0, self.num_classes]
        if len(margins):
            place = math.floor(self.noise_rate * len(margins) * (1.0 + 4.0 * torch.finfo(torch.float64).eps))
            self.get_buffer("quantile").fill_(margins.kthvalue(min(place, len(margins) - 1) + 1).values.item())

    def reset(self) -> None:
        super().reset()
        if self.noise_rate is not None:
            self.get_buffer("quantile").fill_(-1.0)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(batch, self.num_classes, generator=generator, dtype=torch.float64) * 2
        candidates = torch.rand(batch, self.num_classes, generator=generator) < 0.4
        true = torch.randint(self.num_classes, (batch, 1), generator=generator)
        return logits.to(dtype), candidates.scatter(1, true, True)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        logits, candidates = self.example_inputs(seed=seed, dtype=dtype)
        some = (torch.arange(len(logits)) % 3 != 1).unsqueeze(1)
        return {
            "sets": (logits, candidates),
            "0 and 1": (logits, candidates.to(dtype)),
            "some without a candidate": (logits, candidates.long() * some),
            "every label": (logits, torch.ones_like(candidates)),
        }
