"""residrop on every model that can be built small: python benchmarks/sweep.py [--json FILE] [--only PATTERN].

One model of every module of timm, every model type of transformers, every family of torchvision, and torch.nn's own
transformer layers (tests/sweep): rules at block and at row level, against a reference that masks the branches of the
plain model. It takes about an hour on two cores.
"""

import argparse
import sys
from collections import Counter
from fnmatch import fnmatchcase
from importlib import metadata
from math import isfinite
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # in front of this folder, which has a file of that name

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from residrop.research import ledger
from sweep.sources import SOURCES, all_names
from sweep.workers import examined

STATES = ("wholly", "in part", "refused", "not built", "broken")


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of library/model, such as 'timm/*' or '*/bert'")
    parser.add_argument("--workers", type=int, default=2, help="models at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit for one model")
    parser.add_argument("--quick", action="store_true", help="leave out fewer branches, one by one or some together")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the processes have it
    names = [name for name in all_names() if fnmatchcase(name, arguments.only)]
    if not names:
        sys.exit(f"no model is named {arguments.only}; names look like timm/vision_transformer")
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    console = Console(width=None if sys.stdout.isatty() else 160)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(names))
        for row in examined(names, arguments.workers, arguments.seconds, quick=arguments.quick):
            rows.append(row)
            progress.update(task, advance=1, description=f"{row['library']}/{row['model']}")
            if not console.is_terminal:  # for logs, which have no bar
                print(
                    f"{len(rows)}/{len(names)} {row['library']}/{row['model']}: {row['status']}, {row['seconds']} s",
                    flush=True,
                )
            for problem in row["problems"]:
                console.print(f"{row['library']}/{row['model']}: {problem}", markup=False, soft_wrap=True)
    order = {name: number for number, name in enumerate(names)}
    rows.sort(key=lambda row: order[f"{row['library']}/{row['model']}"])
    _print(rows, console)
    if arguments.json:
        command = "python benchmarks/sweep.py" + ("" if arguments.only == "*" else f" --only '{arguments.only}'")
        command += " --quick" if arguments.quick else ""
        kept = [{name: value for name, value in row.items() if _is_kept(value)} for row in rows]
        what = "residrop on every model that can be built small, against a masked reference"
        libraries = {name: metadata.version(name) for name in _installed()}
        ledger.save(arguments.json, what, command, [{**row, "versions": libraries} for row in kept])


def _is_kept(value: object) -> bool:
    """Whether a value goes into the results: they hold no numbers that are not finite."""
    return value is not None and not (isinstance(value, float) and not isfinite(value))


def _installed() -> list[str]:
    return [one.library for one in SOURCES if one.names()]


def _print(rows: list[dict], console: Console) -> None:
    table = Table("library", "family", *STATES, "not compared", "error, block", "error, row", "faults")
    families: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        families.setdefault((row["library"], row["family"] if row["library"] == "transformers" else ""), []).append(row)
    for (library, family), members in families.items():
        count = Counter(row["status"] for row in members)
        errors = [
            max((row[name] for row in members if row[name] is not None), default=None)
            for name in ("error_block", "error_row")
        ]
        table.add_row(
            library,
            family,
            *(str(count[state]) for state in STATES),
            str(sum(bool(row["compared"]) for row in members)),
            *("" if error is None else f"{error:.1e}" for error in errors),
            str(sum(bool(row["problems"]) for row in members)),
        )
    console.print(table)
    for state in ("refused", "not built", "broken"):
        console.print(f"\n{state}:")
        for row in rows:
            if row["status"] == state:
                why = next(iter(row["refused"].values()), "") or "; ".join(row["problems"])
                console.print(f"  {row['library']}/{row['model']}: {why}", markup=False, soft_wrap=True)
    console.print("\nnot compared:")
    for row in rows:
        if row["compared"]:
            console.print(f"  {row['library']}/{row['model']}: {row['compared']}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
