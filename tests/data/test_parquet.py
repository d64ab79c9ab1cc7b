import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from residrop.common.errors import ConfigError, DataError
from residrop.data import load, parquet
from residrop.data import pixels as pixels_module
from residrop.data.decode import shrink_and_crop, to_chw


def chw(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("prefix", ["parquet:", ""])
def test_parquet_gives_pixels_labels_and_names(shards, prefix):
    folder, train, test = shards
    splits = load(f"{prefix}{folder}")
    assert torch.equal(splits.train.pixels, chw(train))
    assert torch.equal(splits.test.pixels, chw(test))
    assert splits.train.labels.tolist() == [0, 1, 2, 1] * 3
    assert splits.test.labels.tolist() == [0, 1, 2, 1, 0]
    assert splits.train.labels.dtype == torch.int64
    assert (splits.name, splits.classes, splits.channels, splits.size) == ("tiny", ("a", "b", "c"), 3, 6)
    assert splits.validation is None


def test_other_column_names_subfolder_and_validation_part(tmp_path, write_shard, random_pixels):
    folder = tmp_path / "set"
    for part in ("train", "validation"):
        write_shard(folder / "data" / f"{part}-0.parquet", random_pixels(3), [0, 2, 1], None, ("img", "fine_label"))
    splits = load(str(folder))
    assert splits.classes == ("0", "1", "2")
    assert len(splits.test) == 3


def test_grey_images_have_one_channel(tmp_path, write_shard, random_pixels):
    grey = random_pixels(4)[..., 0]
    for part in ("train", "test"):
        write_shard(tmp_path / "g" / f"{part}-0.parquet", grey, [0, 1, 0, 1])
    splits = load(str(tmp_path / "g"))
    assert splits.channels == 1
    assert torch.equal(splits.train.pixels[:, 0], torch.from_numpy(grey))


def test_grey_among_colour_becomes_colour(tmp_path, write_shard, random_pixels):
    colour = list(random_pixels(4))
    write_shard(tmp_path / "m" / "train-0.parquet", [colour[0][..., 0], *colour[1:]], [0, 1, 0, 1])
    write_shard(tmp_path / "m" / "test-0.parquet", colour, [0, 1, 0, 1])
    splits = load(str(tmp_path / "m"))
    assert splits.channels == 3
    assert torch.equal(splits.train.pixels[0], torch.from_numpy(colour[0][..., 0]).expand(3, 6, 6))


def test_webp_and_jpeg_are_decoded(tmp_path, write_shard, encode):
    flat = np.full((6, 6, 3), 128, np.uint8)
    write_shard(tmp_path / "w" / "train-0.parquet", [encode(flat, "WEBP"), encode(flat, "JPEG")], [0, 1])
    write_shard(tmp_path / "w" / "test-0.parquet", [encode(flat, "WEBP")], [0])
    assert (load(str(tmp_path / "w")).train.pixels.int() - 128).abs().max() <= 2


def test_missing_numbered_shard(shards):
    folder, _, _ = shards
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00000-of-00003.*promises 3 shards, the folder has 2"):
        load(str(folder))


def test_missing_test_shard(shards):
    folder, _, _ = shards
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"none for testing; add test-\*.parquet .*--split 0.2"):
        load(str(folder))


def test_folder_without_shards(tmp_path):
    with pytest.raises(DataError, match=r"no train-\*.parquet; name the folder"):
        load(f"parquet:{tmp_path}")


@pytest.mark.parametrize("keep", [0, 100, 0.9])
def test_truncated_shard(shards, keep):
    path = shards[0] / "train-00001-of-00003.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.9 else keep])
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet: not a complete parquet file"):
        load(str(shards[0]))


@pytest.mark.parametrize("cut", [0, 20, 60])
def test_damaged_image_names_shard_and_row(shards, write_shard, encode, cut):
    folder, train, _ = shards
    images = [*train[:2], encode(train[2])[:cut], train[3]]
    write_shard(folder / "train-00002-of-00003.parquet", images, [0, 1, 2, 1], ["a", "b", "c"])
    with pytest.raises(DataError, match=r"train-00002-of-00003.parquet, row 2: image cannot be decoded"):
        load(str(folder))


@pytest.mark.parametrize(("label", "allowed"), [(3, "0 to 2"), (-1, "0 to 2")])
def test_label_out_of_range_names_shard_and_row(shards, write_shard, label, allowed):
    folder, train, _ = shards
    write_shard(folder / "train-00001-of-00003.parquet", train[:4], [0, 1, 2, label], ["a", "b", "c"])
    with pytest.raises(DataError, match=f"train-00001.*row 3: label {label} is out of range, allowed: {allowed}"):
        load(str(folder))


