"""Criteria: what turns inputs into unreduced loss terms."""

from .base import Criterion
from .binary import BinaryCrossEntropy
from .classwise import ClasswiseCrossEntropy
from .confidence import ActivePassive, ClosedForm, ExactCrossEntropy, NormalizedClosedForm
from .element import CrossEntropy
from .function import FromLoss
from .joint import Joint
from .label_dro import AdaptiveLabelDRO, LabelDRO
from .language import CausalLM
from .linear import LinearCausalLM, LinearCrossEntropy
from .pair import PairLogSumExp, PairSimilarity
from .partial_labels import PartialLabelCrossEntropy
from .proxy import ProxyCrossEntropy
from .region import Overlap
from .rows import packed_position_ids
from .self_adjusting import SelfAdjustingDice
from .stacked import StackedLosses
from .task import TaskLosses
from .text import NumberTokens, Unlikelihood
from .transition import NoisyCrossEntropy

__all__ = [
    "ActivePassive",
    "AdaptiveLabelDRO",
    "BinaryCrossEntropy",
    "CausalLM",
    "ClasswiseCrossEntropy",
    "ClosedForm",
    "Criterion",
    "CrossEntropy",
    "ExactCrossEntropy",
    "FromLoss",
    "Joint",
    "LabelDRO",
    "LinearCausalLM",
    "LinearCrossEntropy",
    "NoisyCrossEntropy",
    "NormalizedClosedForm",
    "NumberTokens",
    "Overlap",
    "PairLogSumExp",
    "PairSimilarity",
    "PartialLabelCrossEntropy",
    "ProxyCrossEntropy",
    "SelfAdjustingDice",
    "StackedLosses",
    "TaskLosses",
    "Unlikelihood",
    "packed_position_ids",
]
