"""The scenes, the network and the LightningModule of :mod:`reweigh.benchmarks.suites.nyuv2`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..readers import DataError, Scene, load_scene
from .training import Classifier
from .vision import Unreadable

IGNORED = -1
"""Label of pixels that have none."""

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Scenes(Dataset[Batch]):
    """Scenes, read when they are asked for; takes a list of indices and gives images, labels, depths and normals.

    Args:
        scenes: The files.
        classes: Labels there are.
        size: Height and width that all of them have.
    """

    def __init__(self, scenes: Sequence[Scene], classes: int, size: tuple[int, int]) -> None:
        self.scenes, self.classes, self.size = scenes, classes, size

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, items: Sequence[int]) -> Batch:
        try:
            found = [self._one(self.scenes[item]) for item in items]
        except DataError as error:
            raise Unreadable(str(error)) from None
        image, label, depth, normal = (
            torch.from_numpy(np.stack([scene[kind] for scene in found]))
            for kind in ("image", "label", "depth", "normal")
        )
        return image.permute(0, 3, 1, 2).contiguous(), label, depth, normal.permute(0, 3, 1, 2).contiguous()

    def _one(self, scene: Scene) -> dict[str, np.ndarray[Any, Any]]:
        found = load_scene(scene, classes=self.classes)
        size = found["image"].shape[:2]
        if size != self.size:
            raise DataError(f"{scene.image}: must have the size of the first scene, {self.size}, found {size}")
        return found

    def loader(self, options: Mapping[str, Any]) -> DataLoader[Batch]:
        """All scenes in order."""
        size, loaders = options["batch_size"], options.get("loaders", 0)
        return DataLoader(
            self,
            sampler=[list(range(start, min(start + size, len(self)))) for start in range(0, len(self), size)],
            batch_size=None,
            num_workers=loaders,
            persistent_workers=loaders > 0,
            generator=torch.Generator(),  # the state of the global one is that of the training
        )

    def digest(self, root: Path) -> bytes:
        """SHA-256 of names and sizes of the files."""
        lines = [
            f"{file.relative_to(root).as_posix()} {file.stat().st_size}"
            for scene in self.scenes
            for file in (scene.image, scene.label, scene.depth, scene.normal)
        ]
        return hashlib.sha256("\n".join(lines).encode()).digest()


class Stage(nn.Sequential):
    """Two convolutions, each normalised image by image."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
        )


class EncoderDecoder(nn.Module):
    """A shared encoder and decoder with shortcuts between stages of one size (U-Net), and a head per task.

    Args:
        widths: Channels of the stages; each but the first halves the size.
        heads: Channels that each task's answer has.
    """

    def __init__(self, widths: Sequence[int], heads: Mapping[str, int]) -> None:
        super().__init__()
        self.first = Stage(3, widths[0])
        steps = list(pairwise(widths))
        self.down = nn.ModuleList(Stage(here, there, 2) for here, there in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(there, here, 2, 2) for here, there in reversed(steps))
        self.join = nn.ModuleList(Stage(2 * here, here) for here, _ in reversed(steps))
        self.heads = nn.ModuleDict({task: head(widths[0], channels) for task, channels in heads.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Answers ``(B, channels, H, W)`` by task; normals have length 1, depth has no channel."""
        found = self.first(images)
        kept = [found]
        for stage in self.down:
            found = stage(found)
            kept.append(found)
        for grow, stage, beside in zip(self.up, self.join, kept[-2::-1], strict=True):
            grown = grow(found)[
                :, :, : beside.shape[2], : beside.shape[3]
            ]  # an odd size was rounded up on the way down
            found = stage(torch.cat([grown, beside], 1))
        answers = {task: own(found) for task, own in self.heads.items()}
        return {**answers, "depth": answers["depth"].squeeze(1), "normal": F.normalize(answers["normal"], dim=1)}


def head(width: int, channels: int) -> nn.Module:
    """Two convolutions of a task's own."""
    return nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, channels, 1))


def seen(depth: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
    """Where there is a depth, and where there is a normal: what is all 0 is missing."""
    return depth != 0, (normal != 0).any(1)


def losses(found: Mapping[str, Tensor], label: Tensor, depth: Tensor, normal: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, absolute error and 1 - cosine: means over the pixels that have a target, 0 where none has."""
    with_depth, with_normal = seen(depth, normal)
    logits = found["segmentation"].permute(0, 2, 3, 1).flatten(0, 2)  # rows: deterministic on CUDA, unlike images
    entropy = F.cross_entropy(logits, label.flatten(), ignore_index=IGNORED, reduction="sum")
    cosine = (found["normal"] * F.normalize(normal, dim=1)).sum(1)
    return {
        "segmentation": entropy / (label != IGNORED).sum().clamp(min=1),
        "depth": ((found["depth"] - depth).abs() * with_depth).sum() / with_depth.sum().clamp(min=1),
        "normal": ((1.0 - cosine) * with_normal).sum() / with_normal.sum().clamp(min=1),
    }


class Dense(Classifier):
    """Trains on some of the tasks; the others are absent."""

    tasks: tuple[str, ...] = ("segmentation", "depth", "normal")

    @classmethod
    def of(cls, tasks: tuple[str, ...]) -> type[Dense]:
        """The module for these tasks."""
        return cast("type[Dense]", type(cls.__name__, (cls,), {"tasks": tasks}))

    def task_losses(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Unweighted losses by task."""
        image, label, depth, normal = batch
        found = losses(self.net(image), label, depth, normal)
        return {task: found[task] for task in self.tasks}

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return cast(Tensor, self.objective(self.task_losses(batch)))


class DenseScores:
    """The papers' metrics, pixel by pixel over all scenes."""

    def __init__(self, classes: int) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
        from torchmetrics.regression import MeanAbsoluteError

        self.miou = MulticlassJaccardIndex(classes, average="macro", ignore_index=IGNORED)
        self.accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED)
        self.depth = MeanAbsoluteError().set_dtype(torch.float64)
        self.angles, self.pixels = 0.0, 0

    def update(self, found: Mapping[str, Tensor], label: Tensor, depth: Tensor, normal: Tensor) -> None:
        """Take in a batch, on the CPU."""
        answer = found["segmentation"].argmax(1)
        self.miou.update(answer, label)
        self.accuracy.update(answer, label)
        with_depth, with_normal = seen(depth, normal)
        if with_depth.any():
            self.depth.update(found["depth"][with_depth].double(), depth[with_depth].double())
        cosine = (found["normal"].double() * F.normalize(normal.double(), dim=1)).sum(1)
        angle = cosine.clamp(-1.0, 1.0).acos().rad2deg()
        self.angles += float(angle[with_normal].sum())
        self.pixels += int(with_normal.sum())

    def compute(self) -> dict[str, float]:
        """By name."""
        return {
            "miou": float(self.miou.compute()),
            "pixel_accuracy": float(self.accuracy.compute()),
            "depth_error": float(self.depth.compute()),
            "angle": self.angles / max(1, self.pixels),
        }
