"""Damaged files of runs: every command that reads them ends well or says one line, and leaves the run as it was."""

import contextlib
import json
import random
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import seed
from residrop.training.checked import save_state, save_tensors

ODD = (
    *(None, True, -1, 0, 3, 10**30, -(10**400), 1.5, 1e308, float("nan"), "", "x", "\u0000", "a/b" * 200),
    *([], {}, [[1]], [None], {"a": 1}, [3, "x"], "1e400"),
)
NAMES = (
    *("recipe.json", "dataset.json", "versions.json", "evaluation.json", "metrics.jsonl", "survival.jsonl"),
    *("instruments.jsonl", "normalization.safetensors", "model.safetensors", "best.safetensors", "last.pt"),
)


def contents(folder):
    """Everything in a run, by name, but the pictures and events that every training draws anew."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "curves.png"]
    return {str(path): path.read_bytes() for path in paths if path.parent.name != "tensorboard"}


def places(value, path=()):
    """Paths to everything inside nested mappings and sequences."""
    found = [path] if path else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        found += places(one, (*path, key))
    return found


def edited(value, draw):
    """The same with one value replaced, removed, or nested deeply."""
    path = draw.choice(places(value))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    what = draw.randrange(6)
    if what == 0:
        del parent[path[-1]]
    elif what == 1 and isinstance(parent, dict):
        parent["another"] = draw.choice(ODD)
    else:
        parent[path[-1]] = draw.choice(ODD)
    return value


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path, draw):
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def fill(path, draw):
    content = (b"", b"\0" * 100, b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"3\n", b"{}\n")
    path.write_bytes(draw.choice(content))


def remove(path, draw):
    path.unlink()
    if draw.randrange(2):
        path.mkdir()


def edit(path, draw):
    """Other content in a file of the right form, with no checksum, or one that fits."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = edited(lines, draw)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif path.suffix == ".json":
        values = json.loads(path.read_text())
        values.pop("sha256", None)
        path.write_text(json.dumps(edited(values, draw)))
    elif path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        state.pop("sha256")
        where = draw.choice(places(state))
        parent = state
        for key in where[:-1]:
            parent = parent[key]
        old = parent[where[-1]]
        if isinstance(old, torch.Tensor) and draw.randrange(2):
            parent[where[-1]] = draw.choice([old.reshape(-1)[:1], old.reshape(-1).to(torch.int64), old[None]])
        elif draw.randrange(4) == 0:
            del parent[where[-1]]
        else:
            parent[where[-1]] = draw.choice(ODD)
        with contextlib.suppress(OverflowError):
            save_state(path, state)
    else:
        tensors = load_file(path)
        name = draw.choice(list(tensors))
        old = tensors[name]
        if draw.randrange(3) == 0:
            del tensors[name]
        else:
            tensors[name] = draw.choice([old.reshape(-1)[:1].clone(), old.to(torch.int32), old[None].clone()])
        (save_tensors if draw.randrange(2) else lambda path, tensors: save_file(tensors, path))(path, tensors)


DAMAGES = (flip, cut, fill, remove, edit, edit)
COMMANDS = (
    lambda run: ("evaluate", run, "--samples", "0", "--json", "out.json"),
    lambda run: ("evaluate", run, "--samples", "0", "--weights", "best", "--json", "out.json"),
    lambda run: ("train", "--resume", "--quiet", "--out", run, "--json", "out.json"),
    lambda run: ("report", run),
    lambda run: ("export", run, "--to", "out.safetensors"),
    lambda run: ("recalibrate", run, "--batches", "1"),
)


@pytest.mark.parametrize("cases", [15, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_damaged_files_are_one_line(finished, tmp_path, run_command, record_property, cases):
    draw = random.Random(seed(0))
    run, refused, failed = tmp_path / "run", 0, []
    for number in range(cases):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        name, damage, command = NAMES[number % len(NAMES)], draw.choice(DAMAGES), draw.choice(COMMANDS)
        damage(run / name, draw)
        before = contents(run)
        about = f"case {number}: {damage.__name__} of {name}, {command(run)}"
        try:
            code, said = run_command(*command(run))
        except Exception as error:
            failed.append(f"{about}: {error!r:.300} in {traceback.extract_tb(error.__traceback__)[-1]}")
            continue
        refused += bool(code)
        if code and contents(run) != before and "cannot be written" not in said:
            failed.append(f"{about}: the run has changed: {said}")
    record_property("tried", cases)
    record_property("refused", refused)
    assert not failed, "\n".join(failed)
    assert refused > cases // 5


@pytest.mark.parametrize("cases", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_damaged_settings_of_a_comparison_are_one_line(compared, tmp_path, run_command, record_property, cases):
    draw = random.Random(seed(1))
    both = tmp_path / "both"
    shutil.copytree(compared, both)
    intact = (both / "settings.json").read_text()
    for number in range(cases):
        shutil.rmtree(both / "settings.json", ignore_errors=True)
        (both / "settings.json").write_text(intact)
        draw.choice(DAMAGES)(both / "settings.json", draw)
        before = contents(both)
        try:
            code, _ = run_command("compare", "--resume", "--quiet", "--out", both)
        except Exception as error:
            raise AssertionError(f"case {number}: {Path(both / 'settings.json').read_bytes()[:300]!r}") from error
        assert not code or contents(both) == before
    record_property("tried", cases)
