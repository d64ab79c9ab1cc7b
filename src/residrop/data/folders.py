"""Folders of image files with one subfolder per class: `DIR/train/<class>/*`, `DIR/test/<class>/*`."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from residrop.common.errors import DataError
from residrop.data.decode import DecodePool, DecodingError, open_rgb, shrink_and_crop, suffixes
from residrop.data.pixels import Pixels
from residrop.data.remarks import named, remark

__all__ = ["TEST", "Listing", "decode_files", "list_folder", "unreadable"]

TEST = ("test", "val", "valid", "validation")  # the first that exists is the test set
_NO_CLASSES = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}  # as systems leave them in folders


@dataclass(frozen=True, eq=False)
class Listing:
    """The files of one part, sorted by class, then by name.

    Attributes:
        folder: that holds the folders of the classes.
        names: the classes, sorted; label k means `names[k]`.
        paths: one file for every image.
        labels: int64 `Tensor[N]`.
    """

    folder: Path
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: torch.Tensor


@dataclass
class _Passed:
    """What is no picture: names of files and of folders, and of pipes, sockets and devices."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = {"file": self.files, "folder": self.folders, "pipe, socket or device": self.special}
        return " and ".join(
            f"{len(names)} {kind}{'s' if len(names) > 1 and kind[0] == 'f' else ''} ({named(sorted(set(names)), 3)})"
            for kind, names in kinds.items()
            if names
        )


def list_folder(folder: Path, test_names: Sequence[str] = TEST, wanted: Sequence[str] = ()) -> dict[str, Listing]:
    """List the image files of an image folder.

    Images are files with an ending that Pillow reads, in any case, also in subfolders of a class. Hidden files and
    folders, other files, what systems leave behind (`__MACOSX`, `@eaDir`, `Thumbs.db`), pipes, sockets and devices are
    passed over, which a remark counts.

    Args:
        folder: the folder of a source.
        test_names: what its test part may be called; the first that exists is taken.
        wanted: of "train" and "test", those to list; by default those that there are.

    Returns:
        Parts "train" and "test" as far as they are there and wanted; "all" if the folder has classes but no parts.

    Raises:
        DataError: if a part has no classes, or a class of "train" or "all" has no images.
        OSError: if a folder cannot be listed.
    """
    places = {"train": folder / "train"}
    places["test"] = next((folder / name for name in test_names if (folder / name).is_dir()), folder / test_names[0])
    places = {name: place for name, place in places.items() if place.is_dir()} or {"all": folder}
    passed = _Passed()
    parts = {
        name: _list(place, passed, name != "test")
        for name, place in places.items()
        if not wanted or name in (*wanted, "all")
    }
    if text := str(passed):
        remark(f"{folder}: passed over what is no picture: {text}")
    return parts


def _list(part: Path, passed: _Passed, complete: bool) -> Listing:
    names: list[str] = []
    paths: list[Path] = []
    labels: list[int] = []
    for entry in sorted(part.iterdir()):
        if not entry.is_dir():
            passed.files.append(entry.name)
            continue
        if _is_left_behind(entry.name):
            passed.folders.append(entry.name)
            continue
        before = len(passed.files)
        files = sorted(_images(str(entry), "", passed, ()))
        if not files and complete:
            others = f" but {named(passed.files[before:], 3)}" if passed.files[before:] else ""
            message = f"{entry}: no images in this class folder{others}; fill it or remove the class everywhere"
            raise DataError(message)
        if files:
            paths.extend(entry / file for file in files)
            labels.extend([len(names)] * len(files))
            names.append(entry.name)
    if not names:
        raise DataError(f"{part}: no class folders; put the images of every class into a folder of its name")
    return Listing(part, tuple(names), tuple(paths), torch.tensor(labels, dtype=torch.int64))


def _is_left_behind(name: str) -> bool:
    return name[0] == "." or name in _NO_CLASSES


def _images(folder: str, prefix: str, passed: _Passed, above: tuple[str, ...]) -> Iterator[str]:
    """Names of the images below a folder. `above` are the folders on the way here: links may lead in a circle."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:  # a million Path objects are made once, by the caller
        for entry in entries:
            if entry.is_dir():
                if _is_left_behind(entry.name) or os.path.realpath(entry.path) in above:
                    passed.folders.append(entry.name)
                else:
                    yield from _images(entry.path, f"{prefix}{entry.name}/", passed, above)
            elif entry.name[0] == "." or os.path.splitext(entry.name)[1].lower() not in suffixes():  # noqa: PTH122
                passed.files.append(entry.name)
            elif entry.is_file() or not os.path.exists(entry.path):  # noqa: PTH110 (a link to nothing is a missing image)
                yield prefix + entry.name
            else:
                passed.special.append(entry.name)


def decode_files(paths: Sequence[Path], size: int, skip: bool) -> dict[str, torch.Tensor]:
    """Decode images, each resized to `size` pixels along its shorter edge and cropped to a square.

    Returns:
        As of `Pixels.tensors`.

    Raises:
        DataError: naming the file, if an image is damaged and not to be skipped.
    """
    pixels = Pixels(len(paths), skip)
    pixels.start(size, "these images")

    def work(i: int, path: Path) -> None:
        try:
            image, grey = open_rgb(path)
        except DecodingError as error:
            pixels.fail(i, f"{path}: image {error}; replace or remove the file, or leave it out with --on-error skip")
        else:
            pixels.put(i, shrink_and_crop(image, size), grey)

    with DecodePool(len(paths), "decoding") as pool:
        pool.run(work, paths)
    return pixels.tensors()


def unreadable(paths: Sequence[Path], title: str) -> dict[int, str]:
    """Decode images and keep nothing of them but the numbers of those that cannot be read, with the reason."""
    found: dict[int, str] = {}

    def work(i: int, path: Path) -> None:
        try:
            open_rgb(path)
        except DecodingError as error:
            found[i] = str(error)

    with DecodePool(len(paths), title) as pool:
        pool.run(work, paths)
    return dict(sorted(found.items()))
