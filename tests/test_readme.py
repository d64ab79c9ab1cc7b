"""What README says runs."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_python_of_readme_runs(code):
    names = {}
    exec(code, names)
    assert names["found"].probabilities.sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert torch.isfinite(names["loss"])


def test_ci_runs_the_test_command_of_readme():
    script = (Path(__file__).parents[1] / ".ci" / "run").read_text()
    install, tests = re.search(r"`python -m (pip install .*?) && (python -m pytest.*?)`", README).groups()
    assert install.replace("install", "install --quiet") in script
    assert tests in script
