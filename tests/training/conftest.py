"""Trainings of half a second: two hundred digits, three blocks."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from residrop.common.errors import Interrupted
from residrop.training import Recipe, loop, train

MEASURED = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def _user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(scope="session")
def tiny():
    """Return a function from changes to a recipe of 4 updates an epoch (64, 64, 64 and 8 images)."""

    def make(**changes):
        return Recipe(
            **{
                "network": "resnet-8",
                "limit": 200,
                "epochs": 2,
                "batch_size": 64,
                "lr": 0.05,
                "precision": "fp32",
                "device": "cpu",
                "samples": 0,
                **changes,
            }
        )

    return make


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """Return (recipe, directory, outcome) of one run with a validation set; read only."""
    recipe = tiny(validation=40, select="best", samples=2)
    path = tmp_path_factory.mktemp("finished") / "run"
    return recipe, path, train(recipe, path, quiet=True)


@pytest.fixture
def at_update(monkeypatch):
    """Return a function that makes something happen right after update number n, once."""
    original = loop._update

    def arrange(number, action):
        def update(recipe, state, *args):
            original(recipe, state, *args)
            if state.update == number:
                monkeypatch.setattr(loop, "_update", original)
                action()

        monkeypatch.setattr(loop, "_update", update)

    return arrange


class PowerCutError(BaseException):
    """Ends a training without a chance to save."""


@pytest.fixture
def power_cut():
    return PowerCutError


@pytest.fixture
def interrupt(at_update, tmp_path):
    """Return a function that trains until Ctrl-C arrives during update number n, and gives the message."""

    def run(recipe, path, number, resume=False):
        at_update(number, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted) as caught:
            train(recipe, path, resume=resume, quiet=True)
        return str(caught.value)

    return run


@pytest.fixture
def cut_power(at_update):
    """Return a function that trains until the power fails after update number n."""

    def run(recipe, path, number, resume=False):
        def fail():
            raise PowerCutError

        at_update(number, fail)
        with pytest.raises(PowerCutError):
            train(recipe, path, resume=resume, quiet=True)

    return run


def lines_of(path):
    """Metrics of a run without what a clock decides."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


@pytest.fixture(scope="session")
def metrics():
    return lines_of


def assert_equal_trees(one, other, where="state"):
    """Fail unless two nested states agree to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_trees(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_trees(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.fixture(scope="session")
def assert_same_run():
    """Return a check that two runs agree to the bit in weights, optimizer, counters and metrics."""

    def check(one, other):
        assert lines_of(one) == lines_of(other)
        for name in ("model", "best"):
            files = [path / f"{name}.safetensors" for path in (one, other)]
            assert files[0].exists() == files[1].exists(), name
            if files[0].exists():
                assert_equal_trees(*(load_file(file) for file in files), where=name)
        states = [torch.load(path / "last.pt", weights_only=True) for path in (one, other)]
        for state in states:
            del state["seconds"], state["sha256"]  # the latter is of the former, too
            for line in state["survival"]:
                del line["seconds"]
            state["history"] = lines_of(one)  # compared above, without the clock
        assert_equal_trees(*states)

    return check
