import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import residrop.data.decoded as decoded_module
from residrop.data import load, load_test


@pytest.fixture
def cached(user_cache):
    """Return a function from "train" or "test" to the cache of that part of the shards."""

    def find(part="train"):
        (path,) = (user_cache / "decoded").glob(f"*-parquet-{part}-*.safetensors")
        return path

    return find


def everything(folder):
    return sorted(path.name for path in folder.iterdir())


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
    assert len(builds) == 17
    assert equal(first, load(str(shards[0])))
    assert len(builds) == 17


def test_a_test_part_is_read_alone(shards, builds, cached):
    first = load_test(str(shards[0]), ("c", "b", "a"))
    assert len(builds) == 5
    assert first.labels.tolist() == [2, 1, 0, 1, 2]
    assert torch.equal(first.pixels, load(str(shards[0])).test.pixels)
    cached("train").unlink()
    for path in shards[0].glob("train-*"):
        path.unlink()
    assert torch.equal(first.pixels, load_test(str(shards[0]), ("a", "b", "c")).pixels)
    assert len(builds) == 17


def test_nothing_is_left_in_the_source(shards, write_tree, tmp_path, user_cache):
    folder = write_tree(tmp_path / "pets")
    before = everything(shards[0]), everything(folder)
    load(str(shards[0]))
    load(f"folder:{folder}?size=8")
    assert (everything(shards[0]), everything(folder)) == before
    assert len(everything(user_cache / "decoded")) == 4


def test_temporary_files_of_killed_processes_are_removed(shards, user_cache):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (user_cache / "decoded").mkdir(parents=True)
    dead = user_cache / "decoded" / f"pets-folder-train-8-abc.safetensors.{int(process.stdout)}.tmp"
    alive = user_cache / "decoded" / f"pets-folder-train-8-abc.safetensors.{os.getppid()}.tmp"
    dead.touch()
    alive.touch()
    load(str(shards[0]))
    assert sorted((user_cache / "decoded").glob("*.tmp")) == [alive]


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "bit", "shape", "tensor"])
def test_damaged_cache_is_rebuilt(shards, builds, cached, damage):
    first = load(str(shards[0]))
    path = cached()
    data = bytearray(path.read_bytes())
    if damage == "tensor":
        with safe_open(path, "pt") as file:
            about = file.metadata()
        save_file({**load_file(path), "pixels": torch.zeros(12, 3, 6, 6, dtype=torch.uint8)}, path, about)
    else:
        data[-1] ^= 1
        shape = bytes(data).replace(b"[12,3,6,6]", b"[12,3,4,9]")
        damaged = {"empty": b"", "truncated": data[:-9], "garbage": b"x" * 500, "bit": data, "shape": shape}
        path.write_bytes(damaged[damage])
    builds.clear()
    assert equal(first, load(str(shards[0])))
    assert len(builds) == 12
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
    assert len(builds) == 12


def test_format_version_is_part_of_the_fingerprint(shards, builds, monkeypatch):
    load(str(shards[0]))
    builds.clear()
    monkeypatch.setattr(decoded_module, "_FORMAT", decoded_module._FORMAT + 1)
    load(str(shards[0]))
    assert len(builds) == 17


def test_named_cache_folder_wins(shards, builds, tmp_path, user_cache):
    load(str(shards[0]), cache=tmp_path / "mine")
    assert len(everything(tmp_path / "mine" / "decoded")) == 2
    assert not user_cache.exists()
    builds.clear()
    load(str(shards[0]), cache=tmp_path / "mine")
    assert builds == []


def test_nothing_writable_still_loads(shards, user_cache, caplog):
    user_cache.parent.write_text("a file where the cache folder should be")
    assert len(load(str(shards[0])).train) == 12
    assert "could not cache the decoded images" in caplog.text


def test_sizes_of_one_folder_are_cached_side_by_side(tmp_path, write_tree, user_cache):
    folder = write_tree(tmp_path / "pets")
    sizes = [load(f"folder:{folder}?size={size}").train.pixels.shape[-1] for size in (8, 6, 8)]
    assert sizes == [8, 6, 8]
    assert len(everything(user_cache / "decoded")) == 4


def test_long_and_odd_names_of_folders_are_cached(shards, builds):
    odd = shards[0].rename(shards[0].with_name("ä?*" * 60))
    load(str(odd))
    builds.clear()
    load(str(odd))
    assert builds == []
