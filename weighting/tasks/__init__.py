"""Weightings over the task axis: one weight per task's loss."""

from .base import TaskWeighting
from .closed import RLW, UWO, UWSO, GeometricMean, ScaleInvariant
from .coba import CoBa
from .famo import FAMO
from .fixed import Fixed, Ramp, Staged, TemperatureMixing, mixing_probabilities
from .go4align import GO4Align
from .gradient import GradNorm, OutputGradientBalancer
from .history import DWA, IGB, CoefficientOfVariation, SoftAdapt
from .learned import IMTLL, LearnedSoftmax, RevisedUncertainty, Uncertainty
from .relative import LossBalancedTaskWeighting, NormalizedLossBalance, ReLoBRaLo
from .tchebycheff import STCH, LogSTCH

__all__ = [
    "CoBa",
    "CoefficientOfVariation",
    "DWA",
    "FAMO",
    "Fixed",
    "GO4Align",
    "GeometricMean",
    "GradNorm",
    "IGB",
    "IMTLL",
    "LearnedSoftmax",
    "LogSTCH",
    "LossBalancedTaskWeighting",
    "NormalizedLossBalance",
    "OutputGradientBalancer",
    "RLW",
    "Ramp",
    "ReLoBRaLo",
    "RevisedUncertainty",
    "STCH",
    "ScaleInvariant",
    "SoftAdapt",
    "Staged",
    "TaskWeighting",
    "TemperatureMixing",
    "UWO",
    "UWSO",
    "Uncertainty",
    "mixing_probabilities",
]
