"""Charts of measurements: against bounds, by budget, time, samples and epoch."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from residrop.research.report.blocks import Block, Chart, Dots, Series

__all__ = ["charts_of", "grouped"]

Entry = Mapping[str, Any]
Entries = Sequence[Entry]


def charts_of(rows: Entries) -> list[Block]:
    every = (_against_bounds(rows), _recalibrated(rows), *_budgets(rows), _by_samples(rows), _by_epoch(rows))
    return [one for one in every if one is not None]


def _against_bounds(rows: Entries) -> Dots | None:
    """Skipping against its ideal, with the bounds that it has to keep: 1.04 by block, 1.10 by row, 1.20 there for
    models from elsewhere."""
    mine = [row for row in rows if row.get("variant") == "residrop" and row.get("relative_to_ideal") is not None]
    if not mine:
        return None
    found: list[tuple[str, dict[str, float]]] = []
    bounds: dict[str, float] = {}
    for row in mine:
        label = f"{row['model']}, {row['granularity']}, {row['survival']}"
        found.append((label, {"relative to ideal": row["relative_to_ideal"]}))
        bounds[label] = 1.04 if row["granularity"] == "block" else 1.20 if "/" in row["model"] else 1.10
    return Dots(
        "Skipping against the ideal",
        "time of a step, relative to the ideal",
        tuple(found),
        bounds,
        "Ideal: a network of only the live blocks or rows. "
        "Bounds: 1.04 by block; by row 1.10 for our networks and 1.20 for models from elsewhere.",
    )


def _recalibrated(rows: Entries) -> Dots | None:
    mine = [row for row in rows if {"mode", "change", "nll", "ece"} <= row.keys()]
    found: dict[str, dict[str, float]] = {}
    for (model, mode), group in grouped(mine, ["model", "mode"]):
        found.setdefault(model, {})[mode] = fmean(row["error"] for row in group)
    return Dots("Error by batch norm's statistics", "test error (%)", tuple(found.items())) if found else None


def _budgets(rows: Entries) -> list[Chart]:
    """Test error against budget, and against time."""
    mine = [row for row in rows if {"budget", "mode", "error"} <= row.keys()]
    by_budget: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for (mode, budget), group in grouped(mine, ["mode", "budget"]):
        errors = [row["error"] for row in group]
        spread = stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None
        times = [row["relative_time"] for row in group if row.get("relative_time") is not None]
        by_budget.setdefault(mode, []).append((budget, fmean(errors), spread, fmean(times) if times else None))
    charts: list[Chart] = []
    for title, axis, at in (("budget", "budget (share of a full step)", 0), ("time", "time of a step, relative", 3)):
        series: list[Series] = []
        for mode, points in by_budget.items():
            kept = sorted((place, *point) for point in points if (place := point[at]) is not None)
            if kept:
                errors = [point[3] for point in kept]
                series.append(
                    Series(mode, [point[0] for point in kept], [point[2] for point in kept],
                           errors if None not in errors else None)
                )  # fmt: skip
        if series:
            caption = "Bands: standard error over seeds." if any(one.error for one in series) else ""
            charts.append(Chart(f"Test error against {title}", axis, "test error (%)", tuple(series), caption=caption))
    return charts


def _by_samples(rows: Entries) -> Chart | None:
    mine = [row for row in rows if row.get("curve.samples")]
    series: list[Series] = []
    for row in mine:
        x, errors = row["curve.samples"], row.get("curve.error_se")
        series.append(Series(row.get("rule", "sampled"), x, row["curve.error"], errors))
        if row.get("curve.deterministic") is not None:
            series.append(Series("in expectation", [x[0], x[-1]], [row["curve.deterministic"]] * 2))
    caption = "Bands: standard error over repetitions."
    return Chart("Error by samples", "samples", "test error (%)", tuple(series), caption=caption) if series else None


def _by_epoch(rows: Entries) -> Chart | None:
    mine = [row for row in rows if row.get("run.errors_by_epoch")]
    series = tuple(
        Series(
            f"{row['rule']}, {row['run.survival']}" if row.get("run.survival") not in (None, "1") else row["rule"],
            list(range(1, len(row["run.errors_by_epoch"]) + 1)),
            row["run.errors_by_epoch"],
        )
        for row in mine
    )
    return Chart("Test error along the training", "epoch", "test error (%)", series) if series else None


def grouped(rows: Iterable[Entry], names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Entry]]]:
    """Rows by the values of some fields, in order of first appearance."""
    groups: dict[str, tuple[tuple[Any, ...], list[Entry]]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in names)
        groups.setdefault(repr(key), (key, []))[1].append(row)
    return list(groups.values())
