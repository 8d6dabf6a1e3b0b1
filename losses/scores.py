"""Scores of single samples: how hard they are, how much they pull, how often they were forgotten.

Pure functions of a model's outputs or of the model itself. What they give is a number per sample for
:class:`~reweigh.weighting.ScoreWeight` (``difficulty=``), :class:`~reweigh.weighting.SelfInfluence`
(``influence=``), or for choosing a part of the data. The papers average scores over several runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .criteria.base import _kind, is_index, upcast


def _error(owner: str, logits: Tensor, target: Tensor) -> Tensor:
    """Gradient of cross-entropy in the logits, ``softmax - target``, without cancellation at the target."""
    logits = upcast(owner, "logits", logits)
    if logits.ndim < 2:
        raise ValueError(f"{owner}: logits must have shape (N, C, ...), got {tuple(logits.shape)}")
    if isinstance(target, Tensor) and target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"{owner}: probability targets must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        return logits.softmax(1) - target.to(logits.dtype)
    if not is_index(target):
        raise TypeError(f"{owner}: target must be class indices or probabilities, got {_kind(target)}")
    shape = logits.shape[:1] + logits.shape[2:]
    if target.shape != shape:
        raise ValueError(f"{owner}: target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    others = logits.softmax(1).scatter(1, target.long().unsqueeze(1), 0.0)
    return others.scatter(1, target.long().unsqueeze(1), -others.sum(1, keepdim=True))


def el2n(logits: Tensor, target: Tensor) -> Tensor:
    r"""EL2N, the norm of the error: :math:`\lVert \mathrm{softmax}(z) - y \rVert_2`, in :math:`[0, \sqrt 2]`.

    With two classes it is :math:`\sqrt 2\,(1 - p_y)`.

    Args:
        logits: ``(N, C, ...)``; float16 and bfloat16 are computed in float32.
        target: ``(N, ...)`` class indices, or ``(N, C, ...)`` probabilities.

    Returns:
        ``(N, ...)`` scores.

    Example:
        >>> import torch
        >>> el2n(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0]))
        tensor([0.7071])

    References:
        M. Paul, S. Ganguli, G. K. Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021.
    """
    norm: Tensor = torch.linalg.vector_norm(_error("el2n", logits, target), dim=1)
    return norm


def grand_last_layer(logits: Tensor, target: Tensor, features: Tensor, *, bias: bool = True) -> Tensor:
    r"""Norm of cross-entropy's gradient in the last linear layer, exact, at the cost of a forward pass.

    .. math:: \lVert p - y \rVert\, \sqrt{\lVert h \rVert^2 + 1}

    The 1 is the bias's part.

    Args:
        logits: ``(N, C)``, what the layer gives.
        target: ``(N,)`` class indices, or ``(N, C)`` probabilities.
        features: ``(N, d)`` what the layer gets, :math:`h`.
        bias: Whether it has a bias.

    Returns:
        ``(N,)`` norms.

    Example:
        >>> import torch
        >>> grand_last_layer(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[3.0, 4.0]]), bias=False)
        tensor([3.5355])
    """
    features = upcast("grand_last_layer", "features", features)
    error = el2n(logits, target)
    if features.ndim != 2 or error.shape != features.shape[:1]:
        raise ValueError(
            f"grand_last_layer: features must have shape (N, d) and logits (N, C), got {tuple(features.shape)} and "
            f"{tuple(logits.shape)}"
        )
    return error * torch.sqrt(features.square().sum(1) + (1.0 if bias else 0.0))


def grand(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    r"""GraNd, the norm of each sample's own gradient :math:`\lVert \nabla_\theta \ell(x_i, y_i) \rVert_2`, exact.

    Args:
        model: In evaluation mode where it has dropout or batch statistics: a sample's gradient must be its own.
            Parameters that need no gradient are left out.
        loss_fn: ``loss_fn(model(x), y)``, a scalar, for a batch of one.
        x: ``(N, ...)`` inputs.
        y: ``(N, ...)`` targets.
        chunk_size: Samples taken together, to bound memory. Default: all.

    Returns:
        ``(N,)`` norms, without gradient.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
        >>> scores = grand(model, torch.nn.functional.cross_entropy, x, y)
        >>> torch.allclose(scores, grand_last_layer(model(x), y, x), atol=1e-6)
        True
    """
    return self_influence(model, loss_fn, x, y, chunk_size=chunk_size).sqrt()


def self_influence(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Self-influence, the squared norm of each sample's own gradient: :math:`\lVert \nabla_\theta \ell_i \rVert^2`.

    Arguments as for :func:`grand`, whose square it is. TracIn adds it up over checkpoints, times their learning rates.

    References:
        G. Pruthi, F. Liu, M. Sundararajan, S. Kale, "Estimating Training Data Influence by Tracing Gradient Descent",
        NeurIPS 2020.
    """
    learned = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if not learned:
        raise ValueError("self_influence: model has no parameter that needs gradient")
    fixed = {name: value.detach() for name, value in model.named_parameters() if not value.requires_grad}
    fixed |= {name: value.detach() for name, value in model.named_buffers()}

    def squared(sample: Tensor, label: Tensor) -> Tensor:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(model, {**fixed, **parameters}, (sample.unsqueeze(0),))
            return loss_fn(out, label.unsqueeze(0))

        slopes: dict[str, Tensor] = torch.func.grad(loss)(learned)
        return torch.stack([slope.square().sum() for slope in slopes.values()]).sum()

    with torch.no_grad():
        each: Any = torch.func.vmap(squared, chunk_size=chunk_size)
        found: Tensor = each(x, y)
    return found


def forgetting_counts(correct: Tensor, *, never_learned: float | None = None) -> Tensor:
    r"""How often each sample was forgotten: right at one look, wrong at the next.

    Args:
        correct: ``(looks, N)`` bool, whether the sample was right when it was looked at, in order of time.
        never_learned: Count of samples that were never right. Default: their number of looks, more than any other can
            have.

    Returns:
        ``(N,)`` float32 counts.

    Example:
        >>> import torch
        >>> forgetting_counts(torch.tensor([[True, False], [False, False], [True, False]]))
        tensor([1., 3.])

    References:
        M. Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network Learning", ICLR 2019.
    """
    if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
        raise TypeError(f"forgetting_counts: correct must be a bool tensor, got {_kind(correct)}")
    if correct.ndim != 2:
        raise ValueError(f"forgetting_counts: correct must have shape (looks, N), got {tuple(correct.shape)}")
    counts = (correct[:-1] & ~correct[1:]).sum(0).float()
    most = float(len(correct)) if never_learned is None else never_learned
    return torch.where(correct.any(0), counts, torch.full_like(counts, most))
