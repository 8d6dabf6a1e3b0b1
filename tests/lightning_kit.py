"""What the Lightning tests share: a small model, data in a reproducible order, and a Trainer that keeps quiet."""

from importlib import import_module

import pytest
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

from reweigh.losses import CrossEntropy, Objective
from reweigh.weighting import Weighting

QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def samples(size=30, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (size,), generator=generator)


class EpochOrder(Sampler):
    """An order that depends on the epoch only, so that a resumed run sees what an uninterrupted one sees."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def loader(size=30, batch_size=6, classes=3, ordered=True):
    data = TensorDataset(*samples(size, classes))
    return DataLoader(data, batch_size=batch_size, sampler=EpochOrder(size) if ordered else None)


def network(classes=3):
    torch.manual_seed(7)
    return torch.nn.Linear(4, classes, dtype=torch.float64)


def module(loss, *, package="pytorch_lightning", optimizer=None, classes=3):
    """A LightningModule of the named package around a loss."""
    base = import_module(package).LightningModule

    class Classifier(base):
        def __init__(self):
            super().__init__()
            self.net = network(classes)
            self.loss = loss
            self.lr = 0.1

        def training_step(self, batch):
            x, y = batch
            return self.loss(self.net(x.to(self.net.weight.dtype)), y)

        def validation_step(self, batch):
            x, y = batch
            self.log("val", self.loss(self.net(x.to(self.net.weight.dtype)), y))

        def configure_optimizers(self):
            if optimizer is not None:
                return optimizer(self)
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    return Classifier()


def trainer(root, callbacks=None, *, package="pytorch_lightning", **options):
    """A Trainer of the named package on the CPU; nothing but what is asked for."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "default_root_dir": str(root),
    }
    return import_module(package).Trainer(callbacks=callbacks, **{**quiet, **options})


class Diary(Weighting):
    """Writes down the events that reach it, and how many terms it had seen before each."""

    def __init__(self, update_on="step"):
        super().__init__()
        self.update_on = update_on
        self.add_pending("terms")
        self.events = []
        self.seen = 0.0

    def weigh(self, terms):
        return torch.ones_like(terms.loss)

    def observe(self, terms):
        self.accumulate("terms", terms.counts().sum())

    def commit(self, sums):
        self.seen = sums["terms"].item()

    def refresh(self, event, **signals):
        self.events.append((event, self.seen) if event == "step" else event)


def diary(update_on="step"):
    return Objective(CrossEntropy(), Diary(update_on))
