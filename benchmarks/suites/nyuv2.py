"""NYUv2 from the user's copy: three dense tasks of one network, whose losses are in different units."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from ..readers import DataError, Scene, load_scene, read_nyuv2
from .base import Method, Metric, Trial
from .classes import FromRoot
from .tasks import TaskSuite, TaskTrial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

    from .dense import Scenes
    from .training import Classifier

CLASSES = 13
VAL = 0.1
"""Share of the training scenes that are set apart for CoBa, because the published validation part is the test."""
EPOCHS, BATCH = 200, 8
TASKS = ("segmentation", "depth", "normal")
HEADS = {"segmentation": CLASSES, "depth": 1, "normal": 3}


@lru_cache(maxsize=2)
def _read(root: Path, classes: int) -> tuple[dict[str, list[Scene]], tuple[int, int]]:
    parts = read_nyuv2(root)
    if len(parts["train"]) < 2:
        raise DataError(f"{root / 'train'}: must hold at least 2 scenes, found {len(parts['train'])}")
    sizes = {part: load_scene(scenes[0], classes=classes)["image"].shape[:2] for part, scenes in parts.items()}
    if sizes["train"] != sizes["val"]:
        raise DataError(f"{root}: train and val must have images of one size, found {sizes['train']}, {sizes['val']}")
    height, width = sizes["train"]
    return parts, (height, width)


@final
class NYUv2(FromRoot, TaskSuite):
    """Segmentation, depth and surface normals of rooms."""

    name = "nyuv2"
    version = 1
    title = "NYUv2, three tasks"
    summary = "your NYUv2 scenes: segmentation, depth and surface normals with one network"
    story = (
        "One network looks at a photograph of a room and has three tasks for every pixel: name what it shows, say how "
        "far away it is, and say which way its surface faces. The three losses are in different units and fall at "
        "different speeds. The methods below change nothing but their weights. Every result is compared with three "
        "networks that learn one task each: delta-m is the mean over tasks of the relative change to them, so 0 % "
        "means that sharing costs nothing. In every repetition all methods get the same scenes, the same initial "
        "network and the same order of batches; which training scenes are set apart for validation changes from one "
        "repetition to the next, the test does not."
    )
    notes = (
        "The authors of this program have measured nothing on these scenes: there is no promise, and no figure of ours "
        "to compare yours with.",
        "The folders are those of MTAN and LibMTL (288 x 384 pixels, 13 classes). As there, what is called val is the "
        "test. A tenth of the training scenes is set apart for validation: CoBa needs losses on scenes that training "
        "does not see. All methods, and the single-task models, train on the other nine tenths.",
        "Losses are those of LibMTL: cross-entropy without unlabelled pixels (-1), absolute error of the depth where "
        "there is one, 1 - cosine of the normals where there are any. Epochs and batch size are LibMTL's, too.",
        "The papers start from a ResNet-50 or a SegNet with a decoder per task, and turn, scale or mirror scenes. Here "
        "a small encoder-decoder with a head per task starts from random weights, scenes are shown as they are, and "
        "the network of the last step is tested: expect figures below the papers', and compare methods with each "
        "other only.",
        "delta-m is the mean over the three tasks; segmentation's change is the mean over mIoU and pixel accuracy. "
        "Some papers count more measures, or all of them equally. Read it beside the columns of the tasks.",
        "Errors and angles are means over all pixels of the test; LibMTL takes the mean of the depth over batches.",
        "'first losses' divides each loss by its first training value and does nothing else. It is the baseline that "
        "adaptive methods have to beat where units differ.",
        "CoBa sees one validation batch per step, which costs a forward pass; no other method sees validation data.",
        "Nothing was tuned: rate and size are of the usual order. The single-task models are three trainings more. All "
        "of this is made for a graphics card; results of different machines differ in their last digits.",
        "With three repetitions no rank test can be significant: read the intervals.",
    )
    methods = (
        Method("equal", "equal weights", "The three losses are added as they are."),
        Method(
            "single",
            "single-task models",
            "Three networks, one per task: what the others are measured against.",
            claim=False,
        ),
        Method("first", "first losses", "Each loss is divided by its value on the first batch."),
        Method("uncertainty_first", "uncertainty (first losses)", "Learns a noise level per task, on divided losses."),
        Method("dwa", "DWA", "Weighs tasks by how slowly their training loss falls."),
        Method("coba", "CoBa (first losses)", "Follows how fast each task's validation loss converges."),
    )
    quick = ("equal", "single", "first")
    default = ("equal", "single", "first", "uncertainty_first", "dwa", "coba")
    metrics = (
        Metric("delta_m", "delta-m", "Mean over the tasks of the relative change to the single-task models."),
        Metric("miou", "mIoU", "Mean over classes of the overlap of found and true pixels, by both together."),
        Metric("pixel_accuracy", "pixel acc.", "Share of the labelled pixels whose class is found."),
        Metric(
            "depth_error",
            "depth error",
            "Mean absolute error of the depth, in its unit.",
            higher_is_better=False,
            share=False,
        ),
        Metric(
            "angle",
            "angle",
            "Mean angle between found and true normals, in degrees.",
            higher_is_better=False,
            share=False,
        ),
        Metric("val_delta_m", "delta-m, val.", "On the validation scenes.", shown=False),
    )
    seeds = 3
    needs = "train/ and val/, each with image/, label/, depth/ and normal/ of .npy files with the same names"
    folders = ("nyuv2", "NYUv2")
    tasks = TASKS
    signs: Mapping[str, Mapping[str, float]] = {
        "segmentation": {"miou": 1.0, "pixel_accuracy": 1.0},
        "depth": {"depth_error": -1.0},
        "normal": {"angle": -1.0},
    }
    # 1 - cosine is half the squared distance of two directions
    kinds: Mapping[str, Any] = {"segmentation": "categorical", "depth": "laplace", "normal": "gaussian"}
    training: Mapping[str, Any] = {
        "steps": EPOCHS * -(-715 // BATCH),
        "batch_size": BATCH,
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "rate_warmup": 200,
        "milestones": [0.75],
        "widths": [32, 64, 128, 256],
        "accelerator": "auto",
        "loaders": 4,
    }
    own: Mapping[str, Mapping[str, Any]] = {
        "first": {"init": "first"},
        "uncertainty_first": {"init": "first"},
        "coba": {"coba_warmup": 100, "coba_history": 200, "init": "first"},
    }

    def protocol(self) -> Mapping[str, Any]:
        return {"classes": CLASSES, "val": VAL, "signs": self.signs}

    def read(self) -> tuple[dict[str, list[Scene]], tuple[int, int]]:
        return _read(self.home, CLASSES)

    def data(self, seed: int) -> dict[str, Scenes]:
        """The parts of a seed."""
        from .dense import Scenes

        parts, size = self.read()
        known = parts["train"]
        order = np.random.default_rng(seed).permutation(len(known))
        number = max(1, round(VAL * len(known)))
        chosen = {
            "train": [known[at] for at in sorted(order[number:])],
            "val": [known[at] for at in sorted(order[:number])],
            "test": parts["val"],
        }
        return {part: Scenes(scenes, CLASSES, size) for part, scenes in chosen.items()}

    def prepare(self, seed: int) -> Trial:
        return _NYUTrial(self, seed)


class _NYUTrial(TaskTrial):
    suite: NYUv2

    def __init__(self, suite: NYUv2, seed: int) -> None:
        from .vision import place

        self.suite, self.seed = suite, seed
        self.device = place(suite.training)
        self.parts = suite.data(seed)
        digest = hashlib.sha256()
        for part in sorted(self.parts):
            digest.update(self.parts[part].digest(suite.home))
        self.data_hash = digest.hexdigest()
        self._alone = {}

    def _network(self, options: Mapping[str, Any]) -> nn.Module:
        from .dense import EncoderDecoder

        return EncoderDecoder(options["widths"], HEADS)

    def _module(self, tasks: tuple[str, ...]) -> type[Classifier]:
        from .dense import Dense

        return Dense.of(tasks)

    def _probed(self, options: Mapping[str, Any]) -> Iterable[Any]:
        found: Iterable[Any] = self.parts["val"].loader(options)
        return found

    def _test(self, net: nn.Module, part: str = "test") -> dict[str, float]:
        import torch

        from .dense import DenseScores
        from .training import reproducible

        scores = DenseScores(CLASSES)
        with reproducible(self.seed), torch.no_grad():
            net.to(self.device)
            for image, label, depth, normal in self.parts[part].loader(self.suite.training):
                found = {task: answer.cpu() for task, answer in net(image.to(self.device)).items()}
                scores.update(found, label, depth, normal)
            net.cpu()
        return scores.compute()
