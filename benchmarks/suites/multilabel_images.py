"""COCO, and the long-tailed VOC-MLT and COCO-MLT, from the user's copies: several labels for each photograph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from ..readers import DataError, MultiLabel, read_coco
from ..readers.common import listed
from .base import Metric, Outcome, Published, Suite
from .classes import FromRoot
from .multilabel import ECE, MACRO_F1, MAP, METHODS, OWN, VAL, LabelData, LabelTrial

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import Tensor, nn

    from reweigh.losses import Objective

HEAD, TAIL = 100, 20
"""Labels with more training images than the first are head, with fewer than the second tail, others medium."""
WEIGHTS = "weights.pt"
"""In the user's folder: weights that the networks start from, where it is there."""
VAL_SEED = 0
"""Of the choice of validation images, the same in all repetitions."""

CF1 = Metric(
    "cf1", "CF1", "Harmonic mean of the labels' mean precision and mean recall, where yes is a probability above 0.5."
)
OF1 = Metric("of1", "OF1", "F1 over all answers for all labels together, where yes is a probability above 0.5.")
REST = (
    CF1,
    OF1,
    MACRO_F1,
    ECE,
    VAL,
)

ASL = "Ben-Baruch et al. 2021 (ASL), quoted from an excerpt of the paper"

Split = dict[str, MultiLabel]


def apart(pool: MultiLabel, taken: Sequence[Path], number: int) -> tuple[list[int], list[int]]:
    """Places in ``pool`` of the training and of the validation images.

    Validation images are drawn from those that are not ``taken`` for training; where all are, they are set apart.
    """
    kept = set(taken)
    rest = [place for place, path in enumerate(pool.paths) if path not in kept]
    free = rest or list(range(len(pool.paths)))
    chosen = np.random.default_rng(VAL_SEED).permutation(len(free))[:number]
    val = sorted(free[place] for place in chosen)
    out = set(val)
    train = [place for place, path in enumerate(pool.paths) if path in kept and place not in out]
    return train, val


@lru_cache(maxsize=2)
def _read(home: Path, train: tuple[str, str], test: tuple[str, str], keep: str | None, number: int) -> Split:
    pool, other = (read_coco(home / file, home / images) for file, images in (train, test))
    if pool.names != other.names:
        odd = sorted(set(pool.names) ^ set(other.names))
        found = f"only one of them has {listed(odd)}" if odd else "another order"
        raise DataError(f"{home / test[0]}: must have the categories of {train[0]}, found a difference: {found}")
    if keep is None:  # the custom on all of COCO: images without any label are left out
        pool, other = (_chosen(own, np.flatnonzero(own.labels.any(1)).tolist()) for own in (pool, other))
        taken: Sequence[Path] = pool.paths
    else:
        taken = read_coco(home / train[0], home / train[1], keep=home / keep).paths
    spare = len(pool.paths) - (len(taken) if keep else 1)
    if spare < number:
        besides = f" besides the {len(taken)} of {keep}" if keep else ""
        raise DataError(f"{home / train[0]}: must have {number} images{besides} for validation, found {spare}")
    rows, val = apart(pool, taken, number)
    found_parts = {"train": _chosen(pool, rows), "val": _chosen(pool, val), "test": other}
    sizes = found_parts["train"].labels.sum(0)
    where = home / (keep or train[0])
    absent = [pool.names[place] for place in np.flatnonzero(sizes == 0)]
    if absent:
        raise DataError(f"{where}: every category must have an image in training, found none of {listed(absent)}")
    if keep and not all(mine.any() for mine in thirds(sizes)):
        rule = f"over {HEAD}, under {TAIL} and between"
        raise DataError(
            f"{where}: must have head, tail and medium labels ({rule}), found {sizes.min()} to {sizes.max()}"
        )
    return found_parts


def _chosen(whole: MultiLabel, rows: list[int]) -> MultiLabel:
    return MultiLabel(tuple(whole.paths[row] for row in rows), whole.labels[rows], whole.names)


