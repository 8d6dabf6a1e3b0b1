"""Weightings over the task axis: one weight per task's loss."""

from .base import TaskWeighting
from .closed import ScaleInvariant
from .fixed import Fixed
from .history import DWA
from .learned import Uncertainty

__all__ = ["DWA", "Fixed", "ScaleInvariant", "TaskWeighting", "Uncertainty"]
