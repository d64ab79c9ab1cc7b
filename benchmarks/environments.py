"""A command with the oldest and with the newest packages that pyproject.toml allows.

Makes two virtual environments in FOLDER, each with this checkout (editable) and the packages of the given extras:

  oldest   every package that pyproject.toml names in the lowest version that it allows
  newest   the newest versions that the ranges allow

and runs COMMAND in each, from the root of the checkout. `python`, `pytest` and the like in COMMAND are those of the
environment, {name} is "oldest" or "newest". Environments that are there are brought up to date, which takes seconds.

  python benchmarks/environments.py ~/envs -- pytest tests/surgery -q
  python benchmarks/environments.py ~/envs --only oldest -- python benchmarks/sweep.py --json sweep_{name}.json

Packages come from wherever pip is configured to take them; its own options are given through the variables that pip
reads. For torch without CUDA, which is a tenth of the size: PIP_EXTRA_INDEX_URL=(PyTorch's index of CPU wheels).
An environment with CUDA takes about 8 GB. What pip said is in FOLDER/NAME.log.

Exits with 0 if COMMAND did so in every environment, else with 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).parents[1]
NAMES = ("oldest", "newest")


def requirements(project: dict, extras: Sequence[str]) -> Iterator[Requirement]:
    """What `pip install PROJECT[extras]` asks for by name; `project` is pyproject.toml's table of that name."""
    lines = list(project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            sys.exit(f"no extra {extra!r}; there are {', '.join(project['optional-dependencies'])}")
        lines += project["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
            yield from requirements(project, sorted(requirement.extras))
        else:
            yield requirement


def lower_bounds(wanted: Sequence[Requirement]) -> dict[str, str]:
    """The lowest version of each package that all its requirements allow."""
    bounds: dict[str, str] = {}
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        lowest = [one.version for one in requirement.specifier if one.operator in (">=", "==", "~=")]
        if not lowest:
            sys.exit(f"pyproject.toml gives no lowest version of {name}: {requirement}")
        bounds[name] = max(*lowest, bounds.get(name, "0"), key=Version)
    return bounds


def install(python: Path, extras: Sequence[str], constraints: Path | None) -> list[str]:
    """The command that fills an environment: with the versions of a file, or with the newest."""
    options = (
        ["--upgrade", "--upgrade-strategy", "eager"] if constraints is None else ["--constraint", str(constraints)]
    )
    return [str(python), "-m", "pip", "install", *options, "--editable", f"{ROOT}[{','.join(extras)}]"]


def variables(folder: Path, outer: dict[str, str]) -> dict[str, str]:
    """The variables of a process inside an environment."""
    kept = {name: value for name, value in outer.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"VIRTUAL_ENV": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{outer.get('PATH', os.defpath)}"}


def inside(command: Sequence[str], name: str, environment: dict[str, str]) -> list[str]:
    """COMMAND for one environment."""
    program, *rest = [part.replace("{name}", name) for part in command]
    return [shutil.which(program, path=environment["PATH"]) or program, *rest]


def run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Its exit code; 127, as of a shell, where there is no such program."""
    try:
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    except FileNotFoundError:
        print(f"no program {command[0]!r} in the environment or on the path", file=sys.stderr)
        return 127


def make(folder: Path, python: str, extras: Sequence[str], bounds: dict[str, str] | None) -> None:
    """Make or update an environment."""
    constraints = None
    if bounds is not None:
        constraints = folder.with_suffix(".txt")
        constraints.write_text("".join(f"{package}=={version}\n" for package, version in sorted(bounds.items())))
    steps = [] if (folder / "bin" / "python").exists() else [[python, "-m", "venv", str(folder)]]
    steps += [install(folder / "bin" / "python", extras, constraints)]
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        for step in steps:
            print("$", *step, file=file, flush=True)
            done = subprocess.run(step, stdout=file, stderr=subprocess.STDOUT, env=variables(folder, dict(os.environ)))
            if done.returncode:
                sys.exit(f"{folder.name}: no environment; the end of {log}:\n{log.read_text()[-2000:]}")


def versions(folder: Path) -> dict[str, str]:
    """Packages of an environment."""
    command = [str(folder / "bin" / "python"), "-m", "pip", "list", "--format", "json"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=variables(folder, dict(os.environ)))
    return {canonicalize_name(one["name"]): one["version"] for one in json.loads(text.stdout)}


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        usage="python benchmarks/environments.py FOLDER [options] [-- COMMAND ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the environments are, or will be")
    parser.add_argument("--only", choices=NAMES, help="one of the two")
    parser.add_argument("--extras", default="dev", help="extras of this project, with commas between (default: dev)")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter to make them with; old packages want an old one (default: the one that runs this)",
    )
    cut = given.index("--") if "--" in given else len(given)
    arguments, command = parser.parse_args(given[:cut]), given[cut + 1 :]
    extras = arguments.extras.split(",")
    wanted = list(requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], extras))
    bounds = lower_bounds(wanted)
    names = [arguments.only] if arguments.only else NAMES
    home = arguments.folder.resolve()
    home.mkdir(parents=True, exist_ok=True)

    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    found, codes = {}, {}
    for name in names:
        with Progress(*columns, console=console) as progress:
            progress.add_task(f"{name}: packages (minutes when new; pip writes to {home / name}.log)", total=None)
            make(home / name, arguments.python, extras, bounds if name == "oldest" else None)
        found[name] = versions(home / name)
        if command:
            environment = variables(home / name, dict(os.environ))
            console.rule(f"{name}: {' '.join(command)}")
            codes[name] = run(inside(command, name, environment), environment)

    table = Table("package", "allowed", *names)
    for package in sorted(bounds):
        ranges = {str(one.specifier) for one in wanted if canonicalize_name(one.name) == package}
        table.add_row(package, ", ".join(sorted(ranges)), *(found[name].get(package, "-") for name in names))
    if command:
        table.add_section()
        table.add_row("exit code", "", *(str(codes[name]) for name in names))
    console.print(table)
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
