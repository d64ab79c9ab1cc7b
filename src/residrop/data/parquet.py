"""Labels and images of parquet shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from residrop.common.errors import DataError
from residrop.data.decode import DecodePool, DecodingError, open_rgb, shrink_and_crop
from residrop.data.pixels import Pixels, check_memory
from residrop.data.remarks import remark
from residrop.data.shards import IMAGE, LABEL, TEST, column_of, features_of, open_shard, reading
from residrop.data.splits import unknown_class

__all__ = ["broken_rows", "decode_shards", "shard_labels", "test_shards"]

_ROWS = 1024  # rows decoded at a time, and
_BYTES = 1 << 28  # encoded bytes that are enough before that: together they bound what is held in memory
_EXPANDED = 1 << 30  # bytes that a batch of Arrow may have: a shard can say thousands of times that a row is as another
_NO_LABEL = -(1 << 63)  # stands for null


# Labels


def test_shards(parts: dict[str, tuple[Path, ...]], folder: Path) -> tuple[Path, ...] | None:
    """The shards of the part to test on: the first one besides "train" that has labels; None if there is none."""
    bare: list[str] = []
    for name in TEST:
        if name in parts:
            if any(_labelled(file) for file in parts[name]):
                if bare:
                    remark(f"{folder}: part {' and '.join(bare)} has no labels, so {name} is the test set")
                return parts[name]
            bare.append(name)
    return None


def _label_column(shard: pq.ParquetFile, file: Path) -> str:
    label = column_of(shard, LABEL, "ClassLabel")
    if label is None:
        names = ", ".join(shard.schema_arrow.names)
        raise DataError(f"{file}: columns {names}; needs one called {' or '.join(LABEL)}; rename the columns")
    return label


def _labelled(file: Path) -> bool:
    """Whether any row has a label: the Hub's test sets without them say -1, or null, or have no such column."""
    with open_shard(file) as shard:
        if column_of(shard, LABEL, "ClassLabel") is None:
            return False
    labels, _ = _labels_of(file)
    return not labels.size or bool((labels >= 0).any())


def _labels_of(file: Path) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """The labels of a shard, int64, and the names that they stand for; None if numbers are all there is."""
    with open_shard(file) as shard, reading(file, lambda: "its labels cannot be read"):
        label = _label_column(shard, file)
        rows, kind = shard.metadata.num_rows, shard.schema_arrow.field(label).type
        check_memory(16 * rows, f"{file}: labels of {rows} rows")
        words = kind.value_type if pa.types.is_dictionary(kind) else kind
        named = pa.types.is_string(words) or pa.types.is_large_string(words)
        if not named and not pa.types.is_integer(kind):
            raise DataError(f"{file}: column {label} is {kind}; needs whole numbers from 0 on, or names")
        column = pa.chunked_array(
            [batch.column(0) for batch in shard.iter_batches(batch_size=65536, columns=[label])], kind
        )
        if column.null_count == len(column):
            return np.full(len(column), _NO_LABEL), () if named else None
        if named:
            coded = column if pa.types.is_dictionary(kind) else column.dictionary_encode()
            coded = coded.unify_dictionaries().combine_chunks()
            if isinstance(coded, pa.ChunkedArray):
                coded = coded.chunk(0)
            return _numbers(coded.indices), tuple(str(name) for name in coded.dictionary.to_pylist())
        names = features_of(shard).get(label, {}).get("names")
        if not isinstance(names, list):
            return _numbers(column), None
        names = tuple(str(name) for name in names)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{file}: two classes are called {twice!r}; give every class a name of its own")
        return _numbers(column), names


def _numbers(column: Any) -> np.ndarray:
    return column.cast(pa.int64()).fill_null(_NO_LABEL).to_numpy(zero_copy_only=False)


