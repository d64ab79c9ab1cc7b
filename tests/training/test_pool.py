"""Several trainings in processes of their own, stopped and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from residrop.common.errors import UsageError
from residrop.common.lock import held
from residrop.training import pool
from residrop.training.pool import train_all

SCRIPT = """
import sys
from pathlib import Path
import torch
from residrop.common.errors import UsageError
from residrop.training import Interrupted, Recipe
from residrop.training.pool import train_all

if __name__ == "__main__":
    torch.set_num_threads(2)
    common = dict(network="resnet-8", limit=200, batch_size=64, precision="fp32", device="cpu", samples=0)
    recipes = {str(seed): Recipe(epochs=int(sys.argv[2]), seed=seed, **common) for seed in range(4)}
    try:
        told = lambda name, _: print("done", name, flush=True)
        found = train_all(recipes, Path(sys.argv[1]), workers=2, on_finished=told)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(130)
    print(sorted(found))
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that starts four trainings in two processes, as from a terminal."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(epochs):
        words = [sys.executable, tmp_path / "script.py", tmp_path / "runs", str(epochs)]
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, env=env, start_new_session=True, **pipes)

    return run


def states(folder: Path):
    return [path.parent.name for path in folder.glob("*/last.pt")]


def parent_of(path: Path):
    """Number of the parent of a process, or None if the process is gone (or waits to be buried)."""
    try:
        state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["to the parent", "to the group"])
def test_ctrl_c_saves_every_training_and_begins_no_other(start, tmp_path, to_all):
    process = start(100_000)
    until = time.monotonic() + 120
    while len(states(tmp_path / "runs")) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].startswith("stopped; the same command continues the runs in")
    assert "Traceback" not in err
    assert sorted(states(tmp_path / "runs")) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_save_and_leave_when_their_parent_is_killed(start, tmp_path):
    process = start(100_000)
    until = time.monotonic() + 120
    while len(states(tmp_path / "runs")) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    workers = [path for path in Path("/proc").glob("[0-9]*") if parent_of(path) == process.pid]
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=60)  # returns when the last of them has closed its pipes
    while any(parent_of(path) is not None for path in workers) and time.monotonic() < until:
        time.sleep(0.2)
    assert [parent_of(path) for path in workers] == [None] * len(workers)
    assert sorted(states(tmp_path / "runs")) == ["0", "1"]


@pytest.mark.slow
def test_trainings_are_finished_and_told_one_by_one(start, tmp_path):
    out, err = start(1).communicate(timeout=120)
    assert sorted(line for line in out.splitlines() if line.startswith("done")) == [f"done {seed}" for seed in range(4)]
    assert out.splitlines()[-1] == "['0', '1', '2', '3']"
    assert "error" in err
    again, _ = start(1).communicate(timeout=60)
    assert again.splitlines() == [*(f"done {seed}" for seed in range(4)), "['0', '1', '2', '3']"]


def test_complete_runs_start_no_process(tiny, tmp_path, monkeypatch):
    recipe = tiny()
    (tmp_path / "a").mkdir()
    complete = {"deterministic_error": 1.0, "sampled_error": None, "train_seconds": 1.0, "details": {}, "run": {}}
    (tmp_path / "a" / "evaluation.json").write_text(json.dumps(complete))
    monkeypatch.setattr(pool, "ProcessPoolExecutor", None)
    told = []
    found = train_all({"a": recipe}, tmp_path, on_finished=lambda name, found: told.append((name, found)))
    assert found == {"a": complete}
    assert told == [("a", complete)]


@pytest.mark.slow
def test_errors_are_named_and_others_finish(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    told = []
    recipes = {"wrong": tiny(data="/nowhere"), "right": tiny(epochs=1), "held": tiny(epochs=1)}
    with held(tmp_path / "held"), pytest.raises(UsageError, match=r"2 of 3 runs failed; (wrong: .*nowhere|held: )"):
        train_all(
            recipes, tmp_path, workers=1, console=Console(stderr=True), on_finished=lambda name, _: told.append(name)
        )
    assert told == ["right"]
