"""The network and the LightningModule of :mod:`reweigh.benchmarks.suites.language`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .training import Classifier


class Reader(nn.Module):
    """A recurrent language model whose output embeddings are its input embeddings."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.drop = nn.Dropout(dropout)
        self.recur = nn.GRU(width, width, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next word at every place."""
        return nn.functional.linear(self.drop(self.hidden(ids)[0]), self.embed.weight, self.bias)

    def hidden(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What was read so far, at every place, and the state at the end."""
        return cast("tuple[Tensor, Tensor]", self.recur(self.drop(self.embed(ids)), state))


class Language(Classifier):
    """Batches are contexts, which are inputs and labels at once."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        (ids,) = batch
        return cast(Tensor, self.objective(self.net(ids), ids))


def continued(net: nn.Module, prompts: Tensor, length: int, shift: Tensor | None) -> Tensor:
    """What the model writes after each prompt, always its likeliest word; ``shift`` is taken off the logits."""
    reader = cast(Reader, net)
    hidden, state = reader.hidden(prompts)
    written = []
    for _ in range(length):
        logits = nn.functional.linear(hidden[:, -1], reader.embed.weight, reader.bias)
        written.append((logits if shift is None else logits - shift).argmax(-1))
        hidden, state = reader.hidden(written[-1][:, None], state)
    return torch.stack(written, 1)
