"""Waterbirds and CelebA from the user's copies: photographs in which a shortcut holds for most of the training data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from ..readers import read_celeba, read_waterbirds
from ..readers.groups import Grouped
from .classes import FromRoot
from .groups import TIMES, GroupData, GroupSuite

if TYPE_CHECKING:  # torch and Lightning are imported by the workers only
    from torch import nn

    from .vision import Frame

WEIGHTS = "weights.pt"
"""In the user's folder: weights that the networks start from, where it is there."""

NOTES = (
    "The authors of this program have measured nothing on these images: there is no promise, and no figure of ours to "
    "compare yours with.",
    "Group DRO, resampling and group weights are told the group of each training sample; JTT, CVaR, KL-DRO, focal and "
    "GCE are not. All are told the groups of the validation samples, by which the network is chosen: without that, "
    "plain training would look worse than it is.",
    "Accuracy at training frequencies is what the papers call adjusted average accuracy: the accuracy of each group, "
    "weighted by its share of the training data.",
    "The papers start from a ResNet-50 that has learned ImageNet. Here a ResNet-18 starts from random weights, unless "
    f"{WEIGHTS} lies in the data's folder: for example a state dict of torchvision's resnet18, written with "
    "torch.save. Without it, expect accuracies far below the papers'. The data hash depends on that file.",
    "Learning rate, batches, epochs and what is seen of an image are those of the sample command in the authors' code "
    "of group DRO; images are not augmented. The paper shows that strong weight decay or early stopping matters; "
    "here every method, plain training included, stops where the worst group of the validation data did best.",
    "The sample command combines group DRO with batches of equal shares of groups: that is the row of balanced "
    "batches.",
    "JTT has the same settings as in this program's other suites, not those of its paper.",
)
# the step size of group DRO as in the authors' code; the others have the settings they are usually given
OWN: Mapping[str, Mapping[str, Any]] = {
    "group_dro": {"step_size": 0.01},
    "group_dro_adjusted": {"step_size": 0.01, "adjustment": 1.0},
    "group_dro_balanced": {"step_size": 0.01},
    "cvar": {"alpha": 0.2},
    "kl_dro": {"temperature": 1.0},
    "focal": {"gamma": 2.0},
    "gce": {"q": 0.7},
}


@lru_cache(maxsize=2)
def _waterbirds(root: Path) -> dict[str, Grouped]:
    return read_waterbirds(root)


@lru_cache(maxsize=2)
def _celeba(root: Path) -> dict[str, Grouped]:
    return read_celeba(root)


class GroupImageSuite(FromRoot, GroupSuite):
    """What they share."""

    version = 1
    names: tuple[str, ...]
    """Of the groups."""
    frame: Frame
    """What is seen of an image."""
    size = 224
    """Pixels of a side."""
    modules: Mapping[str, str] = {"PIL": "pillow"}
    quick = ("erm", "group_dro_balanced", "resampling")
    default = ("erm", "group_dro", "group_dro_balanced", "resampling", "group_weights")
    notes = NOTES
    seeds = 6

    def protocol(self) -> Mapping[str, Any]:
        return {"size": self.size, "frame": self.frame}

    def data(self, seed: int) -> GroupData:
        import torch

        from .vision import Files, ImageSet, file_hash

        parts, home = {}, self.home
        for part, found in self.read().items():
            source = Files(found.paths, home, self.size, frame=self.frame)
            parts[part] = ImageSet(source, torch.from_numpy(found.label), torch.from_numpy(found.group))
        file = home / WEIGHTS
        return GroupData(parts, self.names, file_hash(file) if file.exists() else b"")

    def network(self, data: GroupData, options: Mapping[str, Any]) -> nn.Module:
        from .vision import load_weights, network

        net = network(options["model"], 2)
        if data.weights:
            load_weights(net, self.home / WEIGHTS)
        return net


def _training(epochs: int, images: int, rate: float) -> dict[str, Any]:
    epoch = -(-images // 128)
    return {
        "model": "resnet18",
        "steps": epochs * epoch,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": rate,
        "weight_decay": 1e-4,
        "look_every": epoch,
        "accelerator": "auto",
        "loaders": 4,
    }


@final
class Waterbirds(GroupImageSuite):
    """Water birds and land birds, before water and land."""

    name = "waterbirds"
    title = "Waterbirds"
    summary = "your Waterbirds images: water bird or land bird; the background agrees in 95 % of the training data"
    story = (
        "A residual network has to say whether a bird is a water bird or a land bird. The birds were cut out and put "
        "before other backgrounds: in training 95 % of water birds stand before water and of land birds before land, "
        "so a network may learn the background instead of the bird. What counts is the accuracy in the group (bird and "
        "background) that is served worst. Every method keeps the network of the training step at which the worst "
        "group of the validation data did best. In every repetition all methods get the same initial network and the "
        "same order of batches (those that resample draw their own); the split is fixed."
    )
    needs = "metadata.csv of Waterbirds (waterbird_complete95_forest2water2) and the images that it names"
    folders = ("waterbird_complete95_forest2water2", "waterbirds")
    names = ("land bird, land", "land bird, water", "water bird, land", "water bird, water")
    frame = "inner"
    training: Mapping[str, Any] = _training(300, 4795, 1e-3)
    own: Mapping[str, Mapping[str, Any]] = {**OWN, "jtt": {"first_steps": 60 * 38, "times": TIMES}}

    def read(self) -> dict[str, Grouped]:
        return _waterbirds(self.home)


@final
class CelebABlond(GroupImageSuite):
    """Blond hair, among women and men."""

    name = "celeba_blond"
    title = "CelebA, blond hair"
    summary = "your CelebA images: blond or not; of the blond faces in training few are men's"
    story = (
        "A residual network has to say whether a person on a photograph has blond hair. Few of the blond people in "
        "training are men, so a network may take every man for not blond. What counts is the accuracy in the group "
        "(hair and sex, as the data's authors had them annotated) that is served worst. Every method keeps the network "
        "of the training step at which the worst group of the validation data did best. In every repetition all "
        "methods get the same initial network and the same order of batches (those that resample draw their own); the "
        "split is fixed."
    )
    needs = "list_attr_celeba and list_eval_partition (.csv or .txt) and img_align_celeba/"
    folders = ("celeba", "celebA", "CelebA")
    names = ("not blond, female", "not blond, male", "blond, female", "blond, male")
    frame = "square"
    training: Mapping[str, Any] = _training(50, 162_770, 1e-4)
    own: Mapping[str, Mapping[str, Any]] = {**OWN, "jtt": {"first_steps": 1272, "times": TIMES}}

    def read(self) -> dict[str, Grouped]:
        return _celeba(self.home)
