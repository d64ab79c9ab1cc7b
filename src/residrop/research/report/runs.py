"""Run directories in a report: their results, learning curves and first gradients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from residrop.research.report.blocks import Block, Chart, Grid, Section, Series, Text, number
from residrop.training.checkpoint import Run
from residrop.training.recipe import Recipe

__all__ = ["section_of_runs"]

_CURVES = (
    ("test_error", "Test error", "test error (%)", False),
    ("train_loss", "Training loss", "training loss", True),
    ("first_gradient", "Gradient of the first convolution", "mean |gradient|", True),
)


class _Read(NamedTuple):
    name: str
    folder: str  # in which it lies, for runs of one name
    recipe: Recipe
    history: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]  # empty while the run is not finished


def section_of_runs(paths: Sequence[Path]) -> Section:
    """Runs side by side; one that is not finished has no errors yet.

    Args:
        paths: run directories, at least one.

    Raises:
        RunError: one is no run, or its files are damaged.
    """
    runs = [_read(path) for path in dict.fromkeys(path.resolve() for path in paths)]
    if len({run.name for run in runs}) < len(runs):
        runs = [run._replace(name=f"{run.folder}/{run.name}") for run in runs]
    rows = tuple(_row(run) for run in runs)
    head = ("run", "network", "rule", "data", "epochs", "seed", "error %", "sampled %", "minutes")
    blocks: list[Block] = [Grid(head, rows, left=4)]
    if any(not run.results for run in runs):
        blocks.append(Text("A run without errors is not finished.", "aside"))
    for name, title, axis, log in _CURVES:
        series = tuple(one for run in runs if (one := _series(run, name)) is not None)
        if any(len(one.x) > 1 for one in series):  # a single point is in the table
            blocks.append(Chart(title, "epoch", axis, series, log))
    return Section("Runs", "runs", blocks)


def _read(path: Path) -> _Read:
    run = Run.open(path)
    return _Read(path.name, path.parent.name, run.recipe(), run.history(), run.evaluation() or {})


def _row(run: _Read) -> tuple[str, ...]:
    recipe = run.recipe
    seconds = sum(line.get("seconds") or 0.0 for line in run.history)
    data = recipe.data if "/" not in recipe.data and ":" not in recipe.data else "a folder"
    return (
        run.name, recipe.network, recipe.rule, data, f"{len(run.history)} of {recipe.epochs}", str(recipe.seed),
        number(run.results.get("deterministic_error")), number(run.results.get("sampled_error")), number(seconds / 60),
    )  # fmt: skip


def _series(run: _Read, name: str) -> Series | None:
    points = [(float(line["epoch"]), line[name]) for line in run.history if line.get(name) is not None]
    return Series(run.name, [x for x, _ in points], [y for _, y in points]) if points else None
