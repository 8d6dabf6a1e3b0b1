"""One rank of test_lightning_distributed.py; the ranks find each other by Lightning's environment variables."""

import gc
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from lightning_kit import module, network, samples, trainer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from reweigh.lightning_callbacks import FitStatistics, WeightingCallback, WeightingMonitor
from reweigh.losses import CrossEntropy, Objective
from reweigh.weighting import Constant, EffectiveNumber, InverseClassLoss, Linear, Piecewise

SIZE = 48


def objective():
    return Objective(
        CrossEntropy(),
        EffectiveNumber(beta=Piecewise([0.0, 0.99], [2]))
        * InverseClassLoss(3, smoothing=0.3, to="mean")
        * Constant(Linear(0.5, 1.0, duration=8, by="step")),
    )


class Share(Sampler):
    """This rank's four of every eight samples."""

    def __init__(self, rank):
        self.rank = rank

    def __len__(self):
        return SIZE // 2

    def __iter__(self):
        return iter(i for i in range(SIZE) if i % 8 // 4 == self.rank)


class Stream(IterableDataset):
    def __init__(self, share):
        self.share = share

    def __iter__(self):
        x, y = samples(SIZE)
        return iter([(x[i], y[i]) for i in range(SIZE) if self.share is None or i % 2 == self.share])


def data(rank):
    return DataLoader(TensorDataset(*samples(SIZE)), batch_size=4, sampler=Share(rank))


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def with_lightning(root, rank, out):
    torch.set_num_threads(1)
    calls, inside = {"driver": 0, "monitor": 0}, []
    model = module(objective())
    statistics, driver, monitor = FitStatistics(), WeightingCallback(), WeightingMonitor(every_n_steps=1)
    parallel = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    run = trainer(root, [statistics, driver, monitor], max_epochs=3, accumulate_grad_batches=2, **parallel)

    def named(name, hook):
        def call(*args, **kwargs):
            inside.append(name)
            hook(*args, **kwargs)
            inside.pop()

        return call

    for name, callback in (("driver", driver), ("monitor", monitor)):
        for hook in ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"):
            setattr(callback, hook, named(name, getattr(callback, hook)))
    all_reduce = dist.all_reduce

    def counted(*args, **kwargs):
        if inside:
            calls[inside[-1]] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    run.fit(model, data(rank))
    dist.all_reduce = all_reduce
    out["reductions"] = calls
    out["lightning"] = {"state": copied(model)}
    out["counts"], out["rows"] = statistics.counts, monitor.history()

    for name, share in (("sharded", rank), ("repeated", None)):
        statistics = FitStatistics()
        stream = DataLoader(Stream(share), batch_size=4)
        trainer(root, statistics, max_steps=1, max_epochs=1, **parallel).fit(module(objective()), stream)
        out[name] = statistics.counts
    try:
        refusing = FitStatistics(sharded=False)
        stream = DataLoader(Stream(rank), batch_size=4)
        trainer(root, refusing, max_steps=1, max_epochs=1, **parallel).fit(module(objective()), stream)
    except ValueError as error:
        out["refused"] = str(error)


def plain_loop(rank, out):
    net, loss = network(), objective()
    model = DistributedDataParallel(torch.nn.ModuleDict({"net": net, "loss": loss}))
    inner = model.module
    inner.forward = lambda x, y: loss(net(x), y)
    loss.update("fit", class_counts=torch.bincount(samples(SIZE)[1], minlength=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = 0
    for epoch in range(3):
        for i, (x, y) in enumerate(data(rank)):
            (model(x, y) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
                loss.update("step", index=step)
                step += 1
        loss.update("epoch", index=epoch)
    out["plain"] = {"state": copied(inner)}


def trap(rank, out):
    """A running sum kept as a buffer under DDP, and the truth."""

    class Summing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x):
            self.total += x.sum()
            return self.scale * x.sum()

    model = DistributedDataParallel(Summing())
    true = torch.zeros(())
    for value in (1.0, 2.0):
        x = torch.tensor([value + rank])
        model(x).backward()
        true += x.sum()
    total = model.module.total.clone()
    dist.all_reduce(total)
    dist.all_reduce(true)
    out["trap"] = [total.item(), true.item()]


if __name__ == "__main__":
    warnings.simplefilter("error")
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        "You defined a `validation_step` but have no `val_dataloader`",
        ".*process group has NOT been destroyed",
    ):
        warnings.filterwarnings("ignore", message)
    rank, out = int(os.environ["LOCAL_RANK"]), {}
    with_lightning(sys.argv[1], rank, out)
    plain_loop(rank, out)
    trap(rank, out)
    torch.save(out, Path(sys.argv[1]) / f"rank{rank}.pt")
    dist.barrier()
    gc.collect()  # what DDP holds in cycles must not outlive its group
    dist.destroy_process_group()
