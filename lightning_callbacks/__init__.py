"""Callbacks that drive dynamic weights in a Lightning Trainer, feed them class counts, and show what they do.

They work with ``pytorch_lightning`` and with ``lightning.pytorch``.
"""

from .balancer import GradientBalancing
from .driver import WeightingCallback
from .monitor import WeightingMonitor
from .probe import ValidationProbe
from .statistics import FitStatistics

__all__ = ["FitStatistics", "GradientBalancing", "ValidationProbe", "WeightingCallback", "WeightingMonitor"]