def test_label_of_the_test_set_unknown_to_training(tmp_path, write_shard, random_pixels):
    write_shard(tmp_path / "u" / "train-0.parquet", random_pixels(3), [0, 1, 2])
    write_shard(tmp_path / "u" / "test-0.parquet", random_pixels(3), [0, 1, 3])
    with pytest.raises(DataError, match=r"test-0.parquet, row 2: label 3 is out of range, allowed: 0 to 2"):
        load(str(tmp_path / "u"))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0.0, 1.0, 2.0, 1.0], "column label is double; needs whole numbers"),
        ([0, 1, None, 1], "row 2: no label"),
    ],
)
def test_labels_that_are_not_whole_numbers(shards, write_shard, labels, match):
    folder, train, _ = shards
    write_shard(folder / "train-00001-of-00003.parquet", train[:4], labels)
    with pytest.raises(DataError, match=f"train-00001.*{match}"):
        load(str(folder))


def test_mixed_sizes_name_the_first_offender(shards, write_shard, random_pixels):
    folder, train, _ = shards
    images = [train[0], *random_pixels(3, side=7)]
    write_shard(folder / "train-00002-of-00003.parquet", images, [0, 1, 2, 1], ["a", "b", "c"])
    with pytest.raises(DataError, match=r"train-00002-of-00003.parquet, row 1: image of 7x7 pixels, expected 6x6"):
        load(str(folder))


def test_oblong_images(tmp_path, write_shard, random_pixels):
    for part in ("train", "test"):
        write_shard(tmp_path / "o" / f"{part}-0.parquet", random_pixels(2)[:, :, :4], [0, 1])
    with pytest.raises(DataError, match="row 0: image of 4x6 pixels, expected 6x6"):
        load(str(tmp_path / "o"))


def test_wrong_columns(tmp_path):
    (tmp_path / "c").mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table({"image": ["x"], "label": [0]}), tmp_path / "c" / f"{part}-0.parquet")
    with pytest.raises(
        DataError, match="column image is string; needs encoded images, as binary or struct<bytes, path>"
    ):
        load(str(tmp_path / "c"))
    for part in ("train", "test"):
        pq.write_table(pa.table({"pic": [b"x"], "label": [0]}), tmp_path / "c" / f"{part}-0.parquet")
    with pytest.raises(DataError, match=r"columns pic, label; needs one called image or img"):
        load(str(tmp_path / "c"))


def test_rows_without_image_bytes(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "a.png"}], kind)
    (tmp_path / "n").mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "n" / f"{part}-0.parquet")
    with pytest.raises(DataError, match="row 0: image has no image bytes"):
        load(str(tmp_path / "n"))


def test_shards_without_rows(shards, write_shard):
    folder, _, _ = shards
    shutil.rmtree(folder)
    for part in ("train", "test"):
        write_shard(folder / f"{part}-0.parquet", [], pa.array([], pa.int64()))
    with pytest.raises(DataError, match=r"train-0.parquet: no rows"):
        load(str(folder))


def test_damaged_page_names_the_shard(shards):
    path = shards[0] / "train-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32  # the head of the first page; the footer stays whole
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet: damaged after row 0 .*fetch it again"):
        load(str(shards[0]))


# Layouts of the Hub


@pytest.fixture
def pair(write_shard, random_pixels):
    """Return a function that writes a training and a test shard at these paths, and gives their pixels."""

    def write(train, test, **options):
        first, second = random_pixels(4), random_pixels(3, seed=1)
        write_shard(train, first, [0, 1, 1, 0], ["a", "b"], **options)
        write_shard(test, second, [1, 0, 1], ["a", "b"], **options)
        return chw(first), chw(second)

    return write


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.parquet", "test.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("plain_text/train-00000-of-00001-ab12.parquet", "plain_text/validation-00000-of-00001-cd34.parquet"),
        ("data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet"),
        ("train/a.parquet", "valid/b.parquet"),
    ],
)
@pytest.mark.parametrize("prefix", ["parquet:", ""])
def test_layouts(tmp_path, pair, train, test, prefix):
    first, second = pair(tmp_path / train, tmp_path / test)
    splits = load(f"{prefix}{tmp_path}")
    assert torch.equal(splits.train.pixels, first)
    assert torch.equal(splits.test.pixels, second)
    assert (splits.train.labels.tolist(), splits.test.labels.tolist()) == ([0, 1, 1, 0], [1, 0, 1])


