"""What suites of images share: small residual networks, images that are read batch by batch, their augmentation."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..readers import DataError, load_images
from ..readers.common import listed
from ..readers.lists import IMAGENET_MEAN, IMAGENET_STD
from .training import EpochOrder

if TYPE_CHECKING:
    from PIL.Image import Image

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic algorithms fail on CUDA

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
PADDING = 4
"""Pixels of black around a CIFAR image before a part of the old size is cut out at a random place."""
RATIOS = (3 / 4, 4 / 3)
"""Width by height of a random part of an image."""

Frame = Literal["centre", "inner", "square", "whole"]


# images


class Source(Protocol):
    """Where the pixels of a data set come from."""

    def __len__(self) -> int: ...

    def read(self, at: Sequence[int], views: Sequence[np.random.Generator] | None) -> NDArray[np.float32]:
        """Images ``(N, 3, H, W)``; with generators, each is augmented by its own."""
        ...

    def digest(self) -> bytes:
        """SHA-256 of what the pixels depend on."""
        ...


class Pictures:
    """Small images held in memory: ``(N, H, W, 3)`` of bytes. Augmented: padded, cut out at random, maybe mirrored."""

    def __init__(
        self, pixels: NDArray[np.uint8], mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD
    ) -> None:
        self.pixels = pixels
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, at: Sequence[int], views: Sequence[np.random.Generator] | None) -> NDArray[np.float32]:
        found = self.pixels[np.asarray(at)]
        if views is not None:
            height, width = found.shape[1:3]
            wide = np.pad(found, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
            for row, view in enumerate(views):
                top, left = view.integers(0, 2 * PADDING + 1, 2)
                cut = wide[row, top : top + height, left : left + width]
                found[row] = cut[:, ::-1] if view.random() < 0.5 else cut
        scaled = (found.astype(np.float32) / 255 - self.mean) / self.std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)

    def digest(self) -> bytes:
        return hashlib.sha256(self.pixels.tobytes()).digest()


class Files:
    """Image files, opened when they are asked for. Augmented: a random part of the image, maybe mirrored.

    Args:
        paths: Of the images.
        root: Folder; names from there on, not the whole path, make the digest.
        size: Pixels of a side.
        frame: What is seen without augmentation. ``"centre"``: as ``load_images`` does; ``"square"``: the largest
            square in the middle; ``"inner"``: 7/8 of each side, in the middle; ``"whole"``: everything. The last two
            change the proportions.
        scale: Smallest share of the area that a random part has.
    """

    def __init__(
        self, paths: Sequence[Path], root: Path, size: int, *, frame: Frame = "centre", scale: float = 0.08
    ) -> None:
        self.paths, self.root, self.size, self.frame, self.scale = paths, root, size, frame, scale

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, at: Sequence[int], views: Sequence[np.random.Generator] | None) -> NDArray[np.float32]:
        if views is None and self.frame == "centre":
            return load_images([self.paths[index] for index in at], self.size)
        batch = np.empty((len(at), self.size, self.size, 3), np.float32)
        for row, index in enumerate(at):
            batch[row] = self._one(self.paths[index], None if views is None else views[row])
        batch /= 255
        batch -= np.asarray(IMAGENET_MEAN, np.float32)
        batch /= np.asarray(IMAGENET_STD, np.float32)
        return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))

    def _one(self, path: Path, view: np.random.Generator | None) -> NDArray[np.uint8]:
        from PIL.Image import Resampling

        image = opened(path)
        box = framed(self.frame, *image.size) if view is None else part(view, *image.size, self.scale)
        pixels = np.asarray(image.resize((self.size, self.size), Resampling.BILINEAR, box=box))
        return pixels[:, ::-1] if view is not None and view.random() < 0.5 else pixels

    def digest(self) -> bytes:
        names = "\n".join(path.relative_to(self.root).as_posix() for path in self.paths)
        return hashlib.sha256(names.encode()).digest()


def opened(path: Path) -> Image:
    """A whole image, in three colours.

    Raises:
        DataError: A missing, truncated or unreadable one, by name.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need Pillow: pip install pillow") from None
    if not path.is_file():
        raise DataError(f"{path}: must be an image file, found no file at this path")
    try:
        with Image.open(path) as image:
            found: Image.Image = image.convert("RGB")
    except Exception as error:  # decoders raise many kinds
        why = str(error) or type(error).__name__
        raise DataError(f"{path}: must be a whole image, found one that cannot be decoded ({why})") from None
    return found


