"""Weightings: functions from loss terms to one weight per term, and the algebra that composes them."""

from . import tasks
from .algebra import (
    EMA,
    Between,
    Clip,
    Constant,
    Detach,
    Frozen,
    Gathered,
    InClasses,
    Normalize,
    Pooled,
    Power,
    Product,
    Sum,
    Warmup,
    Where,
)
from .asymmetric import AdaptiveAsymmetricFocal, AsymmetricFocal
from .base import Scope, Weighting, learned_parameters
from .base import available as available
from .base import create as create
from .base import method as method
from .base import registry as registry
from .counting import class_counts
from .difficulty import Focal, HardNegatives, InverseClassLoss
from .dynamics import Dynamic, Event, drive, dynamics
from .frequency import ClassTable, ClassWeight, CountTable, EffectiveNumber, InverseFrequency, PositiveBalance
from .pair import CirclePacing
from .region import LossPower, VolumeBalance
from .sample import SampleTable
from .schedules import Cosine, Linear, Piecewise, Schedule
from .tasks import *  # noqa: F403
from .terms import LossTerms
from .token import TLDR, PowerLawDecay
from .tokens import token_counts

__all__ = [
    "AdaptiveAsymmetricFocal",
    "AsymmetricFocal",
    "Between",
    "CirclePacing",
    "ClassTable",
    "ClassWeight",
    "Clip",
    "Constant",
    "Cosine",
    "CountTable",
    "Detach",
    "Dynamic",
    "EMA",
    "EffectiveNumber",
    "Event",
    "Focal",
    "Frozen",
    "Gathered",
    "HardNegatives",
    "InClasses",
    "InverseClassLoss",
    "InverseFrequency",
    "Linear",
    "LossPower",
    "LossTerms",
    "Normalize",
    "Piecewise",
    "Pooled",
    "PositiveBalance",
    "Power",
    "PowerLawDecay",
    "Product",
    "SampleTable",
    "Schedule",
    "Scope",
    "Sum",
    "TLDR",
    "VolumeBalance",
    "Warmup",
    "Weighting",
    "Where",
    "class_counts",
    "drive",
    "dynamics",
    "learned_parameters",
    "token_counts",
]
__all__ += tasks.__all__
