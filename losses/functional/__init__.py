"""Functional twins of the named objectives: same names, same defaults, one call."""

from ..logits import posthoc_logit_adjustment
from .classification import focal_loss, sigmoid_focal_loss, sigmoid_focal_loss_star
from .language import power_law_decay_loss, tldr_loss
from .metric import circle_classification_loss, circle_loss, circle_similarity_loss
from .multilabel import asymmetric_loss, asymmetric_single_label_loss
from .segmentation import dice_loss, generalized_dice_loss, self_adjusting_dice_loss, tversky_loss, unified_focal_loss

__all__ = [
    "asymmetric_loss",
    "asymmetric_single_label_loss",
    "circle_classification_loss",
    "circle_loss",
    "circle_similarity_loss",
    "dice_loss",
    "focal_loss",
    "generalized_dice_loss",
    "posthoc_logit_adjustment",
    "power_law_decay_loss",
    "self_adjusting_dice_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "tldr_loss",
    "tversky_loss",
    "unified_focal_loss",
]
