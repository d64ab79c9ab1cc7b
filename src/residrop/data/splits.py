"""What a data source gives (`Images`, `Files`, `Splits`), and how its training part is divided further."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from residrop.common.errors import ConfigError, DataError
from residrop.data.remarks import named
from residrop.data.seeds import generator_for

__all__ = [
    "Files",
    "Images",
    "Splits",
    "balanced_limit",
    "hold_out",
    "renumber",
    "select",
    "stratified",
    "svhn_validation",
    "take_apart",
    "unknown_class",
]

_VALIDATION, _LIMIT, _SVHN = 1, 2, 3  # first words of the seeds: one purpose never repeats another's draw


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images in memory.

    Attributes:
        pixels: uint8 `Tensor[N, C, H, W]`, values 0..255, C = 1 (grey) or 3 (RGB).
        labels: int64 `Tensor[N]`, values 0..K-1 for K classes.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()


@dataclass(frozen=True, eq=False)
class Files:
    """Image files, decoded to RGB when a batch needs them because all at once are too large.

    Attributes:
        paths: one file for every image.
        labels: int64 `Tensor[N]`, values 0..K-1 for K classes.
        size: side of the square image that comes out, in pixels.
        shorter: length in pixels to which the shorter edge is resized before the central crop of `size`;
            0 stands for `size`. ImageNet's convention is 256 for a crop of 224.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    size: int
    shorter: int = 0

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Splits:
    """The images of one source.

    Attributes:
        name: short name of the source, fit for a file name.
        classes: K class names; label k means `classes[k]`.
        train: images to learn from, without those of `validation`.
        test: images for the reported number only.
        validation: images held out of the training set for choices, or None if none were asked for.
        channels: 1 (grey) or 3 (RGB).
        size: side of the square images in pixels.
        listed: of `Files`, the names below their folder of all that `train` and `validation` were drawn from.
    """

    name: str
    classes: tuple[str, ...]
    train: Images | Files
    test: Images | Files
    validation: Images | Files | None
    channels: int
    size: int
    listed: tuple[str, ...] | None = None


def renumber(labels: Tensor, names: Sequence[str], classes: Sequence[str], where: str) -> Tensor:
    """Turn labels that mean `names` into labels that mean `classes`, by name.

    Args:
        labels: int64 `Tensor[N]`, values 0..len(names)-1.
        names: what the labels mean.
        classes: what they shall mean; names that no label uses need not be among them.
        where: what to call the source in the message.

    Raises:
        DataError: if a name that occurs is not among `classes`.
    """
    index = {name: number for number, name in enumerate(classes)}
    table = torch.tensor([index.get(name, -1) for name in names], dtype=torch.int64)
    found = table[labels]
    if bool((found < 0).any()):
        name = names[int(labels[int((found < 0).int().argmax())])]
        raise DataError(unknown_class(where, name, classes))
    return found


def unknown_class(where: str, name: str, classes: Sequence[str]) -> str:
    """The message about a name that is not among the classes."""
    known = named(classes)
    return f"{where}: class {name!r} is not among the classes ({known}); correct the name or leave its images out"


def select(images: Images | Files, index: Tensor) -> Images | Files:
    """Return the images numbered by `index`, an int64 `Tensor[M]`, in that order."""
    if isinstance(images, Files):
        paths = tuple(images.paths[i] for i in index.tolist())
        return Files(paths, images.labels[index], images.size, images.shorter)
    return Images(images.pixels[index], images.labels[index])


def hold_out(total: int, count: int, seed: int) -> Tensor:
    """Draw which images of a training set become its validation set.

    Args:
        total: number of training images.
        count: number to hold out, 0 <= count < total.
        seed: the same seed holds out the same images.

    Returns:
        Ascending int64 `Tensor[count]` of image numbers. Classes are not balanced: Huang et al. draw freely too.

    Raises:
        ConfigError: if `count` is outside its range.
    """
    if not 0 <= count < total:
        message = f"validation={count}: must be at least 0 and less than the {total} training images"
        raise ConfigError(f"{message}; choose a smaller number")
    order = torch.randperm(total, generator=generator_for(_VALIDATION, seed))
    return order[:count].sort().values


