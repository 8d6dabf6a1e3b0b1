"""Criteria: what turns inputs into unreduced loss terms."""

from .base import Criterion
from .element import BinaryCrossEntropy, CrossEntropy, FromLoss

__all__ = ["BinaryCrossEntropy", "CrossEntropy", "Criterion", "FromLoss"]
