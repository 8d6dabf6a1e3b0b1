"""Named objectives for noisy labels, hard instances and weak groups."""

from .confidence import CompSumLoss, GCELoss, MAELoss, SCELoss
from .consistency import AdaWACLoss
from .expansion import EncouragingLoss, PolyLoss, TaylorLoss
from .group import GroupDROLoss
from .instance import ChiSquareDROLoss, CVaRLoss, KLDROLoss, TiltedLoss
from .label import ALDRLoss, LDRLoss
from .normalized import ActivePassiveLoss, NormalizedLoss
from .partial import ALIMLoss
from .transition import ForwardCorrectionLoss, TransitionReweightedLoss

__all__ = [
    "ALDRLoss",
    "ALIMLoss",
    "ActivePassiveLoss",
    "AdaWACLoss",
    "CVaRLoss",
    "ChiSquareDROLoss",
    "CompSumLoss",
    "EncouragingLoss",
    "ForwardCorrectionLoss",
    "GCELoss",
    "GroupDROLoss",
    "KLDROLoss",
    "LDRLoss",
    "MAELoss",
    "NormalizedLoss",
    "PolyLoss",
    "SCELoss",
    "TaylorLoss",
    "TiltedLoss",
    "TransitionReweightedLoss",
]
