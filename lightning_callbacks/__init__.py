"""Callbacks that drive dynamic weights in a Lightning Trainer, feed them class counts, and show what they do; metrics.

Callbacks work with ``pytorch_lightning`` and with ``lightning.pytorch``.
"""

from .balancer import GradientBalancing
from .driver import WeightingCallback
from .metrics import (
    EffectiveSampleSize,
    GroupAccuracy,
    SplitAccuracy,
    WeightEntropy,
    WorstClassRecall,
    WorstGroupAccuracy,
)
from .monitor import WeightingMonitor
from .probe import ValidationProbe
from .statistics import FitStatistics
from .token_metrics import DistinctN, RareTokenAccuracy, Repetition, TokenFrequencyLoss, frequency_bins
from .two_stage import JustTrainTwice, LearningFromFailure

__all__ = [
    "DistinctN",
    "EffectiveSampleSize",
    "FitStatistics",
    "GradientBalancing",
    "GroupAccuracy",
    "JustTrainTwice",
    "LearningFromFailure",
    "RareTokenAccuracy",
    "Repetition",
    "SplitAccuracy",
    "TokenFrequencyLoss",
    "ValidationProbe",
    "WeightEntropy",
    "WeightingCallback",
    "WeightingMonitor",
    "WorstClassRecall",
    "WorstGroupAccuracy",
    "frequency_bins",
]
