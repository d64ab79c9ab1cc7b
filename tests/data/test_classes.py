"""Labels mean names: wherever shards, parts or runs number the same classes in different orders."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from residrop.common.errors import DataError, RunError
from residrop.data import load, load_test
from residrop.training import Recipe, load_run, loop, train
from residrop.training.setup import loader_of_run

NAMES = ("ash", "birch", "cedar")
SHADES = {"ash": 20, "birch": 120, "cedar": 220}  # each class is one shade of grey


def picture(name):
    return np.full((8, 8, 3), SHADES[name], np.uint8)


def shades(images):
    """The class of every image by its looks."""
    called = {shade: name for name, shade in SHADES.items()}
    return [called[int(value)] for value in images.pixels[:, 0, 0, 0]]


def meant(images, classes):
    """The class of every image by its label."""
    return [classes[label] for label in images.labels.tolist()]


@pytest.fixture
def shard(write_shard):
    """Return a function that writes a shard of pictures of the named classes, with ClassLabel names in an order."""

    def write(path, pictures, order):
        write_shard(path, [picture(name) for name in pictures], [order.index(name) for name in pictures], list(order))

    return write


@pytest.fixture
def tree(tmp_path):
    """Return a function that writes n pictures of every named class into a class folder of each part."""

    def write(name, parts, n=4):
        for part, classes in parts.items():
            for one in classes:
                (tmp_path / name / part / one).mkdir(parents=True)
                for i in range(n):
                    Image.fromarray(picture(one)).save(tmp_path / name / part / one / f"{i}.png")
        return tmp_path / name

    return write


def test_every_shard_has_an_order_of_its_own(tmp_path, shard):
    shard(tmp_path / "train-0.parquet", ["ash", "birch"], NAMES)
    shard(tmp_path / "train-1.parquet", ["cedar", "birch", "ash"], NAMES[::-1])
    shard(tmp_path / "test-0.parquet", ["cedar", "ash"], ("birch", "cedar", "ash"))
    splits = load(str(tmp_path))
    assert splits.classes == NAMES
    for part in (splits.train, splits.test):
        assert meant(part, splits.classes) == shades(part)
    again = load_test(str(tmp_path), ("cedar", "ash", "birch"))
    assert meant(again, ("cedar", "ash", "birch")) == shades(again)


def test_names_that_no_image_has_may_differ_and_others_are_refused(tmp_path, shard):
    shard(tmp_path / "train-0.parquet", ["ash", "birch"], ("ash", "birch"))
    shard(tmp_path / "test-0.parquet", ["birch"], ("birch", "cedar"))
    splits = load(str(tmp_path))
    assert meant(splits.test, splits.classes) == ["birch"]
    shard(tmp_path / "test-0.parquet", ["birch", "cedar"], ("birch", "cedar"))
    unknown = r"test-0.parquet, row 1: class 'cedar' is not among the classes \(ash, birch\)"
    with pytest.raises(DataError, match=unknown):
        load(str(tmp_path))
    shard(tmp_path / "train-1.parquet", ["cedar"], NAMES)
    with pytest.raises(DataError, match=r"train-1.parquet, row 0: class 'cedar' is not among"):
        load(str(tmp_path))


def test_numbers_are_no_names(tmp_path, shard, write_shard):
    shard(tmp_path / "train-0.parquet", ["ash", "birch"], ("ash", "birch"))
    write_shard(tmp_path / "test-0.parquet", [picture("ash")], [0])
    with pytest.raises(DataError, match=r"test-0.parquet, row 0: class '0' is not among the classes \(ash, birch\)"):
        load(str(tmp_path))
    shutil.copy(tmp_path / "test-0.parquet", tmp_path / "train-0.parquet")
    assert load(str(tmp_path)).classes == ("0",)


def test_strings_are_names(tmp_path):
    def write(part, pictures, kind):
        data = []
        for name in pictures:
            Image.fromarray(picture(name)).save(buffer := io.BytesIO(), "PNG")
            data.append(buffer.getvalue())
        pq.write_table(pa.table({"image": data, "label": pa.array(pictures).cast(kind)}), tmp_path / part)

    write("train-0.parquet", ["cedar", "ash", "cedar"], pa.string())
    write("train-1.parquet", ["birch"], pa.dictionary(pa.int8(), pa.string()))
    write("test-0.parquet", ["birch", "ash"], pa.large_string())
    splits = load(str(tmp_path))
    assert splits.classes == NAMES
    for part in (splits.train, splits.test):
        assert meant(part, splits.classes) == shades(part)


def test_two_classes_of_one_name_are_refused(tmp_path, write_shard):
    for part in ("train", "test"):
        write_shard(tmp_path / f"{part}-0.parquet", [picture("ash")] * 2, [0, 1], ["ash", "ash"])
    with pytest.raises(DataError, match=r"-0.parquet: two classes are called 'ash'"):
        load(str(tmp_path))


def test_a_test_folder_may_lack_a_class(tree, caplog):
    splits = load(f"folder:{tree('trees', {'train': NAMES, 'test': ('birch', 'cedar')})}?size=8")
    assert splits.classes == NAMES
    assert meant(splits.test, splits.classes) == shades(splits.test)
    assert "trees: the test set has no images of class ash" in caplog.text


def test_a_test_folder_of_unknown_class_is_refused(tree):
    folder = tree("trees", {"train": ("ash", "birch"), "val": ("birch", "cedar")})
    with pytest.raises(DataError, match=r"trees/val: class 'cedar' is not among the classes \(ash, birch\)"):
        load(f"folder:{folder}?size=8")


@pytest.fixture
def run(tmp_path, shard, monkeypatch):
    """Directory of a run that tells the shades apart, trained on shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shard(tmp_path / "set" / "train-0.parquet", list(NAMES) * 8, NAMES)
    shard(tmp_path / "set" / "test-0.parquet", list(NAMES) * 2, NAMES)
    train(recipe_of(tmp_path / "set", epochs=6), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def recipe_of(folder, **changes):
    options = {"network": "resnet-8", "rule": "constant", "batch_size": 8, "lr": 0.05, "samples": 0, "device": "cpu"}
    return Recipe(data=f"parquet:{folder}", precision="fp32", normalization="unit", **options, **changes)


def error_of(run, data):
    wrong, images = 0, 0
    model = load_run(run)[1]
    for x, y in loader_of_run(load_run(run)[0], data).eval_batches():
        wrong += int((model(x).argmax(1) != y).sum())
        images += len(y)
    return wrong / images


def test_a_run_is_evaluated_by_name(run, tmp_path, shard, tree):
    assert error_of(run, None) == 0
    shard(tmp_path / "other" / "test.parquet", ["cedar", "ash"] * 4, NAMES[::-1])
    assert error_of(run, f"parquet:{tmp_path}/other") == 0
    folder = tree("trees", {"test": ("birch", "cedar")})
    assert error_of(run, f"folder:{folder}") == 0
    tree("more", {"test": NAMES})
    (tmp_path / "more" / "test" / "ash").rename(tmp_path / "more" / "test" / "elm")
    with pytest.raises(DataError, match=r"more/test: class 'elm' is not among the classes \(ash, birch, cedar\)"):
        error_of(run, f"folder:{tmp_path}/more")


def test_a_run_is_evaluated_at_its_size(run, tmp_path, tree, write_shard):
    folder = tree("trees", {"test": NAMES})
    loader = loader_of_run(load_run(run)[0], f"folder:{folder}")
    assert next(loader.eval_batches())[0].shape[1:] == (3, 8, 8)
    with pytest.raises(RunError, match=r"3-channel images of 8x8 pixels, .* has 3 of 16x16; .*\?size=8"):
        loader_of_run(load_run(run)[0], f"folder:{folder}?size=16")
    grey = np.zeros((8, 8), np.uint8)
    write_shard(tmp_path / "grey" / "test-0.parquet", [grey], [0], list(NAMES))
    loader = loader_of_run(load_run(run)[0], f"parquet:{tmp_path}/grey")
    assert next(loader.eval_batches())[0].shape[1:] == (3, 8, 8)


def test_a_run_goes_on_by_name(tmp_path, shard, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shard(tmp_path / "set" / "train-0.parquet", list(NAMES) * 8, NAMES)
    shard(tmp_path / "set" / "test-0.parquet", list(NAMES) * 2, NAMES)
    recipe = recipe_of(tmp_path / "set", epochs=2)
    whole = train(recipe, tmp_path / "whole", quiet=True)
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shard(tmp_path / "set" / "train-0.parquet", list(NAMES) * 8, NAMES[::-1])
    shard(tmp_path / "set" / "test-0.parquet", list(NAMES) * 2, NAMES[1:] + NAMES[:1])
    outcome = train(recipe, tmp_path / "run", resume=True, quiet=True)
    one, other = (load_run(tmp_path / name)[1].state_dict() for name in ("whole", "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert outcome.evaluation == whole.evaluation
    assert json.loads((tmp_path / "run" / "dataset.json").read_text())["classes"] == list(NAMES)
    shard(tmp_path / "set" / "train-0.parquet", list(NAMES) * 8, NAMES)
    about = json.loads((tmp_path / "run" / "dataset.json").read_text())
    del about["sha256"]  # as who changes such a file is told to do
    (tmp_path / "run" / "dataset.json").write_text(json.dumps({**about, "classes": ["ash", "birch", "elm"]}))
    with pytest.raises(DataError, match=r"train-0.parquet, row 2: class 'cedar' is not among"):
        train(recipe, tmp_path / "run", resume=True, quiet=True)


def stop_after(monkeypatch, number):
    original = loop._update

    def update(recipe, state, *args):
        original(recipe, state, *args)
        if state.update == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_update", update)
