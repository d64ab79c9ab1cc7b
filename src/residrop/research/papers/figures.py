"""Figures of the papers from our runs, instruments and rows: their lines, entries for the ledger, and a picture."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from residrop.common.errors import RunError
from residrop.common.files import replacing
from residrop.common.pictures import save_png
from residrop.inference import error_curve
from residrop.research.papers.claims import Measured
from residrop.research.papers.instruments import trace
from residrop.research.papers.rows import Curve, Figure, Variant
from residrop.research.papers.timings import Bench
from residrop.research.papers.work import Settings, Source, training
from residrop.training import load_run
from residrop.training.checked import read_record, write_record
from residrop.training.checkpoint import Run
from residrop.training.recipe import Recipe
from residrop.training.setup import choose_device, loader_of_run, precision_context

__all__ = ["Line", "draw", "entries_of", "lines_of"]

_CPU_REPETITIONS, _CPU_BATCHES = 5, 8  # of curves by samples: 30 repetitions of 30 passes are for a GPU
_SAMPLES = {"samples": [int], "error": [int | float], "error_se": list | None, "deterministic": int | float}


class Line(NamedTuple):
    """What is drawn of a curve.

    Attributes:
        label: as in the figure.
        x: positions.
        y: values, means over seeds; NaN where there is none.
        error: standard errors (over seeds, test images, repetitions or samples), or None.
        predicted: the theory's values, or None.
        seeds: number of seeds.
        recipe: fingerprint at full scale, or None.
        note: how it was measured.
        versions: software and machine of the trainings it comes from; None for what is measured here and now.
    """

    label: str
    x: list[float]
    y: list[float]
    error: list[float] | None
    predicted: list[float] | None
    seeds: int
    recipe: str | None
    note: str
    versions: Mapping[str, str] | None = None


class Context(NamedTuple):
    """Where lines take their numbers from: runs, rows of the same paper, and where to time."""

    settings: Settings
    source: Source | None
    runs: Path
    bench: Bench
    measured: Callable[[str], Measured]  # of a row, "table-1/key"
    variant: Variant | None = None

    def read(self, recipe: Recipe) -> Recipe:
        """A recipe under the variant."""
        return recipe if self.variant is None else self.variant.of(recipe)


def lines_of(figure: Figure, context: Context) -> list[Line]:
    """All curves of a figure whose trainings are finished and whose rows are measured; those without a number are
    left out."""
    found = [_line(figure, curve, context) for curve in figure.curves]
    return [line for line in found if any(map(math.isfinite, line.y))]


def _line(figure: Figure, curve: Curve, context: Context) -> Line:
    if curve.instrument is not None:
        found = trace(curve, 0, context.bench)
        return Line(curve.label, found.x, found.y, found.error, found.predicted, 1, None, found.note)
    if curve.points:
        return _of_points(curve, context)
    if curve.recipe is None:
        raise RunError(f"{figure.id}: curve {curve.label!r} has neither recipe nor points nor instrument")
    runs = _runs_of(curve.recipe, context)
    recipe = context.read(curve.recipe)
    kinds = {
        "error_by_samples": _by_samples,
        "standard_error_by_samples": _by_samples,
        "test_error_by_hours": _by_hours,
        "error": _at_the_end,
    }
    line = kinds.get(curve.plotted, _by_epoch)(curve, recipe, runs, context)
    return line._replace(versions=runs[0].versions() if runs else None)


def _runs_of(recipe: Recipe, context: Context) -> list[Run]:
    """The finished runs of a recipe, by seed."""
    settings, recipe = context.settings, context.read(recipe)
    every = [training(recipe, seed, settings, context.source) for seed in range(settings.seeds)]
    paths = [context.runs / one.name for one in every]
    return [Run.open(path) for path in paths if (path / "evaluation.json").exists()]


def _averaged(curve: Curve, recipe: Recipe, x: list[float], columns: Sequence[Sequence[float]], note: str = "") -> Line:
    """Mean over seeds, position by position."""
    rows = list(zip(*columns, strict=True))
    error = [stdev(row) / math.sqrt(len(row)) for row in rows] if len(columns) > 1 else None
    mark = recipe.replace(seed=0).fingerprint()
    return Line(curve.label, x, [fmean(row) for row in rows], error, None, len(columns), mark, note)


def _by_epoch(curve: Curve, recipe: Recipe, runs: Sequence[Run], context: Context) -> Line:
    columns: list[list[float]] = []
    x: list[float] = []
    for run in runs:
        lines = [line for line in run.history() if line.get(curve.plotted) is not None]
        x = [float(line["epoch"]) for line in lines]
        columns.append([line[curve.plotted] for line in lines])
    return _averaged(curve, recipe, x, columns)


def _by_hours(curve: Curve, recipe: Recipe, runs: Sequence[Run], context: Context) -> Line:
    """Hours are iterations times the measured time of one, or where the paper does not print it, those of the run."""
    each = [fmean(values) for name in curve.rows if (values := context.measured(name).values)]
    if not runs or (curve.rows and not each):
        return _averaged(curve, recipe, [], [])
    steps = runs[0].dataset()["steps"] / runs[0].recipe().epochs
    x: list[float] = []
    seconds = 0.0
    for line in runs[0].history():
        seconds += line["seconds"]
        x.append(line["epoch"] * steps * each[0] / 3.6e6 if each else seconds / 3600.0)
    note = "epochs times the measured time of an iteration" if each else "measured along the first run"
    return _by_epoch(_replotted(curve), recipe, runs, context)._replace(x=x, note=note)


def _replotted(curve: Curve) -> Curve:
    return Curve(label=curve.label, plotted="test_error", recipe=curve.recipe)


def _at_the_end(curve: Curve, recipe: Recipe, runs: Sequence[Run], context: Context) -> Line:
    """A level line through the axis of p_L."""
    found = _at_last(runs)
    y, error = [fmean(found.values)] * 2 if runs else [], found.error
    mark = recipe.replace(seed=0).fingerprint()
    x = [0.0, 1.0] if runs else []
    return Line(curve.label, x, y, None if error is None else [error] * 2, None, len(runs), mark, "")


def _at_last(runs: Sequence[Run]) -> Measured:
    """Errors of inference in expectation, one per run, with their standard errors over the test images."""
    found = [found for run in runs if (found := run.evaluation()) is not None]
    errors = [one["details"]["deterministic"]["error_se"] for one in found]
    return Measured([one["deterministic_error"] for one in found], errors)


def _by_samples(curve: Curve, recipe: Recipe, runs: Sequence[Run], context: Context) -> Line:
    """Of the first run; kept in its directory, since it takes long."""
    if not runs:
        return _averaged(curve, recipe, [], [])
    device = choose_device(context.settings.device)
    slow = device.type == "cpu"
    wanted = curve.setting["repetitions"]
    repetitions = min(wanted, _CPU_REPETITIONS) if slow else wanted
    path = runs[0].path / "samples.json"
    if not path.exists():
        _, model = load_run(runs[0].path)
        loader = loader_of_run(runs[0], context.settings.data, device)
        batches = islice(loader.eval_batches(), _CPU_BATCHES if slow else None)
        with precision_context(runs[0].recipe(), device)():
            measured = error_curve(model.to(device), batches, curve.setting["samples"], repetitions)
        write_record(path, measured.to_dict())
    found = read_record(path, _SAMPLES, "delete it, and it is measured again")
    errors = found["error_se"]
    by_error = curve.plotted == "error_by_samples"
    return Line(
        curve.label,
        [float(k) for k in found["samples"]],
        found["error"] if by_error else (errors or []),
        errors if by_error else None,
        None,
        1,
        recipe.replace(seed=0).fingerprint(),
        f"{found['repetitions']} repetitions on {found['images']} test images; in expectation the error is "
        f"{found['deterministic']:.2f}%",
    )


def _of_points(curve: Curve, context: Context) -> Line:
    """Values of rows or of trainings of their own; points without a number are left out."""
    x: list[float] = []
    found: list[Measured] = []
    versions: Mapping[str, str] | None = None
    for point in curve.points:
        if point.recipe is not None:
            runs = _runs_of(point.recipe, context)
            one, versions = _at_last(runs), versions or (runs[0].versions() if runs else None)
        else:
            one = context.measured(point.row or "")
        if one.values:
            places = context.measured(point.x_row).values if point.x_row else ()
            x.append(fmean(places) if places else point.x)
            found.append(one)
    y, errors = [fmean(one.values) for one in found], [one.error for one in found]
    if curve.plotted == "relative_error":
        base = context.measured(curve.points[0].row or "")
        if not base.values:
            return Line(curve.label, [], [], None, None, 0, None, "")
        y, errors = _relative(y, errors, fmean(base.values), base.error)
    known = [error for error in errors if error is not None]
    error = known if len(known) == len(y) else None
    seeds = min((len(one.values) for one in found), default=0)
    return Line(curve.label, x, y, error, None, seeds, None, curve.note, versions)


def _relative(
    y: Sequence[float], errors: Sequence[float | None], base: float, base_error: float | None
) -> tuple[list[float], list[float | None]]:
    """100 (y / base - 1) and its standard errors, those of the base in it; the base itself is 0 by definition."""
    found: list[float | None] = []
    for value, error in zip(y, errors, strict=True):
        known = None if error is None or base_error is None else math.hypot(error, value * base_error / base)
        found.append(0.0 if value == base else None if known is None else 100.0 * known / base)
    return [100.0 * (value / base - 1.0) for value in y], found


# Keeping and drawing


def entries_of(figure: Figure, lines: Sequence[Line], scale: float, variant: str | None = None) -> list[dict[str, Any]]:
    """Lines as entries of the ledger; a number that there is not is null."""

    def kept(values: list[float] | None) -> list[float | None] | None:
        return None if values is None else [value if math.isfinite(value) else None for value in values]

    return [
        {
            "kind": "measurement",
            "figure": figure.id,
            "curve": line.label,
            "x": kept(line.x),
            "y": kept(line.y),
            "error": kept(line.error),
            "predicted": kept(line.predicted),
            "scale": scale,
            "seeds": list(range(line.seeds)),
            "recipe": line.recipe,
            "variant": variant,
            "note": line.note,
        }
        for line in lines
    ]


def draw(path: Path, figure: Figure, lines: Sequence[Line], stamp: str) -> None:
    """Draw a figure as a PNG, in the paper's axes; `stamp` is written below it."""
    from matplotlib.figure import Figure as Canvas  # no pyplot: no global state, no display; slow to import

    canvas = Canvas(figsize=(7.2, 4.6), dpi=120, layout="constrained")
    axes = canvas.add_subplot()
    if figure.shape == "heat map":
        _heat_map(canvas, axes, lines)
    else:
        for number, line in enumerate(lines):
            _draw_line(axes, line, f"C{number % 10}")
        axes.set_yscale(figure.scale)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    axes.set(xlabel=figure.x, ylabel=figure.y, title=f"{figure.id}: {figure.title}")
    axes.title.set_fontsize(10)
    canvas.supxlabel(stamp, fontsize=8, x=0.01, ha="left")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_png(canvas, temporary)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); choose another --runs") from None


def _draw_line(axes: Any, line: Line, colour: str) -> None:
    style = "o-" if len(line.x) <= 12 else "-"
    axes.plot(line.x, line.y, style, color=colour, label=line.label, linewidth=1.6, markersize=4)
    if line.error is not None:
        low = [y - error for y, error in zip(line.y, line.error, strict=True)]
        high = [y + error for y, error in zip(line.y, line.error, strict=True)]
        axes.fill_between(line.x, low, high, color=colour, alpha=0.2, linewidth=0)
    if line.predicted is not None:
        axes.plot(line.x, line.predicted, ":", color=colour, label=f"{line.label}, predicted", linewidth=1.4)


def _heat_map(canvas: Any, axes: Any, lines: Sequence[Line]) -> None:
    columns = sorted({x for line in lines for x in line.x})
    cells = [[dict(zip(line.x, line.y, strict=True)).get(x, math.nan) for x in columns] for line in lines]
    image = axes.imshow(cells, aspect="auto", origin="lower", cmap="viridis_r")
    axes.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    canvas.colorbar(image, label="test error (%)")