def stratified(labels: Tensor, names: Sequence[str], share: float, keys: Sequence[str]) -> Tensor:
    """Draw which images become the test set of a source that has none: the same share of every class.

    Of every class those are drawn whose hash is smallest. So the draw is the same in every run, whatever its seed and
    the order of classes, and an image that comes or goes later moves at most one other between training and test.

    Args:
        labels: int64 `Tensor[N]`, values 0..len(names)-1.
        names: of the classes.
        share: of every class, in (0, 1), rounded to whole images; of two images or more at least one on either side.
        keys: N texts that are hashed, such as file names; no two of one class are equal.

    Returns:
        Ascending int64 tensor of image numbers.

    Raises:
        ConfigError: if `share` is out of range.
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"split={share}: must lie between 0 and 1; 0.2 takes a fifth of every class for testing")
    hashes = [hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest() for key in keys]
    chosen: list[int] = []
    for label in range(len(names)):
        members = (labels == label).nonzero().flatten().tolist()
        count = min(max(round(share * len(members)), 1), len(members) - 1) if len(members) > 1 else 0
        chosen.extend(sorted(members, key=lambda number: hashes[number])[:count])
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def svhn_validation(train: Tensor, extra: Tensor, seed: int, *, per_train: int = 400, per_extra: int = 200) -> Tensor:
    """Draw the validation set of SVHN as in Huang et al.: per class, some of `train` and some of `extra`.

    Args:
        train: int64 `Tensor[N]`, labels of the set "train".
        extra: int64 `Tensor[M]`, labels of the set "extra".
        seed: the same seed holds out the same images.
        per_train: images per class out of "train".
        per_extra: images per class out of "extra".

    Returns:
        Ascending int64 tensor of numbers into the concatenation of "train" and "extra".

    Raises:
        DataError: if a class has fewer images than are to be held out.
    """
    generator = generator_for(_SVHN, seed)
    chosen = []
    parts = (("train", train, per_train, 0), ("extra", extra, per_extra, train.numel()))
    for name, labels, count, offset in parts:
        for label in range(int(torch.cat([train, extra]).max()) + 1):
            members = (labels == label).nonzero().flatten()
            if members.numel() < count:
                message = f"SVHN {name}: {members.numel()} images of class {label}, {count} are to be held out"
                raise DataError(f"{message}; use the complete set or validation=0")
            order = torch.randperm(members.numel(), generator=generator)
            chosen.append(members[order[:count]] + offset)
    return torch.cat(chosen).sort().values


def take_apart(images: Images | Files, held_out: Tensor) -> tuple[Images | Files, Images | Files]:
    """Split images into (those not in `held_out`, those in it), both in their old order."""
    keep = torch.ones(len(images), dtype=torch.bool)
    keep[held_out] = False
    return select(images, keep.nonzero().flatten()), select(images, held_out)


def balanced_limit(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Draw `limit` images with class counts as equal as the set allows.

    Args:
        labels: int64 `Tensor[N]`.
        limit: number of images wanted, at least 1; more than N keeps all.
        seed: the same seed draws the same images; a smaller limit draws a subset of them.

    Returns:
        Ascending int64 `Tensor[min(limit, N)]` of image numbers.

    Raises:
        ConfigError: if `limit` is less than 1.
    """
    if limit < 1:
        raise ConfigError(f"limit={limit}: must be at least 1; leave it out to keep all training images")
    order = torch.randperm(labels.numel(), generator=generator_for(_LIMIT, seed))
    shuffled = labels[order]
    rank = torch.empty_like(order)  # rank of an image within its class, in shuffled order
    for label in shuffled.unique():
        members = (shuffled == label).nonzero().flatten()
        rank[members] = torch.arange(members.numel())
    # A stable sort deals out one image of every class, then a second one, until a class runs dry.
    dealt = order[rank.sort(stable=True).indices]
    return dealt[:limit].sort().values
