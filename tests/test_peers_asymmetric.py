"""AsymmetricLoss and AsymmetricSingleLabelLoss beside timm's, where both define the same thing."""

import pytest
import torch
from peers import peer

from reweigh.losses import AsymmetricLoss, AsymmetricSingleLabelLoss

pytestmark = pytest.mark.peers


def close(ours, theirs, logits):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(("gammas", "clip"), [((4.0, 1.0), 0.05), ((2.0, 0.0), 0.2), ((1.0, 3.0), 0.0)])
def test_multi_label(gammas, clip, detach, reduction):
    module = peer("timm", "loss.asymmetric_loss")
    logits = torch.randn(16, 20).requires_grad_()  # beyond |x| = 4 their float32 log(1 - p) is off by more than 1e-6
    targets = (torch.rand(16, 20) < 0.2).float()
    theirs = module.AsymmetricLossMultiLabel(
        *gammas, clip=clip, disable_torch_grad_focal_loss=detach, reduction=reduction
    )
    ours = AsymmetricLoss(*gammas, clip=clip, detach=detach, reduction=reduction.replace("batchm", "batch_m"))
    close(ours(logits, targets), theirs(logits, targets), logits)


def test_multi_label_weights():
    module = peer("timm", "loss.asymmetric_loss")
    logits = (torch.randn(16, 5) * 2).requires_grad_()
    targets, weight = (torch.rand(16, 5) < 0.2).float(), torch.rand(5)
    theirs = module.AsymmetricLossMultiLabel(weight=weight, pos_weight=3.0, reduction="mean")
    ours = AsymmetricLoss(weight=weight, pos_weight=3.0, detach=False)
    close(ours(logits, targets), theirs(logits, targets), logits)


@pytest.mark.parametrize(("gammas", "smoothing"), [((4.0, 0.0), 0.1), ((4.0, 1.0), 0.1), ((2.0, 2.0), 0.3)])
def test_single_label(gammas, smoothing):
    module = peer("timm", "loss.asymmetric_loss")
    logits, target = (torch.randn(16, 7) * 2).requires_grad_(), torch.randint(7, (16,))
    theirs = module.AsymmetricLossSingleLabel(gamma_neg=gammas[0], gamma_pos=gammas[1], eps=smoothing)
    ours = AsymmetricSingleLabelLoss(*gammas, label_smoothing=smoothing)
    close(ours(logits, target), theirs(logits, target), logits)
