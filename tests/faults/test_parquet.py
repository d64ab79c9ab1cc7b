"""Damaged parquet files: images or one line, whatever is flipped, cut, repeated or lied about. All seeds are fixed."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from residrop.common.errors import UsageError
from residrop.data import load, load_test
from residrop.data.checking import check

SAMPLE, ALL = 15, 500


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="module")
def sound():
    """Return shards in three encodings, as bytes, with the table that they hold."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(12):
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(buffer := io.BytesIO(), "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}
    table = pa.table({"image": pa.array(images, kind), "label": [0, 1] * 6})
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    return table, [
        written(table, row_group_size=5, compression=compression, **options)
        for compression, options in (("snappy", {}), ("zstd", {"use_dictionary": False}), ("none", {"version": "1.0"}))
    ]


def written(table, **options):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def damaged(draw, table, files):
    """One damaged shard, and what was done to it."""
    data = bytearray(draw.choice(files))
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    kind = draw.choice(("footer", "footer", "pages", "pages", "anywhere", "cut", "zeros", "spliced", "length", "table"))
    if kind in ("footer", "pages", "anywhere"):
        low, high = {"footer": (footer, len(data)), "pages": (4, footer), "anywhere": (0, len(data))}[kind]
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "zeros":
        first = draw.randrange(len(data))
        data[first : first + 32] = bytes(len(data[first : first + 32]))
    elif kind == "spliced":
        other = draw.choice(files)
        cut = draw.randrange(len(data))
        data[cut:] = other[draw.randrange(len(other)) :]
    elif kind == "length":
        data[-8:-4] = draw.randrange(1 << 32).to_bytes(4, "little")
    else:
        kind, data = changed(draw, table)
    return kind, bytes(data)


def changed(draw, table):
    """A sound file of a table that is not what is expected."""
    nested = b"[" * draw.choice((10, 100_000)) + b"]" * draw.choice((0, 10))
    names = draw.choice(([], [1, None], ["a", "a"], ["x"], [["a"], ["b"]], {"a": 0}, None))
    about = {"info": {"features": {"label": {"_type": draw.choice(("ClassLabel", 3, None)), "names": names}}}}
    choices = {
        "metadata not UTF-8": lambda: table.replace_schema_metadata({b"huggingface": b"\xff\xfe{\x80"}),
        "metadata nested": lambda: table.replace_schema_metadata({b"huggingface": nested}),
        "metadata of another form": lambda: table.replace_schema_metadata({"huggingface": json.dumps(about)}),
        "column missing": lambda: table.drop_columns([draw.choice(("image", "label"))]),
        "column twice": lambda: table.append_column(
            *(lambda name: (name, table[name]))(draw.choice(("image", "label")))
        ),
        "labels of another type": lambda: table.set_column(
            1, "label", draw.choice((pa.array([0.5] * 12), pa.array([[0]] * 12), pa.array([True] * 12), pa.nulls(12)))
        ),
        "labels out of range": lambda: table.set_column(
            1, "label", pa.array([0, draw.choice((-5, 2, 1 << 62, -1 << 63, None))] * 6, pa.int64())
        ),
        "images of another type": lambda: table.set_column(
            0, "image", draw.choice((pa.array(["x"] * 12), pa.array([b"x"] * 12), pa.array([{"path": "x"}] * 12)))
        ),
        "nothing": lambda: table.slice(0, 0),
    }
    kind = draw.choice(list(choices))
    return kind, written(choices[kind]())


def attempt(call):
    """What a call gave: nothing, or its error, which must be one line for a user."""
    try:
        call()
    except UsageError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert len(text) < 1500, text
        return text
    return None


@pytest.mark.parametrize(
    "numbers", [range(SAMPLE), pytest.param(range(SAMPLE, ALL), marks=pytest.mark.slow)], ids=["sample", "all"]
)
def test_damaged_shards_are_read_or_refused_in_one_line(tmp_path, sound, numbers, record_property):
    refused = 0
    for number in numbers:
        draw = random.Random(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        part = draw.choice(("train-0", "train-1", "test-0"))
        for name in ("train-0", "train-1", "test-0"):
            (folder / f"{name}.parquet").write_bytes(sound[1][0])
        kind, data = damaged(draw, *sound)
        (folder / f"{part}.parquet").write_bytes(data)
        try:
            found = attempt(lambda folder=folder: load(f"parquet:{folder}"))
            attempt(lambda folder=folder: load(f"parquet:{folder}?size=4", on_error="skip"))
            attempt(lambda folder=folder: load_test(f"parquet:{folder}", ("a", "b")))
            attempt(lambda folder=folder: check(f"parquet:{folder}"))
        except Exception as error:
            raise AssertionError(f"file {number} ({kind}): {type(error).__name__}: {error}") from error
        refused += found is not None
    record_property("tried", len(numbers))
    assert refused >= len(numbers) // 2
