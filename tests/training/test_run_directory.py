"""What a run leaves on disk, and what is said when some of it is missing or damaged."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import residrop
from residrop.common.errors import RunError, UsageError
from residrop.data import Normalization
from residrop.training import Recipe, Run, checked, checkpoint, load_run, logbook


@pytest.fixture
def copy(finished, tmp_path):
    """Return a copy of the finished run that may be damaged."""
    return shutil.copytree(finished[1], tmp_path / "copy")


def promised():
    """File names of the module's docstring; names are followed by two spaces or more."""
    names = re.findall(r"(?:^|  )([a-z]+(?:\.[a-z]+|/))(?= {2,})", checkpoint.__doc__, re.MULTILINE)
    return {name.rstrip("/") for name in names}


def test_directory_holds_what_is_promised(finished):
    assert len(promised()) == 17
    measured = {"survival.jsonl", "instruments.jsonl"}  # of recipes that ask for them: test_budget.py
    measured |= {"run.lock", "metrics.csv", "logs.json"}  # of runs that go on, or are logged so
    measured |= {"calibration.json"}  # of runs whose uncertainty was evaluated
    assert promised() - measured <= {path.name for path in finished[1].iterdir()}


def test_every_file_of_a_run_is_documented(finished):
    assert {path.name for path in finished[1].iterdir()} <= promised()


def test_nothing_temporary_is_left(finished):
    assert not [path for path in finished[1].rglob("*") if path.name.startswith(".")]


def test_load_run_gives_what_a_user_needs(finished):
    recipe, path, _ = finished
    loaded = residrop.load_run(str(path))
    run, model = loaded
    assert loaded.model is model
    assert not model.training
    assert loaded.recipe == run.recipe() == recipe.replace(survival="linear_decay(0.5)", normalization="channel")
    assert loaded.classes == tuple(str(digit) for digit in range(10))
    x = loaded.normalization(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert torch.equal(x, run.normalization()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)))
    assert model(x).shape == (2, 10)


def test_files_say_what_was_done(finished):
    recipe, path, outcome = finished
    run = Run.open(path)
    # what it left open is filled in
    assert run.recipe() == recipe.replace(survival="linear_decay(0.5)", normalization="channel")
    dataset = run.dataset()
    assert re.fullmatch(r"[0-9a-f]{16}", dataset.pop("digest"))
    assert dataset == {
        "classes": [str(digit) for digit in range(10)],
        "channels": 1,
        "size": 8,
        "steps": 8,
        "normalization": "channel",
    }
    versions = run.versions()
    assert {"residrop", "torch", "torchvision", "numpy", "python", "machine", "cuda", "threads"} <= versions.keys()
    assert torch.__version__.startswith(versions["torch"])
    assert run.evaluation() == outcome.to_dict()


