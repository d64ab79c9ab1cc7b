"""Folders of parquet shards in the image layout of Hugging Face: `train-*.parquet`, `test-*.parquet`."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from residrop.common.errors import DataError
from residrop.data.decode import DecodePool, DecodingError, open_rgb, to_chw
from residrop.data.decoded import Decoded
from residrop.data.splits import Images

__all__ = ["Shards", "decode_shards", "find_shards"]

_IMAGE, _LABEL = ("image", "img"), ("label", "fine_label")
_TEST = ("test", "validation", "valid")  # the first that has shards is the test set
_ROWS = 1024  # rows decoded at a time: bounds the encoded bytes held in memory


@dataclass(frozen=True)
class Shards:
    """The shard files of a folder, in order."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]


@dataclass
class _Part:
    """One part of the source while it is decoded: `buffer` is uint8 [N, 3, S, S] once S is known."""

    rows: int
    labels: np.ndarray
    size: int = 0
    buffer: np.ndarray = field(default_factory=lambda: np.empty((0, 3, 0, 0), np.uint8))
    coloured: bool = False


def find_shards(folder: Path) -> Shards | None:
    """Find the shards of `folder` or of its subfolder `data`; None if there is no training shard.

    Raises:
        DataError: if there is no test shard, or a numbered shard ("00001-of-00003") is missing.
    """
    for place in (folder, folder / "data"):
        train = _complete(place, "train")
        if not train:
            continue
        for name in _TEST:
            test = _complete(place, name)
            if test:
                return Shards(train, test)
        raise DataError(f"{place}: train-*.parquet but no test-*.parquet or validation-*.parquet; add the test set")
    return None


def _complete(folder: Path, part: str) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob(f"{part}-*.parquet")))
    for file in files:
        numbered = re.fullmatch(rf"{part}-\d+-of-(\d+)(.*)\.parquet", file.name)
        if numbered and len(files) != int(numbered[1]):
            message = f"{file}: its name promises {int(numbered[1])} shards, the folder has {len(files)}"
            raise DataError(f"{message}; fetch the others or remove strays")
    return files


def decode_shards(shards: Shards) -> Decoded:
    """Decode all images of all shards.

    Columns: `image` (or `img`), a struct with the encoded `bytes`; `label` (or `fine_label`), whole numbers.
    All images must be squares of one size. Class names come from the features in the schema's metadata; without
    them the classes are the numbers from 0 to the largest training label.

    Returns:
        Parts "train" and "test"; one channel if every image is grey, otherwise three.

    Raises:
        DataError: naming the shard and row, if a shard, an image or a label is damaged or out of range.
    """
    named = _class_names(shards.train[0])
    train = _Part(_count(shards.train), np.empty(0, np.int64))
    test = _Part(_count(shards.test), np.empty(0, np.int64))
    train.labels, test.labels = np.empty(train.rows, np.int64), np.empty(test.rows, np.int64)
    with DecodePool(train.rows + test.rows, "decoding") as pool:
        # Without names there cannot be more classes than images; the bound keeps one wild label from making millions.
        _decode_part(shards.train, train, len(named) or train.rows, pool)
        classes = named or tuple(str(number) for number in range(int(train.labels.max()) + 1))
        test.size = train.size
        _decode_part(shards.test, test, len(classes), pool)
    channels = 3 if train.coloured or test.coloured else 1
    parts = {name: _images(part, channels) for name, part in (("train", train), ("test", test))}
    return Decoded(parts, classes)


def _images(part: _Part, channels: int) -> Images:
    return Images(torch.from_numpy(part.buffer[:, :channels]).contiguous(), torch.from_numpy(part.labels))


def _decode_part(files: tuple[Path, ...], part: _Part, num_classes: int, pool: DecodePool) -> None:
    offset = 0
    for file, first, encoded, labels in _batches(files):
        _check_labels(labels, num_classes, file, first)
        part.labels[offset : offset + len(encoded)] = labels
        if part.buffer.shape[0] == 0:
            if part.size == 0:
                part.size = _decode(encoded[0], file, first)[0].shape[1]
            part.buffer = np.empty((part.rows, 3, part.size, part.size), np.uint8)

        def work(i: int, data: bytes, offset: int = offset, file: Path = file, first: int = first) -> None:
            pixels, grey = _decode(data, file, first + i)
            _, height, width = pixels.shape
            if (height, width) != (part.size, part.size):
                raise DataError(
                    f"{file}, row {first + i}: image of {width}x{height} pixels, expected {part.size}x{part.size} "
                    "as the first training image has; make all images squares of one size"
                )
            part.buffer[offset + i] = pixels
            if not grey:
                part.coloured = True  # only ever set, so threads need no lock

        pool.run(work, encoded)
        offset += len(encoded)


def _decode(data: Any, file: Path, row: int) -> tuple[np.ndarray, bool]:
    if not isinstance(data, bytes):
        raise DataError(f"{file}, row {row}: no image bytes; store the encoded image in the shard, not a path")
    try:
        image, grey = open_rgb(data)
    except DecodingError as error:
        raise DataError(f"{file}, row {row}: image {error}; replace the shard") from error
    return to_chw(image), grey


def _check_labels(labels: np.ndarray, num_classes: int, file: Path, first: int) -> None:
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        row = int(bad.argmax())
        message = f"{file}, row {first + row}: label {labels[row]} is out of range, allowed: 0 to {num_classes - 1}"
        raise DataError(f"{message}; correct the label or the class names")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())  # Arrow's messages run over several lines


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a complete parquet file ({_line(error)}); fetch it again") from error


def _count(files: tuple[Path, ...]) -> int:
    rows = 0
    for file in files:
        with _open(file) as shard:
            rows += shard.metadata.num_rows
    if rows == 0:
        raise DataError(f"{files[0]}: no rows; fetch the shard again")
    return rows


def _batches(files: tuple[Path, ...]) -> Iterator[tuple[Path, int, list[Any], np.ndarray]]:
    """Yield (shard, number of the first row in it, encoded images, int64 labels)."""
    for file in files:
        with _open(file) as shard:
            image, label = _columns(shard.schema_arrow, file)
            first = 0
            try:
                for batch in shard.iter_batches(batch_size=_ROWS, columns=[image, label]):
                    images, column = batch.column(image), batch.column(label)
                    if column.null_count:
                        row = first + column.is_null().to_pylist().index(True)
                        raise DataError(f"{file}, row {row}: no label; every image needs one")
                    encoded = [None if value is None else value["bytes"] for value in images.to_pylist()]
                    yield file, first, encoded, column.to_numpy(zero_copy_only=False).astype(np.int64)
                    first += len(encoded)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file}: damaged after row {first} ({_line(error)}); fetch it again") from error


def _columns(schema: pa.Schema, file: Path) -> tuple[str, str]:
    image = next((name for name in _IMAGE if name in schema.names), None)
    label = next((name for name in _LABEL if name in schema.names), None)
    if image is None or label is None:
        wanted = "image (or img) and label (or fine_label)"
        raise DataError(f"{file}: columns {', '.join(schema.names)}; needs {wanted}; rename the columns")
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"{file}: column {image} is {kind}; needs struct<bytes, path> with encoded images")
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{file}: column {label} is {schema.field(label).type}; needs whole numbers from 0 on")
    return image, label


def _class_names(file: Path) -> tuple[str, ...]:
    """Read the names out of the schema's Hugging Face features; empty if there are none."""
    with _open(file) as shard:
        schema = shard.schema_arrow
        _, label = _columns(schema, file)
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(str(name) for name in about["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
