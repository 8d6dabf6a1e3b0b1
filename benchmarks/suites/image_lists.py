"""ImageNet-LT, Places-LT and iNaturalist 2018 from the user's copies: image lists with a long tail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from ..readers import DataError, read_image_list
from .base import Metric, Outcome, Published
from .classes import (
    BALANCED,
    ECE,
    MACRO_F1,
    METHODS,
    NATURAL,
    VAL,
    ClassData,
    ClassSuite,
    ClassTrial,
    FromRoot,
)

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

MANY, FEW = 100, 20
"""Classes with more training images than the first are "many", with fewer than the second "few", others "medium"."""
SHOTS = ("many", "medium", "few")
POINTS = 100
"""Of the figure of all classes; where there are more classes, neighbours by size are averaged."""
EPOCHS, BATCH = 90, 512

Lists = dict[str, tuple[list[Path], NDArray[np.int64]]]

BALMS = "Ren et al. 2020 (BALMS), the README of their code"
DECOUPLING = "Kang et al. 2020 (decoupling), ResNeXt-50, the README of their code"


def shots(sizes: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Which classes are many, medium and few, by their training images."""
    many, few = sizes > MANY, sizes < FEW
    return many, ~(many | few), few


@lru_cache(maxsize=2)
def _read(folder: Path, files: tuple[tuple[str, str], ...], classes: int) -> Lists:
    found = {part: read_image_list(folder / file, folder, classes=classes) for part, file in files}
    sizes = np.bincount(found["train"][1], minlength=classes)
    for name, mine in zip(SHOTS, shots(sizes), strict=True):
        if not mine.any():
            rule = f"over {MANY}, under {FEW} and between are many, few and medium images"
            raise DataError(
                f"{folder / files[0][1]}: must have classes of many, medium and few images ({rule}), "
                f"found none of {name} ({sizes.min()} to {sizes.max()} per class)"
            )
    return found


