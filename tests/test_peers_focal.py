"""FocalLoss and SigmoidFocalLoss beside MONAI and segmentation_models_pytorch, where they define the same thing."""

import pytest
import torch
from peers import peer
from torch.nn.functional import one_hot

from reweigh.losses import FocalLoss, SigmoidFocalLoss

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SHAPES = [(6, 4), (3, 4, 9), (2, 4, 5, 3)]


def agree(ours, theirs, logits):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_monai_sigmoid(shape, gamma, alpha, reduction):
    monai = pytest.importorskip("monai.losses")
    logits, target = (torch.randn(shape) * 3).requires_grad_(), (torch.rand(shape) < 0.3).float()
    theirs = monai.FocalLoss(gamma=gamma, alpha=alpha, reduction=reduction)(logits, target)
    agree(SigmoidFocalLoss(gamma, alpha=alpha, reduction=reduction)(logits, target), theirs, logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [None, [0.25, 0.5, 1.0, 2.0]])
def test_monai_softmax(shape, gamma, alpha):
    """Theirs has a zero for every class that is not the target's, and a mean over those too."""
    monai = pytest.importorskip("monai.losses")
    logits, target = (torch.randn(shape) * 3).requires_grad_(), torch.randint(4, shape[:1] + shape[2:])
    dense = one_hot(target, 4).movedim(-1, 1).float()
    theirs = monai.FocalLoss(gamma=gamma, alpha=alpha, use_softmax=True, reduction="none")(logits, dense)
    agree(FocalLoss(gamma, alpha=alpha, reduction="none")(logits, target), theirs.sum(1), logits)
    mean = monai.FocalLoss(gamma=gamma, alpha=alpha, use_softmax=True)(logits, dense)
    agree(FocalLoss(gamma, alpha=alpha)(logits, target), 4.0 * mean, logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_smp_sigmoid(shape, gamma, alpha):
    """In the range where its ``1 - exp(-loss)`` has not cancelled."""
    smp = peer("segmentation_models_pytorch", "losses._functional")
    logits, target = torch.randn(shape).requires_grad_(), (torch.rand(shape) < 0.3).float()
    theirs = smp.focal_loss_with_logits(logits, target, gamma=gamma, alpha=alpha, reduction="none")
    agree(SigmoidFocalLoss(gamma, alpha=alpha, reduction="none")(logits, target), theirs, logits)
