"""CIFAR-10 and CIFAR-100 with a long tail, from the user's copy: the protocol of most papers on imbalanced classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from ..readers import DataError, long_tail_counts, long_tailed, read_cifar
from .base import Metric, Published
from .classes import BALANCED, ECE, MACRO_F1, METHODS, NATURAL, OWN, WORST, ClassData, ClassSuite, FromRoot, ends

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

EPOCHS, WARMUP, BATCH = 200, 5, 128
"""Epochs, those of a rising rate among them, and images of a batch."""
BETA = 0.9999
"""Of the effective number of samples, as in the code of LDAM-DRW."""
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Parts = dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]

LDAM = "Cao et al. 2019 (LDAM), quoted from an excerpt of the paper; best epoch on the test, rate / 100 at 80 and 90 %"
BALMS = "Ren et al. 2020 (BALMS), the README of their code; its training also cuts out and distorts images"
PUBLISHED: Mapping[str, Sequence[Published]] = {
    "cifar10_lt10": (
        Published("cross-entropy", "top-1 error, %", "13.61", LDAM),
        Published("LDAM-DRW", "top-1 error, %", "11.84", LDAM),
    ),
    "cifar10_lt100": (Published("LDAM-DRW", "top-1 error, %", "22.97", LDAM),),
    "cifar10_lt200": (
        Published("softmax", "top-1 accuracy, %", "74.0", BALMS),
        Published("balanced softmax, end to end", "top-1 accuracy, %", "79.8", BALMS),
        Published("balanced softmax, decoupled", "top-1 accuracy, %", "81.8", BALMS),
        Published("BALMS", "top-1 accuracy, %", "82.2", BALMS),
    ),
    "cifar100_lt10": (Published("LDAM-DRW", "top-1 error, %", "41.29", LDAM),),
    "cifar100_lt100": (Published("LDAM-DRW", "top-1 error, %", "57.96", LDAM),),
    "cifar100_lt200": (
        Published("softmax", "top-1 accuracy, %", "41.2", BALMS),
        Published("balanced softmax, end to end", "top-1 accuracy, %", "46.7", BALMS),
        Published("balanced softmax, decoupled", "top-1 accuracy, %", "47.2", BALMS),
        Published("BALMS", "top-1 accuracy, %", "48.0", BALMS),
    ),
}
"""By suite. The papers' figures, not ours."""


@lru_cache(maxsize=2)
def _read(root: Path, classes: int, largest: int) -> Parts:
    parts = read_cifar(root, classes)
    fewest = int(np.bincount(parts["train"][1], minlength=classes).min())
    if fewest < largest:
        raise DataError(f"{root}: the training part must have {largest} images of each class, found one with {fewest}")
    sizes = np.bincount(parts["test"][1], minlength=classes)
    if sizes.min() < sizes.max():
        found = f"{sizes.min()} to {sizes.max()}"
        raise DataError(f"{root}: the test part must have as many images of each class, found {found}")
    return parts