def test_shards_that_name_no_part_are_for_training(tmp_path, write_shard, random_pixels):
    for place in ("", "data"):
        pixels = random_pixels(4)
        write_shard(tmp_path / "set" / place / "0000.parquet", pixels[:2], [0, 1])
        write_shard(tmp_path / "set" / place / "0001.parquet", pixels[2:], [0, 1])
        with pytest.raises(DataError, match=r"none for testing; add .* --split 0.2"):
            load(f"{tmp_path}/set")
        splits = load(f"{tmp_path}/set", split=0.5)
        assert sorted(splits.test.labels.tolist()) == sorted(splits.train.labels.tolist()) == [0, 1]
        shutil.rmtree(tmp_path / "set")


def test_several_configurations_are_refused_by_name(tmp_path, pair):
    for name in ("cropped", "full"):
        pair(tmp_path / name / "train.parquet", tmp_path / name / "test.parquet")
    with pytest.raises(DataError, match=rf"configurations \(cropped, full\); name one, as parquet:{tmp_path}/cropped"):
        load(f"parquet:{tmp_path}")
    assert len(load(f"parquet:{tmp_path}/full").train) == 4


@pytest.mark.parametrize("columns", [("img", "labels"), ("image", "fine_label"), ("picture", "species")])
def test_column_names(tmp_path, pair, columns):
    first, _ = pair(tmp_path / "train.parquet", tmp_path / "test.parquet", columns=columns)
    if columns[0] == "picture":  # known by its feature only
        with pytest.raises(DataError, match="columns picture, species; needs one called image or img"):
            load(str(tmp_path))
        for path in tmp_path.glob("*.parquet"):
            table = pq.read_table(path)
            about = json.loads(table.schema.metadata[b"huggingface"])
            about["info"]["features"]["picture"] = {"_type": "Image"}
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    splits = load(str(tmp_path))
    assert torch.equal(splits.train.pixels, first)
    assert splits.classes == ("a", "b")


def test_images_as_plain_binary(tmp_path, encode, random_pixels):
    pixels = random_pixels(3)
    for part, kind in (("train", pa.binary()), ("test", pa.large_binary())):
        table = pa.table({"image": pa.array([encode(one) for one in pixels], kind), "label": ["x", "y", "x"]})
        pq.write_table(table, tmp_path / f"{part}.parquet")
    splits = load(str(tmp_path))
    assert torch.equal(splits.train.pixels, chw(pixels))
    assert torch.equal(splits.test.pixels, chw(pixels))
    assert (splits.classes, splits.test.labels.tolist()) == (("x", "y"), [0, 1, 0])


def test_images_of_different_sizes_are_resized(tmp_path, write_shard, random_pixels):
    images = [*random_pixels(1, side=9), random_pixels(1, side=12)[0][:8], *random_pixels(1, side=5)]
    for part in ("train", "test"):
        write_shard(tmp_path / f"{part}.parquet", images, [0, 1, 0])
    with pytest.raises(DataError, match=r"row 1: image of 12x8 pixels, .* resize them with \?size=N"):
        load(f"parquet:{tmp_path}")
    splits = load(f"parquet:{tmp_path}?size=4")
    for found, image in zip(splits.train.pixels, images, strict=True):
        assert np.array_equal(to_chw(shrink_and_crop(Image.fromarray(image), 4)), found)
    with pytest.raises(ConfigError, match="allowed is size=N"):
        load(f"parquet:{tmp_path}?side=4")


def test_parts_of_two_sizes_are_refused(tmp_path, write_shard, random_pixels):
    write_shard(tmp_path / "train.parquet", random_pixels(2), [0, 1])
    write_shard(tmp_path / "test.parquet", random_pixels(2, side=7), [0, 1])
    with pytest.raises(DataError, match=r"images of 6x6 and 7x7 pixels; resize them with parquet:DIR\?size=N"):
        load(str(tmp_path))


@pytest.mark.parametrize("missing", ["minus one", "null", "column"])
def test_a_test_part_without_labels_gives_way_to_the_validation_part(tmp_path, pair, caplog, missing):
    _, second = pair(tmp_path / "train.parquet", tmp_path / "validation.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    if missing == "column":
        table = table.drop_columns(["label"])
    else:
        empty = pa.array([-1] * 4 if missing == "minus one" else [None] * 4, pa.int64())
        table = table.set_column(1, "label", empty)
    pq.write_table(table, tmp_path / "test.parquet")
    splits = load(str(tmp_path))
    assert torch.equal(splits.test.pixels, second)
    assert "part test has no labels, so validation is the test set" in caplog.text
    (tmp_path / "validation.parquet").unlink()
    with pytest.raises(DataError, match=r"none for testing; add .* with labels, or hold out .* --split 0.2"):
        load(str(tmp_path))
    splits = load(str(tmp_path), split=0.5)
    assert (sorted(splits.train.labels.tolist()), sorted(splits.test.labels.tolist())) == ([0, 1], [0, 1])


def test_rows_that_cannot_be_read_are_skipped_counted_and_named(tmp_path, write_shard, random_pixels, caplog):
    pixels = random_pixels(5)
    write_shard(tmp_path / "train-0.parquet", [b"nothing", pixels[0], b"", pixels[1]], [0, 1, 1, 0])
    write_shard(tmp_path / "train-1.parquet", [pixels[2], b"nothing"], [0, 0])
    write_shard(tmp_path / "test.parquet", pixels[3:], [0, 1])
    for _ in range(2):  # the second time from the cache
        splits = load(str(tmp_path), on_error="skip")
        assert torch.equal(splits.train.pixels, chw(pixels[:3]))
        assert splits.train.labels.tolist() == [1, 0, 0]
    line = "train: 3 of 6 images cannot be read and are left out: row 0 of train, row 2 of train, row 5 of train"
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}, {line}"]
    with pytest.raises(DataError, match=r"train-0.parquet, row 0: image cannot be decoded"):
        load(str(tmp_path))


