"""A source read once, from the first image to the last, to find those that cannot be read."""

from dataclasses import dataclass
from pathlib import Path

from residrop.data.folders import list_folder, unreadable
from residrop.data.request import readable
from residrop.data.sources import load, parse
from residrop.data.splits import renumber

__all__ = ["Checked", "check"]


@dataclass(frozen=True)
class Checked:
    """One part of a source.

    Attributes:
        name: of the part: "train", "test", ...; "all" of a folder without parts.
        images: number of images, readable or not.
        classes: number of classes.
        unreadable: where images lie that cannot be decoded, with the reasons.
    """

    name: str
    images: int
    classes: int
    unreadable: dict[str, str]


def check(source: str) -> list[Checked]:
    """Decode every image of a source and keep none; labels and names of classes are checked, too.

    Args:
        source: as of `load`. Sources that are neither folders nor parquet are loaded, which checks their files.

    Raises:
        DataError: as of `load`, for anything but a damaged image.
    """
    request = parse(source, split=0.5)  # of any share: a folder without parts is one, too
    if request.kind in ("folder", "imagenet", "parquet"):
        with readable(source):
            return (_shards if request.kind == "parquet" else _files)(request.existing())
    splits = load(source)
    parts = {"train": splits.train, "test": splits.test}
    return [Checked(name, len(part), len(splits.classes), {}) for name, part in parts.items()]


def _files(folder: Path) -> list[Checked]:
    found = list_folder(folder)
    if found.keys() == {"train", "test"}:
        test = found["test"]
        renumber(test.labels, test.names, found["train"].names, str(test.folder))
    checked: list[Checked] = []
    for name, part in found.items():
        broken = unreadable(part.paths, f"checking {name}")
        where = {str(part.paths[number]): reason for number, reason in broken.items()}
        checked.append(Checked(name, len(part.paths), len(part.names), where))
    return checked


def _shards(folder: Path) -> list[Checked]:
    from residrop.data.parquet import broken_rows, shard_labels, test_shards  # loads pyarrow
    from residrop.data.shards import find_shards

    parts, found, classes = find_shards(folder), list[Checked](), None
    test = test_shards(parts, folder)
    for name, files in parts.items():
        if name == "train" or files == test:
            labels, classes = shard_labels(files, classes)
            rows = len(labels)
            found.append(Checked(name, rows, len(classes), broken_rows(files, rows, f"checking {name}")))
    return found
