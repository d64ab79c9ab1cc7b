import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from residrop.common.errors import DataError
from residrop.data import load


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
