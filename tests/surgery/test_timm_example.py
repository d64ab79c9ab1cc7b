"""The example of fine-tuning a timm model runs and shows what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_finetune.py"


def run(*options: str) -> str:
    command = [sys.executable, str(EXAMPLE), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=280).stdout


def accuracies(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"test accuracy ([\d.]+)%", printed)]


def test_it_runs():
    printed = run("--epochs", "1", "--batch-size", "360")
    assert printed.startswith(
        "8 blocks, 16 branches, expected depth 12.80\n  blocks.0  1, 1          row  timm Block\n"
    )
    assert len(accuracies(printed)) == 2
    assert "of the time of one with masked rows" in printed


@pytest.mark.slow
def test_both_models_learn():
    printed = run()
    assert min(accuracies(printed)) > 80.0
