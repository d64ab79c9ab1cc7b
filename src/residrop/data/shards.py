"""Finding and opening parquet shards, in the layouts of the Hugging Face Hub."""

import contextlib
import json
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from residrop.common.errors import DataError, UsageError

__all__ = ["IMAGE", "LABEL", "TEST", "column_of", "features_of", "find_shards", "open_shard", "reading"]

IMAGE, LABEL = ("image", "img"), ("label", "labels", "fine_label")  # what their columns are called
TEST = ("test", "validation", "valid", "val")  # the first that has labels is the test set


def find_shards(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Find the shards of every part, by its name: "train", "test", "validation", "valid" or "val"; empty if none.

    They are called `train-*.parquet`, `train.parquet` or `train/*.parquet`, in `folder`, its subfolder `data` or the
    only other subfolder that has them (the name of a configuration, such as `default`). Shards of other names are for
    training, as the Hub has it, if there are none that name their part.

    Raises:
        DataError: if a numbered shard ("00001-of-00003") is missing, or several configurations have shards.
        OSError: if a folder cannot be listed.
    """
    for place in (folder, folder / "data"):
        if found := _parts_in(place):
            return found
    others = sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    found = {place.name: parts for place in others if (parts := _parts_in(place))}
    if len(found) > 1:
        names = ", ".join(found)
        raise DataError(f"{folder}: shards of several configurations ({names}); name one, as parquet:{others[0]}")
    for place in (folder, folder / "data"):
        if not found and (files := tuple(sorted(place.glob("*.parquet")))):
            return {"train": files}
    return next(iter(found.values()), {})


def _parts_in(place: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    here = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    for part in ("train", *TEST):
        numbered = tuple(place / name for name in here if name.startswith(f"{part}-") and name.endswith(".parquet"))
        alone = (place / f"{part}.parquet",) if f"{part}.parquet" in here else ()
        inside = () if part not in here else tuple(sorted((place / part).glob("*.parquet")))
        if files := numbered or alone or inside:
            found[part] = files
    for files in found.values():
        for file in files:
            numbered = re.fullmatch(r".*-\d+-of-(\d{1,9})(.*)\.parquet", file.name)
            if numbered and len(files) != int(numbered[1]):
                message = f"{file}: its name promises {int(numbered[1])} shards, the folder has {len(files)}"
                raise DataError(f"{message}; fetch the others or remove strays")
    return found


@contextlib.contextmanager
def reading(file: Path, where: Callable[[], str] = lambda: "not a complete parquet file") -> Iterator[None]:
    """Turn what Arrow raises on damaged shards, of about every type there is, into one line."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__  # Arrow's run over several lines
        raise DataError(f"{file}: {where()} ({reason}); fetch it again") from error


@contextlib.contextmanager
def open_shard(file: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard. DataError if it is no parquet file, or has two columns of a name that is looked for."""
    with reading(file):
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{file}: no regular file; remove it")  # opening a pipe would wait for ever
        shard = pq.ParquetFile(file)
        names = shard.schema_arrow.names
        for name in {*IMAGE, *LABEL} & set(names):
            if names.count(name) > 1:
                raise DataError(f"{file}: {names.count(name)} columns are called {name}; keep one of them")
    with shard:
        yield shard


def column_of(shard: pq.ParquetFile, usual: Sequence[str], feature: str) -> str | None:
    """The first of the usual names that there is, else the only column whose Hugging Face feature is of this type."""
    names = shard.schema_arrow.names
    if found := next((name for name in usual if name in names), None):
        return found
    typed = [name for name, one in features_of(shard).items() if name in names and one.get("_type") == feature]
    return typed[0] if len(typed) == 1 else None


def features_of(shard: pq.ParquetFile) -> dict[str, dict[str, Any]]:
    """What the schema's metadata says of the columns; empty if nothing that can be understood."""
    try:
        found = json.loads((shard.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one for name, one in found.items() if isinstance(one, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
