"""Optional packages: what is missing is named with the command that installs it, and what is broken is not hidden."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from residrop import theory
from residrop.common.errors import MissingExtraError, UsageError
from residrop.common.extras import extra
from residrop.inference.uncertainty import calibration_error

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
SOURCE = Path(__file__).parents[2] / "src"


def test_a_missing_package_is_named_with_the_command():
    message = r"^no_such_package is not installed; run: .*'residrop\[train\]'$"
    with pytest.raises(MissingExtraError, match=message) as found, extra("train"):
        import no_such_package  # noqa: F401
    assert isinstance(found.value, UsageError)
    assert isinstance(found.value, ImportError)


def test_a_fault_of_our_own_is_no_missing_package():
    with pytest.raises(ModuleNotFoundError, match=r"residrop\.no_such_module"), extra("train"):
        import residrop.no_such_module  # noqa: F401


@pytest.mark.parametrize(
    ("package", "call", "name"),
    [
        ("scipy.optimize", lambda: theory.depth_bound([0.5, 0.5], 0.1), "theory"),
        ("scipy", lambda: theory.shapiro(torch.randn(2, 5)), "theory"),
        ("torchmetrics", lambda: calibration_error(torch.full((4,), 0.5), torch.ones(4, dtype=torch.bool)), "train"),
    ],
)
def test_functions_name_their_extra(monkeypatch, package, call, name):
    for module in [one for one in sys.modules if one == package or one.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"residrop\[{name}\]"):
        call()


def test_every_extra_that_is_named_exists():
    named = {
        line.split('extra("')[1].split('"')[0]
        for path in SOURCE.rglob("*.py")
        for line in path.read_text().splitlines()
        if 'with extra("' in line
    }
    assert named
    assert named <= set(PYPROJECT["optional-dependencies"])


def test_the_core_is_torch_numpy_and_safetensors():
    assert [one.split(">")[0] for one in PYPROJECT["dependencies"]] == ["torch", "numpy", "safetensors"]


CALLS = [
    ("from residrop.data import load", "PIL", "train"),
    ("from residrop.training import train", "rich", "train"),
    ("from residrop.engines.integrations import lightning", "lightning", "lightning"),
    ("from residrop.research.ledger import read", "filelock", "research"),
]
WITHOUT = """
import sys
import torch._dynamo
for code, missing, _ in {calls!r}:
    sys.modules[missing] = None
    try:
        exec(code)
    except ImportError as error:
        print(type(error).__name__, error)
    del sys.modules[missing]
"""


def test_packages_name_their_extra_when_they_are_imported():
    run = [sys.executable, "-c", WITHOUT.format(calls=CALLS)]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(CALLS)
    for line, (_, missing, name) in zip(lines, CALLS, strict=True):
        assert line.startswith(f"MissingExtraError {missing}")
        assert f"residrop[{name}]" in line
