"""TorchJD's methods on our losses: right Gramian, one backward per task, ranks that agree, state that survives."""

import copy
import io
import json
import math
import pickle
from pathlib import Path

import lightning_kit
import pytest
import torch
import torchjd_worker as worker
from ranks import run_lightning, run_ranks
from torch import nn

import reweigh
from reweigh.losses import GradientBalancer, MultiTaskLoss, from_torchjd
from reweigh.weighting import Fixed, ScaleInvariant, Uncertainty

pytest.importorskip("torchjd")

from torchjd import aggregation, scalarization

pytestmark = lightning_kit.QUIET

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mtl_gramian_weights.json").read_text())
CASES = GOLDEN["cases"]
NAMES = ("a", "b", "c")


def linear_losses(rows, names=NAMES):
    """Parameters whose losses have the given Jacobian, split in two so that it is put together from parts."""
    first, second = (nn.Parameter(torch.full((n,), 0.3, dtype=torch.float64)) for n in (1, len(rows[0]) - 1))
    rows = torch.tensor(rows, dtype=torch.float64)
    point = torch.cat([first, second])
    return {name: row @ point for name, row in zip(names, rows, strict=False)}, [first, second]


def gradient(parameters):
    return torch.cat([p.grad.reshape(-1) for p in parameters])


# golden

METHODS = {
    "MGDAWeighting": (lambda: aggregation.MGDAWeighting(epsilon=1e-8, max_iters=5000), 1e-4),
    "IMTLGWeighting": (aggregation.IMTLGWeighting, 1e-9),
    "AlignedMTLWeighting": (aggregation.AlignedMTLWeighting, 1e-9),
    "FairGradWeighting": (lambda: aggregation.FairGradWeighting(alpha=1.0), 1e-9),
    "MeanWeighting": (aggregation.MeanWeighting, 1e-9),
    "SumWeighting": (aggregation.SumWeighting, 1e-9),
    "PCGradWeighting_seed0": (aggregation.PCGradWeighting, 1e-9),
}
ELSEWHERE = {"J", "gramian", "CAGradWeighting", "ConFIG_vector"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", METHODS)
def test_golden_weights(case, key):
    make, tolerance = METHODS[key]
    losses, parameters = linear_losses(CASES[case]["J"])
    balancer = GradientBalancer(make(), list(losses))
    weights = torch.stack(list(balancer.backward(losses).values()))
    expected = torch.tensor(CASES[case][key], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=tolerance, atol=tolerance)
    jacobian = torch.tensor(CASES[case]["J"], dtype=torch.float64)
    torch.testing.assert_close(gradient(parameters), weights @ jacobian, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_golden_direction_and_gramian(case):
    losses, parameters = linear_losses(CASES[case]["J"])
    balancer = GradientBalancer(aggregation.ConFIG(), list(losses))
    assert balancer.backward(losses, retain_graph=True) == {}
    expected = torch.tensor(CASES[case]["ConFIG_vector"], dtype=torch.float64)
    torch.testing.assert_close(gradient(parameters), expected, rtol=1e-9, atol=1e-9)

    seen = []
    listener = GradientBalancer(lambda gramian: seen.append(gramian) or gramian.new_ones(len(gramian)), list(losses))
    listener.backward(losses)
    expected = torch.tensor(CASES[case]["gramian"], dtype=torch.float64)
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=1e-12)


def test_no_golden_number_is_left_out():
    for case in CASES.values():
        assert set(case) == METHODS.keys() | ELSEWHERE
        assert case["CAGradWeighting"].startswith("unavailable")  # needs a solver that was not installed


# against TorchJD itself


class Net(nn.Module):
    def __init__(self, tasks=3):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(tasks))
        self.double()

    def losses(self, x, y, names=NAMES):
        z = self.trunk(x)
        return {
            n: (h(z).squeeze(-1) - y[:, k]).square().mean()
            for k, (n, h) in enumerate(zip(names, self.heads, strict=True))
        }


def problem(seed=0, size=12):
    torch.manual_seed(seed)
    net = Net()
    return net, torch.randn(size, 5, dtype=torch.float64), torch.randn(size, 3, dtype=torch.float64) * 2


