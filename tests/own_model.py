"""A user's module and data, as the documentation of ``compare`` describes them."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassRecall


class Net(pl.LightningModule):
    def __init__(self, objective):
        super().__init__()
        self.objective, self.net = objective, torch.nn.Linear(4, 3)
        self.recall = MulticlassRecall(3)

    def training_step(self, batch, batch_idx):
        return self.objective(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.recall.update(scores, batch[1])
        self.log("test/recall", self.recall)
        self.log("test/loss", torch.nn.functional.cross_entropy(scores, batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(pl.LightningDataModule):
    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        target = torch.tensor([0] * 60 + [1] * 12 + [2] * 6)
        centres = torch.randn(3, 4, generator=generator)

        def part(target):
            return TensorDataset(centres[target] + 0.7 * torch.randn(len(target), 4, generator=generator), target)

        self.train, self.test = part(target), part(torch.arange(3).repeat(30))

    def train_dataloader(self):
        return DataLoader(self.train, 16, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, 90)


def build():
    return Net, Data


def whole():
    return {
        "module_factory": Net,
        "datamodule": Data(0),
        "objectives": ["cross_entropy", "focal"],
        "metrics": ["test/recall", "-test/loss"],
        "trainer": {"max_epochs": 1},
    }


def nothing():
    return 3
