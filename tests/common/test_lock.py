"""One process at a time writes into a run directory, and a killed one holds nothing."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from residrop.cli import main
from residrop.cli.shared import free_directory
from residrop.common.errors import RunError
from residrop.common.lock import held

HOLD = """
import sys, time
from pathlib import Path
from residrop.common.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the directory `run`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_holds_it(tmp_path, holder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = rf"run is in use by process {holder.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; wait until it has"
    for command in (["train"], ["compare"]):
        assert main([*command, "--out", "run"]) == 2
        err = capsys.readouterr().err
        assert re.search(said, err)
        assert err.count("\n") == 1
    with pytest.raises(RunError, match=said), held(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    with held(tmp_path / "run"):  # what a killed process leaves is a file, no lock
        pass
    assert not (tmp_path / "run" / "run.lock").exists()


def test_two_holders_of_one_process_exclude_each_other(tmp_path):
    with held(tmp_path / "a" / "b"):
        with pytest.raises(RunError, match="in use by process"), held(tmp_path / "a" / "b"):
            pass
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]  # b stayed empty


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "b", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(RunError, match=r"cannot be written \(.*\); choose another --out"), held(place):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_free_directories_are_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with free_directory("a b") as one, free_directory("a b") as other:
        assert [str(one), str(other)] == ["runs/a-b-001", "runs/a-b-002"]
        (other / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "a-b-002", "kept"]
    with free_directory("a b") as again:
        assert str(again) == "runs/a-b-001"


ORPHAN = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
print(child.pid, flush=True)
child.wait()
"""
WAITING = """
import os, sys, time
from pathlib import Path
from residrop.common.orphans import leave_with_parent
leave_with_parent(lambda: Path(sys.argv[1]).write_text("gone"), seconds=0.05)
Path(sys.argv[1]).write_text("watching")
time.sleep(60)
"""


def test_a_process_leaves_with_its_parent(tmp_path):
    note = tmp_path / "note"
    with subprocess.Popen([sys.executable, "-c", ORPHAN, WAITING, note], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while not (note.exists() and note.read_text() == "watching"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(parent.pid, signal.SIGKILL)
    while note.read_text() != "gone" or is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0] != "Z"
