"""Objectives: criteria, reductions, logit transforms, and the named losses composed of them."""

from . import functional
from .classification import FocalLoss, SigmoidFocalLoss
from .criteria import BinaryCrossEntropy, CausalLM, Criterion, CrossEntropy, FromLoss
from .language import PowerLawDecayLoss, TLDRLoss
from .logits import BalancedSoftmax, Chain, LogitAdjustment, LogitTransform, Temperature, posthoc_logit_adjustment
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
    "BalancedSoftmax",
    "BatchMean",
    "BinaryCrossEntropy",
    "CausalLM",
    "Chain",
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
    "Total",
    "TLDRLoss",
    "Temperature",
    "Unreduced",
    "WeightedMean",
    "functional",
    "posthoc_logit_adjustment",
]
