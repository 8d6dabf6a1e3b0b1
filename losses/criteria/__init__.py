"""Criteria: what turns inputs into unreduced loss terms."""

from .base import Criterion
from .binary import BinaryCrossEntropy
from .classwise import ClasswiseCrossEntropy
from .element import CrossEntropy
from .function import FromLoss
from .joint import Joint
from .language import CausalLM
from .pair import PairLogSumExp, PairSimilarity
from .proxy import ProxyCrossEntropy
from .region import Overlap
from .self_adjusting import SelfAdjustingDice
from .task import TaskLosses

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
    "TaskLosses",
]
