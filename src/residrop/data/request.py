"""What is wanted of a source, and what it gives: between `sources` and the readers of its kinds."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from residrop.common.errors import DataError
from residrop.data.decoded import user_cache
from residrop.data.splits import Files, Images

__all__ = ["Found", "Request", "is_folder", "readable"]


@contextlib.contextmanager
def readable(source: str) -> Iterator[None]:
    """Turn errors of the system, such as a folder that may not be listed or a file that vanished, into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"source {source!r}: cannot be read ({error}); check path and permissions") from error


def is_folder(path: Path) -> bool:
    """Whether a path names a folder; False where it cannot name anything, which `Path.is_dir` would raise about."""
    return os.path.isdir(path)  # noqa: PTH112


@dataclass(frozen=True)
class Request:
    """A source taken apart, and what is wanted of it.

    Attributes:
        kind: a key of `sources()`.
        folder: None where none was named.
        size: pixels that were asked for; None for the kind's own.
        wanted: parts to load, of "train" and "test".
        classes: what labels shall mean; None for the order of the source.
        split: share of every class that is held out for testing where the source has no test part.
        skip: whether images that cannot be read are left out.
        listed: training images of a run that is continued, as `Splits.listed`.
    """

    kind: str
    folder: Path | None
    size: int | None
    download: bool
    cache: Path | None
    wanted: tuple[str, ...] = ("train", "test")
    classes: tuple[str, ...] | None = None
    split: float | None = None
    skip: bool = False
    listed: tuple[str, ...] | None = None

    def root(self) -> Path:
        """Return the folder of a torchvision set."""
        return self.folder or self.cache or user_cache()

    def existing(self) -> Path:
        """Return the folder of a source that must have one."""
        if self.folder is None:
            raise DataError(f"{self.kind}: no folder named; write {self.kind}:DIR")
        if not is_folder(self.folder):
            raise DataError(f"{self.folder}: no such folder; check the path after {self.kind}:")
        return self.folder


@dataclass(frozen=True, eq=False)
class Found:
    """What a source gives.

    Attributes:
        parts: those that were wanted; of SVHN "extra" comes with "train".
        classes: what the labels mean.
        listed: as of `Splits`.
        gone: files among those of "train" that a run was started on and that cannot be read any more.
    """

    parts: dict[str, Images | Files]
    classes: tuple[str, ...]
    listed: tuple[str, ...] | None = None
    gone: frozenset[Path] = frozenset()
