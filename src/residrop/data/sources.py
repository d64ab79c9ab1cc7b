"""From the name of a source to its images: `load` is the door of this package."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from residrop.common.checks import check_choice
from residrop.common.errors import ConfigError, DataError
from residrop.common.extras import extra
from residrop.data.local import load_parquet, load_tree, stand_ins
from residrop.data.remarks import named, remark
from residrop.data.request import Found, Request, is_folder, readable
from residrop.data.splits import (
    Files,
    Images,
    Splits,
    balanced_limit,
    hold_out,
    renumber,
    select,
    svhn_validation,
    take_apart,
)
from residrop.data.standard import CIFAR_FOLDERS, cifar, digits, svhn

__all__ = ["OnError", "in_colour", "load", "load_test", "parse", "sized", "sources"]

OnError = Literal["stop", "skip"]

_SVHN_VALIDATION = 6000  # ten classes, of each 400 out of train and 200 out of extra
_DEFAULT_SIZE = 32  # pixels, of folder:DIR
_LAYOUTS = "train-*.parquet and test-*.parquet, train/<class>/ and test/<class>/, cifar-10-batches-py/"


def sources() -> dict[str, str]:
    """Return every kind of source with a one-line description, for help texts and listings."""
    return {name: description for name, (description, _) in _KINDS.items()}


def load(
    source: str = "digits",
    *,
    validation: int = 0,
    seed: int = 1,
    limit: int | None = None,
    split: float | None = None,
    on_error: OnError = "stop",
    classes: Sequence[str] | None = None,
    listed: Sequence[str] | None = None,
    download: bool = True,
    cache: Path | None = None,
) -> Splits:
    """Load the images of a source.

    Labels are matched by the names of classes wherever these are known: a shard or test part may number them in another
    order, or lack some.

    Args:
        source: a name of `sources()`, with the folder after a colon where one is needed ("parquet:DIR",
            "folder:DIR?size=64"; optional for "cifar10:DIR" and its like), or the path of a folder, whose layout
            is then found out. A name wins over a folder of that name. `?size=N` resizes the shorter edge to N pixels
            and cuts out the central square: of "folder" N is 32 by default, of "parquet" images stay as they are.
        validation: number of images taken out of the training set for choices, drawn by `seed`. For svhn it must be
            0 or 6000, drawn by class as in Huang et al.
        seed: the same seed draws the same validation set and the same limited set.
        limit: keep only so many training images (after the validation set is taken out), their class counts as
            equal as possible; a draw by `seed`. At least 1; None keeps all.
        split: of a "folder" or "parquet" without a test part: share of every class to hold out as such, in (0, 1).
            The draw does not depend on `seed`.
        on_error: "stop" at an image of a "folder" or "parquet" that cannot be read, or "skip" such images, which a
            remark counts and names; those that are read batch by batch are all decoded once for that.
        classes: the class names that labels shall mean, in order, as of a run that is continued. Default: as the
            training part has them.
        listed: of a run that is continued, `Splits.listed`: the same images come in the same order, and others take
            the places of those that are gone.
        download: whether a missing torchvision set may be downloaded.
        cache: folder for downloads and decoded images. Default: the user's cache folder
            (`$XDG_CACHE_HOME/residrop` or `~/.cache/residrop`). Nothing is written beside the source.

    Returns:
        The splits. Pixels are uint8 `Tensor[N, C, H, W]`, 0..255, labels int64 `Tensor[N]`. "imagenet" gives `Files`,
        and so does a "folder" whose decoded images would take 1 GiB or more.

    Raises:
        DataError: for an unknown source, and for a missing, incomplete or corrupt one; the message names the file.
        ConfigError: if `validation`, `limit`, `split`, `on_error` or the size of "folder:DIR?size=N" is out of range.
    """
    if validation < 0:
        raise ConfigError(f"validation={validation}: must be at least 0; 0 holds out no images")
    check_choice("on_error", on_error, OnError)
    request = replace(
        parse(source, download, cache, split),
        classes=None if classes is None else tuple(classes),
        skip=on_error == "skip",
        listed=None if listed is None else tuple(listed),
    )
    if request.kind == "svhn" and validation not in (0, _SVHN_VALIDATION):
        raise ConfigError(
            f"validation={validation}: svhn allows 0 or {_SVHN_VALIDATION}, 400 of train and 200 of extra per class"
        )
    found = _found(source, request)
    if request.size is None and request.kind == "folder":
        size = f"{_DEFAULT_SIZE}x{_DEFAULT_SIZE}"
        remark(f"{request.folder}: images are resized and cut to {size} pixels; folder:PATH?size=N takes another size")
    train, test = found.parts["train"], found.parts["test"]
    more = found.parts.get("extra")
    whole = train
    if isinstance(train, Images) and isinstance(more, Images):
        whole = Images(torch.cat([train.pixels, more.pixels]), torch.cat([train.labels, more.labels]))
    remaining, held_out = whole, None
    if validation:
        if more is not None:
            index = svhn_validation(train.labels, more.labels, seed)
        else:
            index = hold_out(len(whole), validation, seed)
        remaining, held_out = take_apart(whole, index)
    if limit is not None:
        remaining = select(remaining, balanced_limit(remaining.labels, limit, seed))
    remaining = stand_ins(remaining, found.gone, drop=False)
    held_out = None if held_out is None else stand_ins(held_out, found.gone, drop=True)
    channels, size = _shape(test)
    return Splits(_name(request), found.classes, remaining, test, held_out, channels, size, found.listed)


def load_test(
    source: str,
    classes: Sequence[str] | None,
    *,
    size: int | None = None,
    split: float | None = None,
    on_error: OnError = "stop",
    listed: Sequence[str] | None = None,
    cache: Path | None = None,
) -> Images | Files:
    """Load nothing but the test images of a source, for a network that is trained.

    Args:
        source: as of `load`.
        classes: what the network's outputs mean; labels are matched by name, and the source may lack some. None for
            images of other kinds, whose labels do not matter.
        size: of the images it was trained on, in pixels: of a "folder" the default, as nothing else would do.
        split: as of `load`, where the source has no test part.
        on_error: as of `load`.
        listed: images that the network was trained on (`Splits.listed`), none of which `split` shall hold out.
        cache: as of `load`.

    Raises:
        DataError: as of `load`, and for an image of a class that is not among `classes`.
        ConfigError: if `split` or `on_error` is out of range.
    """
    check_choice("on_error", on_error, OnError)
    request = parse(source, True, cache, split)
    if request.size is None and request.kind == "folder":
        request = replace(request, size=size)
    trained = None if listed is None else tuple(listed)
    names = None if classes is None else tuple(classes)
    request = replace(request, wanted=("test",), classes=names, skip=on_error == "skip", listed=trained)
    return _found(source, request).parts["test"]


def sized(source: str, size: int, split: float | None = None) -> str:
    """A source with its images at a size in pixels: of a "folder" that names none; others are as they are.

    Raises:
        DataError, ConfigError: as of `load`.
    """
    request = parse(source, split=split)
    return f"folder:{request.folder}?size={size}" if request.kind == "folder" and request.size is None else source


def in_colour(splits: Splits) -> Splits:
    """The same images with three channels, which are alike where there was one; they take no more memory."""

    def coloured(part: Images | Files | None) -> Images | Files | None:
        if not isinstance(part, Images) or part.pixels.shape[1] == 3:
            return part
        return Images(part.pixels.expand(-1, 3, -1, -1), part.labels)

    parts = {name: coloured(getattr(splits, name)) for name in ("train", "test", "validation")}
    return replace(splits, channels=3, **parts)  # pyright: ignore[reportArgumentType]


def _found(source: str, request: Request) -> Found:
    if (
        request.split is not None
        and "train" in request.wanted
        and request.kind not in ("folder", "parquet", "imagenet")
    ):
        raise ConfigError(f"split={request.split}: {request.kind} has a test set of its own; leave split out")
    with extra("train"), readable(source):
        found = _KINDS[request.kind][1](request)
    present = set(found.parts["test"].labels.tolist())
    if lacking := [name for number, name in enumerate(found.classes) if number not in present]:
        remark(f"{_name(request)}: the test set has no images of class {named(lacking)}")
    for name, part in found.parts.items():
        if not len(part):
            raise DataError(f"{_name(request)}: not one image of its {name} part can be read; check the source")
    channels = max(_shape(part)[0] for part in found.parts.values())
    for name, part in found.parts.items():
        if isinstance(part, Images) and part.pixels.shape[1] < channels:
            found.parts[name] = Images(part.pixels.expand(-1, channels, -1, -1).contiguous(), part.labels)
    return found


def _shape(part: Images | Files) -> tuple[int, int]:
    """Channels and size in pixels."""
    return (3, part.size) if isinstance(part, Files) else (part.pixels.shape[1], part.pixels.shape[-1])


def _name(request: Request) -> str:
    if request.kind in ("parquet", "folder") and request.folder is not None:
        return request.folder.resolve().name or request.kind
    return request.kind


def parse(source: str, download: bool = True, cache: Path | None = None, split: float | None = None) -> Request:
    """Take a source apart.

    Raises:
        DataError: if it is neither a known name nor a folder of a known layout.
        ConfigError: if its options are wrong.
    """
    kind, colon, rest = source.partition(":")
    if kind in _KINDS:
        size = None
        if kind in ("folder", "parquet") and "?" in rest and not is_folder(_path(rest)):
            rest, _, option = rest.rpartition("?")
            size = _size(source, option)
        if colon and kind == "digits":
            raise DataError(f"source {source!r}: digits has no folder; write digits")
        if colon and not rest:
            raise DataError(f"source {source!r}: no folder after the colon; write {kind}:DIR")
        return Request(kind, _path(rest) if rest else None, size, download, cache, split=split)
    folder = _path(source)
    if not is_folder(folder):
        names = ", ".join(_KINDS)
        raise DataError(f"source {source!r}: neither a folder nor a known name; known are {names}")
    with readable(source):
        kind = _detect(folder, split)
    return Request(kind, folder, None, download, cache, split=split)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~" of somebody unknown
        return Path(text)


def _size(source: str, option: str) -> int:
    match = re.fullmatch(r"size=([0-9]{1,5})", option)
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"source {source!r}: option {option!r}; allowed is size=N with N pixels, at least 1")
    return int(match[1])


def _detect(folder: Path, split: float | None) -> str:
    from residrop.data.shards import find_shards  # loads pyarrow

    if find_shards(folder):
        return "parquet"
    if (folder / "train").is_dir() and any(entry.is_dir() for entry in (folder / "train").iterdir()):
        return "folder"
    for kind, name in CIFAR_FOLDERS.items():
        if folder.name == name or (folder / name).is_dir():
            return kind
    if split is not None:
        return "folder"
    raise DataError(f"{folder}: no known layout; understood are {_LAYOUTS}, and <class>/ with --split 0.2")


# Kinds of sources


def _renumbered(parts: dict[str, Images], names: tuple[str, ...], request: Request) -> Found:
    """Parts whose labels mean `names`, as the request wants them."""
    if request.classes is None:
        return Found(dict(parts), names)
    again = {
        name: Images(part.pixels, renumber(part.labels, names, request.classes, request.kind))
        for name, part in parts.items()
    }
    return Found(dict(again), request.classes)


def _load_digits(request: Request) -> Found:
    return _renumbered(*digits(), request)


def _load_cifar(request: Request) -> Found:
    root = request.root()
    if root.name == CIFAR_FOLDERS[request.kind]:
        root = root.parent  # the folder of the batches was named, torchvision wants the one above
    return _renumbered(*cifar(request.kind, root, request.download, request.wanted), request)


def _load_svhn(request: Request) -> Found:
    wanted = (*request.wanted, "extra") if "train" in request.wanted else request.wanted
    return _renumbered(*svhn(request.root(), request.download, request.cache, wanted), request)


def _load_folder(request: Request) -> Found:
    return load_tree(request, request.size or _DEFAULT_SIZE)


def _load_imagenet(request: Request) -> Found:
    return load_tree(request, 224, 256, ("val",))


_KINDS: dict[str, tuple[str, Callable[[Request], Found]]] = {
    "digits": ("handwritten digits of scikit-learn, 8x8 grey, 1,797 images, nothing to download", _load_digits),
    "cifar10": ("CIFAR-10, 32x32 colour, 50,000 + 10,000 images; cifar10:DIR names the folder", _load_cifar),
    "cifar100": ("CIFAR-100, 32x32 colour, 50,000 + 10,000 images; cifar100:DIR names the folder", _load_cifar),
    "svhn": ("SVHN with extra, 32x32 colour, 604,388 + 26,032 images; svhn:DIR names the folder", _load_svhn),
    "parquet": ("parquet:DIR?size=N, shards of the Hugging Face Hub, train-*.parquet and test-*.parquet", load_parquet),
    "folder": ("folder:DIR?size=N, images in train/<class> and test/<class>, cut to N x N (32)", _load_folder),
    "imagenet": ("imagenet:DIR, images in train/<wnid> and val/<wnid>, 224x224, read batch by batch", _load_imagenet),
}
