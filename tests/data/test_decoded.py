import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import residrop.data.decoded as decoded_module
from residrop.data import load

CACHE = ".residrop-parquet.safetensors"


@pytest.fixture
def builds(monkeypatch):
    """Count the images that are really decoded."""
    import residrop.data.parquet as parquet

    counted = []
    original = parquet.open_rgb
    monkeypatch.setattr(parquet, "open_rgb", lambda data: counted.append(1) or original(data))
    return counted


def equal(first, second):
    return (
        torch.equal(first.train.pixels, second.train.pixels)
        and torch.equal(first.test.pixels, second.test.pixels)
        and torch.equal(first.train.labels, second.train.labels)
        and first.classes == second.classes
    )


def test_second_load_decodes_nothing(shards, builds):
    first = load(str(shards[0]))
    assert (shards[0] / CACHE).is_file()
    assert len(builds) == 18  # 17 images and the first one again for its size
    assert equal(first, load(str(shards[0])))
    assert len(builds) == 18


def test_no_temporary_file_is_left(shards):
    load(str(shards[0]))
    assert sorted(path.name for path in shards[0].iterdir() if path.suffix != ".parquet") == [CACHE]


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "bit", "shape"])
def test_damaged_cache_is_rebuilt(shards, builds, damage):
    first = load(str(shards[0]))
    path = shards[0] / CACHE
    data = bytearray(path.read_bytes())
    if damage == "shape":
        save_file({**load_file(path), "labels_train": torch.zeros(3)}, path)
    else:
        data[-1] ^= 1
        path.write_bytes({"empty": b"", "truncated": data[:-9], "garbage": b"x" * 500, "bit": data}[damage])
    builds.clear()
    assert equal(first, load(str(shards[0])))
    assert len(builds) == 18
    builds.clear()
    load(str(shards[0]))
    assert builds == []


def test_changed_source_is_decoded_again(shards, builds, write_shard, random_pixels):
    load(str(shards[0]))
    write_shard(shards[0] / "test-00000-of-00001.parquet", random_pixels(2, seed=9), [2, 1], ["a", "b", "c"])
    assert load(str(shards[0])).test.labels.tolist() == [2, 1]
    builds.clear()
    path = shards[0] / "train-00000-of-00003.parquet"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    load(str(shards[0]))
    assert len(builds) == 15


def test_format_version_is_part_of_the_fingerprint(shards, builds, monkeypatch):
    load(str(shards[0]))
    builds.clear()
    monkeypatch.setattr(decoded_module, "_FORMAT", decoded_module._FORMAT + 1)
    load(str(shards[0]))
    assert len(builds) == 18


def test_moved_source_keeps_its_cache(shards, builds):
    load(str(shards[0]))
    builds.clear()
    moved = shards[0].rename(shards[0].with_name("moved"))
    assert load(str(moved)).name == "moved"
    assert builds == []


def test_read_only_source_is_cached_for_the_user(shards, builds, user_cache):
    shards[0].chmod(0o555)
    first = load(str(shards[0]))
    assert next(path.name for path in (user_cache / "decoded").iterdir()).startswith("tiny-parquet-")
    assert not (shards[0] / CACHE).exists()
    builds.clear()
    assert equal(first, load(str(shards[0])))
    assert builds == []


def test_named_cache_folder_wins(shards, builds, tmp_path, user_cache):
    load(str(shards[0]), cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine" / "decoded").iterdir())) == 1
    assert not (shards[0] / CACHE).exists()
    assert not user_cache.exists()
    builds.clear()
    load(str(shards[0]), cache=tmp_path / "mine")
    assert builds == []


def test_nothing_writable_still_loads(shards, user_cache, caplog):
    shards[0].chmod(0o555)
    user_cache.parent.write_text("a file where the cache folder should be")
    assert len(load(str(shards[0])).train) == 12
    assert "could not cache the decoded images" in caplog.text


def test_sizes_of_one_folder_are_cached_side_by_side(tmp_path, write_tree):
    folder = write_tree(tmp_path / "pets")
    sizes = [load(f"folder:{folder}?size={size}").train.pixels.shape[-1] for size in (8, 6, 8)]
    assert sizes == [8, 6, 8]
    names = sorted(path.name for path in folder.glob(".residrop*"))
    assert names == [".residrop-folder6.safetensors", ".residrop-folder8.safetensors"]


def test_cache_is_as_readable_as_its_folder(shards):
    shards[0].chmod(0o755)
    load(str(shards[0]))
    assert (shards[0] / CACHE).stat().st_mode & 0o777 == 0o644
