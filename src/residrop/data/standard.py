"""The standard sets: scikit-learn's digits, and CIFAR-10, CIFAR-100 and SVHN through torchvision."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residrop.common.errors import DataError
from residrop.data.decoded import decoded_or_build, fingerprint
from residrop.data.splits import Images

__all__ = ["CIFAR_FOLDERS", "cifar", "digits", "svhn"]

CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def digits() -> tuple[dict[str, Images], tuple[str, ...]]:
    """Return the handwritten digits of scikit-learn: 1,797 grey images of 8x8 pixels, 0..16 scaled to 0..255.

    Like the other functions here: images of every part, and the names of the classes.

    Every fifth image of every class is a test image. The split needs no seed and is the same for everyone;
    the images are ordered by writer, so nearly every writer is in both parts.
    """
    from sklearn.datasets import load_digits  # costs a second, which other sources need not pay

    bunch: Any = load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    is_test = torch.zeros(labels.numel(), dtype=torch.bool)
    for label in range(10):
        is_test[(labels == label).nonzero().flatten()[4::5]] = True
    parts = {
        "train": Images(pixels[~is_test], labels[~is_test]),
        "test": Images(pixels[is_test], labels[is_test]),
    }
    return parts, tuple(str(label) for label in range(10))


def cifar(name: str, root: Path, download: bool, wanted: Sequence[str]) -> tuple[dict[str, Images], tuple[str, ...]]:
    """Read the Python batches of "cifar10" or "cifar100" below `root`; 32x32 RGB, 50,000 + 10,000 images.

    Of its parts "train" and "test" those that are `wanted`.

    Not cached: the batches are raw pixels already and take a second or two to read.

    Raises:
        DataError: if a file is missing or damaged and is not, or cannot be, downloaded.
    """
    from torchvision import datasets  # costs seconds, which other sources need not pay

    kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    meta = (kind.meta["filename"], kind.meta["md5"])
    lists = {"train": kind.train_list, "test": kind.test_list}
    listed = [*(one for part in wanted for one in lists[part]), meta]
    files = [(root / kind.base_folder / file, md5) for file, md5 in listed]
    _ensure(name, files, download, lambda: kind(root, download=True))
    parts = {}
    classes: tuple[str, ...] = ()
    with warnings.catch_warnings():
        # These pickles are from 2009; newer numpy remarks on their way to write a dtype.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        for part in wanted:
            data = kind(root, train=part == "train")
            pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            parts[part] = Images(pixels, torch.tensor(data.targets, dtype=torch.int64))
            classes = tuple(data.classes)
    return parts, classes


def svhn(
    root: Path, download: bool, cache: Path | None, wanted: Sequence[str]
) -> tuple[dict[str, Images], tuple[str, ...]]:
    """Read SVHN below `root`; 32x32 RGB; of its parts "train" (73,257), "extra" (531,131) and "test" (26,032).

    Raises:
        DataError: if a file is missing or damaged and is not, or cannot be, downloaded.
    """
    from torchvision.datasets import SVHN  # costs seconds, which other sources need not pay

    files = {name: (root / SVHN.split_list[name][1], SVHN.split_list[name][2]) for name in wanted}

    def build(name: str) -> dict[str, torch.Tensor]:
        _ensure("svhn", [files[name]], download, lambda: SVHN(root, split=name, download=True))
        data: Any = SVHN(root, split=name)
        labels = torch.from_numpy(data.labels.astype(np.int64).reshape(-1))
        return {"pixels": torch.from_numpy(np.ascontiguousarray(data.data)), "labels": labels}

    parts = {}
    for name in wanted:
        mark = fingerprint(root, [files[name][0]])
        tensors = decoded_or_build(root, f"svhn-{name}", mark, lambda name=name: build(name), cache)
        parts[name] = Images(tensors["pixels"], tensors["labels"])
    return parts, tuple(str(digit) for digit in range(10))


def _ensure(name: str, wanted: list[tuple[Path, str]], download: bool, fetch: Any) -> None:
    """Have all `wanted` files (path, MD5) in place, or raise the DataError that names the first that is not."""
    problem = _first_problem(wanted)
    if problem is None:
        return
    if not download:
        raise DataError(f"{name}: {problem}; allow the download, or name the right folder as {name}:DIR")
    try:
        fetch()
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{name}: {problem}; the download failed ({error}); fetch it by hand") from error
    problem = _first_problem(wanted)
    if problem is not None:
        raise DataError(f"{name}: {problem}, even after a download; delete the file and try again")


def _first_problem(wanted: list[tuple[Path, str]]) -> str | None:
    from torchvision.datasets.utils import check_integrity

    for path, md5 in wanted:
        if not path.is_file():
            return f"{path} is missing"
        if not check_integrity(str(path), md5):
            return f"{path} is damaged or half downloaded (its MD5 differs)"
    return None