def grads(net):
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def same(found, expected, tol=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, rtol=tol, atol=tol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("sync", ["weights", "jacobian"])
@pytest.mark.parametrize(
    "make",
    [
        aggregation.AlignedMTL,
        aggregation.IMTLG,
        aggregation.MGDA,
        aggregation.ConFIG,
        aggregation.Mean,
        lambda: aggregation.TrimmedMean(1),
        lambda: aggregation.Krum(0),
    ],
    ids=["AlignedMTL", "IMTLG", "MGDA", "ConFIG", "Mean", "TrimmedMean", "Krum"],
)
def test_aggregators_give_what_torchjd_gives(make, sync):
    """The whole network's gradient is that of TorchJD's own engine."""
    from torchjd import autojac

    net, x, y = problem()
    GradientBalancer(make(), NAMES, sync=sync).backward(net.losses(x, y))
    ours = grads(net)
    net.zero_grad()
    autojac.backward(list(net.losses(x, y).values()))
    autojac.jac_to_grad(list(net.parameters()), make())
    same(ours, grads(net), 1e-10)


def test_what_the_method_looks_at():
    """With shared=, the Gramian is the trunk's; heads get their task's gradient times its weight."""
    net, x, y = problem()
    balancer = GradientBalancer(aggregation.IMTLG(), NAMES, shared=net.trunk)
    weights = balancer.backward(net.losses(x, y))
    ours = grads(net)
    losses = list(net.losses(x, y).values())
    trunk = list(net.trunk.parameters())
    rows = torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, trunk, retain_graph=True)]) for v in losses]
    )
    expected = aggregation.IMTLGWeighting()(rows @ rows.T)
    torch.testing.assert_close(torch.stack(list(weights.values())), expected, rtol=1e-10, atol=1e-12)
    net.zero_grad()
    sum(w * v for w, v in zip(expected, losses, strict=True)).backward()
    same(ours, grads(net), 1e-10)


def test_a_direction_leaves_heads_their_own_gradient():
    net, x, y = problem()
    GradientBalancer(aggregation.ConFIG(), NAMES, shared=net.trunk).backward(net.losses(x, y))
    ours = grads(net)
    net.zero_grad()
    sum(net.losses(x, y).values()).backward()
    same({k: v for k, v in ours.items() if "heads" in k}, {k: v for k, v in grads(net).items() if "heads" in k})
    assert not torch.allclose(ours["trunk.0.weight"], net.trunk[0].weight.grad)


# cost


class Passes(torch.autograd.Function):
    number = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        Passes.number += 1
        return slope


def passes(run):
    Passes.number = 0
    run()
    return Passes.number


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_one_backward_pass_of_the_trunk_per_task(tasks):
    torch.manual_seed(0)
    names = [str(k) for k in range(tasks)]
    net, x, y = Net(tasks), torch.randn(6, 5, dtype=torch.float64), torch.randn(6, tasks, dtype=torch.float64)
    net.trunk.append(nn.Identity())
    net.trunk[-1].forward = Passes.apply
    for sync in ("weights", "jacobian"):
        for method in (aggregation.MGDA(), aggregation.ConFIG()):
            balancer = GradientBalancer(method, names, sync=sync)
            assert passes(lambda b=balancer: b.backward(net.losses(x, y, names))) == tasks
    assert passes(lambda: MultiTaskLoss(names)(net.losses(x, y, names)).backward()) == 1
    if tasks == 3:  # an absent task costs nothing
        assert passes(lambda: balancer.backward(net.losses(x, y, names), mask={"1": False})) == 2


# losses as MultiTaskLoss knows them


def test_weights_first_losses_and_the_total_of_a_multi_task_loss():
    net, x, y = problem()
    loss = MultiTaskLoss(NAMES, {"a": 2.0, "b": 1.0, "c": 0.5}, init="first")
    balancer = GradientBalancer(aggregation.Sum(), loss)
    balancer.backward(net.losses(x, y))
    ours = grads(net)
    other = MultiTaskLoss(NAMES, {"a": 2.0, "b": 1.0, "c": 0.5}, init="first")
    net.zero_grad()
    other(net.losses(x, y)).backward()
    same(ours, grads(net))
    torch.testing.assert_close(loss.criterion.first, other.criterion.first)


def test_rows_are_weighted_losses():
    """Scale-invariant losses first: a task's unit then changes nothing at all."""
    net, x, y = problem()
    found = []
    for factor in (1.0, 1000.0):
        net.zero_grad()
        losses = net.losses(x, y)
        balancer = GradientBalancer(aggregation.MGDA(), MultiTaskLoss(NAMES, ScaleInvariant()))
        balancer.backward({**losses, "b": factor * losses["b"]})
        found.append(grads(net))
    same(found[0], found[1], 1e-9)


