"""Several tasks in a LightningModule, for the Lightning tests of task weightings.

As a script it is one rank of test_lightning_tasks.py: ``python lightning_task_worker.py FOLDER``, with Lightning's
environment variables.
"""

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from lightning_kit import EpochOrder, trainer
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from reweigh import DWA, FAMO, CoBa, MultiTaskLoss, Uncertainty
from reweigh.lightning_callbacks import ValidationProbe, WeightingCallback
from reweigh.weighting.tasks.base import TaskWeighting

NAMES = ["seg", "depth", "normal"]
SCALES = torch.tensor([1.0, 40.0, 0.1], dtype=torch.float64)


def samples(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return x, x[:, :3].cumsum(1) + noise * torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)


class Resumable(DataLoader):
    """A loader that goes on in mid-epoch, as Lightning asks of one with ``state_dict``; the next pass is whole."""

    skip = drawn = 0

    def state_dict(self):
        return {"drawn": self.drawn % len(self)}

    def load_state_dict(self, state):
        self.skip = state["drawn"]

    def __iter__(self):
        def batches():
            self.drawn, self.skip = self.skip, 0
            for number, batch in enumerate(DataLoader.__iter__(self)):
                if number >= start:
                    self.drawn += 1
                    yield batch

        start = self.skip
        return batches()


def training_data(size=30, batch_size=6):
    return Resumable(TensorDataset(*samples(size, 1)), batch_size=batch_size, sampler=EpochOrder(size))


def validation_data(size=14, batch_size=4, **options):
    return DataLoader(TensorDataset(*samples(size, 2)), batch_size=batch_size, **options)


class Notes(TaskWeighting):
    """Writes down what it is fed, and the events in between."""

    def __init__(self, *feeds, update_on="step", num_tasks=None):
        super().__init__()
        self.feeds = frozenset(feeds)
        self.update_on = update_on
        self.diary = []
        self.start(num_tasks)

    def prepare(self, num_tasks):
        self.add_pending("seen", 2, num_tasks)
        self.track_events()

    def weigh(self, terms):
        return self.read(terms)[1].double()

    def observe(self, terms):
        self.diary.append(("train", self.read(terms)[0].tolist()))

    def observe_validation(self, terms):
        self.accumulate("seen", self.tallies(terms))
        self.diary.append(("val", self.read(terms)[0].tolist()))

    def observe_after(self, terms):
        self.accumulate("seen", self.tallies(terms))
        self.diary.append(("after", self.read(terms)[0].tolist()))

    def commit(self, sums):
        self.sums = sums["seen"]

    def refresh(self, event, **signals):
        self.diary.append((event, None))

    def kinds(self):
        return [kind for kind, _ in self.diary]


def coba(**options):
    return CoBa(**{"warmup": 3, "history": 6, "capacity": 40, **options})


def four():
    """The four ways in which weights move: by validation, after the step, by epoch and by gradient."""
    return {
        "coba": MultiTaskLoss(NAMES, coba(), init="first"),
        "famo": MultiTaskLoss(NAMES, FAMO()),
        "dwa": MultiTaskLoss(NAMES, DWA()),
        "window": MultiTaskLoss(NAMES, DWA(window=2)),
        "learned": MultiTaskLoss(NAMES, Uncertainty(), init="first"),
    }


