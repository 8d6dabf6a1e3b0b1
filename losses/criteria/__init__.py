"""Criteria: what turns inputs into unreduced loss terms."""

from .base import Criterion
from .classwise import ClasswiseCrossEntropy
from .element import BinaryCrossEntropy, CrossEntropy, FromLoss
from .joint import Joint
from .language import CausalLM
from .pair import PairLogSumExp, PairSimilarity
from .proxy import ProxyCrossEntropy
from .region import Overlap, SelfAdjustingDice

__all__ = [
    "BinaryCrossEntropy",
    "CausalLM",
    "ClasswiseCrossEntropy",
    "Criterion",
    "CrossEntropy",
    "FromLoss",
    "Joint",
    "Overlap",
    "PairLogSumExp",
    "PairSimilarity",
    "ProxyCrossEntropy",
    "SelfAdjustingDice",
]