def test_curves_are_a_picture(finished):
    with Image.open(finished[1] / "curves.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_tensorboard_holds_the_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[1] / "tensorboard"))
    events.Reload()
    tags = {"train_loss", "train_error", "validation_error", "test_error", "lr", "realised_depth", "images_per_second"}
    tags.add("first_gradient")
    assert set(events.Tags()["scalars"]) == tags
    history = finished[2].history
    for tag in tags:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [1, 2]
        assert [value for _, value in found] == pytest.approx([line[tag] for line in history], rel=1e-5)


def test_load_run_gives_the_trained_network_in_eval_mode(finished):
    run, model = load_run(finished[1])
    assert run.path == finished[1]
    assert not any(module.training for module in model.modules())
    saved = load_file(finished[1] / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == saved.keys()
    assert load_run(finished[1], "best")[1].state_dict().keys() == saved.keys()


def test_normalization_is_kept_with_the_run(finished):
    from residrop.data import fit, load

    recipe = finished[0]
    wanted = fit(load(recipe.data, validation=40, seed=1, limit=200).train, recipe.normalization)
    found = Run.open(finished[1]).normalization()
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.std, wanted.std)


# Atomic writing


def test_failing_writer_leaves_the_old_file(copy, monkeypatch):
    run = Run.open(copy)
    _, model = load_run(copy)
    names = ("recipe.json", "last.pt", "model.safetensors")
    before = {name: (copy / name).read_bytes() for name in names}

    def half(value, target, *args, **kwargs):
        with target.open("wb") as file:
            file.write(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", lambda path, content: half(content, path))
    monkeypatch.setattr(checked, "save_file", half)
    with pytest.raises(RunError, match=r"last\.pt cannot be written \(No space left on device\); free some space"):
        run.save_state({"update": 1})
    with pytest.raises(RunError, match=r"model\.safetensors cannot be written \(No space left on device\)"):
        run.save_weights("model", model)
    with pytest.raises(TypeError):
        checked.write_record(copy / "recipe.json", {"epochs": object()})
    assert {name: (copy / name).read_bytes() for name in names} == before
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_failing_replacement_leaves_the_old_file(copy, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    before = (copy / "recipe.json").read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=r"recipe\.json cannot be written \(Input/output"):
        checked.write_record(copy / "recipe.json", {})
    assert (copy / "recipe.json").read_bytes() == before
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_new_file_takes_the_place_of_the_old(tmp_path):
    checked.write_record(tmp_path / "a.json", {"a": 1})
    checked.write_record(tmp_path / "a.json", {"a": 2})
    assert checked.read_record(tmp_path / "a.json") == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_curves_are_written_atomically_too(copy, finished, monkeypatch):
    # the docstring promises it of every file of the run; savefig goes straight to curves.png
    from matplotlib.figure import Figure

    before = (copy / "curves.png").read_bytes()

    def half(figure, target, *args, **kwargs):
        with open(target, "wb") as file:  # noqa: PTH123 - a path or a name
            file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        logbook.draw_curves(copy / "curves.png", {"a": finished[2].history}, "title")
    assert (copy / "curves.png").read_bytes() == before


# Damage


def test_no_directory_and_no_run_are_clear(tmp_path):
    with pytest.raises(RunError, match="nothing is no directory; give the folder that residrop train wrote"):
        load_run(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"recipe\.json does not exist; is .* a run directory"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"epochs": 3', "\x00\x01"])
def test_recipe_that_is_no_json_is_clear(copy, content):
    (copy / "recipe.json").write_text(content)
    with pytest.raises(RunError, match=r"recipe\.json cannot be read .*restore it or train anew"):
        load_run(copy)


@pytest.mark.parametrize("name", ["recipe.json", "dataset.json"])
def test_binary_rubbish_in_json_is_clear(copy, name):
    (copy / name).write_bytes(b"\xff\xfe\x80\x81")
    with pytest.raises(RunError, match=f"{name} cannot be read"):
        load_run(copy)


def test_recipe_of_another_version_is_clear(copy):
    (copy / "recipe.json").write_text('{"epochs": 3, "colour": "red"}')
    with pytest.raises(UsageError, match="unknown fields colour"):
        load_run(copy)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"lr": "fast"}', '{"lr_drops": 3}', '{"network": 3}'])
def test_recipe_of_the_wrong_shape_is_clear(copy, content):
    (copy / "recipe.json").write_text(content)
    with pytest.raises(UsageError, match="recipe"):
        load_run(copy)


@pytest.mark.parametrize("content", ["{}", "[]", "null"])
def test_dataset_of_the_wrong_shape_is_clear(copy, content):
    (copy / "dataset.json").write_text(content)
    with pytest.raises(RunError, match=r"dataset\.json"):
        load_run(copy)


@pytest.mark.parametrize("keep", [0, 7, 500, -10])
def test_damaged_weights_are_clear(copy, keep):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"model\.safetensors is damaged .*--resume"):
        load_run(copy)


def test_missing_weights_are_clear(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model\.safetensors does not exist; .*continue it with --resume"):
        load_run(copy)


def test_weights_of_another_network_are_clear(copy, tmp_path):
    from residrop import create

    other = create("resnet-14", channels=1)
    Run(copy).save_weights("model", other)
    with pytest.raises(RunError, match=r"model\.safetensors does not fit the recipe's network: \w+"):
        load_run(copy)


@pytest.mark.parametrize("size", [100_000, 10**12])
def test_a_network_larger_than_its_weights_is_refused_before_memory_is_taken(tmp_path, size):
    recipe = Recipe(network="vanilla-6", width=32)
    described = {"classes": ["a", "b"], "channels": 1, "size": 8, "steps": 4, "digest": "0"}
    run = Run.create(
        tmp_path / "run", recipe, described, Normalization("unit", torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    )
    run.save_weights("model", checkpoint.build_network(recipe, described))
    assert load_run(tmp_path / "run")[0] == run
    dataset = {**run.dataset(), "size": size}
    (tmp_path / "run" / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(RunError, match=r"does not fit the recipe's network|describes no network that can be built"):
        load_run(tmp_path / "run")


def test_missing_normalization_is_clear(copy):
    (copy / "normalization.safetensors").unlink()
    with pytest.raises(RunError, match=r"normalization\.safetensors does not exist"):
        Run.open(copy).normalization()


# Logbook and curves


def test_logbook_continues_its_history(tmp_path):
    book = logbook.Logbook(tmp_path)
    book.write({"epoch": 1, "train_loss": 2.0})
    again = logbook.Logbook(tmp_path, book.history)
    again.write({"epoch": 2, "train_loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": 1.0}]
    logbook.Logbook(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "history",
    [
        [{"epoch": 1, "train_error": 50.0, "test_error": 40.0}],
        [{"epoch": 1, "train_error": 90.0}, {"epoch": 2, "train_error": 3.0, "test_error": 0.0}],
        [{"epoch": 1, "train_error": 90.0, "test_error": 80.0, "validation_error": 3.0}],
    ],
    ids=["one", "zero-error", "validation"],
)
def test_curves_of_short_histories_are_drawn(tmp_path, history):
    logbook.draw_curves(tmp_path / "a.png", {"rule": history, "other": history}, "title")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
