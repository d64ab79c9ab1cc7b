"""What README says is so; that its code and commands run is checked in test_docs.py."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))]
FIRST_EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)


def test_first_example_predicts():
    names = {}
    exec(FIRST_EXAMPLE, names)
    assert names["found"].probabilities.sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert torch.isfinite(names["loss"])


def test_named_tests_and_files_exist():
    """Pages name tests as evidence; a renamed test must not leave a claim without one."""
    for page in PAGES:
        for name in re.findall(r"`((?:tests|examples|results|benchmarks)/[^`*\s]*)`", page):
            path, _, test = name.partition("::")
            assert (ROOT / path).exists(), name
            assert not test or f"def {test}(" in (ROOT / path).read_text(), name


def test_ci_runs_the_test_command_of_readme():
    script = (ROOT / ".ci" / "run").read_text()
    install, tests = re.search(r"`python -m (pip install .*?) && (python -m pytest.*?)`", README).groups()
    assert install.replace("install", "install --quiet") in script
    assert tests in script
