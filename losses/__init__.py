"""Objectives: criteria, reductions, logit transforms, and the named losses composed of them."""

from . import functional
from .accumulation import Accumulator
from .classification import FocalLoss, SigmoidFocalLoss
from .criteria import (
    BinaryCrossEntropy,
    CausalLM,
    ClasswiseCrossEntropy,
    Criterion,
    CrossEntropy,
    FromLoss,
    Joint,
    Overlap,
    PairLogSumExp,
    PairSimilarity,
    ProxyCrossEntropy,
    SelfAdjustingDice,
    TaskLosses,
)
from .gradient_balancing import GradientBalancer
from .language import PowerLawDecayLoss, TLDRLoss
from .logits import BalancedSoftmax, Chain, LogitAdjustment, LogitTransform, Temperature, posthoc_logit_adjustment
from .margins import CircleLogits
from .metric import CircleClassificationLoss, CircleLoss
from .multilabel import AsymmetricLoss, AsymmetricSingleLabelLoss
from .multitask import MultiTaskLoss, strip
from .objective import Components, Objective
from .reductions import (
    BatchMean,
    GroupMean,
    Mean,
    Reduction,
    SequenceMean,
    Total,
    Unreduced,
    WeightedMean,
)
from .registry import available as available
from .registry import create as create
from .registry import registry as registry
from .scalarized import from_torchjd
from .segmentation import DiceLoss, GeneralizedDiceLoss, SelfAdjustingDiceLoss, TverskyLoss, UnifiedFocalLoss

__all__ = [
    "Accumulator",
    "AsymmetricLoss",
    "AsymmetricSingleLabelLoss",
    "BalancedSoftmax",
    "BatchMean",
    "BinaryCrossEntropy",
    "CausalLM",
    "Chain",
    "CircleClassificationLoss",
    "CircleLogits",
    "CircleLoss",
    "ClasswiseCrossEntropy",
    "Components",
    "Criterion",
    "CrossEntropy",
    "DiceLoss",
    "FocalLoss",
    "FromLoss",
    "GeneralizedDiceLoss",
    "GradientBalancer",
    "GroupMean",
    "Joint",
    "LogitAdjustment",
    "LogitTransform",
    "Mean",
    "MultiTaskLoss",
    "Objective",
    "Overlap",
    "PairLogSumExp",
    "PairSimilarity",
    "PowerLawDecayLoss",
    "ProxyCrossEntropy",
    "Reduction",
    "SelfAdjustingDice",
    "SelfAdjustingDiceLoss",
    "SequenceMean",
    "SigmoidFocalLoss",
    "TLDRLoss",
    "TaskLosses",
    "Temperature",
    "Total",
    "TverskyLoss",
    "UnifiedFocalLoss",
    "Unreduced",
    "WeightedMean",
    "from_torchjd",
    "functional",
    "posthoc_logit_adjustment",
    "strip",
]
