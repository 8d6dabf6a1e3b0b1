"""Circle loss beside pytorch-metric-learning, where that is installed."""

import pytest
import torch

from reweigh import CircleLoss

pytestmark = pytest.mark.peers
losses = pytest.importorskip("pytorch_metric_learning.losses")
miners = pytest.importorskip("pytorch_metric_learning.miners")


def batch(seed, size=64, dim=32, classes=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    centers = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    x = centers[labels] + torch.randn(size, dim, generator=generator, dtype=torch.float64)
    return x.to(dtype), labels


def both(loss, x, *rest):
    leaf = x.clone().requires_grad_()
    value = loss(leaf, *rest)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def close(found, wanted, exact, tol):
    """Value within ``tol``; the gradient too, or no further from float64 than twice the peer's own rounding."""
    torch.testing.assert_close(found[0], wanted[0], rtol=tol, atol=0)
    mine, peer = ((grad.double() - exact).abs().max() / exact.abs().max() for _, grad in (found, wanted))
    assert mine <= max(tol, 2 * peer.item()), (mine, peer)


MINED = {
    "labels": lambda x, y: (),
    "hard pairs": lambda x, y: (miners.BatchHardMiner()(x, y),),
    "multi-similarity": lambda x, y: (miners.MultiSimilarityMiner(epsilon=0.3)(x, y),),
    "triplets": lambda x, y: (miners.TripletMarginMiner(margin=0.2, type_of_triplets="all")(x, y),),
}


@pytest.mark.parametrize("mined", MINED)
@pytest.mark.parametrize(("m", "gamma"), [(0.4, 80.0), (0.25, 256.0), (0.25, 2.0)])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_value_and_gradient(mined, m, gamma, dtype, tol):
    """1e-9 in float64: the peer's softplus is a straight line from 20 on, which is 2e-9 off there."""
    for seed in range(3):
        x, y = batch(seed, dtype=dtype)
        pairs = MINED[mined](x, y)
        peer, mine = losses.CircleLoss(m=m, gamma=gamma), CircleLoss(m, gamma=gamma, tile=24)
        exact = both(peer, x.double(), y, *pairs)[1]
        close(both(mine, x, y, *pairs), both(peer, x, y, *pairs), exact, tol)


def test_where_nothing_is_to_learn():
    x = torch.randn(4, 3)
    for y in (torch.zeros(4, dtype=torch.long), torch.arange(4)):
        for loss in (losses.CircleLoss(), CircleLoss()):
            value, grad = both(loss, x, y)
            assert value == 0
            assert (grad == 0).all()


def test_how_often_a_pair_is_listed_does_not_matter_to_either():
    x, y = batch(0)
    pairs = miners.BatchHardMiner()(x, y)
    twice = tuple(torch.cat([part, part]) for part in pairs)
    for loss in (losses.CircleLoss(), CircleLoss()):
        torch.testing.assert_close(loss(x, y, pairs), loss(x, y, twice), rtol=1e-7, atol=0)