def shard_labels(files: Sequence[Path], classes: Sequence[str] | None = None) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Read the labels of all shards of a part, by name.

    Every shard has names of its own: in the schema's metadata (ClassLabel), or as the labels themselves (strings).
    Labels of a shard without names are called by their numbers.

    Args:
        files: the shards.
        classes: what the labels shall mean. None: the names of the first shard; sorted, if they are strings; or the
            numbers from 0 to the largest label.

    Returns:
        Labels int64 `Tensor[N]` that mean the classes, and the classes.

    Raises:
        DataError: naming the shard and row, if a label is missing, out of range or unknown; or if there are no rows.
    """
    found = [_labels_of(file) for file in files]
    rows = sum(len(labels) for labels, _ in found)
    if rows == 0:
        raise DataError(f"{files[0]}: no rows; fetch the shard again")
    if classes is None:
        classes = _classes(files, found, rows)
    index = {name: number for number, name in enumerate(classes)}
    mapped = [
        _mapped(labels, names, index, file) for file, (labels, names) in zip(files, found, strict=True) if len(labels)
    ]
    return torch.from_numpy(np.concatenate(mapped)), tuple(classes)


def _classes(files: Sequence[Path], found: list[tuple[np.ndarray, tuple[str, ...] | None]], rows: int) -> list[str]:
    first = found[0][1]
    if first is None:
        # There cannot be more classes than images; the bound keeps one wild label from making millions.
        for file, (labels, _) in zip(files, found, strict=True):
            _check_range(labels, rows, file)
        return [str(number) for number in range(max(int(labels.max(initial=0)) for labels, _ in found) + 1)]
    with open_shard(files[0]) as shard:
        numbers = pa.types.is_integer(shard.schema_arrow.field(_label_column(shard, files[0])).type)
    return list(first) if numbers else sorted({name for _, names in found for name in names or ()})


def _check_range(labels: np.ndarray, count: int, file: Path) -> None:
    bad = (labels < 0) | (labels >= count)
    if bad.any():
        row = int(bad.argmax())
        if labels[row] == _NO_LABEL:
            raise DataError(f"{file}, row {row}: no label; every image needs one")
        message = f"{file}, row {row}: label {labels[row]} is out of range, allowed: 0 to {count - 1}"
        raise DataError(f"{message}; correct the label or the class names")


def _mapped(labels: np.ndarray, names: tuple[str, ...] | None, index: dict[str, int], file: Path) -> np.ndarray:
    if names is None and list(index) == [str(number) for number in range(len(index))]:
        _check_range(labels, len(index), file)
        return labels
    _check_range(labels, 1 << 62 if names is None else len(names), file)
    different, where = np.unique(labels, return_inverse=True)
    called = [str(number) if names is None else names[number] for number in different.tolist()]
    table = np.array([index.get(name, -1) for name in called], np.int64)
    if (table < 0).any():
        row = int((table[where] < 0).argmax())
        raise DataError(unknown_class(f"{file}, row {row}", called[int(where[row])], list(index)))
    return table[where]


# Images


def decode_shards(files: Sequence[Path], rows: int, size: int | None, skip: bool) -> dict[str, torch.Tensor]:
    """Decode all images of the shards of a part.

    Columns: `image` (or `img`, or the only one whose feature is Image), encoded images as binary or as a struct with
    `bytes`.

    Args:
        files: the shards.
        rows: how many images they have.
        size: resize the shorter edge to so many pixels and cut out the central square; None for images that are squares
            of one size.
        skip: leave out images that cannot be decoded.

    Returns:
        As of `Pixels.tensors`.

    Raises:
        DataError: naming the shard and row, if a shard or image is damaged, or of another size.
    """
    pixels, offset = Pixels(rows, skip), 0
    where = f"{files[0].parent}: {rows} images"
    if size:
        pixels.start(size, where)
    with DecodePool(rows, "decoding") as pool:
        for file, first, encoded in _batches(files):
            if offset + len(encoded) > rows:
                raise DataError(f"{file}: more images than labels; fetch it again")

            def work(i: int, data: Any, offset: int = offset, file: Path = file, first: int = first) -> None:
                row = f"{file}, row {first + i}"
                try:
                    image, grey = open_rgb(_checked(data))
                except DecodingError as error:
                    pixels.fail(
                        offset + i,
                        f"{row}: image {error}; replace the shard, or leave the image out with --on-error skip",
                    )
                    return
                if size:
                    image = shrink_and_crop(image, size)
                elif image.size != (pixels.size or image.height,) * 2:
                    side = pixels.size or image.height
                    raise DataError(
                        f"{row}: image of {image.width}x{image.height} pixels, expected {side}x{side} as the first "
                        "image of the part has; make all images squares of one size, or resize them with ?size=N"
                    )
                if not pixels.size:
                    pixels.start(image.height, where)
                pixels.put(offset + i, image, grey)

            start = 0
            while not pixels.size and start < len(encoded):  # alone, until one has said which size they have
                work(start, encoded[start])
                start += 1
            pool.run(lambda i, data, work=work, start=start: work(start + i, data), encoded[start:])
            offset += len(encoded)
    if offset != rows:
        raise DataError(f"{files[-1]}: fewer images than labels; fetch it again")
    if not pixels.size:
        raise DataError(f"{files[0]}: no image can be decoded; fetch the shards again")
    return pixels.tensors()


def broken_rows(files: Sequence[Path], rows: int, title: str) -> dict[str, str]:
    """Decode all images and keep nothing of them but where those lie that cannot be read, with the reason."""
    found: dict[str, str] = {}
    with DecodePool(rows, title) as pool:
        for file, first, encoded in _batches(files):

            def work(i: int, data: Any, file: Path = file, first: int = first) -> None:
                try:
                    open_rgb(_checked(data))
                except DecodingError as error:
                    found[f"{file}, row {first + i}"] = str(error)

            pool.run(work, encoded)
    return found


def _checked(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise DecodingError("has no image bytes: the shard holds a path, or nothing, in place of the encoded image")
    return data


def _batches(files: Sequence[Path]) -> Iterator[tuple[Path, int, list[Any]]]:
    """Yield (shard, number of the first row in it, encoded images)."""
    for file in files:
        first, encoded, held = 0, list[Any](), 0
        with open_shard(file) as shard, reading(file, lambda: f"damaged after row {first + len(encoded)}"):  # noqa: B023
            image, largest = _image_column(shard, file), _largest_group(shard)
            check_memory(largest, f"{file}: its largest row group")
            rows = max(1, min(_ROWS, _EXPANDED // max(1, largest)))
            for batch in shard.iter_batches(batch_size=rows, columns=[image]):
                values = batch.column(0)
                if pa.types.is_struct(values.type):
                    values = values.flatten()[values.type.get_field_index("bytes")]
                encoded.extend(values.to_pylist())
                held += values.nbytes
                if len(encoded) >= _ROWS or held >= _BYTES:
                    yield file, first, encoded
                    first, encoded, held = first + len(encoded), [], 0
            if encoded:
                yield file, first, encoded


def _largest_group(shard: pq.ParquetFile) -> int:
    """Bytes of the largest row group, as its columns say."""
    groups = (shard.metadata.row_group(number) for number in range(shard.metadata.num_row_groups))
    return max((group.total_byte_size for group in groups), default=0)


def _image_column(shard: pq.ParquetFile, file: Path) -> str:
    schema = shard.schema_arrow
    image = column_of(shard, IMAGE, "Image")
    if image is None:
        names = ", ".join(schema.names)
        raise DataError(f"{file}: columns {names}; needs one called {' or '.join(IMAGE)}; rename the columns")
    kind = schema.field(image).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise DataError(f"{file}: column {image} is {kind}; needs encoded images, as binary or struct<bytes, path>")
    return image
