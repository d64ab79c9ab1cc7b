import sys

import numpy as np
import pytest
import torch
from PIL import Image

from residrop.common.errors import ConfigError, DataError
from residrop.data import Files, load


def test_folder_is_resized_and_centre_cropped(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets", width=20, height=16)
    splits = load(f"folder:{folder}?size=8")
    assert splits.train.pixels.shape == (6, 3, 8, 8)
    assert (splits.name, splits.classes, splits.size, splits.channels) == ("pets", ("cat", "dog"), 8, 3)
    assert splits.train.labels.tolist() == splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(folder / "test" / "dog" / "1.png") as image:
        small = np.asarray(image.resize((10, 8), Image.Resampling.BILINEAR))[:, 1:9].transpose(2, 0, 1)
    assert torch.equal(splits.test.pixels[4], torch.from_numpy(small.copy()))


@pytest.mark.parametrize("prefix", ["folder:", ""])
@pytest.mark.parametrize("part", ["test", "val", "valid", "validation"])
def test_test_part_names_and_default_size(tmp_path, write_tree, part, prefix):
    folder = write_tree(tmp_path / "pets", parts=("train", part))
    splits = load(f"{prefix}{folder}")
    assert splits.test.pixels.shape == (6, 3, 32, 32)


def test_grey_folder_has_one_channel(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets", grey=True)
    assert load(f"folder:{folder}?size=8").train.pixels.shape == (6, 1, 8, 8)


def test_large_folder_streams(tmp_path, write_tree, monkeypatch):
    # not by its dotted name: the package has a function of the name of the module
    monkeypatch.setattr(sys.modules["residrop.data.sources"], "_IN_MEMORY_BYTES", 12 * 3 * 8 * 8)
    folder = write_tree(tmp_path / "pets")
    splits = load(f"folder:{folder}?size=8", validation=2)
    assert isinstance(splits.train, Files)
    assert (len(splits.train), len(splits.validation), splits.train.size) == (4, 2, 8)
    assert not set(splits.train.paths) & set(splits.validation.paths)


def test_imagenet_streams_at_224(tmp_path, write_tree):
    splits = load(f"imagenet:{write_tree(tmp_path / 'net', parts=('train', 'val'))}")
    assert isinstance(splits.train, Files)
    assert (splits.name, splits.size, splits.train.size, splits.train.shorter) == ("imagenet", 224, 224, 256)
    assert [path.name for path in splits.test.paths[:3]] == ["0.png", "1.png", "2.png"]


def test_damaged_image_names_the_file(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    path = folder / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"^{path}: image cannot be decoded"):
        load(f"folder:{folder}")


def test_sixteen_bit_image_is_refused(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(folder / "test" / "cat" / "0.png")
    with pytest.raises(DataError, match=r"cat/0.png: image pixel mode I;16.*convert it to 8 bits"):
        load(f"folder:{folder}")


def test_empty_class_folder(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    for path in (folder / "train" / "cat").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match="train/cat: no images in this class folder"):
        load(f"folder:{folder}")


def test_different_classes(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    (folder / "test" / "dog").rename(folder / "test" / "fox")
    with pytest.raises(DataError, match=r"different classes \(only in train: dog; only in test: fox\)"):
        load(f"folder:{folder}")


def test_missing_parts(tmp_path, write_tree):
    with pytest.raises(DataError, match="no folder train"):
        load(f"folder:{tmp_path}")
    folder = write_tree(tmp_path / "pets", parts=("train",))
    with pytest.raises(DataError, match="none for testing; add one of test, val"):
        load(f"folder:{folder}")
    (folder / "test").mkdir()
    with pytest.raises(DataError, match="test: no class folders"):
        load(f"folder:{folder}")


@pytest.mark.parametrize("option", ["size=0", "size=-3", "size=big", "side=8", ""])
def test_bad_options(tmp_path, option):
    with pytest.raises(ConfigError, match=r"allowed is size=N"):
        load(f"folder:{tmp_path}?{option}")
