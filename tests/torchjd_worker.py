"""One rank of test_torchjd.py: ``python torchjd_worker.py WHAT RANK WORLD INIT_FILE OUT``."""

import gc
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reweigh.losses import GradientBalancer, MultiTaskLoss

NAMES = ("a", "b", "c")
SIZE, STEPS = 12, 3
# method, sync, scenario, in DistributedDataParallel
RUNS = [
    *[("IMTLG", "weights", scenario, True) for scenario in ("even", "uneven", "missing", "trunk")],
    *[("IMTLG", "jacobian", scenario, True) for scenario in ("even", "uneven", "missing", "trunk", "empty")],
    ("IMTLG", "jacobian", "empty", False),
    *[("ConFIG", "jacobian", scenario, True) for scenario in ("uneven", "trunk", "empty")],
    ("PCGrad", "weights", "missing", True),
    ("PCGrad", "jacobian", "missing", True),
]
SMALLER = [run for run in RUNS if run[2] in ("uneven", "empty") and run[0] != "PCGrad"]
"""What four ranks run."""
SHARES = {
    "even": {1: [12], 2: [6, 6], 4: [3, 3, 3, 3]},
    "uneven": {1: [12], 2: [8, 4], 4: [5, 4, 2, 1]},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(6, 1) for name in NAMES})
        self.double()

    def forward(self, x, y, has):
        """Losses and counts of the tasks these samples have; heads of other tasks do not run."""
        z = self.trunk(x)
        counts = {name: int(has[:, k].sum()) for k, name in enumerate(NAMES)}
        losses = {
            name: (self.heads[name](z[has[:, k]]).squeeze(-1) - y[has[:, k], k]).square().mean()
            for k, name in enumerate(NAMES)
            if counts[name]
        }
        return losses, counts


def batch(step, scenario):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SIZE, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(SIZE, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.3])
    has = torch.ones(SIZE, 3, dtype=torch.bool)
    if scenario in ("missing", "trunk", "empty"):
        has[6:, 1] = False  # the last ranks lack it
        if step % 2:
            has[:, 2] = False  # nobody has it
        if step == 2 and scenario == "empty":
            has[6:] = False  # the last ranks have nothing
    return x, y, has


def method_of(name):
    from torchjd import aggregation

    return getattr(aggregation, name)()


def train(method, sync, scenario, wrapped, *, rank, world):
    """Parameters after some steps. One process takes all that the ranks would take."""
    torch.manual_seed(0)
    net = Net()
    loss = MultiTaskLoss(NAMES, {"a": 1.0, "b": 0.5, "c": 2.0}, init="first")
    shared = net.trunk if scenario == "trunk" else None
    balancer = GradientBalancer(method_of(method), loss, sync=sync, shared=shared)
    model = DistributedDataParallel(net, find_unused_parameters=True) if wrapped and world > 1 else net
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    sizes = SHARES["uneven" if scenario == "uneven" else "even"][world]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    weights = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses, counts = model(*(part[mine] for part in batch(step, scenario)))
        balancer.backward(losses, net.parameters(), counts=counts)
        if balancer.weights:
            weights.append(torch.stack(list(balancer.weights.values())))
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        loss.update("step")
    found = {name: value.clone() for name, value in net.state_dict().items()}
    return {**found, **({"weights": torch.stack(weights)} if weights else {})}


def own_weights(scenario, rank, world):
    """Weights of one batch's gradients: of this rank's share of it, in as many processes as there are."""
    torch.manual_seed(0)
    net, balancer = Net(), GradientBalancer(method_of("IMTLG"), NAMES)
    sizes = SHARES["uneven" if scenario == "uneven" else "even"][world]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    losses, counts = net(*(part[mine] for part in batch(0, scenario)))
    return torch.stack(list(balancer.backward(losses, counts=counts).values()))


def documented_pattern(rank):
    """What TorchJD's documentation shows for several tasks, with the model inside DistributedDataParallel."""
    from torchjd import autojac

    torch.manual_seed(0)
    net = Net()
    DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(STEPS):
        x, y, _ = (part[6 * rank : 6 * rank + 6] for part in batch(step, "even"))
        z = net.trunk(x)
        losses = [(net.heads[name](z).squeeze(-1) - y[:, k]).square().mean() for k, name in enumerate(NAMES)]
        autojac.mtl_backward(losses, features=z)
        autojac.jac_to_grad(list(net.trunk.parameters()), method_of("IMTLG"))
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in net.state_dict().items()}


def refusal(method, sync):
    try:
        GradientBalancer(method_of(method), NAMES, sync=sync).backward(Net()(*batch(0, "even"))[0])
    except ValueError as error:
        return str(error)
    return ""


def lightning(root, rank, sync):
    """Automatic optimisation, two micro-batches per step, a gradient scaler, clipping; weights are logged."""
    import pytorch_lightning as pl
    from lightning_kit import trainer
    from pytorch_lightning.plugins.precision import MixedPrecision
    from torch.utils.data import DataLoader, TensorDataset

    from reweigh.lightning_callbacks import GradientBalancing

    class Module(GradientBalancing, pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Net().float()
            self.balancer = GradientBalancer(method_of("IMTLG"), NAMES, sync=sync)

        def training_step(self, rows):
            losses, counts = self.net(*rows)
            return self.balancer(losses, counts=counts)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    batches = [[part[6 * rank : 6 * rank + 6] for part in batch(step, "missing")] for step in range(6)]
    x, y, has = (torch.cat(parts) for parts in zip(*batches, strict=True))
    data = DataLoader(TensorDataset(x.float(), y.float(), has), batch_size=6)
    model = Module()
    scaler = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    run = trainer(
        root,
        strategy="ddp_find_unused_parameters_true",
        devices=2,
        use_distributed_sampler=False,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        plugins=[scaler],
    )
    run.fit(model, data)
    logged = {name: float(v) for name, v in run.logged_metrics.items()}
    return {"logged": logged, "steps": run.global_step, **{n: v.clone() for n, v in model.state_dict().items()}}


if __name__ == "__main__":
    if sys.argv[1] == "lightning":
        import os

        torch.set_num_threads(1)
        rank, root = int(os.environ["LOCAL_RANK"]), Path(sys.argv[2])
        found = {sync: lightning(root, rank, sync) for sync in ("weights", "jacobian")}
        torch.save(found, root / f"rank{rank}.pt")
        dist.barrier()
        gc.collect()  # what DDP holds in cycles must not outlive its group
        dist.destroy_process_group()
        sys.exit()
    what, rank, world, init, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results = {str(run): train(*run, rank=rank, world=world) for run in (RUNS if world == 2 else SMALLER)}
    results.update({f"own {scenario}": own_weights(scenario, rank, world) for scenario in ("uneven", "missing")})
    if world == 2:
        results["documented pattern"] = documented_pattern(rank)
        results["refused"] = refusal("ConFIG", "weights")
        results["unknown parameters"] = refusal("IMTLG", "jacobian")
    torch.save(results, out)
    dist.barrier()
    gc.collect()  # what DDP holds in cycles must not outlive its group
    dist.destroy_process_group()