def framed(frame: Frame, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is seen of an image."""
    shares = {"whole": (width, height), "inner": (width * 7 / 8, height * 7 / 8)}
    wide, high = shares.get(frame, (min(width, height),) * 2)
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def part(view: np.random.Generator, width: int, height: int, scale: float) -> tuple[float, float, float, float]:
    """A random part with at least ``scale`` of the area and sides in a proportion of 3 : 4 to 4 : 3.

    Where ten tries find none that fits, the largest one in the middle.
    """
    low, high = np.log(RATIOS)
    for _ in range(10):
        area = width * height * view.uniform(scale, 1.0)
        ratio = float(np.exp(view.uniform(low, high)))
        wide, tall = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(view.integers(0, width - wide + 1)), int(view.integers(0, height - tall + 1))
            return left, top, left + wide, top + tall
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    most, tallest = min(width, height * ratio), min(height, width / ratio)
    left_edge, top_edge = (width - most) / 2, (height - tallest) / 2
    return left_edge, top_edge, left_edge + most, top_edge + tallest


class Unreadable(DataError):
    """An image that cannot be read, in one line, also where a reading process says so with its traceback before it."""

    def __init__(self, text: str) -> None:
        super().__init__(text.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class ImageSet(Dataset[tuple[Tensor, ...]]):
    """Images and what belongs to each; takes a list of indices and gives the batch.

    With augmentation, an index comes from :class:`Views` and says for the how-manieth time an image is drawn: how it is
    augmented depends on that, on the image and on the seed, and not on the batch, the method or the reading process.

    Args:
        source: Of the pixels.
        behind: What stands behind the inputs in a batch: the target, the group, ...
        augment: Whether images are augmented.
        seed: Of the augmentation.
    """

    def __init__(self, source: Source, *behind: Tensor, augment: bool = False, seed: int = 0) -> None:
        self.source, self.behind, self.augment, self.seed = source, behind, augment, seed

    @property
    def targets(self) -> Tensor:
        """Where ``FitStatistics`` looks, so that counting classes opens no image."""
        return self.behind[0]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, items: Sequence[int]) -> tuple[Tensor, ...]:
        size = len(self)
        at = [item % size for item in items]
        views = None
        if self.augment:
            views = [np.random.Generator(np.random.Philox(key=[self.seed, item])) for item in items]
        try:
            inputs = torch.from_numpy(self.source.read(at, views))
        except DataError as error:
            raise Unreadable(str(error)) from None
        return inputs, *(tensor[at] for tensor in self.behind)

    def plain(self) -> ImageSet:
        """The same without augmentation."""
        return ImageSet(self.source, *self.behind)

    def plus(self, *more: Tensor) -> ImageSet:
        """The same with more behind the inputs."""
        found = copy.copy(self)
        found.behind = (*self.behind, *more)
        return found

    def order(self, batch_size: int, seed: int, inner: EpochOrder | None = None) -> Views:
        """The order of batches to train on it: the common one, or that of ``inner``."""
        return Views(inner or EpochOrder(len(self), batch_size, seed))

    def digest(self) -> bytes:
        """SHA-256 of names (or pixels) and of what belongs to them."""
        digest = hashlib.sha256(self.source.digest())
        for tensor in self.behind:
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.digest()


class Views(EpochOrder):
    """Another order of batches, in which each index also says how many samples were drawn before it."""

    def __init__(self, inner: EpochOrder) -> None:
        super().__init__(inner.size, inner.batch_size, inner.seed)
        self.inner = inner

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.inner.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        number = self.epoch * self.size
        for batch in self.inner:
            yield [(number + place) * self.size + index for place, index in enumerate(batch)]
            number += len(batch)


# networks


class Block(nn.Module):
    """Two convolutions beside a shortcut, which without parameters leaves out pixels and adds empty channels."""

    def __init__(self, channels: int, width: int, stride: int, *, projected: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - channels
        self.downsample: nn.Module | None = None
        if projected and (stride > 1 or self.more):
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Features of half the size where the stride is 2."""
        found: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(inputs)).relu()))
        return (found + self._shortcut(inputs)).relu()

    def _shortcut(self, inputs: Tensor) -> Tensor:
        if self.downsample is not None:
            return cast(Tensor, self.downsample(inputs))
        found = inputs[:, :, :: self.stride, :: self.stride]
        before = self.more // 2
        return nn.functional.pad(found, (0, 0, 0, 0, before, self.more - before)) if self.more else found


