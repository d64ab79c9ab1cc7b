"""Worker scripts run by torchrun, a few process groups for many checks: rank 0 of each writes what it found as JSON."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = Path(__file__).parent / "workers"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="session")
def torchrun():
    """Return a function that runs a command under torchrun and gives the finished process; a hang is a failure."""

    def run(processes, *command, timeout=240, **environment):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environment}
        arguments = [*TORCHRUN, str(processes), *map(str, command)]
        if processes == 1:  # without the agent, which takes seconds to start
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            variables.update(place, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            arguments = [sys.executable, *map(str, command)]
        return subprocess.run(arguments, env=variables, timeout=timeout, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def checked(torchrun, tmp_path_factory):
    """Return a function that runs named checks of a worker script and gives what they found, and where it lies."""

    def run(script, processes, *names, place=None):
        place = place or tmp_path_factory.mktemp(script.removesuffix(".py"))
        done = torchrun(processes, WORKERS / script, place / "found.json", *names)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads((place / "found.json").read_text()), place

    return run


@pytest.fixture(scope="session")
def assert_follows():
    """Return a check that a distributed training was the one of a single process, to 1e-6."""

    def check(found, tolerance=1e-6, one_sided=0):
        assert found["error"] <= tolerance
        assert found["grad_error"] <= tolerance
        assert found["one_sided"] == one_sided
        assert found["dead"] > 0

    return check