class CifarLT(FromRoot, ClassSuite):
    """What all of them share; ``classes`` and ``imbalance`` stand in the class statement."""

    version = 1
    classes: int
    imbalance: int
    largest: int
    """Training images of the most common class."""
    methods = tuple(
        replace(METHODS[name], what=METHODS[name].what.replace("beta 0.999)", f"beta {BETA})"))
        for name in (
            "ce",
            "posthoc_la",
            "inverse",
            "sqrt_inverse",
            "cb",
            "balanced_softmax",
            "focal",
            "cb_focal",
            "drw",
        )
    )
    quick = ("ce", "posthoc_la", "balanced_softmax")
    default = ("ce", "posthoc_la", "cb", "balanced_softmax", "drw")
    own: Mapping[str, Mapping[str, Any]] = {
        **OWN,
        **{name: {**OWN[name], "beta": BETA} for name in ("cb", "cb_focal", "drw")},
    }
    notes = (
        "The authors of this program have measured nothing on these images: there is no promise, and no figure of ours "
        "to compare yours with.",
        "As in the papers there is no validation part, the classes keep their order (airplane or apple is the most "
        "common one), and each repetition draws its own images.",
        "Settings are those of the LDAM-DRW code, with one exception: the network of the last step is tested, where "
        "that code reports the epoch that was best on the test, which flatters.",
        "The test has as many images of each class, so accuracy equals balanced accuracy.",
        "Post-hoc logit adjustment needs no training: a method that does not beat it has no case on these data.",
        "200 epochs of a ResNet-32 are made for a graphics card, which is used where there is one. Results of "
        "different machines differ in their last digits.",
    )
    seeds = 6

    def __init_subclass__(cls, *, classes: int, imbalance: int) -> None:
        super().__init_subclass__()
        cls.classes, cls.imbalance, cls.largest = classes, imbalance, 50_000 // classes
        cls.name = f"cifar{classes}_lt{imbalance}"
        counts = cls.sizes()
        cls.title = f"CIFAR-{classes}, imbalance {imbalance}"
        cls.summary = f"your CIFAR-{classes} images, training samples per class from {counts[0]} down to {counts[-1]}"
        folder = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
        cls.needs = f"CIFAR-{classes} as its authors give it for Python ({folder})"
        third = str(max(1, classes // 3))
        cls.story = (
            f"A residual network (ResNet-32) learns to tell {classes} kinds of things on photographs of 32 x 32 "
            f"pixels. It sees {counts[0]} images of the most common kind and {counts[-1]} of the rarest, each kind by "
            "the same factor fewer than the one before, and is tested on as many unseen images of each. Each method "
            "changes only the loss. In every repetition all methods get the same images, the same initial network and "
            "the same batches, shifted and mirrored in the same way."
        )
        cls.metrics = (
            Metric("accuracy", "accuracy", "Share of test images recognised; the test has as many of each class."),
            *ends(third),
            WORST,
            MACRO_F1,
            NATURAL,
            ECE,
            replace(BALANCED, shown=False),
        )
        cls.published = PUBLISHED.get(cls.name, ())
        epoch = -(-sum(counts) // BATCH)
        cls.training = {
            "model": "resnet32",
            "steps": EPOCHS * epoch,
            "batch_size": BATCH,
            "optimizer": "sgd",
            "lr": 0.1,
            "weight_decay": 2e-4,
            "rate_warmup": WARMUP * epoch,
            "milestones": [0.8, 0.8, 0.9, 0.9],  # twice a tenth, as the code has it
            "accelerator": "auto",
        }

    @classmethod
    def sizes(cls) -> list[int]:
        """Training images per class, most common first."""
        return long_tail_counts(cls.largest, cls.classes, cls.imbalance)

    def protocol(self) -> Mapping[str, Any]:
        return {"class_sizes": self.sizes(), "augmentation": "crop after padding 4, flip"}

    def read(self) -> Parts:
        return _read(self.home, self.classes, self.largest)

    def data(self, seed: int) -> ClassData:
        import torch

        from .vision import ImageSet, Pictures

        parts = self.read()
        images, target = parts["train"]
        at = long_tailed(target, self.sizes(), seed)
        train = ImageSet(Pictures(images[at]), torch.from_numpy(target[at]), augment=True, seed=seed)
        images, target = parts["test"]
        test = ImageSet(Pictures(images), torch.from_numpy(target))
        names = NAMES if self.classes == 10 else [str(label) for label in range(self.classes)]
        return ClassData({"train": train, "test": test}, list(range(self.classes)), names)

    def network(self, data: ClassData, options: Mapping[str, Any]) -> nn.Module:
        from .vision import network

        return network(options["model"], self.classes)


@final
class Cifar10LT10(CifarLT, classes=10, imbalance=10):
    """CIFAR-10, the rarest class 10 times rarer than the most common one."""


@final
class Cifar10LT50(CifarLT, classes=10, imbalance=50):
    """CIFAR-10, 50 times rarer."""


@final
class Cifar10LT100(CifarLT, classes=10, imbalance=100):
    """CIFAR-10, 100 times rarer."""


@final
class Cifar10LT200(CifarLT, classes=10, imbalance=200):
    """CIFAR-10, 200 times rarer."""


@final
class Cifar100LT10(CifarLT, classes=100, imbalance=10):
    """CIFAR-100, the rarest class 10 times rarer than the most common one."""


@final
class Cifar100LT50(CifarLT, classes=100, imbalance=50):
    """CIFAR-100, 50 times rarer."""


@final
class Cifar100LT100(CifarLT, classes=100, imbalance=100):
    """CIFAR-100, 100 times rarer."""


@final
class Cifar100LT200(CifarLT, classes=100, imbalance=200):
    """CIFAR-100, 200 times rarer."""


CIFAR_LT: tuple[type[CifarLT], ...] = (
    Cifar10LT10,
    Cifar10LT50,
    Cifar10LT100,
    Cifar10LT200,
    Cifar100LT10,
    Cifar100LT50,
    Cifar100LT100,
    Cifar100LT200,
)
"""All of them."""