class ResNet(nn.Module):
    """A residual network of basic blocks; its parameters have the names that torchvision gives them.

    Args:
        blocks: In each stage.
        widths: Channels of each stage; all but the first halve the size.
        classes: Outputs.
        stem: ``"cifar"``, a convolution of 3 pixels, with shortcuts without parameters; ``"imagenet"``, one of 7 that
            halves the size and a pooling that does so again, with shortcuts that are convolutions.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], classes: int, *, stem: Literal["cifar", "imagenet"]
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, widths[0], 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        channels, self.stages = widths[0], len(blocks)
        for number, (depth, width) in enumerate(zip(blocks, widths, strict=True), 1):
            stage = []
            for place in range(depth):
                stage.append(Block(channels, width, 2 if number > 1 and not place else 1, projected=large))
                channels = width
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if large else "fan_in", nonlinearity="relu")
        if not large:
            nn.init.kaiming_normal_(self.fc.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, classes)``."""
        found = self.pool(self.bn1(self.conv1(inputs)).relu())
        for number in range(1, self.stages + 1):
            found = self.get_submodule(f"layer{number}")(found)
        return cast(Tensor, self.fc(found.mean((2, 3))))  # adaptive pooling has no deterministic gradient on CUDA


OWN_NETWORKS = ("resnet32", "resnet10", "resnet18")


def network(name: str, classes: int) -> nn.Module:
    """A fresh network: one of :data:`OWN_NETWORKS`, or any of timm's, with random weights."""
    if name == "resnet32":
        return ResNet((5, 5, 5), (16, 32, 64), classes, stem="cifar")
    if name in ("resnet10", "resnet18"):
        return ResNet((1 if name == "resnet10" else 2,) * 4, (64, 128, 256, 512), classes, stem="imagenet")
    try:
        timm: Any = import_module("timm")
    except ImportError:
        raise ImportError(f"the network {name!r} needs timm: pip install timm") from None
    return cast(nn.Module, timm.create_model(name, pretrained=False, num_classes=classes))


def load_weights(net: nn.Module, file: Path) -> None:
    """Start from the weights of a file, all but those of the last layer ``fc``.

    Args:
        net: Is changed in place.
        file: What ``torch.save(model.state_dict(), file)`` wrote, of this network or of torchvision's of that name; it
            is read as weights only, so it can run nothing.

    Raises:
        DataError: Another kind of file, or weights of another network.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile file may raise anything
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{file}: must be a state dict of tensors, found one that cannot be read ({why})") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{file}: must be a state dict of tensors, found {type(found).__name__}")
    own = net.state_dict()
    wanted = {name: value for name, value in own.items() if not name.startswith("fc.")}
    fits = {name for name, value in wanted.items() if name in found and found[name].shape == value.shape}
    wrong = sorted(name for name in wanted.keys() - fits if not name.endswith("num_batches_tracked"))
    if wrong:
        raise DataError(f"{file}: must hold the weights of the network, found no fitting {listed(wrong, 3)}")
    net.load_state_dict({**own, **{name: found[name] for name in fits}})


def file_hash(file: Path) -> bytes:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.digest()


# where they run


def place(options: Mapping[str, Any]) -> torch.device:
    """The device that ``options["accelerator"]`` means, as Lightning chooses it."""
    name = options.get("accelerator", "cpu")
    if name in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if name in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@torch.no_grad()
def outputs(net: nn.Module, data: ImageSet, options: Mapping[str, Any]) -> Tensor:
    """Of a network in evaluation mode, without augmentation, on the CPU; the network ends where it was."""
    plain, size = data.plain(), options["batch_size"]
    order = [list(range(start, min(start + size, len(data)))) for start in range(0, len(data), size)]
    loader: DataLoader[Any] = DataLoader(
        plain,
        sampler=order,
        batch_size=None,
        num_workers=options.get("loaders", 0),
        generator=torch.Generator(),  # the state of the global one is that of the training
    )
    before = next(net.parameters()).device
    there = place(options) if before.type == "cpu" else before
    net.to(there)
    found = [net(inputs.to(there)).cpu() for inputs, *_ in loader]
    net.to(before)
    return torch.cat(found)
