"""Criteria: what turns inputs into unreduced loss terms."""

from .base import Criterion
from .classwise import ClasswiseCrossEntropy
from .element import BinaryCrossEntropy, CrossEntropy, FromLoss
from .language import CausalLM

__all__ = [
    "BinaryCrossEntropy",
    "CausalLM",
    "ClasswiseCrossEntropy",
    "Criterion",
    "CrossEntropy",
    "FromLoss",
]
