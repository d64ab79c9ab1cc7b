"""Every file that a run is continued or evaluated from is verified when it is read."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import seed
from residrop.common.errors import RunError
from residrop.training import Run, load_run, train
from residrop.training.checked import load_state, load_tensors, read_lines, read_record, write_record


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "copy")


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def equal(one, other):
    """Whether nested values agree to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def weights(run, name):
    return dict(load_run(run.path, name)[1].state_dict())


READ = {
    "last.pt": lambda run: run.load_state(),
    "model.safetensors": lambda run: weights(run, "model"),
    "best.safetensors": lambda run: weights(run, "best"),
    "normalization.safetensors": lambda run: {"mean": run.normalization().mean, "std": run.normalization().std},
    "recipe.json": lambda run: run.recipe().to_dict(),
    "dataset.json": lambda run: run.dataset(),
    "versions.json": lambda run: run.versions(),
    "evaluation.json": lambda run: run.evaluation(),
}


@pytest.mark.parametrize("name", READ)
def test_a_flipped_bit_is_refused_or_changes_nothing(copy, name, record_property):
    """Bits that no reader looks at (of an archive's dates, of spaces) may differ."""
    run, path, draw = Run(copy), copy / name, random.Random(seed(0))
    before, content = READ[name](run), path.read_bytes()
    refused, tried = 0, 24 if name == "last.pt" else 12
    for _ in range(tried):
        flip(path, draw.randrange(len(content)), draw.randrange(8))
        try:
            assert equal(READ[name](run), before)
        except RunError:
            refused += 1
        path.write_bytes(content)
    record_property("tried", tried)
    assert refused > tried // 2


def test_a_flipped_bit_of_a_weight_is_seen_by_all_that_read_it(copy, finished):
    """The archive of torch and the header of safetensors are as they were; one weight is another."""
    state = torch.load(copy / "last.pt", weights_only=True)
    next(iter(state["model"].values()))[0] += 1e-3
    torch.save(state, copy / "last.pt")
    with pytest.raises(
        RunError, match=r"last\.pt is damaged \(it does not hold what its checksum was made of\); delete"
    ):
        train(finished[0], copy, resume=True, quiet=True)
    flip(copy / "model.safetensors", -3, 0)
    with pytest.raises(RunError, match=r"model\.safetensors is damaged .*continue the run with --resume to write it"):
        load_run(copy)


def test_files_stay_plain(copy):
    """Readers that know nothing of checksums read them."""
    assert load_file(copy / "model.safetensors").keys() == weights(Run(copy), "model").keys()
    assert torch.load(copy / "last.pt", weights_only=True)["update"] == 8
    assert json.loads((copy / "recipe.json").read_text())["network"] == "resnet-8"


def test_files_of_earlier_versions_have_no_checksum_and_are_read(copy, finished):
    for name in ("model", "best", "normalization"):
        save_file(load_file(copy / f"{name}.safetensors"), copy / f"{name}.safetensors")
    state = torch.load(copy / "last.pt", weights_only=True)
    del state["sha256"]
    torch.save(state, copy / "last.pt")
    for name in ("recipe.json", "dataset.json", "versions.json", "evaluation.json"):
        values = json.loads((copy / name).read_text())
        del values["sha256"]
        (copy / name).write_text(json.dumps(values))
    load_run(copy)
    again = train(finished[0], copy, resume=True, quiet=True)
    assert again.evaluation == finished[2].evaluation


def test_versions_that_are_gone_are_those_of_the_one_who_resumes(copy, finished):
    (copy / "versions.json").write_text("{")
    with pytest.raises(RunError, match=r"versions\.json cannot be read .*delete it, and residrop train"):
        train(finished[0], copy, resume=True, quiet=True)
    (copy / "versions.json").unlink()
    assert train(finished[0], copy, resume=True, quiet=True).to_dict()["run"]["versions"] == Run(copy).versions()


def test_a_record_changed_by_hand_says_how_it_is_read(tmp_path):
    write_record(tmp_path / "a.json", {"lr": 0.1})
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace("0.1", "0.2"))
    with pytest.raises(RunError, match="remove its entry sha256 if you have changed it yourself"):
        read_record(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"lr": 0.2}')
    assert read_record(tmp_path / "a.json") == {"lr": 0.2}


