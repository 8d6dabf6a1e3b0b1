"""Several objectives on the same inputs, each one term: what a weighted sum of losses is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from reweigh.weighting.terms import LossTerms

from .base import Criterion

if TYPE_CHECKING:
    from ..objective import Objective


@final
class Joint(Criterion):
    """One term per objective: all get the same inputs, masks and sample weights.

    ``Objective(Joint(a, b), ClassWeight([0.5, 0.5]), "sum")`` is half of one plus half of the other; ``0.5 * a +
    0.5 * b`` builds the same. Each part has its own weighting and reduction, and learns as it would alone.

    Args:
        *parts: Objectives whose reduction gives a scalar.
        objectives: Further ones, for YAML, which has no ``*args``.

    Shapes:
        Inputs as the parts take them; terms ``(K,)`` with the part's number as ``category``.

    Raises:
        TypeError: If a part is not an objective.
        ValueError: If there is none, or one has reduction ``"none"``.

    Example:
        >>> import torch
        >>> from reweigh.losses import CrossEntropy, Objective
        >>> part = Objective(CrossEntropy())
        >>> Joint(part, part).terms(torch.zeros(2, 2), torch.tensor([0, 1])).loss
        tensor([0.6931, 0.6931])
    """

    provides = frozenset({"loss", "category"})
    independent = False
    pools = True

    def __init__(self, *parts: Objective, objectives: Sequence[Objective] = ()) -> None:
        from ..objective import Objective

        super().__init__()
        everything = (*parts, *objectives)
        if not everything:
            raise ValueError("Joint: needs at least one objective, got none")
        for part in everything:
            if not isinstance(part, Objective):
                raise TypeError(f"Joint: every part must be an Objective, got {type(part).__name__}")
            if part.reduction.name == "none":
                raise ValueError("Joint: every part must have a scalar reduction, got 'none'")
        self.parts = nn.ModuleList(everything)
        self.exact_gradient = all(part.exact_gradient for part in everything)

    def terms(self, *inputs: Any, **meta: Any) -> LossTerms:
        loss = torch.stack([part(*inputs, **meta) for part in self.parts])
        return LossTerms(loss, category=torch.arange(len(self.parts), device=loss.device), num_classes=len(self.parts))

    def measure(self, *inputs: Any, mask: Tensor | None) -> LossTerms:
        """The same as :meth:`terms` with nothing but a mask."""
        return self.terms(*inputs, mask=mask)

    def example_inputs(self, batch: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        """Those of the first part."""
        first = self.parts[0]
        if not isinstance(first, Criterion):
            raise TypeError(f"Joint: every part must be an Objective, got {type(first).__name__}")
        return first.example_inputs(batch, seed=seed, dtype=dtype)

    def example_variants(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, tuple[Any, ...]]:
        """Those of the first part."""
        first = self.parts[0]
        if not isinstance(first, Criterion):
            raise TypeError(f"Joint: every part must be an Objective, got {type(first).__name__}")
        return first.example_variants(seed=seed, dtype=dtype)


def combine(*weighted: tuple[float, Objective]) -> Objective:
    """The weighted sum of objectives as one; a sum among them is taken apart first."""
    from reweigh.weighting.frequency import ClassWeight

    from ..objective import Objective

    pairs = [(factor * share, part) for factor, whole in weighted for share, part in _summands(whole)]
    return Objective(Joint(*(part for _, part in pairs)), ClassWeight([factor for factor, _ in pairs]), "sum")


def _summands(objective: Objective) -> list[tuple[float, Objective]]:
    """Factors and parts of what :func:`combine` built; anything else is one part."""
    from reweigh.weighting.frequency import ClassWeight

    from ..objective import Objective

    criterion, weighting = objective.criterion, objective.weighting
    plain = type(objective) is Objective and objective.reduction.name == "sum"
    if not (plain and isinstance(criterion, Joint) and isinstance(weighting, ClassWeight)):
        return [(1.0, objective)]
    parts = [part for part in criterion.parts if isinstance(part, Objective)]
    return list(zip(weighting.table().tolist(), parts, strict=True))
