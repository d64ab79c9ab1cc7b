"""Fault injection: a finished run and a finished comparison to damage, and commands that must not break over it.

A short sample runs by default, the whole under the marker slow. Every test records how many cases it tried.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from residrop.cli import main
from residrop.training import Run

RECIPE = (
    *("--network", "resnet-8", "--limit", "200", "--epochs", "2", "--samples", "0", "--precision", "fp32"),
    *("--device", "cpu", "--quiet"),
)


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Directory of a finished run with everything that a run may hold; read only."""
    out = tmp_path_factory.mktemp("faults") / "run"
    options = ("--validation", "40", "--select", "best", "--budget", "0.6", "--watch", "sensitivity")
    assert main(["train", *RECIPE, *options, "--out", str(out)]) == 0
    assert main(["recalibrate", str(out), "--batches", "2"]) == 0
    return out


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """Directory of a finished comparison; read only."""
    out = tmp_path_factory.mktemp("faults") / "both"
    assert main(["compare", *RECIPE, "--rules", "constant", "stochastic-depth", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def run_command(capsys):
    """Return a function that runs a command, which must end well or say one line; gives the code and the line."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        if code == 0:
            return code, ""
        lines = [line for line in err.splitlines() if line.startswith("residrop: error: ")]
        assert code == 2, (arguments, err)
        assert len(lines) == 1, (arguments, err)
        assert len(lines[0]) < 1500, (arguments, err)
        return code, lines[0]

    return call


@pytest.fixture(scope="session")
def finished_plain(tmp_path_factory):
    """Directory of a finished run, and beside it the same as it was after an epoch; read only."""
    place = tmp_path_factory.mktemp("plain")
    out = place / "run"
    original = Run.save_state

    def save(run, state):
        original(run, state)
        if state["update"] == 4:
            shutil.copytree(run.path, place / "unfinished", ignore=shutil.ignore_patterns("run.lock"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_state", save)
        assert main(["train", *RECIPE, "--out", str(out)]) == 0
    return out


class Started:
    """Commands that were started at once."""

    def __init__(self, server, files):
        self._server, self._files, self._codes = server, files, None
        self.pids = json.loads(server.stdout.readline())

    def kill(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pids[number], signal.SIGKILL)

    def codes(self):
        """Exit codes, once all have ended."""
        if self._codes is None:
            self._codes = json.loads(self._server.stdout.readline())
        return self._codes

    def said(self, number):
        return Path(self._files[number]).read_text()


@pytest.fixture
def commands(tmp_path):
    """Return a function from options of a training to (a function that starts commands, its finished run)."""
    servers = []

    def start(*recipe):
        whole = tmp_path / "whole"
        words = [sys.executable, str(Path(__file__).parent / "workers" / "commands.py"), str(whole), *recipe]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        servers.append(subprocess.Popen(words, env=environment, text=True, **pipes))
        while (line := servers[-1].stdout.readline()) != "ready\n":
            assert line, "the server of commands has ended"

        def send(*every):
            files = [str(tmp_path / f"said-{number}") for number in range(len(every))]
            print(json.dumps([*zip(every, files, strict=True)]), file=servers[-1].stdin)
            servers[-1].stdin.flush()
            return Started(servers[-1], files)

        return send, whole

    yield start
    for server in servers:
        server.stdin.close()
        server.wait(timeout=60)
        server.stdout.close()
