import torch

import reweigh


def test_focal_with_gamma_zero_is_cross_entropy():
    logits, target = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, -100, 1, 0])
    ours = reweigh.FocalLoss(gamma=0)(logits, target)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, target), rtol=1e-12, atol=0)
