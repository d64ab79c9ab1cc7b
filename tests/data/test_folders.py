import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from residrop.common.errors import ConfigError, DataError
from residrop.data import Files, load, load_test, local


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
    monkeypatch.setattr(local, "_IN_MEMORY_BYTES", 12 * 3 * 8 * 8)
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


def test_image_of_floats_is_refused(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "test" / "cat" / "0.tiff")
    with pytest.raises(DataError, match=r"cat/0.tiff: image pixel mode F .*convert it to 8 bits"):
        load(f"folder:{folder}")


def test_empty_class_folder(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    for path in (folder / "train" / "cat").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match="train/cat: no images in this class folder"):
        load(f"folder:{folder}")


def test_missing_parts(tmp_path, write_tree):
    with pytest.raises(DataError, match="none for testing"):
        load(f"folder:{tmp_path}")
    folder = write_tree(tmp_path / "bats", parts=("test",))
    with pytest.raises(DataError, match="no folder train"):
        load(f"folder:{folder}")
    folder = write_tree(tmp_path / "pets", parts=("train",))
    with pytest.raises(DataError, match="none for testing; add a folder test or val"):
        load(f"folder:{folder}")
    (folder / "test").mkdir()
    with pytest.raises(DataError, match="test: no class folders"):
        load(f"folder:{folder}")


@pytest.mark.parametrize("option", ["size=0", "size=-3", "size=big", "side=8", ""])
def test_bad_options(tmp_path, option):
    with pytest.raises(ConfigError, match=r"allowed is size=N"):
        load(f"folder:{tmp_path}?{option}")


def test_the_size_is_said_where_none_was_asked_for(tmp_path, write_tree, caplog):
    folder = write_tree(tmp_path / "pets")
    load(f"folder:{folder}?size=8")
    assert caplog.text == ""
    for _ in range(2):
        load(f"folder:{folder}")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{folder}: images are resized and cut to 32x32 pixels; folder:PATH?size=N takes another size"
    )


# What is in folders of the world


def png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path, "PNG")


