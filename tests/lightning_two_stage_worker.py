"""One rank of test_lightning_two_stage.py; the ranks find each other by Lightning's environment variables."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from lightning_kit import trainer
from test_lightning_two_stage import SIZE, Indexed, mean, module, states
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler

from reweigh.lightning_callbacks import JustTrainTwice


class Share(Sampler):
    """This rank's three of every six samples, so that both ranks' batches are one process's."""

    def __init__(self, rank):
        self.rank = rank

    def __len__(self):
        return SIZE // 2

    def __iter__(self):
        return iter(i for i in range(SIZE) if i % 6 // 3 == self.rank)


def options(sampler, rank):
    """Of the loader: a sampler that shares out samples itself, or one that Lightning wraps."""
    if sampler == "own":
        return {"sampler": Share(rank)}
    return {"shuffle": True} if sampler == "shuffled" else {"sampler": SubsetRandomSampler(range(0, 20, 2))}


def main():
    sampler, folder, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    model = module(mean())
    visited = []
    answer = model.find_errors

    def counting(batch):
        visited.extend(batch[2].tolist())
        return answer(batch)

    model.find_errors = counting
    callback = JustTrainTwice(2, upweight=5.0)
    wrap = sampler != "own"
    run = trainer(folder, callback, max_epochs=4, strategy="ddp", devices=2, use_distributed_sampler=wrap)
    run.fit(model, DataLoader(Indexed(), batch_size=3, **options(sampler, rank)))
    out = {"visited": visited, "errors": callback.num_errors, "state": states(model)}
    torch.save(out, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
