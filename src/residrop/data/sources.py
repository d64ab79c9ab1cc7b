"""From the name of a source to its images: `load` is the door of this package."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from residrop.common.errors import ConfigError, DataError
from residrop.data.decoded import Decoded, decoded_or_build, fingerprint, user_cache
from residrop.data.folders import Tree, decode_tree, find_tree, tree_files
from residrop.data.splits import Images, Splits, balanced_limit, hold_out, select, svhn_validation, take_apart
from residrop.data.standard import CIFAR_FOLDERS, cifar, digits, svhn

__all__ = ["load", "sources"]

_SVHN_VALIDATION = 6000  # ten classes, of each 400 out of train and 200 out of extra
_IN_MEMORY_BYTES = 1 << 30  # an image folder that decodes to more streams through workers
_DEFAULT_SIZE = 32  # pixels, of folder:DIR
_LAYOUTS = "train-*.parquet and test-*.parquet, train/<class>/ and test/<class>/, cifar-10-batches-py/"


@dataclass(frozen=True)
class _Request:
    """A source taken apart: `folder` is None where none was named."""

    kind: str
    folder: Path | None
    size: int
    download: bool
    cache: Path | None

    def root(self) -> Path:
        """Return the folder of a torchvision set."""
        return self.folder or self.cache or user_cache()

    def existing(self) -> Path:
        """Return the folder of a source that must have one."""
        if self.folder is None:
            raise DataError(f"{self.kind}: no folder named; write {self.kind}:DIR")
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; check the path after {self.kind}:")
        return self.folder


def sources() -> dict[str, str]:
    """Return every kind of source with a one-line description, for help texts and listings."""
    return {name: description for name, (description, _) in _KINDS.items()}


def load(
    source: str = "digits",
    *,
    validation: int = 0,
    seed: int = 1,
    limit: int | None = None,
    download: bool = True,
    cache: Path | None = None,
) -> Splits:
    """Load the images of a source.

    Args:
        source: a name of `sources()`, with the folder after a colon where one is needed ("parquet:DIR",
            "folder:DIR?size=64"; optional for "cifar10:DIR" and its like), or the path of a folder, whose layout
            is then found out. A name wins over a folder of that name.
        validation: number of images taken out of the training set for choices, drawn by `seed`. For svhn it must be
            0 or 6000, drawn by class as in Huang et al.
        seed: the same seed draws the same validation set and the same limited set.
        limit: keep only so many training images (after the validation set is taken out), their class counts as
            equal as possible; a draw by `seed`. At least 1; None keeps all.
        download: whether a missing torchvision set may be downloaded.
        cache: folder for downloads and decoded images. Default: downloads go to the user's cache folder
            (`$XDG_CACHE_HOME/residrop` or `~/.cache/residrop`); decoded images go beside the source, or to the
            user's cache folder if that place must not be written.

    Returns:
        The splits. Pixels are uint8 `Tensor[N, C, H, W]`, 0..255, labels int64 `Tensor[N]`. "imagenet" gives `Files`,
        and so does a "folder" whose decoded images would take 1 GiB or more.

    Raises:
        DataError: for an unknown source, and for a missing, incomplete or corrupt one; the message names the file.
        ConfigError: if `validation`, `limit` or the size of "folder:DIR?size=N" is out of range.
    """
    if validation < 0:
        raise ConfigError(f"validation={validation}: must be at least 0; 0 holds out no images")
    request = _parse(source, download, cache)
    if request.kind == "svhn" and validation not in (0, _SVHN_VALIDATION):
        raise ConfigError(
            f"validation={validation}: svhn allows 0 or {_SVHN_VALIDATION}, 400 of train and 200 of extra per class"
        )
    try:
        loaded = _KINDS[request.kind][1](request)
    except OSError as error:  # a folder that may not be listed, a file that vanished meanwhile
        raise DataError(f"source {source!r}: cannot be read ({error}); check path and permissions") from error
    if isinstance(loaded, Decoded):
        splits = _from_decoded(loaded, request, validation, seed)
    else:
        splits = _from_files(loaded, request)
        if validation:
            train, held_out = take_apart(splits.train, hold_out(len(splits.train), validation, seed))
            splits = replace(splits, train=train, validation=held_out)
    if limit is not None:
        splits = replace(splits, train=select(splits.train, balanced_limit(splits.train.labels, limit, seed)))
    return splits


def _from_decoded(decoded: Decoded, request: _Request, validation: int, seed: int) -> Splits:
    train, test = decoded.parts["train"], decoded.parts["test"]
    extra = decoded.parts.get("extra")
    if extra is not None:
        pixels = torch.cat([train.pixels, extra.pixels])
        whole = Images(pixels, torch.cat([train.labels, extra.labels]))
    else:
        whole = train
    _, channels, _, size = whole.pixels.shape
    remaining, held_out = whole, None
    if validation:
        if extra is not None:
            index = svhn_validation(train.labels, extra.labels, seed)
        else:
            index = hold_out(len(whole), validation, seed)
        remaining, held_out = take_apart(whole, index)
    return Splits(_name(request), decoded.classes, remaining, test, held_out, channels, size)


def _from_files(parts: tuple[Tree, int, int], request: _Request) -> Splits:
    tree, size, shorter = parts
    train, test = tree_files(tree, size, shorter)
    return Splits(_name(request), tree.classes, train, test, None, 3, size)


def _name(request: _Request) -> str:
    if request.kind in ("parquet", "folder") and request.folder is not None:
        return request.folder.resolve().name or request.kind
    return request.kind


def _parse(source: str, download: bool, cache: Path | None) -> _Request:
    """Take a source apart.

    Raises:
        DataError: if it is neither a known name nor a folder of a known layout.
        ConfigError: if its options are wrong.
    """
    kind, colon, rest = source.partition(":")
    if kind in _KINDS:
        size = _DEFAULT_SIZE
        if kind == "folder" and "?" in rest:
            rest, _, option = rest.rpartition("?")
            size = _size(source, option)
        if colon and kind == "digits":
            raise DataError(f"source {source!r}: digits has no folder; write digits")
        if colon and not rest:
            raise DataError(f"source {source!r}: no folder after the colon; write {kind}:DIR")
        return _Request(kind, Path(rest).expanduser() if rest else None, size, download, cache)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        names = ", ".join(_KINDS)
        raise DataError(f"source {source!r}: neither a folder nor a known name; known are {names}")
    return _Request(_detect(folder), folder, _DEFAULT_SIZE, download, cache)


def _size(source: str, option: str) -> int:
    match = re.fullmatch(r"size=([0-9]{1,5})", option)
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"source {source!r}: option {option!r}; allowed is size=N with N pixels, at least 1")
    return int(match[1])


def _detect(folder: Path) -> str:
    from residrop.data.parquet import find_shards  # loads pyarrow

    if find_shards(folder) is not None:
        return "parquet"
    if (folder / "train").is_dir() and any(entry.is_dir() for entry in (folder / "train").iterdir()):
        return "folder"
    for kind, name in CIFAR_FOLDERS.items():
        if folder.name == name or (folder / name).is_dir():
            return kind
    raise DataError(f"{folder}: no known layout; understood are {_LAYOUTS}")


def _load_digits(request: _Request) -> Decoded:
    return digits()


def _load_cifar(request: _Request) -> Decoded:
    root = request.root()
    if root.name == CIFAR_FOLDERS[request.kind]:
        root = root.parent  # the folder of the batches was named, torchvision wants the one above
    return cifar(request.kind, root, request.download)


def _load_svhn(request: _Request) -> Decoded:
    return svhn(request.root(), request.download, request.cache)


def _load_parquet(request: _Request) -> Decoded:
    from residrop.data.parquet import decode_shards, find_shards  # loads pyarrow

    folder = request.existing()
    shards = find_shards(folder)
    if shards is None:
        raise DataError(f"{folder}: no train-*.parquet; name the folder that holds the shards")
    mark = fingerprint(folder, shards.train + shards.test)
    return decoded_or_build(folder, "parquet", mark, lambda: decode_shards(shards), request.cache)


def _load_folder(request: _Request) -> Decoded | tuple[Tree, int, int]:
    folder, size = request.existing(), request.size
    tree = find_tree(folder)
    if (len(tree.train) + len(tree.test)) * 3 * size * size >= _IN_MEMORY_BYTES:
        return tree, size, 0
    mark = fingerprint(folder, tree.train + tree.test, f"{size}")
    return decoded_or_build(folder, f"folder{size}", mark, lambda: decode_tree(tree, size), request.cache)


def _load_imagenet(request: _Request) -> tuple[Tree, int, int]:
    return find_tree(request.existing(), ("val",)), 224, 256


_KINDS: dict[str, tuple[str, Callable[[_Request], Decoded | tuple[Tree, int, int]]]] = {
    "digits": ("handwritten digits of scikit-learn, 8x8 grey, 1,797 images, nothing to download", _load_digits),
    "cifar10": ("CIFAR-10, 32x32 colour, 50,000 + 10,000 images; cifar10:DIR names the folder", _load_cifar),
    "cifar100": ("CIFAR-100, 32x32 colour, 50,000 + 10,000 images; cifar100:DIR names the folder", _load_cifar),
    "svhn": ("SVHN with extra, 32x32 colour, 604,388 + 26,032 images; svhn:DIR names the folder", _load_svhn),
    "parquet": ("parquet:DIR, shards train-*.parquet and test-*.parquet in the Hugging Face layout", _load_parquet),
    "folder": ("folder:DIR?size=N, images in train/<class> and test/<class>, cut to N x N (32)", _load_folder),
    "imagenet": ("imagenet:DIR, images in train/<wnid> and val/<wnid>, 224x224, read batch by batch", _load_imagenet),
}
