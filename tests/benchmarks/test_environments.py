"""benchmarks/environments.py: what it asks pip for and how it runs a command, without making an environment."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("environments", ROOT / "benchmarks" / "environments.py")
assert _spec is not None
assert _spec.loader is not None
environments = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(environments)

PROJECT = {
    "name": "Own_Name",
    "dependencies": ["torch>=2.9,<3"],
    "optional-dependencies": {
        "a": ["pillow>=10.1", "NumPy[x]~=1.26"],
        "b": ["own-name[a]", "torch>=2.10", "exact==1.2"],
        "c": ["pillow>=9", "unbounded"],
    },
}


def bounds(*extras: str, project=PROJECT) -> dict[str, str]:
    return environments.lower_bounds(list(environments.requirements(project, extras)))


def test_lower_bounds_of_extras_and_of_the_extras_in_them():
    assert bounds() == {"torch": "2.9"}
    assert bounds("a") == {"torch": "2.9", "pillow": "10.1", "numpy": "1.26"}
    assert bounds("b") == {"torch": "2.10", "pillow": "10.1", "numpy": "1.26", "exact": "1.2"}  # 2.10 is above 2.9


def test_no_bound_and_no_such_extra_are_refused():
    with pytest.raises(SystemExit, match="no lowest version of unbounded: unbounded"):
        bounds("c")
    with pytest.raises(SystemExit, match="no extra 'd'; there are a, b, c"):
        bounds("d")


def test_every_package_of_this_project_has_a_bound_that_its_range_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(environments.requirements(project, ["dev"]))
    lowest = environments.lower_bounds(wanted)
    assert {"torch", "torchvision", "timm", "transformers", "numpy", "pytest"} <= lowest.keys()
    assert "residrop" not in lowest
    for requirement in wanted:
        assert lowest[requirement.name] in SpecifierSet(str(requirement.specifier)), requirement


def test_commands(tmp_path):
    python, place = tmp_path / "bin" / "python", f"{ROOT}[dev,a]"
    pip = [str(python), "-m", "pip", "install"]
    pinned = environments.install(python, ["dev", "a"], tmp_path / "oldest.txt")
    assert pinned == [*pip, "--constraint", str(tmp_path / "oldest.txt"), "--editable", place]
    newest = environments.install(python, ["dev", "a"], None)
    assert newest == [*pip, "--upgrade", "--upgrade-strategy", "eager", "--editable", place]


def test_programs_are_those_of_the_environment(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    variables = environments.variables(tmp_path, {"PATH": "/usr/bin", "PYTHONPATH": "/elsewhere", "KEPT": "1"})
    assert variables == {"KEPT": "1", "VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin"}
    command = environments.inside(["python", "sweep.py", "--json", "sweep_{name}.json"], "oldest", variables)
    assert command == [str(tmp_path / "bin" / "python"), "sweep.py", "--json", "sweep_oldest.json"]
    assert environments.inside(["none-such"], "newest", variables) == ["none-such"]


def test_help_teaches():
    command = [sys.executable, "benchmarks/environments.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for word in ("oldest", "newest", "COMMAND", "-- pytest tests/surgery -q", "PIP_EXTRA_INDEX_URL", "--only"):
        assert word in text
