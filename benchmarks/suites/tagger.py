"""The sentences, the network and the LightningModule of :mod:`reweigh.benchmarks.suites.conll`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import Dataset

from .training import Classifier

BEYOND = -100
"""Target of what is beyond the end of a sentence."""


class Sentences(Dataset[tuple[Tensor, Tensor]]):
    """Sentences of different length; takes a list of indices and gives the batch, as long as its longest sentence.

    Args:
        features: Of each sentence, ``(T, 2)``: ids of words and of shapes, from 1 on.
        targets: Of each sentence, ``(T,)``: ids of tags.
    """

    def __init__(self, features: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.features, self.targets = features, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs = pad_sequence([self.features[item] for item in items], batch_first=True)
        return inputs, pad_sequence([self.targets[item] for item in items], batch_first=True, padding_value=BEYOND)

    def digest(self) -> bytes:
        """SHA-256 of everything."""
        digest = hashlib.sha256()
        for features, targets in zip(self.features, self.targets, strict=True):
            digest.update(features.numpy().tobytes() + targets.numpy().tobytes())
        return digest.digest()


class Tagger(nn.Module):
    """Words and shapes, a window of three, a GRU in both directions; 0 is beyond the end, and changes nothing."""

    def __init__(self, words: int, shapes: int, tags: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        width, hidden = options["width"], options["hidden"]
        self.word = nn.Embedding(words, width, padding_idx=0)
        self.shape = nn.Embedding(shapes, options["shape_width"], padding_idx=0)
        self.window = nn.Conv1d(width + options["shape_width"], hidden, 3, padding=1)
        self.recur = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(options["dropout"])
        self.out = nn.Linear(2 * hidden, tags)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(B, T, tags)`` of inputs ``(B, T, 2)``."""
        ids, shapes = inputs.unbind(-1)
        found = self.drop(torch.cat([self.word(ids), self.shape(shapes)], -1))
        found = self.drop(self.window(found.transpose(1, 2)).relu().transpose(1, 2))
        lengths = (ids > 0).sum(1).cpu()
        packed: PackedSequence = pack_padded_sequence(found, lengths, batch_first=True, enforce_sorted=False)
        read, _ = pad_packed_sequence(self.recur(packed)[0], batch_first=True, total_length=ids.shape[1])
        return cast(Tensor, self.out(self.drop(read)))


class Tagging(Classifier):
    """Every token is a sample."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        return cast(Tensor, self.objective(self.net(inputs).flatten(0, 1), target.flatten()))


@torch.no_grad()
def logits(net: nn.Module, data: Sentences, size: int) -> Tensor:
    """Of all tokens in order, ``(N, tags)``, on the CPU; the network is in evaluation mode, and stays where it is."""
    there = next(net.parameters()).device
    found = []
    for start in range(0, len(data), size):
        inputs, target = data[range(start, min(start + size, len(data)))]
        found.append(net(inputs.to(there)).cpu()[target != BEYOND])
    return torch.cat(found)