def thirds(sizes: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Which labels are head, medium and tail, by their training images."""
    head, tail = sizes > HEAD, sizes < TAIL
    return head, ~(head | tail), tail


class LabelImageSuite(FromRoot, Suite):
    """What they share."""

    version = 1
    train_files: tuple[str, str]
    """Annotations and the folder of images, for training."""
    test_files: tuple[str, str]
    keep: str | None = None
    """List of the training images, where not all are taken."""
    val_images = 2000
    size = 224
    """Pixels of a side."""
    scale = 0.64
    """Smallest share of the area of an image that training sees at a time."""
    modules: Mapping[str, str] = {"PIL": "pillow"}
    methods = METHODS
    quick = ("bce", "thresholds", "asl")
    default = ("bce", "thresholds", "adjusted", "asl")
    own = OWN
    chosen_by = "val_map"
    notes: Sequence[str] = (
        "The authors of this program have measured nothing on these images: there is no promise, and no figure of ours "
        "to compare yours with.",
        "mAP does not depend on the threshold between yes and no; CF1, OF1 and macro F1 do. Moving it "
        "to where validation data put it costs nothing: that is the row of tuned thresholds, and a method that wins in "
        "F1 alone has to be compared with it.",
        "The papers start from networks that have learned ImageNet. Here a ResNet-18 starts from random weights, "
        f"unless {WEIGHTS} lies in the data's folder: for example a state dict of torchvision's resnet18, written with "
        "torch.save. Without it, expect figures far below the papers'. The data hash depends on that file.",
        "The settings of the losses are those chosen on this program's composites of digits, not on these images.",
    )

    def protocol(self) -> Mapping[str, Any]:
        return {
            "train": list(self.train_files),
            "test": list(self.test_files),
            "keep": self.keep,
            "val_images": self.val_images,
            "size": self.size,
            "augmentation": f"random part of {self.scale} or more, flip",
        }

    def read(self) -> Split:
        return _read(self.home, self.train_files, self.test_files, self.keep, self.val_images)

    def prepare(self, seed: int) -> LabelTrial:
        return LabelImageTrial(self, seed)

    def data(self, seed: int) -> LabelData:
        """The parts; only the augmentation depends on the seed."""
        import torch

        from .vision import Files, ImageSet, file_hash

        home, split = self.home, self.read()
        parts = {}
        for part, found in split.items():
            source = Files(found.paths, home, self.size, frame="whole", scale=self.scale)
            labels = torch.from_numpy(found.labels)
            parts[part] = ImageSet(source, labels, augment=part == "train", seed=seed)
        by_size = np.argsort(-split["train"].labels.sum(0), kind="stable").tolist()
        file = home / WEIGHTS
        return LabelData(parts, by_size, split["train"].names, file_hash(file) if file.exists() else b"")

    def network(self, data: LabelData, options: Mapping[str, Any]) -> nn.Module:
        """A fresh network."""
        from .vision import load_weights, network

        net = network(options["model"], len(data.names))
        if data.weights:
            load_weights(net, self.home / WEIGHTS)
        return net

    def objective(self, method: str, data: LabelData) -> Objective:
        """The loss of a method."""
        from .multilabel import objective

        return objective(method, self.options(method), data)


class LabelImageTrial(LabelTrial):
    """One seed, with the papers' metrics."""

    def _test(self, logits: Tensor, val: Tensor, lines: Tensor | None) -> Outcome:
        from torchmetrics.functional.classification import (
            multilabel_f1_score,
            multilabel_precision,
            multilabel_recall,
        )

        outcome = super()._test(logits, val, lines)
        p, target, labels = logits.sigmoid(), self._truth("test"), len(self.by_size)
        said = (p > (0.5 if lines is None else lines)).long()
        precision = float(multilabel_precision(said, target, labels, average="macro"))
        recall = float(multilabel_recall(said, target, labels, average="macro"))
        both = precision + recall
        outcome.metrics["cf1"] = 2 * precision * recall / both if both else 0.0
        outcome.metrics["of1"] = float(multilabel_f1_score(said, target, labels, average="micro"))
        sizes, found = np.array(outcome.details["class_counts"]), np.array(outcome.details["class_precision"])
        for name, mine in zip(("head_map", "medium_map", "tail_map"), thirds(sizes), strict=True):
            if mine.any():
                outcome.metrics[name] = float(found[mine].mean())
        return outcome


@final
class Coco(LabelImageSuite):
    """MS-COCO 2014, all of it."""

    name = "coco"
    title = "MS-COCO"
    summary = "your COCO 2014 images: which of 80 kinds of things are on a photograph"
    story = (
        "A residual network has to say which of 80 kinds of things are on a photograph; most of them are not. Each "
        "method changes only the loss. In every repetition all methods get the same initial network and the same "
        "batches, the same parts of the same images; the images are fixed, so repetitions differ in the first weights, "
        "the order and the parts alone."
    )
    needs = "annotations/instances_train2014.json, annotations/instances_val2014.json, train2014/ and val2014/"
    folders = ("coco", "COCO")
    train_files = ("annotations/instances_train2014.json", "train2014")
    test_files = ("annotations/instances_val2014.json", "val2014")
    metrics = (
        MAP,
        *REST,
        Metric("tail_ap", "tail-26 AP", "Mean average precision of the 26 labels that are rarest in training."),
        Metric("head_ap", "head-26 AP", "Mean average precision of the 26 most common labels."),
    )
    notes = (
        "As is the custom, the published validation images are the test, and images without any label are left out. "
        "2000 training images are set apart for validation, which the papers do not do.",
        "Images are seen at 224 pixels a side, the papers' at 448. AdamW at 1e-4 and 80 epochs are of the order that "
        "papers use; they were not tuned.",
        "With three repetitions no rank test can be significant: read the intervals.",
        *LabelImageSuite.notes,
    )
    seeds = 3
    published = (
        Published("ASL, TResNet-L at 448 pixels", "mAP, %", "86.6", ASL),
        Published("ASL, TResNet-XL at 640 pixels", "mAP, %", "88.4", ASL),
    )
    training: Mapping[str, Any] = {
        "model": "resnet18",
        "steps": 80 * 626,
        "batch_size": 128,
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "rate_warmup": 626,
        "milestones": [0.6, 0.85],
        "accelerator": "auto",
        "loaders": 4,
    }


class LongTailedLabels(LabelImageSuite):
    """What VOC-MLT and COCO-MLT share."""

    metrics = (
        MAP,
        Metric("head_map", "head mAP", f"Of labels with more than {HEAD} training images."),
        Metric("medium_map", "medium mAP", f"Of labels with {TAIL} to {HEAD} training images."),
        Metric("tail_map", "tail mAP", f"Of labels with fewer than {TAIL} training images."),
        *REST,
    )
    notes = (
        "Head, medium and tail are the papers' words for labels with more than 100, with 20 to 100 and with fewer than "
        "20 training images.",
        "Validation images are 2000 of those that the list leaves out of the training data: they are not in the "
        "papers' training data either, and have the natural frequencies of labels.",
        "Rate, batches and the 80 epochs stand in the configuration of the authors' code (distribution-balanced loss). "
        "That code also draws images by class, and varies colours.",
        *LabelImageSuite.notes,
    )
    seeds = 6


def _long_tailed(images: int) -> dict[str, Any]:
    return {
        "model": "resnet18",
        "steps": 80 * -(-images // 32),
        "batch_size": 32,
        "optimizer": "sgd",
        "lr": 0.02,
        "weight_decay": 1e-4,
        "rate_warmup": 500,
        "milestones": [55 / 80, 75 / 80],
        "accelerator": "auto",
        "loaders": 4,
    }


def _story(labels: int, what: str) -> str:
    return (
        f"A residual network has to say which of {labels} kinds of things are on a photograph. It learns from {what} "
        "that were chosen so that some kinds are common and some very rare, and is tested on photographs with the "
        "usual frequencies. Each method changes only the loss. In every repetition all methods get the same initial "
        "network and the same batches, the same parts of the same images; the images are fixed, so repetitions differ "
        "in the first weights, the order and the parts alone."
    )


@final
class VocMLT(LongTailedLabels):
    """VOC 2012 with a long tail, tested on VOC 2007."""

    name = "voc_mlt"
    title = "VOC-MLT"
    summary = "your VOC images, exported to JSON: 20 labels, about 1100 training images chosen to have a long tail"
    story = _story(20, "about 1100 photographs of VOC 2012")
    needs = (
        "voc2012_trainval.json and voc2007_test.json (of COCO's form), voc_mlt.txt (an image id or file name on each "
        "line), VOC2012/JPEGImages/ and VOC2007/JPEGImages/"
    )
    folders = ("voc", "VOC", "VOCdevkit")
    train_files = ("voc2012_trainval.json", "VOC2012/JPEGImages")
    test_files = ("voc2007_test.json", "VOC2007/JPEGImages")
    keep = "voc_mlt.txt"
    training: Mapping[str, Any] = _long_tailed(1142)


@final
class CocoMLT(LongTailedLabels):
    """COCO 2017 with a long tail."""

    name = "coco_mlt"
    title = "COCO-MLT"
    summary = "your COCO 2017 images: 80 labels, about 1900 training images chosen to have a long tail"
    story = _story(80, "about 1900 photographs of COCO 2017")
    needs = (
        "annotations/instances_train2017.json, annotations/instances_val2017.json, coco_mlt.txt (an image id or file "
        "name on each line), train2017/ and val2017/"
    )
    folders = ("coco", "COCO")
    train_files = ("annotations/instances_train2017.json", "train2017")
    test_files = ("annotations/instances_val2017.json", "val2017")
    keep = "coco_mlt.txt"
    training: Mapping[str, Any] = _long_tailed(1909)
