"""A training on images that are read batch by batch goes on after what its own error message advises."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from residrop.common.errors import DataError, RunError
from residrop.data import local, remarks
from residrop.training import Run, train
from residrop.training.listing import data_of, save_listing
from residrop.training.setup import loader_of_run, prepare


@pytest.fixture(autouse=True)
def _streams(monkeypatch):
    monkeypatch.setattr(local, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(remarks, "_said", set())


@pytest.fixture
def pets(tmp_path):
    """An image folder of two classes, twelve training images each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / name / f"{i}.png")
    return tmp_path / "pets"


@pytest.fixture
def recipe(tiny, pets):
    """Four updates an epoch."""
    changes = {"limit": None, "batch_size": 4, "validation": 8, "normalization": "imagenet", "workers": 0, "epochs": 2}
    return tiny(data=f"folder:{pets}?size=8", **changes)


def weights(path):
    return load_file(path / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def training_file(recipe):
    """One that is met in the second epoch and was read in the first."""
    return prepare(recipe).loaders["train"]._images.paths[5]


@pytest.fixture
def stopped(recipe, tmp_path, at_update):
    """Return (file, its bytes) of a run that met a damaged image in its second epoch."""
    file = training_file(recipe)
    data = file.read_bytes()
    at_update(4, lambda: file.write_bytes(data[:60]))
    with pytest.raises(DataError, match=rf"^{file}: image cannot be decoded .*; replace or remove the file and contin"):
        train(recipe, tmp_path / "run", quiet=True)
    return file, data


def test_after_the_file_is_replaced_nothing_has_happened(recipe, tmp_path, stopped):
    file, data = stopped
    file.write_bytes(data)
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    train(recipe, tmp_path / "whole", quiet=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_after_the_file_is_removed_another_takes_its_place(recipe, tmp_path, stopped, caplog):
    file, _ = stopped
    file.unlink()
    outcome = train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert [line["epoch"] for line in outcome.history] == [1, 2]
    name = f"{file.parent.name}/{file.name}"
    assert f"gone since this run began, so others take their places: {name} (1 in all)" in caplog.text
    before = data_of(Run(tmp_path / "run"))
    assert len(before["listed"]) == 24
    loaders = prepare(recipe, before=before).loaders
    paths = loaders["train"]._images.paths
    assert (len(paths), len(loaders["validation"]._images)) == (16, 8)
    assert paths.count(paths[5]) == 2
    assert paths[5] == paths[6]
    assert not set(paths) & set(loaders["validation"]._images.paths)


def test_skipping_is_the_same_as_removing(recipe, tmp_path, stopped):
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(recipe.replace(on_error="skip"), tmp_path / "run", resume=True, quiet=True)
    stopped[0].unlink()
    train(recipe, tmp_path / "other", resume=True, quiet=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "other"))


def test_a_run_that_skips_goes_on_like_an_uninterrupted_one(recipe, tmp_path, cut_power):
    training_file(recipe).write_bytes(b"no picture")
    recipe = recipe.replace(on_error="skip")
    cut_power(recipe, tmp_path / "run", 5)
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    train(recipe, tmp_path / "whole", quiet=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_new_images_are_left_out(recipe, tmp_path, pets, cut_power, caplog):
    cut_power(recipe, tmp_path / "run", 5)
    shutil.copy(pets / "train" / "cat" / "1.png", pets / "train" / "cat" / "00.png")
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert "left out, as new since this run began: cat/00.png (1 in all)" in caplog.text
    (pets / "train" / "cat" / "00.png").unlink()
    train(recipe, tmp_path / "whole", quiet=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_another_folder_is_refused(recipe, tmp_path, pets, cut_power):
    cut_power(recipe, tmp_path / "run", 5)
    for path in (pets / "train").rglob("*.png"):
        path.rename(path.with_name(f"new-{path.name}"))
    with pytest.raises(DataError, match="24 of the 24 images that the run was started on are missing"):
        train(recipe, tmp_path / "run", resume=True, quiet=True)


@pytest.mark.slow
def test_a_run_without_its_list_goes_on_only_with_the_same_images(recipe, tmp_path, cut_power):
    file = training_file(recipe)
    cut_power(recipe, tmp_path / "run", 5)
    (tmp_path / "run" / "files.json.gz").unlink()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    file.unlink()
    with pytest.raises(RunError, match="other training images"):
        train(recipe, tmp_path / "other", resume=True, quiet=True)


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8bgarbage", None])
def test_a_damaged_list_is_one_line(tmp_path, damage):
    save_listing(Run(tmp_path), ("cat/1.png", "dog/1.png"))
    path = tmp_path / "files.json.gz"
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(RunError, match=r"files.json.gz is damaged .*; delete it to continue"):
        data_of(Run(tmp_path))


def test_no_trained_image_is_held_out_later(recipe, tmp_path, pets):
    shutil.rmtree(pets / "test")
    train(recipe.replace(split=0.25, epochs=1), tmp_path / "run", quiet=True)
    run = Run(tmp_path / "run")
    before = loader_of_run(run)._images.paths
    before[0].unlink()
    after = loader_of_run(run)._images.paths
    assert set(after) == set(before[1:])
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["split"] == 0.25
