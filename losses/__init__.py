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
)
from .language import PowerLawDecayLoss, TLDRLoss
from .logits import BalancedSoftmax, Chain, LogitAdjustment, LogitTransform, Temperature, posthoc_logit_adjustment
from .multilabel import AsymmetricLoss, AsymmetricSingleLabelLoss
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

__all__ = [
    "Accumulator",
    "AsymmetricLoss",
    "AsymmetricSingleLabelLoss",
    "BalancedSoftmax",
    "BatchMean",
    "BinaryCrossEntropy",
    "CausalLM",
    "Chain",
    "ClasswiseCrossEntropy",
    "Components",
    "Criterion",
    "CrossEntropy",
    "FocalLoss",
    "FromLoss",
    "GroupMean",
    "LogitAdjustment",
    "LogitTransform",
    "Mean",
    "Objective",
    "PowerLawDecayLoss",
    "Reduction",
    "SequenceMean",
    "SigmoidFocalLoss",
    "TLDRLoss",
    "Temperature",
    "Total",
    "Unreduced",
    "WeightedMean",
    "functional",
    "posthoc_logit_adjustment",
]
