"""Functional twins of the named objectives: same names, same defaults, one call."""

from ..logits import posthoc_logit_adjustment
from .classification import focal_loss, sigmoid_focal_loss, sigmoid_focal_loss_star
from .language import power_law_decay_loss, tldr_loss
from .linear import linear_causal_lm_loss, linear_cross_entropy
from .metric import circle_classification_loss, circle_loss, circle_similarity_loss
from .multilabel import asymmetric_loss, asymmetric_single_label_loss
from .robust_confidence import (
    active_passive_loss,
    comp_sum_loss,
    encouraging_loss,
    gce_loss,
    mae_loss,
    normalized_loss,
    poly_loss,
    sce_loss,
    taylor_loss,
)
from .robust_consistency import adawac_loss
from .robust_group import group_dro_loss
from .robust_instance import chi_square_dro_loss, cvar_loss, kl_dro_loss, tilted_loss
from .robust_label import adaptive_temperatures, aldr_loss, alim_loss, ldr_loss, partial_label_beliefs
from .robust_transition import forward_correction_loss, transition_reweighted_loss
from .segmentation import dice_loss, generalized_dice_loss, self_adjusting_dice_loss, tversky_loss, unified_focal_loss

__all__ = [
    "active_passive_loss",
    "adaptive_temperatures",
    "adawac_loss",
    "aldr_loss",
    "alim_loss",
    "asymmetric_loss",
    "asymmetric_single_label_loss",
    "chi_square_dro_loss",
    "circle_classification_loss",
    "circle_loss",
    "circle_similarity_loss",
    "comp_sum_loss",
    "cvar_loss",
    "dice_loss",
    "encouraging_loss",
    "focal_loss",
    "forward_correction_loss",
    "gce_loss",
    "generalized_dice_loss",
    "group_dro_loss",
    "kl_dro_loss",
    "ldr_loss",
    "linear_causal_lm_loss",
    "linear_cross_entropy",
    "mae_loss",
    "normalized_loss",
    "partial_label_beliefs",
    "poly_loss",
    "posthoc_logit_adjustment",
    "power_law_decay_loss",
    "sce_loss",
    "self_adjusting_dice_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "taylor_loss",
    "tilted_loss",
    "tldr_loss",
    "transition_reweighted_loss",
    "tversky_loss",
    "unified_focal_loss",
]
