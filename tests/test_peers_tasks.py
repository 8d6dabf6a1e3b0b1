"""Task weightings beside ``torchjd.scalarization``, where they define the same thing."""

import pytest
import torch

from reweigh import DWA, IMTLL, STCH, GeometricMean, MultiTaskLoss, Uncertainty

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
F64 = torch.float64
STEPS = 12


@pytest.fixture
def torchjd():
    return pytest.importorskip("torchjd.scalarization")


def objective(weighting, num_tasks):
    return MultiTaskLoss([f"task{k}" for k in range(num_tasks)], weighting).double()


def rows(num_tasks, seed=0):
    """Losses that fall at their own pace, of scales between 0.1 and 10."""
    generator = torch.Generator().manual_seed(seed)
    pace = torch.rand(num_tasks, generator=generator, dtype=F64)
    scale = torch.logspace(-1, 1, num_tasks, dtype=F64)
    for step in range(STEPS):
        noise = 0.9 + 0.2 * torch.rand(num_tasks, generator=generator, dtype=F64)
        yield scale * noise * (-0.1 * step * pace).exp()


def agree(ours, theirs, row):
    """Value and gradient in the losses; returns the two totals."""
    pairs = []
    for scalarize in (ours, theirs):
        losses = row.clone().requires_grad_()
        total = scalarize(losses)
        pairs.append((total, torch.autograd.grad(total, losses, retain_graph=True)[0]))
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-10, atol=1e-12)
    return pairs[0][0], pairs[1][0]


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_geometric_mean(torchjd, num_tasks):
    ours = objective(GeometricMean(), num_tasks)
    for row in rows(num_tasks):
        agree(ours, torchjd.GeometricMean(), row)


def test_geometric_mean_at_zero_is_where_we_part(torchjd):
    """Their gradient is nan."""
    for scalarize, finite in ((torchjd.GeometricMean(), False), (objective(GeometricMean(), 3), True)):
        losses = torch.tensor([0.0, 1.0, 2.0], dtype=F64, requires_grad=True)
        (slope,) = torch.autograd.grad(scalarize(losses), losses)
        assert bool(slope.isfinite().all()) == finite


@pytest.mark.parametrize("mu", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("given", [False, True])
def test_stch(torchjd, mu, given):
    preferences, reference = [0.2, 0.0, 1.5, 1.0], [0.1, -0.3, 0.0, 0.05]
    arguments = {"preferences": preferences, "reference": reference} if given else {}
    theirs = {"weights": torch.tensor(preferences, dtype=F64), "reference": torch.tensor(reference, dtype=F64)}
    ours = objective(STCH(mu, **arguments), 4)
    for row in rows(4):
        agree(ours, torchjd.STCH(mu, **(theirs if given else {})), row)


@pytest.mark.parametrize(("kind", "name"), [(Uncertainty, "UW"), (IMTLL, "IMTLL")])
def test_learned(torchjd, kind, name):
    """A whole training of the parameters."""
    ours, theirs = objective(kind(), 4), getattr(torchjd, name)(4).double()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.05) for part in (ours, theirs)]
    for row in rows(4):
        for optimizer, total in zip(optimizers, agree(ours, theirs, row), strict=True):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        ours.update("step")
        torch.testing.assert_close(ours.weighting.log_scale, next(theirs.parameters()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("epoch", [1, 3])
def test_dwa(torchjd, temperature, epoch):
    """Epochs of so many batches of one size."""
    ours, theirs = objective(DWA(temperature), 4), torchjd.DWA(temperature)
    for step, row in enumerate(rows(4)):
        agree(ours, theirs, row)
        ours.update("step")
        if step % epoch == epoch - 1:
            ours.update("epoch")
            theirs.step()
