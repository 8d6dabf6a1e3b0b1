"""A third-party package: what it registers shows up in ``available()`` and can be created by name."""

from torch import Tensor

from reweigh.losses import CrossEntropy, Objective
from reweigh.weighting import LossTerms, Weighting


class Hardness(Weighting):
    """Weigh each term by its own loss to a power, as a constant."""

    needs = frozenset({"loss"})
    detached = True
    scope = "local"

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def weigh(self, terms: LossTerms) -> Tensor:
        return terms.loss.detach() ** self.power


class HardMean(Objective):
    """Cross-entropy weighed by :class:`Hardness`."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__(CrossEntropy(), Hardness(power), "weighted_mean")