def test_deep_nesting_and_other_kinds_are_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000)
    with pytest.raises(RunError, match=r"a\.json cannot be read"):
        read_record(path)
    path.write_text('{"size": true}')
    with pytest.raises(RunError, match="size is True, where int belongs"):
        read_record(path, {"size": int})
    path.write_text('{"names": ["a", 1]}')
    with pytest.raises(RunError, match=r"names is \['a', 1\], where a list of str belongs"):
        read_record(path, {"names": [str]})


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a.json", "b.safetensors", "c.pt", "d.jsonl"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: read_record(tmp_path / "a.json"),
        lambda: load_tensors(tmp_path / "b.safetensors", "", ""),
        lambda: load_state(tmp_path / "c.pt", ""),
        lambda: read_lines(tmp_path / "d.jsonl"),
    ):
        with pytest.raises(RunError, match="is no regular file"):
            read()


def test_the_last_line_may_be_cut_short(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_lines(path) == []
    path.write_text('{"epoch": 1}\n{"epoch": 2, "loss": NaN}\n{"epoch": 3, "lo')
    assert read_lines(path) == [{"epoch": 1}, {"epoch": 2, "loss": None}]
    for content in ('{"epoch": 1}\n{"epoch": 2, "lo\n', '{"epoch": 1}\n[2]\n', "\xff"):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(RunError, match=r"a\.jsonl cannot be read"):
            read_lines(path)


# States


@pytest.fixture
def saved(copy):
    """Return a function that changes the saved state and saves it, with a checksum that fits."""

    def change(edit):
        state = Run(copy).load_state()
        edit(state)
        Run(copy).save_state(state)
        return copy

    return change


def _momentum(state):
    entries = state["optimizer"]["state"]
    entries[0]["momentum_buffer"] = entries[0]["momentum_buffer"][:1, :1, :1, :1].clone()


EDITS = {
    "momentum": (_momentum, "its momentum is not of shape"),
    "options": (lambda state: state["optimizer"]["param_groups"][0].update(weight_decay=0.5), "weight_decay"),
    "sums": (lambda state: state.update(sums=torch.zeros(1, dtype=torch.float64)), "its sums is not of shape"),
    "update": (lambda state: state.update(update="6"), "its update is '6'"),
    "best": (lambda state: state.update(best=None), "its best is None"),
    "history": (lambda state: state.update(history=[1, 2]), "its history holds no lines"),
    "epochs": (lambda state: state.update(history=state["history"][:1]), "update 8 of 8, after 1 epochs"),
    "late": (lambda state: state.update(update=9, sampler={"seed": 0, "step": 9}), "update 9 of 8"),
    "draws": (lambda state: state.update(sampler={"seed": 1, "step": 8}), "its draws are"),
    "survival": (lambda state: state.update(survival=[{"epoch": 0, "rates": 3}]), "is not the state of this run"),
}


@pytest.mark.parametrize("name", EDITS)
def test_states_that_do_not_fit_are_refused(saved, finished, name):
    edit, text = EDITS[name]
    path = saved(edit)
    before = {one.name: one.read_bytes() for one in path.iterdir() if one.is_file()}
    with pytest.raises(RunError, match=r"last\.pt is not the state of this run .*delete it") as caught:
        train(finished[0], path, resume=True, quiet=True)
    assert text in str(caught.value)
    assert {one.name: one.read_bytes() for one in path.iterdir() if one.is_file()} == before


# The weights that a run reports on


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_finished_run_without_its_best_weights_is_left_as_it_is(copy, finished, damage):
    best = copy / "best.safetensors"
    best.write_bytes(best.read_bytes()[:100])
    if damage == "gone":
        best.unlink()
    before = {one.name: one.read_bytes() for one in copy.iterdir() if one.is_file()}
    with pytest.raises(RunError, match=r"best\.safetensors .*restore it, or delete .*last\.pt to train anew"):
        train(finished[0], copy, resume=True, quiet=True)
    assert {one.name: one.read_bytes() for one in copy.iterdir() if one.is_file()} == before
    (copy / "last.pt").unlink()
    assert train(finished[0], copy, resume=True, quiet=True).evaluation == finished[2].evaluation