# Sizes are checked before memory is taken


def test_small_shard_that_asks_for_much_memory_is_refused(tmp_path, monkeypatch, write_shard, encode):
    large = encode(np.zeros((3000, 3000), np.uint8))
    for part in ("train", "test"):
        write_shard(tmp_path / f"{part}.parquet", [large] * 50, [0] * 50)
    assert (tmp_path / "train.parquet").stat().st_size < 100_000
    monkeypatch.setattr(pixels_module, "_free_memory", lambda: 1 << 30)
    with pytest.raises(
        DataError, match=r"50 images at 3000x3000 pixels would take 1.3 GiB of memory, 1.0 GiB are free"
    ):
        load(str(tmp_path))


def test_rows_that_repeat_one_value_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    value = bytes(1 << 20)
    table = pa.table({"image": [value] * 100, "label": [0] * 100})
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / f"{part}.parquet", compression="zstd")
    monkeypatch.setattr(parquet, "_EXPANDED", 1 << 22)
    monkeypatch.setattr(parquet, "_BYTES", 1 << 21)
    held = [len(encoded) for _, _, encoded in parquet._batches([tmp_path / "train.parquet"])]
    assert sum(held) == 100
    assert max(held) <= 6
    monkeypatch.setattr(pixels_module, "_free_memory", lambda: 1 << 20)
    with pytest.raises(DataError, match=r"train.parquet: its largest row group would take 0.0 GiB"):
        list(parquet._batches([tmp_path / "train.parquet"]))


@pytest.mark.timeout(20)
def test_pipe_with_the_name_of_a_shard(tmp_path, pair):
    pair(tmp_path / "train-0.parquet", tmp_path / "test-0.parquet")
    os.mkfifo(tmp_path / "train-1.parquet")
    with pytest.raises(DataError, match=r"train-1.parquet: no regular file; remove it"):
        load(str(tmp_path))


# Damage


@pytest.mark.parametrize("value", [b"\xff\xfe", b"[" * 100_000, b"{}", b'{"info": {"features": []}}', b"null"])
def test_metadata_that_cannot_be_understood_count_as_none(tmp_path, pair, value):
    pair(tmp_path / "train.parquet", tmp_path / "test.parquet")
    for path in tmp_path.glob("*.parquet"):
        pq.write_table(pq.read_table(path).replace_schema_metadata({b"huggingface": value}), path)
    assert load(str(tmp_path)).classes == ("0", "1")


def test_column_twice(tmp_path, pair):
    pair(tmp_path / "train.parquet", tmp_path / "test.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(table.append_column("label", table["label"]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet: 2 columns are called label; keep one"):
        load(str(tmp_path))


# The reference


def test_the_same_as_hugging_face_datasets(tmp_path, monkeypatch):
    """Written and read by the library whose layout it is."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a", "c"])})
    for part, rows in (("train", range(20)), ("test", range(20, 30))):
        data = {"image": [Image.fromarray(pixels[i]) for i in rows], "label": [i % 3 for i in rows]}
        made = datasets.Dataset.from_dict(data, features=features)
        for shard in range(2):
            made.shard(2, shard).to_parquet(tmp_path / "set" / f"{part}-0000{shard}-of-00002.parquet")
    splits = load(str(tmp_path / "set"))
    files = {part: str(tmp_path / "set" / f"{part}-*.parquet") for part in ("train", "test")}
    found = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    for part in ("train", "test"):
        theirs, ours = found[part], getattr(splits, part)
        assert splits.classes == tuple(theirs.features["label"].names)
        assert ours.labels.tolist() == theirs["label"]
        assert all(np.array_equal(to_chw(row["image"]), mine) for row, mine in zip(theirs, ours.pixels, strict=True))
