"""Folders of image files with one subfolder per class: `DIR/train/<class>/*`, `DIR/test/<class>/*`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from residrop.common.errors import DataError
from residrop.data.decode import DecodePool, DecodingError, open_rgb, shrink_and_crop, to_chw
from residrop.data.decoded import Decoded
from residrop.data.splits import Files, Images

__all__ = ["Tree", "decode_tree", "find_tree", "tree_files"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}
_TEST = ("test", "val", "valid", "validation")  # the first that exists is the test set


@dataclass(frozen=True, eq=False)
class Tree:
    """The files of an image folder: sorted by class, then by name; labels are int64 tensors."""

    classes: tuple[str, ...]
    train: tuple[Path, ...]
    train_labels: torch.Tensor
    test: tuple[Path, ...]
    test_labels: torch.Tensor


def find_tree(folder: Path, test_names: Sequence[str] = _TEST) -> Tree:
    """List the image files of `folder/train` and of the first existing one of `folder/<test_names>`.

    Hidden files and files without the suffix of an image are passed over.

    Raises:
        DataError: if a part is missing, a class has no images, or the parts have different classes.
    """
    if not (folder / "train").is_dir():
        raise DataError(f"{folder}: no folder train; expected train/<class>/<image> in it")
    name = next((name for name in test_names if (folder / name).is_dir()), None)
    if name is None:
        names = ", ".join(test_names)
        raise DataError(f"{folder}: a folder train but none for testing; add one of {names}")
    classes = _class_folders(folder / "train")
    others = _class_folders(folder / name)
    if classes != others:
        only_train = sorted(set(classes) - set(others))
        only_test = sorted(set(others) - set(classes))
        found = [
            f"only in {part}: {', '.join(some[:5])}"
            for part, some in (("train", only_train), (name, only_test))
            if some
        ]
        raise DataError(f"{folder}: train and {name} have different classes ({'; '.join(found)}); make them equal")
    train, train_labels = _list(folder / "train", classes)
    test, test_labels = _list(folder / name, classes)
    return Tree(classes, train, train_labels, test, test_labels)


def _class_folders(part: Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in part.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not classes:
        raise DataError(f"{part}: no class folders; put the images of every class into a folder of its name")
    return classes


def _list(part: Path, classes: tuple[str, ...]) -> tuple[tuple[Path, ...], torch.Tensor]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = part / name
        # scandir through os.listdir: a million Path objects are made once, here
        files = sorted(file for file in os.listdir(folder) if _is_image(file))  # noqa: PTH208
        if not files:
            raise DataError(f"{folder}: no images in this class folder; fill it or remove the class everywhere")
        paths.extend(folder / file for file in files)
        labels.extend([label] * len(files))
    return tuple(paths), torch.tensor(labels, dtype=torch.int64)


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in _SUFFIXES  # noqa: PTH122


def tree_files(tree: Tree, size: int, shorter: int = 0) -> tuple[Files, Files]:
    """Return the training and the test part to be decoded batch by batch."""
    return (
        Files(tree.train, tree.train_labels, size, shorter),
        Files(tree.test, tree.test_labels, size, shorter),
    )


def decode_tree(tree: Tree, size: int) -> Decoded:
    """Decode all images, each resized to `size` pixels along its shorter edge and cropped to a square.

    Returns:
        Parts "train" and "test"; one channel if every image is grey, otherwise three.

    Raises:
        DataError: naming the file, if an image is damaged.
    """
    paths = tree.train + tree.test
    buffer = np.empty((len(paths), 3, size, size), np.uint8)
    coloured = np.zeros(len(paths), np.bool_)

    def work(i: int, path: Path) -> None:
        try:
            image, grey = open_rgb(path)
        except DecodingError as error:
            raise DataError(f"{path}: image {error}; replace or remove the file") from error
        buffer[i] = to_chw(shrink_and_crop(image, size))
        coloured[i] = not grey

    with DecodePool(len(paths), "decoding") as pool:
        pool.run(work, paths)
    pixels = torch.from_numpy(buffer[:, : 3 if coloured.any() else 1]).contiguous()
    count = len(tree.train)
    parts = {
        "train": Images(pixels[:count], tree.train_labels),
        "test": Images(pixels[count:], tree.test_labels),
    }
    return Decoded(parts, tree.classes)
