"""Weights of places: by the kind of text, by position, as the call says, or as the user's own network learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, final

import torch
from torch import Tensor

from .adversarial import example_numbers, given
from .base import Scope, Weighting, lookup, method
from .config import as_table, check_choice, readable
from .schedules import Schedule, check_hyper, value_of
from .terms import LossTerms, mask_out


@method(
    "spans",
    acts_on="token",
    paper="Bielik 11B v2 Technical Report",
    venue="arXiv 2505.02410, 2025",
    official="none; weights for prompts are common practice",
    defaults={},
    deviations=(),
    neutral={"weights": [1.0, 1.0, 1.0]},
    examples=({"weights": [0.1, 1.0, 0.5]}, {"weights": {"prompt": 0.0, "response": 1.0, "thinking": 0.3}}),
)
@final
class Spans(Weighting):
    r"""A weight for each kind of text: prompt, response, thinking, tool output.

    .. math:: w_i = u_{k_i}

    - :math:`k_i`: ``span=`` of the call, which kind term i is, from 0; u: ``weights``

    Weights:
        As given, >= 0. Detached. Equal weights 1 are neutral. A span of weight 0 still counts in the denominator of
        ``"mean"``; to leave it out, mask it, or use ``"weighted_mean"``.

    State and cadence:
        None; ``update_on = "never"``. Weights may be schedules.

    Use when:
        Parts of a fine-tuning text are of different worth, as prompt, response, thinking and tool output are, and you
        can name a weight for each.
    Avoid when:
        A part should not be learned at all: mask its labels, which costs nothing. Under a plain mean, tokens of weight
        0 stay in the denominator.

    Deviations:
        None.

    Args:
        weights: One per kind, >= 0 or a schedule: a sequence, or a mapping whose names are for reading; its order
            counts. :meth:`names` has them.

    Shapes:
        Reads ``span`` of shape ``(S[0],)`` or ``(*S)``, integers; returns ``(*S)``.

    Raises:
        ValueError: If a span is out of range.

    Example:
        >>> import torch
        >>> from reweigh.losses import CausalLM, Objective
        >>> objective = Objective(CausalLM(), Spans({"prompt": 0.1, "response": 1.0}))
        >>> labels = torch.tensor([[3, 1, 2, 0]])
        >>> objective.weights(torch.zeros(1, 4, 4), labels, span=prompt_spans(torch.tensor([2]), 4))
        tensor([[0.0000, 0.1000, 1.0000, 1.0000]])

    References:
        K. Ociepa, Ł. Flis, R. Kinas, K. Wróbel, A. Gwoździej, "Bielik 11B v2 Technical Report", arXiv 2505.02410, 2025.
    """

    needs = frozenset({"span"})
    detached = True
    scope: Scope = "local"

    def __init__(self, weights: Mapping[str, float | Schedule] | Sequence[float | Schedule]) -> None:
        super().__init__()
        named = weights if isinstance(weights, Mapping) else {str(k): value for k, value in enumerate(weights)}
        if not named:
            raise ValueError("Spans: weights must name at least one kind, got none")
        self._names = tuple(named)
        self.schedules = torch.nn.ModuleDict()
        self._fixed: list[float] = []
        for place, (name, value) in enumerate(named.items()):
            checked = check_hyper(self, f"weights[{name!r}]", value, low=0.0)
            if isinstance(checked, Schedule):
                self.schedules[str(place)] = checked
            self._fixed.append(0.0 if isinstance(checked, Schedule) else checked)

    def names(self) -> tuple[str, ...]:
        """The kinds in their order."""
        return self._names

    def weigh(self, terms: LossTerms) -> Tensor:
        table = torch.tensor(self._fixed, dtype=torch.float64, device=terms.loss.device)
        for place, schedule in self.schedules.items():
            table[int(place)] = value_of(schedule)  # type: ignore[arg-type]
        return lookup(self, table, terms, "span")

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed + 17)
        return {"span": torch.randint(len(self._names), (batch,), generator=generator)}


def prompt_spans(lengths: Tensor, total: int) -> Tensor:
    """``span (B, T)`` of sequences whose first tokens are a prompt: 0 before ``lengths``, 1 from there on.

    Args:
        lengths: Tokens of each prompt, ``(B,)``; or of several parts that follow each other, ``(B, K)``: 0 to K - 1 for
            them, K for what follows.
        total: Tokens of a row, T.

    Raises:
        TypeError: If lengths are not integers.
        ValueError: If one is negative, or the shape does not fit.

    Example:
        >>> import torch
        >>> prompt_spans(torch.tensor([[1, 2], [0, 1]]), 4)
        tensor([[0, 1, 1, 2],
                [1, 2, 2, 2]])
    """
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"prompt_spans: lengths must hold integers, got {lengths.dtype}")
    if lengths.ndim not in (1, 2) or (readable(lengths) and bool((lengths < 0).any())):
        raise ValueError(f"prompt_spans: lengths must be (B,) or (B, K) numbers >= 0, got {lengths.tolist()}")
    ends = (lengths if lengths.ndim == 2 else lengths.unsqueeze(1)).cumsum(1)
    place = torch.arange(total, device=lengths.device)
    return (place[None, :, None] >= ends[:, None, :]).sum(-1)


@method(
    "position_weight",
    acts_on="token",
    paper="LiveSpeech: Low-Latency Zero-shot Text-to-Speech via Autoregressive Modeling of Audio Discrete Codes",
    venue="Interspeech 2024",
    official="none; the abstract alone (codebook weights)",
    defaults={},
    deviations=("A constant weight per place; the paper's schedule of weights is not published in code.",),
    neutral={"weights": [1.0, 1.0, 1.0]},
    examples=({"weights": [1.0, 0.5, 0.25]},),
)
@final
class PositionWeight(Weighting):
    r"""A weight for each place along the terms' last dimension: codebooks of an audio token, steps of a forecast.

    .. math:: w_{\dots k} = u_k

    Weights:
        As given, >= 0. Detached. All 1 is neutral.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        Places along the last dimension differ in importance, as the codebooks of an audio token or the steps of a
        forecast do, and you know how.
    Avoid when:
        Places differ only in the scale of their loss: normalise each loss instead. Where nobody knows which places
        matter, equal weights are the choice.

    Deviations:
        Constants.

    Args:
        weights: u, ``(K,)`` numbers >= 0.

    Shapes:
        Terms ``(..., K)``, or ``position`` of shape ``(*S)`` at the call; returns ``(*S)``.

    Raises:
        ValueError: If the last dimension is not K, or a position out of range.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), PositionWeight([1.0, 0.5]))  # 2 codebooks of 16 codes
        >>> objective.weights(torch.zeros(3, 16, 5, 2), torch.zeros(3, 5, 2).long())[0, 0]
        tensor([1.0000, 0.5000])

    References:
        T. Dang, D. Aponte, D. Tran, K. Koishida, "LiveSpeech: Low-Latency Zero-shot Text-to-Speech via Autoregressive
        Modeling of Audio Discrete Codes", Interspeech 2024.
    """

    detached = True
    scope: Scope = "local"

    def __init__(self, weights: Sequence[float] | Tensor) -> None:
        super().__init__()
        self.add_table("weights", as_table(self, "weights", weights))

    def weigh(self, terms: LossTerms) -> Tensor:
        table = self.get_buffer("weights")
        if terms.find("position") is not None:
            return lookup(self, table, terms, "position")
        if terms.loss.ndim < 2 or terms.loss.shape[-1] != len(table):
            raise ValueError(
                f"PositionWeight: terms must be (..., {len(table)}), one place per weight, or position= be given; got "
                f"terms {tuple(terms.loss.shape)}"
            )
        return table.to(terms.loss.dtype).expand_as(terms.loss)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed + 17)
        return {"position": torch.randint(self.get_buffer("weights").numel(), (batch,), generator=generator)}


@method(
    "given",
    acts_on="token",
    paper="none",
    venue="the user's own weights",
    official="none",
    defaults={},
    deviations=(),
    neutral=None,
    examples=({}, {"statistic": "importance"}),
)
@final
class Given(Weighting):
    r"""Weights that the call brings, so that they can be clipped, normalised and multiplied like others.

    .. math:: w_i = \text{the call's } \texttt{statistic=} \text{ for term } i

    Unlike ``sample_weight=`` they do not count in denominators.

    Weights:
        As given; must be >= 0. Detached. No argument is neutral.

    State and cadence:
        None; ``update_on = "never"``.

    Use when:
        Weights per term come from outside, as a data column or an attention map, and should be clipped, normalised and
        multiplied like those of any other method.
    Avoid when:
        They say how often a sample occurs: pass them as sample weights, which denominators and statistics count too.

    Deviations:
        None.

    Args:
        statistic: What the call names them. Default ``"token_weight"``.

    Shapes:
        Reads the statistic of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Raises:
        ValueError: If one is negative or not finite.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> objective = Objective(CrossEntropy(), Given().clip(max=2.0))
        >>> objective.weights(torch.zeros(2, 4), torch.tensor([0, 1]), token_weight=torch.tensor([0.5, 9.0]))
        tensor([0.5000, 2.0000])

    References:
        None: the user's weights.
    """

    detached = True
    scope: Scope = "local"

    def __init__(self, statistic: str = "token_weight") -> None:
        super().__init__()
        if not isinstance(statistic, str) or not statistic.isidentifier():
            raise ValueError(f"Given: statistic must be an identifier, got {statistic!r}")
        self.statistic = statistic
        self.needs = frozenset({statistic})

    def weigh(self, terms: LossTerms) -> Tensor:
        weights = given(self, terms, self.statistic)
        if readable(weights) and weights.numel():
            low, high = (float(edge) for edge in weights.aminmax())
            if not (low >= 0.0 and high < float("inf")):
                raise ValueError(
                    f"Given: {self.statistic} must be finite and >= 0, got {high if low >= 0.0 else low:g}"
                )
        return weights

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {self.statistic: example_numbers(batch, seed, dtype).abs()}


@method(
    "token_mask",
    acts_on="token",
    paper="SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks",
    venue="arXiv 2410.05102, 2024",
    official="none released",
    defaults={"kind": ("'relu'", "paper"), "l1": ("0.0", "ours: off")},
    deviations=("The mask weighs any loss, not only the two terms of preference optimisation.",),
    neutral=None,
    examples=({}, {"kind": "sigmoid", "l1": 0.1}, {"l1": 0.01}),
)
@final
class TokenMask(Weighting):
    r"""Weights from a head of the user's network, with a price for every token that is kept.

    .. math:: L = \mathrm{reduce}_i\big(w_i\,\ell_i + \lambda\,w_i\big), \qquad w_i = \max(s_i, 0)
              \;\text{ or }\; \sigma(s_i)

    - :math:`s_i`: ``token_score=`` of the call, with gradient to the network that made it; :math:`\lambda`: ``l1``

    Weights:
        >= 0. Differentiated: gradient flows into the scores. No argument is neutral. A loss that is minimised over its
        own weights makes all of them 0; scores must come from somewhere else too (another loss, a constraint,
        ``.normalize(detach=False)``).

    State and cadence:
        None; ``update_on = "never"``. ``l1`` may be a schedule.

    Use when:
        Which tokens matter is to be learned by a head of your network, most do not, and another loss or a constraint
        trains the scores as well.
    Avoid when:
        Nothing but this loss trains the scores: its least value is at a mask that is shut everywhere. Constant weights
        per span need no training.

    Deviations:
        A weighting of any loss.

    Args:
        kind: ``"relu"`` (paper) or ``"sigmoid"``. Default ``"relu"``.
        l1: :math:`\lambda` >= 0, or a schedule; one number per term, reduced like the losses. Default 0.0.

    Shapes:
        Reads ``token_score`` of shape ``(S[0],)`` or ``(*S)``; returns ``(*S)``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> score = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> objective = Objective(CrossEntropy(), TokenMask(l1=0.5))
        >>> objective(torch.zeros(2, 4), torch.tensor([0, 1]), token_score=score).backward()
        >>> score.grad  # (log 4 + 0.5) / 2, and nothing where the mask is shut
        tensor([0.9431, 0.0000])

    References:
        F. Christopoulou, R. Cardenas, G. Lampouras, H. Bou-Ammar, J. Wang, "SparsePO: Controlling Preference Alignment
        of LLMs via Sparse Token Masks", arXiv 2410.05102, 2024.
    """

    needs = frozenset({"token_score"})
    detached = False
    scope: Scope = "local"

    def __init__(self, kind: Literal["relu", "sigmoid"] = "relu", *, l1: float | Schedule = 0.0) -> None:
        super().__init__()
        self.kind = check_choice(self, "kind", kind, ("relu", "sigmoid"))
        self.l1 = check_hyper(self, "l1", l1, low=0.0)

    def weigh(self, terms: LossTerms) -> Tensor:
        score = terms.spread(terms.need("token_score", self)).to(terms.loss.dtype).expand_as(terms.loss)
        score = mask_out(score, terms.mask, 0.0)
        return score.clamp_min(0.0) if self.kind == "relu" else score.sigmoid()

    def penalty(self, terms: LossTerms, weights: Tensor) -> Tensor | None:
        return None if self.l1 == 0.0 else value_of(self.l1) * self.weigh(terms)

    def example_stats(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return {"token_score": example_numbers(batch, seed, dtype)}


@torch.no_grad()
def attention_importance(
    attention: Tensor, low: float = 1.0, high: float = 3.0, *, mask: Tensor | None = None
) -> Tensor:
    r"""How much later tokens look at each token, from causal attention maps: weights in [low, high].

    .. math:: a_j = \frac{1}{T - j} \operatorname{mean}_h \sum_i A_{hij}, \qquad
              w_j = \mathrm{low} + (\mathrm{high} - \mathrm{low})\,\frac{a_j - \min a}{\max a - \min a}

    The authors' ``normalize="linear"``; they have one sequence per batch and no padding.

    Args:
        attention: ``(B, H, T, T)``, rows look at columns; entry (i, j) is 0 for j > i.
        low: Smallest weight, >= 0. Default 1 (authors).
        high: Largest weight. Default 3 (authors). Where all are equal, ``low``.
        mask: ``(B, T)`` bool, True = a real token; others look at nothing and get weight 0.

    Returns:
        ``(B, T)`` constants, for :class:`Given` or ``sample_weight=``.

    Raises:
        ValueError: If shapes do not fit or ``high`` is below ``low``.

    Example:
        >>> import torch
        >>> looks = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]]])
        >>> attention_importance(looks)
        tensor([[3.0000, 1.7500, 1.0000]])

    References:
        Y.-L. Sung et al., "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", ICML 2025.
    """
    if attention.ndim != 4 or attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention_importance: attention must be (B, H, T, T), got {tuple(attention.shape)}")
    if not 0.0 <= low <= high:
        raise ValueError(f"attention_importance: 0 <= low <= high must hold, got low={low!r} and high={high!r}")
    size = attention.shape[-1]
    real = attention.new_ones(attention.shape[0], size, dtype=torch.bool) if mask is None else mask
    if real.shape != (attention.shape[0], size):
        raise ValueError(f"attention_importance: mask must be {(attention.shape[0], size)}, got {tuple(real.shape)}")
    looks = attention.double().mean(1).masked_fill(~real.unsqueeze(-1), 0.0)
    uses = real.double().flip(1).cumsum(1).flip(1)  # real tokens from here on
    share = looks.sum(1) / uses.clamp_min(1.0)
    least = share.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    most = share.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    span = torch.where(most > least, most - least, torch.ones_like(most))
    weights = low + (high - low) * (share - least) / span
    return weights.masked_fill(~real, 0.0).to(attention.dtype)
