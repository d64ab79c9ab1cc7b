"""Other people's trainers on two processes, under stock DDP: the weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "workers" / "trainers.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers", "accelerate", "lightning"])
def test_two_processes_train_as_one(torchrun, tmp_path, name):
    """Wrapped by the trainer itself with find_unused_parameters; draws are shared, and steps advance alike."""
    pytest.importorskip(name)
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, WORKER, name, alone], env=quiet, check=True, timeout=240)
    done = torchrun(2, WORKER, name, both)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = load_file(alone), load_file(both)
    assert list(expected) == list(found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0.0, atol=1e-6)
