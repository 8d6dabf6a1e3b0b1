"""Exact means over micro-batches and ranks: divide the gradients once, when the denominator is known."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reweigh.weighting.algebra import is_node
from reweigh.weighting.base import Weighting
from reweigh.weighting.config import Configured, check_choice, check_number

from .objective import Objective

Gradients = Literal["averaged", "summed"]


@final
class Accumulator(Configured, nn.Module):
    r"""Train on an objective's numerator, and divide the gradients by its denominator after the last micro-batch.

    .. math:: L = \frac{\sum_b N_b}{\sum_b D_b}, \qquad \nabla L = \frac{1}{\sum_b D_b} \sum_b \nabla N_b

    - :math:`N_b, D_b`: numerator and denominator of micro-batch :math:`b` of any rank (see ``Objective.parts``)

    The loss and its gradient are those of all micro-batches of all ranks as one batch, however the samples fall on
    them, without knowing a denominator in advance. Where nothing counts anywhere, gradients and loss are 0.

    - ``acc(...)`` takes what the objective takes and returns :math:`N_b`, to be sent ``backward()``.
    - ``acc.finish(parameters)`` comes after the last ``backward()`` and before gradients are clipped, logged or used.
      It adds denominators over ranks (one all-reduce of two numbers) and reads no value back from a device. The
      gradients must come from this accumulator alone.
    - Everything is linear, so a ``GradScaler`` may unscale before or after ``finish``; the returned loss is never
      scaled. Numerators are sums: in float16 the scaler settles at a smaller scale than it would for means.
    - Without parameters and under ``no_grad`` it is the exact loss of an evaluation: ``acc.finish()``.

    It has no state that is saved: what a step has collected so far is forgotten with the step.

    Exact where a term's weight depends on its own sample, on class tables and on learned state. A weighting that
    compares the terms of a call (``normalize()``, ``pooled("batch")``) sees one micro-batch at a time, as ever; a
    warning says so.

    Args:
        objective: With a scalar reduction that adds up over samples: ``"mean"``, ``"weighted_mean"``, ``"batch_mean"``,
            ``"sequence_mean"``, or ``"sum"``, whose denominator is 1.
        gradients: What becomes of gradients between ``backward()`` and ``finish`` where there are several ranks:
            ``"averaged"`` by DDP, or ``"summed"`` by you. With one process it makes no difference.

    Raises:
        TypeError: If ``objective`` is none.
        ValueError: If the reduction is ``"none"``, ``"log_mean_exp"`` or ``"group_mean"`` (groups spread over
            micro-batches), or if it is ``"weighted_mean"`` with differentiated weights, whose gradient goes through the
            denominator too; if the weighting has a penalty, or an inner objective has divided its terms already.

    Example:
        >>> import torch
        >>> from reweigh.losses import FocalLoss
        >>> loss = Accumulator(FocalLoss(0.0, weight=[1.0, 3.0]))
        >>> logits, target = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 0, 0, 1])
        >>> for rows in (slice(0, 3), slice(3, 4)):
        ...     loss(logits[rows], target[rows]).backward()
        >>> loss.finish([logits])
        tensor(0.6931, dtype=torch.float64)
        >>> logits.grad[:, 0]
        tensor([-0.0833, -0.0833, -0.0833,  0.2500])
    """

    def __init__(self, objective: Objective, *, gradients: Gradients = "averaged") -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"Accumulator: objective must be an Objective, got {type(objective).__name__}")
        name, weighting = objective.reduction.name, objective.weighting
        if not objective.independent:
            raise ValueError(
                "Accumulator: samples must be independent, or micro-batches do not add up to the batch; got "
                f"{objective.criterion!r}"
            )
        apart = {
            "none": "is no scalar",
            "group_mean": "does not add up where groups spread over micro-batches",
            "log_mean_exp": "is no ratio of sums over terms",
        }
        if name in apart:
            why = apart[name]
            raise ValueError(f"Accumulator: reduction must add up over samples, got {name!r}, which {why}")
        if name == "weighted_mean" and weighting is not None and not weighting.detached:
            raise ValueError(
                "Accumulator: weights must be constants under reduction 'weighted_mean', whose denominator they are; "
                f"use .detach() or reduction='mean', got {weighting!r}"
            )
        for part in () if weighting is None else weighting.modules():
            if isinstance(part, Weighting) and not is_node(part) and type(part).penalty is not Weighting.penalty:
                raise ValueError(
                    "Accumulator: weighting must have no penalty, which is neither in numerator nor denominator; "
                    f"got {part!r}"
                )
        inner = objective.criterion
        while isinstance(inner, Objective):
            if inner.reduction.name not in ("none", "sequence_mean"):
                raise ValueError(
                    "Accumulator: an inner objective must leave one term per sample ('none', 'sequence_mean'), "
                    f"got reduction {inner.reduction.name!r}"
                )
            inner = inner.criterion
        if weighting is not None and weighting.scope != "local":
            warnings.warn(
                f"Accumulator: {weighting!r} compares the terms of a call, so every micro-batch is weighed for itself, "
                "and the result is not exactly that of the joined batch; leave out normalize() and the like",
                stacklevel=2,
            )
        self.objective = objective
        self.gradients = check_choice(self, "gradients", gradients, ("averaged", "summed"))
        self._calls = 0
        self._sums: Tensor | None = None

    def forward(self, *inputs: Any, **meta: Any) -> Tensor:
        """The numerator of one micro-batch, with its gradient; arguments as for the objective, but no ``num_items``."""
        if meta.get("num_items") is not None:
            raise ValueError("Accumulator: num_items must not be given; the denominator is counted here")
        if self.objective.reduction.name == "sum":
            numerator: Tensor = self.objective(*inputs, **meta)
            denominator = torch.ones_like(numerator)
        else:
            numerator, denominator = self.objective.parts(*inputs, **meta)
        both = torch.stack([numerator.detach().double(), denominator.detach().double()])
        self._sums = both if self._sums is None else self._sums.to(both.device) + both
        self._calls += 1
        return numerator

    @torch.no_grad()
    def finish(self, parameters: nn.Module | Iterable[Tensor] = (), *, times: float = 1.0) -> Tensor:
        """Divide the gradients, in place, by the denominator of everything since the last ``finish``, and start anew.

        Args:
            parameters: Whose ``grad`` is divided: a module or its parameters. Those without a gradient stay without.
            times: What the caller has divided numerators by before ``backward()``: Lightning's
                ``trainer.accumulate_grad_batches``. Default 1.

        Returns:
            0-d float64, the same on all ranks: the loss of all micro-batches of all ranks.

        Raises:
            ValueError: If there was no call to finish (with several ranks, one may have had no data).
        """
        times = check_number(self, "times", times, low=0.0, open_low=True)
        tensors = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self._calls == 0 and ranks == 1:
            raise ValueError("Accumulator: finish must come after a call of the accumulator, got none since the last")
        sums = self._sums
        if sums is None:
            sums = torch.zeros(2, dtype=torch.float64, device=tensors[0].device if tensors else None)
        if ranks > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        numerator, denominator = sums.unbind()
        if self.objective.reduction.name == "sum":
            denominator = torch.ones_like(denominator)
        safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
        averaged = ranks if self.gradients == "averaged" else 1
        _multiply([tensor.grad for tensor in tensors if tensor.grad is not None], averaged * times / safe)
        self.reset()
        return numerator / safe

    def reset(self) -> None:
        """Forget what was collected since the last :meth:`finish`, as for a step that is given up."""
        self._calls, self._sums = 0, None


def _multiply(grads: list[Tensor], factor: Tensor) -> None:
    """Multiply in place, with the factor in float32 where gradients are narrower: it may be below their range."""
    for grad in grads:
        values = grad._values() if grad.is_sparse else grad
        local = factor.to(values.device)
        if values.dtype in (torch.float16, torch.bfloat16):
            values.copy_(values.float() * local.float())
        else:
            values.mul_(local.to(values.dtype))
