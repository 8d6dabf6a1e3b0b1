"""Scenes with several dense targets, in the folders of NYUv2 as MTAN and LibMTL ship them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .common import DataError, check_folder, listed, read_bytes

KINDS = ("image", "label", "depth", "normal")


@dataclass(frozen=True)
class Scene:
    """The files of one scene."""

    image: Path
    label: Path
    depth: Path
    normal: Path


def read_nyuv2(root: Path) -> dict[str, list[Scene]]:
    """The scenes under "train" and "val", in the order of their numbers; nothing is loaded yet.

    Args:
        root: Holds ``train`` and ``val``, each with ``image``, ``label``, ``depth`` and ``normal``, each of them with
            ``.npy`` files of the same names.

    Raises:
        DataError: A missing or empty folder, or a scene that lacks one of its files.
    """
    holds = "it holds train and val, each with image/, label/, depth/ and normal/ of .npy files with the same names"
    root = check_folder(root, "an NYUv2", holds, ["train", "val"])
    index = {}
    for part in ("train", "val"):
        folder = check_folder(root / part, "an NYUv2", holds, KINDS)
        names = {}
        for kind in KINDS:
            files = check_folder(folder / kind, "an NYUv2", holds).iterdir()
            names[kind] = {file.name for file in files if file.suffix == ".npy" and not file.name.startswith(".")}
        every = set().union(*names.values())
        if not every:
            raise DataError(f"{folder / 'image'}: must hold .npy files, found none")
        for kind, own in names.items():
            if own != every:
                missing = sorted(every - own, key=_order)
                raise DataError(
                    f"{folder / kind}: must have the same names as its neighbours, without {listed(missing)}"
                )
        index[part] = [Scene(*(folder / kind / name for kind in KINDS)) for name in sorted(every, key=_order)]
    return index


def _order(name: str) -> tuple[int, str]:
    stem = name.removesuffix(".npy")
    return (int(stem), name) if stem.isascii() and stem.isdigit() and len(stem) < 19 else (10**19, name)


def load_scene(scene: Scene, *, classes: int = 13) -> dict[str, NDArray[Any]]:
    """The float32 image ``(H, W, 3)``, depth ``(H, W)``, normal ``(H, W, 3)``, and int64 label ``(H, W)`` of a scene.

    Labels are in ``[0, classes)``, or -1 where a pixel has none. Depth may be stored as ``(H, W, 1)``.

    Raises:
        DataError: A missing or broken file, another shape or kind of number, values that are not finite, a label out of
            range.
    """
    image = _load(scene.image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype.kind != "f" or not image.size:
        raise DataError(f"{scene.image}: must be floats (H, W, 3), found {image.dtype} {image.shape}")
    size = image.shape[:2]
    label = _load(scene.label)
    if label.shape != size or label.dtype.kind not in "iuf":
        raise DataError(f"{scene.label}: must be whole numbers {size}, as the image, found {label.dtype} {label.shape}")
    strange = label[~((label >= -1) & (label < classes) & (label == np.floor(label)))]
    if len(strange):
        raise DataError(f"{scene.label}: a label must be a whole number in [-1, {classes}), found {strange[0]}")
    depth = _load(scene.depth)
    if depth.shape not in (size, (*size, 1)) or depth.dtype.kind != "f":
        raise DataError(
            f"{scene.depth}: must be floats {size} or {(*size, 1)}, as the image, found {depth.dtype} {depth.shape}"
        )
    normal = _load(scene.normal)
    if normal.shape != (*size, 3) or normal.dtype.kind != "f":
        raise DataError(
            f"{scene.normal}: must be floats {(*size, 3)}, as the image, found {normal.dtype} {normal.shape}"
        )
    found: dict[str, NDArray[Any]] = {"label": label.astype(np.int64)}
    for kind, file, array in (
        ("image", scene.image, image),
        ("depth", scene.depth, depth.reshape(size)),
        ("normal", scene.normal, normal),
    ):
        with np.errstate(over="ignore"):
            found[kind] = array.astype(np.float32)
        strange = array[~np.isfinite(found[kind])]
        if len(strange):
            raise DataError(f"{file}: must be finite in 32 bits, found {strange[0]}")
    return {kind: found[kind] for kind in KINDS}


def _load(file: Path) -> NDArray[Any]:
    data = read_bytes(file)
    if not data.startswith(b"\x93NUMPY"):  # numpy.load would take archives and pickles too
        raise DataError(f"{file}: must be a .npy array, found other data")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a broken header may raise anything
        raise DataError(f"{file}: must be a whole .npy array, found a broken one ({error})") from None
    return array  # type: ignore[no-any-return]
