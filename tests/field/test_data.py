"""Reports about data from other projects, tried here. Each test names where it was reported."""

import numpy as np
import pytest
from PIL import Image

from residrop.common.errors import DataError
from residrop.data import load, load_test
from residrop.data.read import read_images


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def write(folder, classes, shade):
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade[name],) * 3).save(folder / name / "1.png")


SHADES = {"a": 10, "b": 20, "c": 30, "d": 40}


@pytest.mark.parametrize("classes", ["bc", "c", "abc"])
def test_a_test_part_with_fewer_classes_is_scored_against_the_right_ones(tmp_path, classes):
    """ultralytics/ultralytics#26192: labels of a part were positions in its own sorted folders."""
    write(tmp_path / "set" / "train", "abc", SHADES)
    write(tmp_path / "set" / "val", classes, SHADES)
    splits = load(f"folder:{tmp_path}/set?size=8")
    alone = load_test(f"folder:{tmp_path}/set?size=8", splits.classes)
    for part in (splits.test, alone):
        assert [10 * (label + 1) for label in part.labels.tolist()] == part.pixels[:, 0, 0, 0].tolist()


def test_a_test_part_with_as_many_but_other_classes_is_refused(tmp_path):
    """ultralytics/ultralytics#26192: equal counts of classes looked right."""
    write(tmp_path / "set" / "train", "abc", SHADES)
    write(tmp_path / "set" / "val", "bcd", SHADES)
    with pytest.raises(DataError, match=r"val: class 'd' is not among the classes \(a, b, c\)"):
        load(f"folder:{tmp_path}/set?size=8")


def test_a_phone_photograph_and_its_upright_copy_are_one_picture(tmp_path):
    """roboflow/rf-detr#189: what a camera writes about orientation was ignored."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side: to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    upright.save(tmp_path / "copy.png")
    phone, copy = read_images([tmp_path / "phone.png", tmp_path / "copy.png"], 8, 3)
    assert np.array_equal(phone, copy)
