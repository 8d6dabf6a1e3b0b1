"""Lists of images with labels (ImageNet-LT, Places-LT, iNaturalist), and images as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .common import DataError, check_folder, check_present, filled_lines, inside, is_integer, shown

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_image_list(
    list_file: Path, images: Path, *, classes: int | None = None
) -> tuple[list[Path], NDArray[np.int64]]:
    """Paths and labels ``(N,)`` from lines ``relative/path label``; a path may have spaces, blank lines are left out.

    Args:
        list_file: Such as ``ImageNet_LT_train.txt``.
        images: The folder that the paths start from; none may leave it.
        classes: Labels are in ``[0, classes)``; by default the largest label + 1.

    Raises:
        DataError: A line of another form, a path that leaves ``images`` or names no file, a label outside the range, a
            class without a sample.
    """
    if classes is not None and classes < 1:
        raise DataError(f"read_image_list: classes must be >= 1, found {classes!r}")
    folder = check_folder(images, "an image", f"it holds the files that {list_file} names")
    paths: list[Path] = []
    labels: list[int] = []
    rule = "an integer >= 0" if classes is None else f"an integer in [0, {classes})"
    for number, line in filled_lines(list_file):
        where = f"{list_file}, line {number}"
        columns = line.rsplit(None, 1)
        if len(columns) != 2:
            raise DataError(f"{where}: must be 'relative/path label', found {shown(line)}")
        name, label = columns
        if not is_integer(label) or int(label) < 0 or (classes is not None and int(label) >= classes):
            raise DataError(f"{where}: the label must be {rule}, found {shown(label)}")
        paths.append(inside(folder, name, where))
        labels.append(int(label))
    array = np.array(labels, np.int64)
    check_present(array, int(array.max()) + 1 if classes is None else classes, str(list_file))
    return paths, array


def load_images(
    paths: Sequence[Path],
    size: int,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> NDArray[np.float32]:
    """Images ``(N, 3, size, size)``: the shorter side resized to ``round(size * 256 / 224)``, the centre cut out.

    Values are ``(pixel / 255 - mean) / std`` of each colour. Needs Pillow.

    Raises:
        DataError: A missing, truncated or unreadable image, by name; a size, mean or std out of range.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("load_images needs Pillow: pip install pillow") from None

    if type(size) is not int or size < 1:
        raise DataError(f"load_images: size must be an integer >= 1, found {size!r}")
    if len(mean) != 3 or len(std) != 3 or not all(np.isfinite([*mean, *std])) or min(std) <= 0:
        raise DataError(f"load_images: mean and std must be 3 numbers, std > 0, found {mean!r} and {std!r}")
    batch = np.empty((len(paths), size, size, 3), np.float32)
    for at, path in enumerate(paths):
        if not Path(path).is_file():
            raise DataError(f"{path}: must be an image file, found no file at this path")
        try:
            with Image.open(path) as image:
                batch[at] = np.asarray(_centre(image.convert("RGB"), size))
        except Exception as error:  # decoders raise many kinds
            why = str(error) or type(error).__name__
            raise DataError(f"{path}: must be a whole image, found one that cannot be decoded ({why})") from None
    batch /= 255
    batch -= np.asarray(mean, np.float32)
    batch /= np.asarray(std, np.float32)
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


def _centre(image: Image, size: int) -> Image:
    from PIL.Image import Resampling

    shorter, least = round(size * 256 / 224), min(image.size)
    width, height = (shorter * side // least for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))
