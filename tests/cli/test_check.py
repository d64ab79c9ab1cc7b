import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from command_line import assert_refused


@pytest.fixture
def folder(place):
    """An image folder of two classes, three images each, beside the working directory."""
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (place.parent / "pets" / part / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(place.parent / "pets" / part / label / f"{i}.png")
    return place.parent / "pets"


def test_check_of_a_sound_folder(cli, folder, place):
    code, out, err = cli("check", f"folder:{folder}")
    assert (code, err) == (0, "")
    assert "train" in out
    assert " 6 " in out
    assert list(place.iterdir()) == []
    assert list((place.parent / "xdg").rglob("*.safetensors")) == []


def test_check_names_what_cannot_be_read(cli, folder, tmp_path):
    for name in ("train/dog/1.png", "test/cat/0.png", "test/cat/2.png"):
        (folder / name).write_bytes(b"no picture")
    code, out, err = cli("check", folder, "--json", tmp_path / "found.json")
    assert code == 2
    assert err == (
        f"residrop: error: 3 of 12 images of {folder} cannot be read; remove or replace them, or train with "
        "--on-error skip\n"
    )
    assert out.count("cannot be decoded") == 3
    train, test = json.loads((tmp_path / "found.json").read_text())
    assert (train["name"], train["images"], train["classes"], list(train["unreadable"])) == (
        *("train", 6, 2),
        [f"{folder}/train/dog/1.png"],
    )
    assert list(test["unreadable"]) == [f"{folder}/test/cat/0.png", f"{folder}/test/cat/2.png"]


def test_check_of_shards_and_of_other_sources(cli, place):
    image = place.parent / "1.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(image)
    for part in ("train", "test"):
        table = pa.table({"image": [image.read_bytes(), b"nothing", None], "label": [0, 1, 0]})
        pq.write_table(table, place / f"{part}-0.parquet")
    code, out, err = cli("check", place)
    assert code == 2
    assert "4 of 6 images" in err
    assert f"{place}/test-0.parquet, row 2: has no image bytes" in out
    code, out, err = cli("check", "digits", "--json", "-")
    assert (code, [part["images"] for part in json.loads(out)]) == (0, [1442, 355])


def test_check_of_an_unsplit_folder(cli, folder):
    for source in (f"folder:{folder}/train", f"{folder}/train"):
        code, out, _ = cli("check", source)
        assert code == 0
        assert "all" in out


def test_check_of_nothing_is_one_line(cli, place, folder):
    assert_refused(cli("check", "folder:nowhere"), place)
    (folder / "test" / "cat").rename(folder / "test" / "emu")
    code, out, err = cli("check", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "class 'emu' is not among the classes (cat, dog)" in err