def test_every_ending_that_pillow_reads_in_any_case(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    for i, name in enumerate(("a.jfif", "b.avif", "c.PNG", "d.JPeG", "e.jp2")):
        png(folder / "test" / "cat" / name, i)  # found by the ending, read by the content
    assert len(load(f"folder:{folder}?size=8").test) == 11


def test_real_avif_and_jfif(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    for kind, name in (("AVIF", "a.AVIF"), ("JPEG", "b.jfif")):
        Image.new("RGB", (8, 8), (100, 100, 100)).save(folder / "test" / "cat" / name, kind)
    pixels = load(f"folder:{folder}?size=8").test.pixels[3:5].int()
    assert (pixels - 100).abs().max() <= 2


def test_pictures_in_subfolders_of_a_class_count(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets", n=1)
    png(folder / "train" / "dog" / "site-2" / "day-1" / "1.png", 50)
    png(folder / "train" / "dog" / "Site-1" / "1.png", 60)
    splits = load(f"folder:{folder}?size=8")
    assert splits.train.labels.tolist() == [0, 1, 1, 1]
    assert splits.train.pixels[2:, 0, 0, 0].tolist() == [60, 50]


def test_what_systems_leave_behind_is_counted_in_one_line(tmp_path, write_tree, caplog):
    folder = write_tree(tmp_path / "pets")
    clean = load(f"folder:{folder}?size=8")
    for name in ("__MACOSX/cat/._0.png", ".ipynb_checkpoints/0-checkpoint.png", "@eaDir/thumb.png", "notes.txt"):
        png(folder / "train" / name)
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "@eaDir/0.png/THUMB.jpg", ".ipynb_checkpoints/0.png"):
        png(folder / "train" / "cat" / name)
    caplog.clear()
    splits = load(f"folder:{folder}?size=8")
    assert splits.classes == ("cat", "dog")
    assert torch.equal(splits.train.pixels, clean.train.pixels)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{folder}: passed over what is no picture: 4 files (.DS_Store, ._0.png, Thumbs.db and 1 more) and "
        "5 folders (.ipynb_checkpoints, @eaDir, __MACOSX)"
    )


def test_class_folder_of_other_files_names_them(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    png(folder / "train" / "emu" / "1.heic")
    with pytest.raises(DataError, match=r"train/emu: no images in this class folder but 1.heic; fill it or remove"):
        load(f"folder:{folder}")


def test_links_in_a_circle_end_and_links_to_nothing_are_named(tmp_path, write_tree, caplog):
    folder = write_tree(tmp_path / "pets")
    (folder / "train" / "cat" / "again").symlink_to(folder / "train" / "cat")
    (folder / "train" / "dog" / "more").symlink_to(folder / "test" / "dog")
    assert load(f"folder:{folder}?size=8").train.labels.tolist() == [0] * 3 + [1] * 6
    assert "1 folder (again)" in caplog.text
    (folder / "train" / "cat" / "lost.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(DataError, match=r"cat/lost.png: image cannot be decoded \(.*No such file"):
        load(f"folder:{folder}?size=8")


@pytest.mark.timeout(20)  # reading a pipe that nobody writes waits for ever
def test_pipes_and_sockets_in_a_class_folder_are_passed_over(tmp_path, write_tree, caplog, monkeypatch):
    folder = write_tree(tmp_path / "pets")
    os.mkfifo(folder / "train" / "cat" / "pipe.png")
    monkeypatch.chdir(folder / "test" / "dog")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.jpg")
        splits = load(f"folder:{folder}?size=8")
    assert (len(splits.train), len(splits.test)) == (6, 6)
    assert "2 pipe, socket or device (pipe.png, socket.jpg)" in caplog.text


@pytest.mark.parametrize("layout", ["", "train"])
@pytest.mark.parametrize("prefix", ["folder:", ""])
def test_split_holds_out_the_same_share_of_every_class(tmp_path, layout, prefix):
    for name, count in (("ash", 20), ("birch", 10), ("cedar", 2), ("elm", 1)):
        for i in range(count):
            png(tmp_path / "set" / layout / name / f"{i}.png", i)
    splits = load(f"{prefix}{tmp_path}/set", split=0.2, seed=1)
    assert splits.test.labels.bincount(minlength=4).tolist() == [4, 2, 1, 0]
    assert splits.train.labels.bincount().tolist() == [16, 8, 1, 1]
    both = torch.cat([splits.train.pixels, splits.test.pixels])[:, 0, 0, 0].tolist()
    assert sorted(both) == sorted([*range(20), *range(10), 0, 1, 0])
    again = load_test(f"folder:{tmp_path}/set", splits.classes, split=0.2)
    assert torch.equal(splits.test.pixels, load(f"folder:{tmp_path}/set", split=0.2, seed=7).test.pixels)
    assert torch.equal(splits.test.pixels, again.pixels)
    (tmp_path / "set" / layout / "ash" / "3.png").unlink()
    fewer = load_test(f"folder:{tmp_path}/set", splits.classes, split=0.2)
    before, after = (set(images.pixels[images.labels == 0][:, 0, 0, 0].tolist()) for images in (again, fewer))
    assert len(after - before) <= 1


def test_split_where_it_cannot_be(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    with pytest.raises(ConfigError, match=r"split=0.2: .*pets has a test part of its own; leave split out"):
        load(f"folder:{folder}", split=0.2)
    assert len(load_test(f"folder:{folder}", ("cat", "dog"), split=0.2)) == 6
    with pytest.raises(ConfigError, match=r"split=0.2: digits has a test set"):
        load("digits", split=0.2)
    one = write_tree(tmp_path / "one", parts=("train",))
    with pytest.raises(ConfigError, match=r"split=1.5: must lie between 0 and 1"):
        load(f"folder:{one}", split=1.5)
    with pytest.raises(DataError, match=r"none for testing; .* --split 0.2"):
        load(f"folder:{one}")


@pytest.mark.parametrize("streams", [False, True])
def test_images_that_cannot_be_read_are_skipped_counted_and_named(tmp_path, write_tree, caplog, monkeypatch, streams):
    monkeypatch.setattr(local, "_IN_MEMORY_BYTES", 0 if streams else 1 << 30)
    folder = write_tree(tmp_path / "pets")
    for name in ("train/dog/1.png", "train/cat/0.png", "test/cat/2.png"):
        (folder / name).write_bytes(b"no picture")
    for _ in range(2):  # the second finds what the first left in the cache
        splits = load(f"folder:{folder}?size=8", on_error="skip")
        assert splits.train.labels.tolist() == [0, 0, 1, 1]
        assert splits.test.labels.tolist() == [0, 0, 1, 1, 1]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{folder}/train: 2 of 6 images cannot be read and are left out: cat/0.png, dog/1.png",
        f"{folder}/test: 1 of 6 images cannot be read and are left out: cat/2.png",
    ]
    if not streams:
        with pytest.raises(DataError, match=r"train/cat/0.png: image cannot be decoded"):
            load(f"folder:{folder}?size=8")  # in spite of the cache
    for path in (folder / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="pets: not one image of its test part can be read"):
        load(f"folder:{folder}?size=8", on_error="skip")
