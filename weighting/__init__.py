"""Weightings: functions from loss terms to one weight per term, and the algebra that composes them."""

from . import tasks
from .adversarial import DAFA, GAIRAT, LRAT, MAIL
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
from .confidence import (
    DFT,
    CompSum,
    Confidence,
    GeneralizedCrossEntropy,
    SymmetricCrossEntropy,
    confidence_curve,
)
from .counting import class_counts
from .difficulty import Focal, HardNegatives, InverseClassLoss
from .dynamics import Dynamic, Event, drive, dynamics
from .entropy import EntropyAdaptive, MiLe
from .expansion import Encouraging, FocalSlope, Poly, Taylor
from .frequency import ClassTable, ClassWeight, CountTable, EffectiveNumber, InverseFrequency, PositiveBalance
from .functional import probability_margin
from .group import GroupCVaR, GroupDRO
from .group_frequency import GroupFrequency, group_index, group_sampling_weights
from .importance import (
    ImportanceWeight,
    PredictionAgreement,
    ScoreWeight,
    SelfInfluence,
    log_ratio_from_classifier,
)
from .instance import KLDRO, ChiSquareDRO, CompositionalDRO, LossRange, Tilted
from .noise import TransitionWeight, dirichlet_weights, resample_weights
from .pair import CirclePacing
from .reference import ReferenceExcess
from .region import LossPower, VolumeBalance
from .remembered import AdaWAC, RelativeDifficulty, SampleWeight
from .sample import SampleTable
from .schedules import Cosine, Linear, Piecewise, Schedule
from .selection import CVaR, SelfPaced, SmallLoss, SuperLoss
from .span import Given, PositionWeight, Spans, TokenMask, attention_importance, prompt_spans
from .tasks import *  # noqa: F403
from .terms import LossTerms
from .token import TLDR, PowerLawDecay
from .token_frequency import FrequencyAware, InverseDocumentFrequency
from .tokens import token_counts

__all__ = [
    "AdaWAC",
    "AdaptiveAsymmetricFocal",
    "AsymmetricFocal",
    "Between",
    "CVaR",
    "ChiSquareDRO",
    "CirclePacing",
    "ClassTable",
    "ClassWeight",
    "Clip",
    "CompSum",
    "CompositionalDRO",
    "Confidence",
    "Constant",
    "Cosine",
    "CountTable",
    "DAFA",
    "DFT",
    "Detach",
    "Dynamic",
    "EMA",
    "EffectiveNumber",
    "Encouraging",
    "EntropyAdaptive",
    "Event",
    "Focal",
    "FocalSlope",
    "FrequencyAware",
    "Frozen",
    "GAIRAT",
    "Gathered",
    "GeneralizedCrossEntropy",
    "Given",
    "GroupCVaR",
    "GroupDRO",
    "GroupFrequency",
    "HardNegatives",
    "ImportanceWeight",
    "InClasses",
    "InverseClassLoss",
    "InverseDocumentFrequency",
    "InverseFrequency",
    "KLDRO",
    "LRAT",
    "Linear",
    "LossPower",
    "LossRange",
    "LossTerms",
    "MAIL",
    "MiLe",
    "Normalize",
    "Piecewise",
    "Poly",
    "Pooled",
    "PositionWeight",
    "PositiveBalance",
    "Power",
    "PowerLawDecay",
    "PredictionAgreement",
    "Product",
    "ReferenceExcess",
    "RelativeDifficulty",
    "SampleTable",
    "SampleWeight",
    "Schedule",
    "Scope",
    "ScoreWeight",
    "SelfInfluence",
    "SelfPaced",
    "SmallLoss",
    "Spans",
    "Sum",
    "SuperLoss",
    "SymmetricCrossEntropy",
    "TLDR",
    "Taylor",
    "Tilted",
    "TokenMask",
    "TransitionWeight",
    "VolumeBalance",
    "Warmup",
    "Weighting",
    "Where",
    "attention_importance",
    "class_counts",
    "confidence_curve",
    "dirichlet_weights",
    "drive",
    "dynamics",
    "group_index",
    "group_sampling_weights",
    "learned_parameters",
    "log_ratio_from_classifier",
    "probability_margin",
    "prompt_spans",
    "resample_weights",
    "token_counts",
]
__all__ += tasks.__all__