def test_absent_tasks_have_no_row():
    net, x, y = problem()
    full, two = grads(net), None
    for losses, mask in [
        ({k: v for k, v in net.losses(x, y).items() if k != "b"}, None),
        (net.losses(x, y), {"b": False}),
        (net.losses(x, y), torch.tensor([True, False, True])),
    ]:
        net.zero_grad()
        balancer = GradientBalancer(aggregation.IMTLG(), NAMES)
        weights = balancer.backward(losses, mask=mask)
        assert weights["b"] == 0
        assert sum(weights.values()) == pytest.approx(1.0)
        assert net.heads[1].weight.grad is None  # as after an ordinary backward
        two = two or grads(net)
        same(grads(net), two)
    assert full.keys() == two.keys()
    nothing = balancer.backward({})
    assert all(weight == 0 for weight in nothing.values())
    same(grads(net), two)
    single = balancer.backward({"a": net.losses(x, y)["a"]})
    assert single["a"] == pytest.approx(1.0)


def test_losses_that_are_not_finite():
    net, x, y = problem()
    bad = {**net.losses(x, y)}
    bad["b"] = bad["b"] * math.nan
    skipping = GradientBalancer(aggregation.IMTLG(), MultiTaskLoss(NAMES, nonfinite="skip"))
    weights = skipping.backward(bad, retain_graph=True)
    assert weights["b"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(FloatingPointError, match="'b'"):
        GradientBalancer(aggregation.IMTLG(), MultiTaskLoss(NAMES, nonfinite="raise")).backward(bad, retain_graph=True)
    net.zero_grad()
    weights = GradientBalancer(aggregation.IMTLG(), NAMES).backward(bad)
    assert all(weight == 1 for weight in weights.values())
    assert not net.trunk[0].weight.grad.isfinite().all()  # a GradScaler would see it


def test_a_loss_inside_another_one():
    """A sum of losses beside its parts: every row is that loss's gradient."""
    net, x, y = problem()
    seen = []
    balancer = GradientBalancer(lambda g: seen.append(g) or g.new_ones(len(g)), NAMES)
    losses = net.losses(x, y)
    balancer.backward({"a": losses["a"], "b": losses["b"], "c": losses["a"] + losses["b"]})
    (gramian,) = seen
    torch.testing.assert_close(gramian[2, 2], gramian[:2, :2].sum())


def test_a_vector_of_losses():
    net, x, y = problem()
    named = GradientBalancer(aggregation.IMTLG(), NAMES)
    named.backward(net.losses(x, y))
    expected = grads(net)
    net.zero_grad()
    named.backward(torch.stack(list(net.losses(x, y).values())))
    same(grads(net), expected)
    net.zero_grad()
    named.backward(named(torch.stack(list(net.losses(x, y).values()))))
    same(grads(net), expected)


# scaled, accumulated, clipped


@pytest.mark.parametrize("make", [aggregation.IMTLG, lambda: aggregation.FairGrad(alpha=0.5), aggregation.ConFIG])
@pytest.mark.parametrize("sync", ["weights", "jacobian"])
def test_a_factor_on_the_vector_is_a_factor_on_the_gradient(make, sync):
    """Also for methods that are not homogeneous: the scaler must not change what they see."""
    net, x, y = problem()
    balancer = GradientBalancer(make(), NAMES, sync=sync)
    balancer.backward(balancer(net.losses(x, y)))
    expected, weights = grads(net), balancer.weights
    net.zero_grad()
    balancer.backward(balancer(net.losses(x, y)) * 65536.0)
    same({k: v / 65536.0 for k, v in grads(net).items()}, expected)
    for name, weight in balancer.weights.items():
        torch.testing.assert_close(weight, weights[name])


def test_accumulation_adds_up():
    net, x, y = problem()
    balancer = GradientBalancer(aggregation.IMTLG(), NAMES)
    parts = []
    for rows in (slice(0, 6), slice(6, 12)):
        net.zero_grad()
        balancer.backward(net.losses(x[rows], y[rows]))
        parts.append(grads(net))
    net.zero_grad()
    for rows in (slice(0, 6), slice(6, 12)):
        balancer.backward(balancer(net.losses(x[rows], y[rows])) / 2)
    same(grads(net), {k: (parts[0][k] + parts[1][k]) / 2 for k in parts[0]})


def test_hooks_of_parameters_run():
    net, x, y = problem()
    seen = []
    net.trunk[0].weight.register_hook(lambda g: g * 2)
    net.trunk[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    balancer = GradientBalancer(aggregation.Sum(), NAMES)
    balancer.backward(net.losses(x, y))
    assert len(seen) == 1
    net.zero_grad()
    sum(net.losses(x, y).values()).backward()
    torch.testing.assert_close(seen[0], seen[1])


def test_some_parameters():
    net, x, y = problem()
    balancer = GradientBalancer(aggregation.IMTLG(), NAMES)
    balancer.backward(net.losses(x, y), net.trunk.parameters())
    assert net.heads[0].weight.grad is None
    assert net.trunk[0].weight.grad is not None
    net.trunk[0].weight.requires_grad_(False)
    net.zero_grad()
    balancer.backward(net.losses(x, y))
    assert net.trunk[0].weight.grad is None


# several processes


WARNINGS = ("-W", "error", "-W", "ignore:.*process group has NOT")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process of a world found; a world is started when the first test asks for it."""

    class Worlds(dict):
        def __missing__(self, world):
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            self[world] = run_ranks(worker.__file__, world, folder, "plain", timeout=120, strict=WARNINGS)
            return self[world]

    return Worlds()


FOUR = pytest.param(4, marks=pytest.mark.slow)
PLACES = [pytest.param(2, run, id=f"2-{run}") for run in worker.RUNS]
PLACES += [pytest.param(4, run, id=f"4-{run}", marks=pytest.mark.slow) for run in worker.SMALLER]
EXACT = [place for place in PLACES if place.values[1][1] == "jacobian"]


@pytest.mark.parametrize(("world", "run"), PLACES)
def test_ranks_stay_equal(ranks, world, run):
    for other in ranks[world][1:]:
        same(other[str(run)], ranks[world][0][str(run)], 0.0)


@pytest.mark.parametrize(("world", "run"), EXACT)
def test_the_averaged_jacobian_is_one_process_on_the_joined_batch(ranks, world, run):
    """Uneven batches, absent tasks, a rank without any; inside DistributedDataParallel and without it."""
    same(ranks[world][0][str(run)], worker.train(*run, rank=0, world=1), 1e-9)


@pytest.mark.parametrize("world", [2, FOUR])
@pytest.mark.parametrize("scenario", ["uneven", "missing"])
def test_averaged_weights_are_means_over_the_ranks_that_have_the_task(ranks, world, scenario):
    """Each rank weighs the gradients of its own means, whatever their part of the joined batch."""
    alone = torch.stack([worker.own_weights(scenario, rank, world) for rank in range(world)])
    expected = alone.sum(0) / (alone != 0).sum(0)
    for rank in ranks[world]:
        torch.testing.assert_close(rank[f"own {scenario}"], expected, rtol=1e-9, atol=1e-12)
    assert (alone == 0).any() == (scenario == "missing")


def test_the_runs_depend_on_what_they_are_compared_by(ranks):
    """Averaged weights are another method, missing tasks other data: the comparison above can fail."""
    runs = ranks[2][0]
    one, other = (runs[str(("IMTLG", sync, "even", True))] for sync in ("weights", "jacobian"))
    assert not torch.allclose(one["trunk.0.weight"], other["trunk.0.weight"], rtol=1e-6)
    even, missing = (runs[str(("IMTLG", "jacobian", scenario, True))] for scenario in ("even", "missing"))
    assert not torch.allclose(even["trunk.0.weight"], missing["trunk.0.weight"], rtol=1e-6)


def test_torchjd_alone_leaves_ranks_apart(ranks):
    """Its documented pattern inside DistributedDataParallel: no error, and parameters that differ."""
    first, second = (rank["documented pattern"] for rank in ranks[2])
    assert not torch.allclose(first["trunk.0.weight"], second["trunk.0.weight"], rtol=1e-9)


def test_directions_cannot_be_averaged_as_weights(ranks):
    for rank in ranks[2]:
        assert "ConFIG gives a direction" in rank["refused"]
        assert "needs backward(..., parameters=)" in rank["unknown parameters"]


# state


@pytest.mark.parametrize("make", [aggregation.PCGrad, aggregation.GradVac, aggregation.Random, aggregation.PCD])
def test_resuming_a_method_with_a_memory_or_random_draws(make):
    net, x, y = problem()

    def steps(balancer, number):
        found = []
        for _ in range(number):
            torch.rand(3)  # somebody else's random numbers do not matter
            found.append(torch.stack(list(balancer.backward(net.losses(x, y)).values())))
        return torch.stack(found)

    whole = GradientBalancer(make(), NAMES)
    first = steps(whole, 2)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    expected = steps(whole, 3)
    fresh = GradientBalancer(make(), NAMES)
    torch.rand(5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(steps(fresh, 3), expected)
    assert first.shape == (2, 3)


def test_random_methods_leave_the_global_generator_alone():
    net, x, y = problem()
    balancer = GradientBalancer(aggregation.Random(), NAMES)
    before = torch.get_rng_state()
    one, two = (list(balancer.backward(net.losses(x, y)).values()) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert one != two


def test_copies_go_on_alone():
    net, x, y = problem()
    balancer = GradientBalancer(aggregation.GradVac(), NAMES)
    balancer.backward(net.losses(x, y))
    twins = [copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))]
    assert all(twin.weights == {} for twin in twins)
    first, *others = (list(each.backward(net.losses(x, y)).values()) for each in (balancer, *twins))
    assert all(other == first for other in others)


def test_a_memory_that_cannot_be_saved_is_said():
    balancer = GradientBalancer(Odd(), NAMES)
    net, x, y = problem()
    balancer.backward(net.losses(x, y))
    with pytest.warns(UserWarning, match="Odd keeps 'seen' .* starts fresh"):
        balancer.state_dict()


# errors


def test_errors():
    net, x, y = problem()
    with pytest.raises(TypeError, match="must be callable"):
        GradientBalancer(3, NAMES)
    with pytest.raises(ValueError, match="sync must be one of"):
        GradientBalancer(aggregation.MGDA(), NAMES, sync="gradients")
    with pytest.raises(ValueError, match="on must be one of"):
        GradientBalancer(aggregation.MGDA(), NAMES, on="hessian")
    with pytest.raises(TypeError, match="ConFIG needs the Jacobian"):
        GradientBalancer(aggregation.ConFIG(), NAMES, on="gramian")
    with pytest.raises(TypeError, match=r"Uncertainty\(\) is learned"):
        GradientBalancer(aggregation.MGDA(), MultiTaskLoss(NAMES, Uncertainty()))
    with pytest.raises(ValueError, match="weights of shape"):
        GradientBalancer(lambda g: g, NAMES).backward(net.losses(x, y))
    with pytest.raises(ValueError, match="direction of shape"):
        GradientBalancer(lambda j: j, NAMES, on="jacobian").backward(net.losses(x, y))
    with pytest.raises(ValueError, match="names 'z'"):
        GradientBalancer(aggregation.MGDA(), NAMES).backward({"z": torch.ones(())})
    with pytest.raises(ValueError, match="one number per task"):
        GradientBalancer(aggregation.MGDA(), NAMES).backward(torch.ones(2))
    with pytest.raises(ValueError, match="none of the parameters"):
        GradientBalancer(aggregation.MGDA(), NAMES, shared=Net().trunk).backward(net.losses(x, y))
    balancer = GradientBalancer(aggregation.MGDA(), NAMES)
    vector = balancer(net.losses(x, y))
    with pytest.raises(ValueError, match="belong to the call"):
        balancer.backward(vector, mask={"a": False})


def test_an_error_does_not_leave_a_call_open():
    net, x, y = problem()
    balancer = GradientBalancer(lambda g: g, NAMES)
    with pytest.raises(ValueError):
        balancer.backward(net.losses(x, y))
    assert balancer._open is None


# TorchJD's scalarizers as task weightings


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


SCALARIZERS = {
    "Mean": scalarization.Mean,
    "Sum": scalarization.Sum,
    "Constant": lambda: scalarization.Constant(vector([1.0, 2.0, 0.5])),
    "GeometricMean": scalarization.GeometricMean,
    "STCH": lambda: scalarization.STCH(0.7),
    "STCH weights": lambda: scalarization.STCH(0.7, vector([0.2, 0.3, 0.5]), torch.zeros(3)),
    "PBI": lambda: scalarization.PBI(2.0, vector([0.2, 0.3, 0.5])),
    "COSMOS": lambda: scalarization.COSMOS(0.5, vector([0.2, 0.3, 0.5])),
    "UW": lambda: scalarization.UW(3),
    "IMTLL": lambda: scalarization.IMTLL(3),
    "Random": scalarization.Random,
    "DWA": scalarization.DWA,
    "FAMO": lambda: scalarization.FAMO(3),
}


def test_every_scalarizer_is_covered():
    assert {key.split()[0] for key in SCALARIZERS} == set(scalarization.__all__) - {"Scalarizer"}


def row(seed, scale=(1.0, 3.0, 0.2)):
    values = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return values * torch.tensor(scale, dtype=torch.float64)


def named(values):
    return dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize("key", SCALARIZERS)
def test_value_and_gradient_are_the_scalarizers(key):
    values = row(0).requires_grad_()
    loss = MultiTaskLoss(NAMES, from_torchjd(SCALARIZERS[key]()))
    total = loss(named(values))
    (slope,) = torch.autograd.grad(total, values)
    peer = SCALARIZERS[key]().double()
    other = row(0).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = peer(other)
    (wanted,) = torch.autograd.grad(expected, other)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.stack(list(loss.effective_weights(named(values)).values()))
    torch.testing.assert_close(weights, slope)
    again = loss(named(values))
    torch.testing.assert_close(again, total)  # weighing twice changes nothing


@pytest.mark.parametrize("key", SCALARIZERS)
def test_an_absent_task_is_not_there(key):
    """The same as a scalarizer of two tasks; nothing about the third one matters."""
    values = row(0).requires_grad_()
    loss = MultiTaskLoss(NAMES, from_torchjd(SCALARIZERS[key]()))
    total = loss({"a": values[0], "c": values[2]})
    (slope,) = torch.autograd.grad(total, values)
    assert slope[1] == 0
    smaller = {
        "Constant": lambda: scalarization.Constant(vector([1.0, 0.5])),
        "STCH weights": lambda: scalarization.STCH(0.7, vector([0.2, 0.5]), torch.zeros(2)),
        "PBI": lambda: scalarization.PBI(2.0, vector([0.2, 0.5])),
        "COSMOS": lambda: scalarization.COSMOS(0.5, vector([0.2, 0.5])),
        "UW": lambda: scalarization.UW(2),
        "IMTLL": lambda: scalarization.IMTLL(2),
        "FAMO": lambda: scalarization.FAMO(2),
    }.get(key, SCALARIZERS[key])
    two = MultiTaskLoss(("a", "c"), from_torchjd(smaller()))
    other = row(0).requires_grad_()
    expected = two({"a": other[0], "c": other[2]})
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, other)[0], rtol=1e-12, atol=1e-12)
    with_nan = MultiTaskLoss(NAMES, from_torchjd(SCALARIZERS[key]()), nonfinite="skip")
    torch.testing.assert_close(with_nan({**named(values), "b": values[1] * math.nan}), total)
    assert loss({}) == 0


def drive(loss, steps, *, first=0, missing=False, optimizer=None):
    """Weights before each step of a trajectory with epochs of three steps."""
    found = []
    for step in range(first, first + steps):
        losses = named(row(step).requires_grad_())
        if missing and step % 4 == 1:
            del losses["b"]
        if optimizer is not None:
            optimizer.zero_grad()
        total = loss(losses)
        total.backward()
        found.append(torch.stack(list(loss.effective_weights(losses).values())).detach())
        if optimizer is not None:
            optimizer.step()
        if "after" in loss.weighting.feeds:
            loss.observe_after({name: value.detach() * 0.9 for name, value in named(row(step + 100)).items()})
        loss.update("step", index=step)
        if step % 3 == 2:
            loss.update("epoch", index=step // 3)
    return torch.stack(found)


def test_dwa_is_ours():
    """The same trajectory, epochs and all; TorchJD's own state would have been lost at the first reload."""
    torch.testing.assert_close(
        drive(MultiTaskLoss(NAMES, from_torchjd(scalarization.DWA())), 12),
        drive(MultiTaskLoss(NAMES, reweigh.DWA()), 12),
        rtol=1e-12,
        atol=1e-12,
    )


def test_famo_is_torchjds():
    """Its own loop: call, step, update with the losses after."""
    peer = scalarization.FAMO(3).double()
    expected = []
    for step in range(9):
        values = row(step).requires_grad_()
        expected.append(torch.autograd.grad(peer(values), values)[0])
        peer.update(row(step + 100) * 0.9)
    found = drive(MultiTaskLoss(NAMES, from_torchjd(scalarization.FAMO(3))), 9)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", SCALARIZERS)
def test_resuming_is_exact(key, at, missing):
    def built():
        loss = MultiTaskLoss(NAMES, from_torchjd(SCALARIZERS[key]()))
        parameters = list(loss.parameters())
        return loss, torch.optim.Adam(parameters, lr=0.1) if parameters else None

    loss, optimizer = built()
    drive(loss, at, missing=missing, optimizer=optimizer)
    file = io.BytesIO()
    torch.save([loss.state_dict(), optimizer and optimizer.state_dict()], file)
    file.seek(0)
    expected = drive(loss, 7, first=at, missing=missing, optimizer=optimizer)
    state, moments = torch.load(file, weights_only=True)
    fresh, optimizer = built()
    fresh.load_state_dict(state)
    if optimizer is not None:
        optimizer.load_state_dict(moments)
    assert torch.equal(drive(fresh, 7, first=at, missing=missing, optimizer=optimizer), expected)
    if key in ("DWA", "FAMO", "UW", "IMTLL", "Random"):  # else there is nothing to resume
        other, optimizer = built()
        assert not torch.equal(drive(other, 7, first=at, missing=missing, optimizer=optimizer), expected)


def test_only_learned_parameters_are_parameters():
    assert [n for n, _ in MultiTaskLoss(NAMES, from_torchjd(scalarization.UW(3))).named_parameters()] == [
        "weighting.log_var"
    ]
    assert not list(MultiTaskLoss(NAMES, from_torchjd(scalarization.FAMO(3))).parameters())
    loss = MultiTaskLoss(NAMES, from_torchjd(scalarization.UW(3)))
    assert len(loss.parameter_groups()[0]["params"]) == 1
    values = row(0)
    loss(named(values)).backward()
    torch.testing.assert_close(loss.weighting.log_var.grad.double(), 0.5 - 0.5 * values, rtol=1e-6, atol=1e-6)


def test_other_tasks_are_matched_by_name_or_dropped():
    old = MultiTaskLoss(("a", "b", "c"), from_torchjd(scalarization.UW(3)))
    with torch.no_grad():
        old.weighting.log_var.copy_(torch.tensor([1.0, 2.0, 3.0]))
    new = MultiTaskLoss(("c", "d", "a"), from_torchjd(scalarization.UW(3)))
    with pytest.warns(UserWarning, match="UW remembers of other tasks is dropped|'?d start fresh"):
        new.load_state_dict(old.state_dict())
    assert new.weighting.log_var.tolist() == [3.0, 0.0, 1.0]


def test_accumulation_counts_once_per_step():
    whole, parts = (MultiTaskLoss(NAMES, from_torchjd(scalarization.DWA())) for _ in range(2))
    for step in range(8):
        values = row(step)
        whole(named(values))
        for factor in (0.5, 1.5):
            parts(named(values * factor))
        for loss in (whole, parts):
            loss.update("step", index=step)
            if step % 2:
                loss.update("epoch", index=step // 2)
    torch.testing.assert_close(torch.stack(list(parts.weights.values())), torch.stack(list(whole.weights.values())))


def test_what_is_remembered_of_an_absent_task():
    """Its last loss: no change, to FAMO; and nothing at all before every task has been seen."""
    peer = scalarization.FAMO(3).double()
    loss = MultiTaskLoss(NAMES, from_torchjd(scalarization.FAMO(3)))
    partial = {name: value for name, value in named(row(7)).items() if name != "b"}
    loss(partial)
    loss.observe_after({name: value * 0.5 for name, value in partial.items()})
    loss.update("step")
    last = None
    for step in range(5):
        values, after = row(step), row(step + 100)
        losses, later = named(values), named(after)
        if step == 2:
            del losses["b"], later["b"]
            values[1] = after[1] = last
        last = values[1].clone()
        peer(values)
        peer.update(after)
        loss(losses)
        loss.observe_after(later)
        loss.update("step")
    other = row(50).requires_grad_()
    (expected,) = torch.autograd.grad(peer(other), other)
    found = torch.stack(list(loss.effective_weights(named(other)).values()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_zero_loss_does_no_harm():
    """GeometricMean's own gradient is nan there."""
    loss = MultiTaskLoss(NAMES, from_torchjd(scalarization.GeometricMean()))
    values = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    total = loss(named(values))
    total.backward()
    assert total.isfinite()
    assert values.grad.isfinite().all()


def test_moving_and_copying():
    loss = MultiTaskLoss(NAMES, from_torchjd(scalarization.FAMO(3)))
    drive(loss, 4)
    expected = torch.stack(list(loss.weights.values()))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        drive(twin, 3)
        assert torch.equal(torch.stack(list(loss.weights.values())), expected)
    loss.half()
    assert torch.equal(torch.stack(list(loss.weights.values())).double(), expected.double())
    loss.weighting.reset()
    fresh = MultiTaskLoss(NAMES, from_torchjd(scalarization.FAMO(3)))
    assert torch.equal(drive(loss, 4), drive(fresh, 4))


def test_a_state_without_memory_is_said():
    """What a model built on the meta device has for state."""
    with torch.device("meta"):
        empty = from_torchjd(scalarization.FAMO(3))
        empty.bind(NAMES)
    weights = from_torchjd(scalarization.FAMO(3))
    weights.bind(NAMES)
    with pytest.warns(UserWarning, match="FAMO was never given memory"):
        weights.set_extra_state(empty.get_extra_state())


class Odd(nn.Module):
    def forward(self, values):
        self.__dict__["seen"] = object()
        return values.sum(-1)


def test_what_cannot_be_wrapped():
    with pytest.raises(TypeError, match="must be a torch module"):
        from_torchjd(torch.sum)
    with pytest.raises(ValueError, match="FAMO does not take 3 losses"):
        MultiTaskLoss(NAMES, from_torchjd(scalarization.FAMO(2)))
    loss = MultiTaskLoss(NAMES, from_torchjd(Odd()))
    loss(named(row(0)))
    loss.update("step")
    with pytest.raises(TypeError, match="Odd keeps 'seen'"):
        loss.state_dict()


@pytest.mark.parametrize("method", ["MGDA", "ConFIG"])
def test_a_constant_scalarizer_before_a_balancer(method):
    """The two kinds of TorchJD methods compose."""
    net, x, y = problem()
    loss = MultiTaskLoss(NAMES, from_torchjd(scalarization.Constant(vector([1.0, 2.0, 0.5]))))
    make = getattr(aggregation, method)
    GradientBalancer(make(), loss).backward(net.losses(x, y))
    ours = grads(net)
    net.zero_grad()
    GradientBalancer(make(), MultiTaskLoss(NAMES, Fixed([1.0, 2.0, 0.5]))).backward(net.losses(x, y))
    same(ours, grads(net))


# Lightning


class LightningKit:
    """Built where Lightning is there."""

    @staticmethod
    def module(package, method, **options):
        from importlib import import_module

        from reweigh.lightning_callbacks import GradientBalancing

        class Module(GradientBalancing, import_module(package).LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.net = Net()
                self.balancer = GradientBalancer(method, NAMES, **options)
                self.seen = []

            def training_step(self, rows):
                return self.balancer(self.net.losses(*rows))

            def on_before_optimizer_step(self, optimizer):
                self.seen.append(self.net.trunk[0].weight.grad.clone())

            def configure_optimizers(self):
                return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

        return Module()

    @staticmethod
    def data():
        from torch.utils.data import DataLoader, TensorDataset

        _, x, y = problem(3, 24)
        return DataLoader(TensorDataset(x, y), batch_size=4)


def plain_loop(method, micro, clip=None):
    torch.manual_seed(0)
    net, balancer = Net(), GradientBalancer(method, NAMES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for i, (x, y) in enumerate(LightningKit.data()):
            balancer.backward(balancer(net.losses(x, y)) / micro)
            if i % micro == micro - 1:
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return net, balancer


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("method", ["IMTLG", "ConFIG"])
def test_automatic_optimisation_is_the_plain_loop(tmp_path, package, micro, method):
    pytest.importorskip(package)
    make = getattr(aggregation, method)
    model = LightningKit.module(package, make())
    run = lightning_kit.trainer(
        tmp_path, package=package, accumulate_grad_batches=micro, gradient_clip_val=0.5, log_every_n_steps=1
    )
    run.fit(model, LightningKit.data())
    net, balancer = plain_loop(make(), micro, 0.5)
    same(dict(model.net.state_dict()), dict(net.state_dict()))
    assert run.global_step == 12 // micro
    logged = {name.rsplit("/", 1)[1]: value for name, value in run.logged_metrics.items()}
    if method == "ConFIG":
        assert logged == {}
    else:
        assert set(run.logged_metrics) == {f"reweigh/balancer/weight/{name}" for name in NAMES}
        for name, weight in balancer.weights.items():
            assert float(logged[name]) == pytest.approx(float(weight), rel=1e-5)


def test_a_scaler_changes_nothing(tmp_path):
    from pytorch_lightning.plugins.precision import MixedPrecision

    found = []
    for scale in (1.0, 4096.0):
        model = LightningKit.module("pytorch_lightning", aggregation.FairGrad(alpha=0.5))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        with torch.autocast("cpu", enabled=False):
            lightning_kit.trainer(tmp_path, plugins=[plugin], accumulate_grad_batches=2).fit(model, LightningKit.data())
        found.append(dict(model.net.state_dict()))
    same(found[0], found[1], 1e-6)


def test_scalar_losses_go_their_usual_way(tmp_path):
    model = LightningKit.module("pytorch_lightning", aggregation.MGDA())
    model.training_step = lambda rows: sum(model.net.losses(*rows).values())
    lightning_kit.trainer(tmp_path, max_steps=1).fit(model, LightningKit.data())
    assert int(model.balancer.calls) == 0


def test_a_vector_of_nobody(tmp_path):
    model = LightningKit.module("pytorch_lightning", aggregation.MGDA())
    model.training_step = lambda rows: torch.stack(list(model.net.losses(*rows).values()))
    with pytest.raises(ValueError, match=r"return self.balancer\(losses\)"):
        lightning_kit.trainer(tmp_path, max_steps=1).fit(model, LightningKit.data())


@pytest.mark.slow
def test_lightning_in_two_processes(tmp_path):
    """Accumulated, scaled, clipped, a rank without a task: parameters of the ranks are the same bits."""
    first, second = run_lightning(worker.__file__, tmp_path, "lightning")
    for sync in ("weights", "jacobian"):
        assert first[sync]["steps"] == 6
        assert set(first[sync]["logged"]) == {f"reweigh/balancer/weight/{name}" for name in NAMES}
        assert first[sync].pop("logged") == second[sync].pop("logged")
        assert first[sync].pop("steps") == second[sync].pop("steps")
        same(first[sync], second[sync], 0.0)
    assert not torch.equal(first["weights"]["net.trunk.0.weight"], first["jacobian"]["net.trunk.0.weight"])
