"""The examples for transformers, Accelerate and Lightning run and show what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def printed(name: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in:\n{text}"
    return float(found[1])


@pytest.mark.slow
def test_transformers_trainer():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = printed("transformers_trainer.py")
    assert "6 blocks, 12 branches, expected depth 8.50" in text
    assert "200 steps drawn, weights off by 0.0e+00" in text
    assert number(r"progressions: ([\d.]+)% wrong", text) < 40.0


@pytest.mark.slow
def test_accelerate_loop():
    pytest.importorskip("accelerate")
    text = printed("accelerate_loop.py")
    assert "back at 24 updates" in text
    assert "weights off by 0.0e+00" in text
    assert number(r"test error ([\d.]+)%", text) < 40.0


@pytest.mark.slow
def test_lightning_digits():
    pytest.importorskip("lightning")
    text = printed("lightning_digits.py")
    assert "steps drawn in all: 144, after the resume: 72" in text
    assert number(r"test error ([\d.]+)%", text) < 20.0


@pytest.mark.slow
def test_language_model(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    size = ["--steps", "200", "--seeds", "1", "--layers", "4", "--width", "32"]
    text = printed("language_model.py", *size, "--out", str(tmp_path))
    assert number(r"constant: ([\d.]+) bits", text) < 4.0  # of characters as frequent as these without context: 4.6
    assert number(r"constant@0.79: .* ([\d.]+) of the FLOPs", text) == 0.79
    assert number(r"dont-drop-dropout: .* ([\d.]+) of the FLOPs", text) < 0.9
    assert number(r"growth: .* ([\d.]+) of the FLOPs", text) < 0.5
    curves = json.loads((tmp_path / "curves-200-4-32.json").read_text())["curves"]
    assert all(len(run) >= 20 for (run,) in curves.values())
    assert (tmp_path / "curves.png").stat().st_size > 10_000
