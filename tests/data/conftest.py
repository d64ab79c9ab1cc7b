"""Tiny sources in every layout; the user's cache folder is never touched."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from residrop.data import remarks


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    """Remarks are made once a process."""
    monkeypatch.setattr(remarks, "_said", set())


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    folder = tmp_path / "xdg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "residrop"


@pytest.fixture
def encode():
    """Return a function from a uint8 array [H, W, 3] or [H, W] to the bytes of an image (lossless by default)."""

    def make(pixels, kind="PNG"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    return make


@pytest.fixture
def random_pixels():
    """Return a function giving uint8 arrays [n, side, side, 3]."""

    def make(n, side=6, seed=0):
        return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)

    return make


@pytest.fixture
def write_shard(encode):
    """Return a function that writes one parquet shard of the Hugging Face image layout."""

    def write(path, images, labels, names=None, columns=("image", "label")):
        encoded = [{"bytes": one if isinstance(one, bytes) else encode(one), "path": None} for one in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({columns[0]: pa.array(encoded, kind), columns[1]: labels})
        if names:
            features = {columns[1]: {"names": names, "_type": "ClassLabel"}}
            about = {"info": {"features": features}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=4)

    return write


@pytest.fixture
def shards(tmp_path, write_shard, random_pixels):
    """Write a folder of three training shards and a test shard; return (folder, train pixels, test pixels)."""
    folder = tmp_path / "tiny"
    train, test = random_pixels(12), random_pixels(5, seed=1)
    for k in range(3):
        part = slice(4 * k, 4 * k + 4)
        write_shard(folder / f"train-{k:05}-of-00003.parquet", train[part], [0, 1, 2, 1], ["a", "b", "c"])
    write_shard(folder / "test-00000-of-00001.parquet", test, [0, 1, 2, 1, 0], ["a", "b", "c"])
    return folder, train, test


@pytest.fixture
def write_tree(random_pixels):
    """Return a function that writes an image folder with n images of width x height per class and part."""

    def write(folder, classes=("cat", "dog"), parts=("train", "test"), n=3, width=10, height=8, grey=False):
        rng = np.random.default_rng(3)
        for part in parts:
            for name in classes:
                (folder / part / name).mkdir(parents=True, exist_ok=True)
                for i in range(n):
                    shape = (height, width) if grey else (height, width, 3)
                    image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                    image.save(folder / part / name / f"{i}.png")
        return folder

    return write
