"""The example of fine-tuning a timm model runs and shows what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_finetune.py"


@pytest.mark.slow
def test_it_runs():
    command = [sys.executable, str(EXAMPLE), "--epochs", "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280).stdout
    assert printed.startswith("6 blocks, 12 branches, expected depth 9.60\n")
    assert re.search(r"blocks\.5 +0\.6, 0\.6 +row +timm Block", printed)
    rows = re.findall(r"^(timm DropPath|residrop) +[\d.]+ ms a step, test error ([\d.]+)%$", printed, re.MULTILINE)
    assert [name for name, _ in rows] == ["timm DropPath", "residrop"]
    assert all(0.0 <= float(error) <= 100.0 for _, error in rows)