def training(images: int) -> dict[str, Any]:
    """Settings for so many training images: those of the ResNet-10 on ImageNet-LT in the code of BALMS."""
    return {
        "model": "resnet10",
        "steps": EPOCHS * -(-images // BATCH),
        "batch_size": BATCH,
        "optimizer": "sgd",
        "lr": 0.2,
        "weight_decay": 5e-4,
        "milestones": [1 / 3, 2 / 3],
        "accelerator": "auto",
        "loaders": 4,
    }


class ImageListSuite(FromRoot, ClassSuite):
    """What they share. The option ``model`` is one of our networks or any name that timm knows."""

    version = 1
    classes: int
    files: tuple[tuple[str, str], ...]
    """Parts and the names of their lists."""
    size = 224
    """Pixels of a side."""
    modules: Mapping[str, str] = {"PIL": "pillow"}
    methods = tuple(
        METHODS[name]
        for name in ("ce", "posthoc_la", "inverse", "sqrt_inverse", "cb", "balanced_softmax", "focal", "drw")
    )
    quick = ("ce", "posthoc_la", "balanced_softmax")
    default = ("ce", "posthoc_la", "sqrt_inverse", "balanced_softmax", "drw")
    metrics: Sequence[Metric] = (
        Metric("accuracy", "accuracy", "Share of test images recognised."),
        Metric("many", "many", f"Mean recall of classes with more than {MANY} training images."),
        Metric("medium", "medium", f"Mean recall of classes with {FEW} to {MANY} training images."),
        Metric("few", "few", f"Mean recall of classes with fewer than {FEW} training images."),
        BALANCED,
        MACRO_F1,
        NATURAL,
        ECE,
    )
    notes: Sequence[str] = (
        "The authors of this program have measured nothing on these images: there is no promise, and no figure of ours "
        "to compare yours with.",
        "Many, medium and few are the papers' words for classes with more than 100, with 20 to 100 and with fewer than "
        "20 training images.",
        "The settings are those that the code of BALMS has for a ResNet-10 on ImageNet-LT, whatever the images. That "
        "code also varies colours, and lowers the rate along a cosine where it is divided by 10 twice here.",
        "The network of the last step is tested. Nothing is chosen on a validation list; where there is one, it is "
        "only reported.",
        "The network is a ResNet-10. Any other one of the package timm can be named (`model` in the suite's "
        "`training`). Weights are random at the start: nothing is downloaded.",
        "Post-hoc logit adjustment needs no training: a method that does not beat it has no case on these data.",
        "With three repetitions no rank test can be significant: read the intervals.",
    )
    seeds = 3

    def protocol(self) -> Mapping[str, Any]:
        return {
            "classes": self.classes,
            "lists": dict(self.files),
            "size": self.size,
            "augmentation": "random part of 8 % or more, flip",
            "shots": [MANY, FEW],
        }

    def unavailable(self) -> str | None:
        from .vision import OWN_NETWORKS

        model = self.training["model"]
        if self.data_root is not None and model not in OWN_NETWORKS and find_spec("timm") is None:
            return f"the network {model!r} needs timm: pip install timm"
        return super().unavailable()

    def read(self) -> Lists:
        return _read(self.home, self.files, self.classes)

    def data(self, seed: int) -> ClassData:
        import torch

        from .vision import Files, ImageSet

        parts, home, lists = {}, self.home, self.read()
        for part, (paths, target) in lists.items():
            source = Files(paths, home, self.size)
            parts[part] = ImageSet(source, torch.from_numpy(target), augment=part == "train", seed=seed)
        sizes = np.bincount(lists["train"][1], minlength=self.classes)
        by_size = np.argsort(-sizes, kind="stable").tolist()
        return ClassData(parts, by_size, [str(label) for label in range(self.classes)])

    def network(self, data: ClassData, options: Mapping[str, Any]) -> nn.Module:
        from .vision import network

        return network(options["model"], self.classes)

    def prepare(self, seed: int) -> ClassTrial:
        return ImageListTrial(self, seed)


class ImageListTrial(ClassTrial):
    """One seed, with the papers' three groups of classes."""

    def _test(self, found: Mapping[str, Tensor]) -> Outcome:
        outcome = super()._test(found)
        details = outcome.details
        recall, sizes = np.array(details["class_recall"]), np.array(details["class_counts"])
        for name, mine in zip(SHOTS, shots(sizes), strict=True):
            outcome.metrics[name] = float(recall[mine].mean())
        if len(sizes) > POINTS:
            pieces = np.array_split(np.arange(len(sizes)), POINTS)
            details["class_recall"] = [float(recall[piece].mean()) for piece in pieces]
            details["class_counts"] = [round(float(sizes[piece].mean())) for piece in pieces]
            details["class_names"] = [f"{len(piece)} classes" for piece in pieces]
        return outcome


def _story(what: str, classes: int, test: str) -> str:
    return (
        f"A residual network learns to tell {classes} {what}. Some kinds have very many training images and some have "
        f"very few, and it is tested on {test}. Each method changes only the loss. In every repetition all methods get "
        "the same initial network and the same batches, the same parts of the same images; the lists of images are "
        "fixed, so repetitions differ in the first weights, the order and the parts alone."
    )


@final
class ImageNetLT(ImageListSuite):
    """ImageNet-LT: 1000 classes, 1280 to 5 images."""

    name = "imagenet_lt"
    title = "ImageNet-LT"
    summary = "your ImageNet images by the lists of ImageNet-LT: 1000 classes, 1280 to 5 training images each"
    story = _story("kinds of things on photographs", 1000, "50 unseen images of each")
    classes = 1000
    files = (("train", "ImageNet_LT_train.txt"), ("val", "ImageNet_LT_val.txt"), ("test", "ImageNet_LT_test.txt"))
    folders = ("ImageNet_LT",)
    needs = "ImageNet_LT_train.txt, ImageNet_LT_val.txt, ImageNet_LT_test.txt and the images that these name"
    metrics = (*ImageListSuite.metrics, VAL)
    training: Mapping[str, Any] = training(115_846)
    published = (
        Published("softmax, ResNet-10", "top-1 accuracy, %", "34.8", BALMS),
        Published("BALMS, ResNet-10", "top-1 accuracy, %", "41.6", BALMS),
        Published("joint training", "all / many / medium / few, %", "44.4 / 65.9 / 37.5 / 7.7", DECOUPLING),
        Published("tau-normalised", "all / many / medium / few, %", "49.4 / 59.1 / 46.9 / 30.7", DECOUPLING),
        Published("LWS", "all / many / medium / few, %", "49.9 / 60.2 / 47.2 / 30.3", DECOUPLING),
        Published("cRT", "all / many / medium / few, %", "49.6 / 61.8 / 46.2 / 27.4", DECOUPLING),
    )


@final
class PlacesLT(ImageListSuite):
    """Places-LT: 365 classes, 4980 to 5 images."""

    name = "places_lt"
    title = "Places-LT"
    summary = "your Places images by the lists of Places-LT: 365 classes, 4980 to 5 training images each"
    story = _story("kinds of places on photographs", 365, "100 unseen images of each")
    classes = 365
    files = (("train", "Places_LT_train.txt"), ("val", "Places_LT_val.txt"), ("test", "Places_LT_test.txt"))
    folders = ("Places_LT",)
    needs = "Places_LT_train.txt, Places_LT_val.txt, Places_LT_test.txt and the images that these name"
    notes = (
        "The papers start from a ResNet-152 that has learned ImageNet. A small network that starts from nothing is far "
        "behind it, with every method: only compare methods with each other.",
        *ImageListSuite.notes,
    )
    metrics = (*ImageListSuite.metrics, VAL)
    training: Mapping[str, Any] = training(62_500)
    published = (
        Published("softmax, ResNet-152 from ImageNet", "top-1 accuracy, %", "30.2", BALMS),
        Published("BALMS, ResNet-152 from ImageNet", "top-1 accuracy, %", "38.3", BALMS),
    )


@final
class INaturalist18(ImageListSuite):
    """iNaturalist 2018: 8142 species, imbalanced as observers see them."""

    name = "inaturalist18"
    title = "iNaturalist 2018"
    summary = "your iNaturalist 2018 images: 8142 species, 1000 to 2 training images each, natural imbalance"
    story = _story(
        "species on photographs; nothing was left out to make the imbalance", 8142, "3 unseen images of each"
    )
    classes = 8142
    files = (("train", "iNaturalist18_train.txt"), ("test", "iNaturalist18_val.txt"))
    folders = ("iNaturalist18",)
    needs = "iNaturalist18_train.txt, iNaturalist18_val.txt and the images that these name"
    notes = (
        "The validation list is the test, as in the papers: the true test has no public labels.",
        *ImageListSuite.notes,
    )
    training: Mapping[str, Any] = training(437_513)