def module(losses, *, package="pytorch_lightning", optimizer=None, validates=True, dropout=0.0, norm=False):
    """A LightningModule of the named package with three tasks; ``losses`` by name."""
    base = import_module(package).LightningModule

    class Tasks(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(7)
            layers = [torch.nn.Linear(4, 8, dtype=torch.float64)]
            layers += [torch.nn.BatchNorm1d(8, dtype=torch.float64)] if norm else []
            layers += [torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 3, dtype=torch.float64)]
            self.net = torch.nn.Sequential(*layers)
            self.losses = torch.nn.ModuleDict(losses)
            self.asked = 0

        def task_losses(self, batch):
            x, y = batch
            self.asked += 1
            found = (self.net(x.to(self.net[0].weight.dtype)) - y).square().mean(0) * SCALES.to(x.device)
            return dict(zip(NAMES, found, strict=True))

        def training_step(self, batch):
            named = self.task_losses(batch)
            return sum(loss(named) for loss in self.losses.values())

        def configure_optimizers(self):
            if optimizer is not None:
                return optimizer(self)
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    if validates:

        def validation_step(self, batch):
            named = self.task_losses(batch)
            self.log("val", sum(loss(named) for loss in self.losses.values()))

        Tasks.validation_step = validation_step
    return Tasks()


# one rank


class Share(Sampler):
    """This rank's part of every batch of the joined data."""

    def __init__(self, size, rank, batch):
        self.mine = [i for i in range(size) if i % batch // (batch // 2) == rank]

    def __len__(self):
        return len(self.mine)

    def __iter__(self):
        return iter(self.mine)


class Stream(IterableDataset):
    """A part of the validation data, of unknown length, possibly nothing."""

    def __init__(self, start, stop):
        self.start, self.stop = start, stop

    def __iter__(self):
        x, y = samples(16, 2)
        return ((x[i], y[i]) for i in range(self.start, self.stop))


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(root, losses, data, validation, probe, *, validates=True, **options):
    """A run of three epochs; what is left, and what the weightings were fed."""
    model = module(losses, validates=validates)
    callbacks = [WeightingCallback(log=False), *([probe] if probe is not None else [])]
    run = trainer(root, callbacks, max_epochs=3, num_sanity_val_steps=0, **options)
    run.fit(model, data, validation)
    return {"state": copied(model), "metrics": dict(run.callback_metrics)}


def main(root):
    torch.set_num_threads(1)
    rank, out = int(os.environ["LOCAL_RANK"]), {}
    parallel = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    for every in (1, 2):
        out[f"probe{every}"] = train(
            root,
            four(),
            DataLoader(TensorDataset(*samples(32, 1)), batch_size=4, sampler=Share(32, rank, 8)),
            DataLoader(TensorDataset(*samples(16, 2)), batch_size=4, sampler=Share(16, rank, 8)),
            ValidationProbe(),
            accumulate_grad_batches=every,
            **parallel,
        )
    data = DataLoader(TensorDataset(*samples(32, 1)), batch_size=4, sampler=Share(32, rank, 8))
    validation = DataLoader(TensorDataset(*samples(16, 2)), batch_size=4, sampler=Share(16, rank, 8))
    out["plain"] = train(root, four(), data, validation, None, **parallel)
    # a rank without validation data, and ranks with unequal numbers of batches, on which DDP itself cannot validate
    for name, shares in {"empty": ((0, 0), (0, 16)), "uneven": ((0, 4), (4, 16))}.items():
        data = DataLoader(TensorDataset(*samples(32, 1)), batch_size=4, sampler=Share(32, rank, 8))
        stream = DataLoader(Stream(*shares[rank]), batch_size=4)
        losses = {"coba": MultiTaskLoss(NAMES, coba())}
        out[name] = train(root, losses, data, stream, ValidationProbe(), validates=False, **parallel)
    # split by Lightning
    whole = DataLoader(TensorDataset(*samples(16, 2)), batch_size=4)
    data = DataLoader(TensorDataset(*samples(32, 1)), batch_size=4)
    losses = {"coba": MultiTaskLoss(NAMES, coba())}
    out["split"] = train(root, losses, data, whole, ValidationProbe(), strategy="ddp", devices=2)
    torch.save(out, Path(root) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        ".*process group has NOT been destroyed",
        ".*smaller than the logging interval",
        ".*recommended to use .self.log",
        "You passed in a `val_dataloader` but have no `validation_step`",
    ):
        warnings.filterwarnings("ignore", message)
    main(sys.argv[1])
