"""Trainings killed at any moment and resumed have the weights and lines of an uninterrupted one."""

import json
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from helpers import seed
from residrop.training import Run

RECIPE = (
    *("--network", "resnet-8", "--limit", "200", "--epochs", "3", "--samples", "0", "--precision", "fp32"),
    *("--device", "cpu", "--quiet", "--validation", "40", "--select", "best"),
    *("--budget", "0.6", "--spend", "sensitivity", "--refresh", "1", "--watch", "sensitivity"),
)
CLOCK = {"seconds", "images_per_second"}


def lines_of(path, name):
    lines = [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same(one, other):
    for name in ("metrics", "survival", "instruments"):
        assert lines_of(one, name) == lines_of(other, name), name
    for name in ("model", "best"):
        mine, theirs = (load_file(path / f"{name}.safetensors") for path in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    states = [torch.load(path / "last.pt", weights_only=True) for path in (one, other)]
    for mine, theirs in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_killed_trainings_resume_to_the_same_weights(commands, tmp_path, record_property, kills):
    draw = random.Random(seed(0))
    send, whole = commands(*RECIPE)
    started = time.monotonic()
    (again,) = send(["train", *RECIPE, "--out", str(tmp_path / "timed")]).codes()
    assert again == 0
    duration, done, runs = time.monotonic() - started, 0, 0
    while done < kills:
        out, runs = tmp_path / f"run-{runs}", runs + 1
        often = ("--checkpoint-minutes", "0") if runs % 2 else ()
        for attempt in range(1000):
            resume = ("--resume",) if (out / "recipe.json").exists() else ()
            process = send(["train", *RECIPE, *often, *resume, "--out", str(out)])
            if done < kills and attempt < 8:
                time.sleep(draw.uniform(0.0, duration))
                process.kill(0)
            (code,) = process.codes()
            done += code == -signal.SIGKILL
            if code == 0:
                break
            assert code == -signal.SIGKILL, process.said(0)
        assert_same(whole, out)
        assert not [path for path in out.rglob("*") if path.name.startswith(".residrop")]
        assert Run(out).evaluation() is not None
    record_property("tried", done)
