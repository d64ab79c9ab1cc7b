"""Charts of measurements: against bounds, by budget, time, samples and epoch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from residrop.research.report.blocks import Block, Chart, Dots, Series

__all__ = ["charts_of", "grouped"]

Entry = Mapping[str, Any]
Entries = Sequence[Entry]


def charts_of(rows: Entries) -> list[Block]:
    """All charts that the fields of some rows allow."""
    every = (_against_bounds(rows), _recalibrated(rows), *_budgets(rows), _by_samples(rows), _by_epoch(rows))
    return [one for one in every if one is not None]


def _against_bounds(rows: Entries) -> Dots | None:
    """Skipping against its ideal, with the bounds that it has to keep."""
    bounds: dict[str, float] = {}
    found: list[tuple[str, dict[str, float]]] = []
    for row in rows:
        if row.get("variant") == "residrop" and row.get("relative_to_ideal") is not None:
            label = f"{row['model']}, {row['granularity']}, {row['survival']}"
            found.append((label, {"relative to ideal": row["relative_to_ideal"]}))
            bounds[label] = 1.04 if row["granularity"] == "block" else 1.20 if "/" in row["model"] else 1.10
    caption = (
        "Ideal: a network of only the live blocks or rows. "
        "Bounds: 1.04 by block; by row 1.10 for our networks and 1.20 for models from elsewhere."
    )
    axis = "time of a step, relative to the ideal"
    return Dots("Skipping against the ideal", axis, tuple(found), bounds, caption) if found else None


def _recalibrated(rows: Entries) -> Dots | None:
    mine = [row for row in rows if {"mode", "change", "nll", "ece"} <= row.keys()]
    found: dict[str, dict[str, float]] = {}
    for (model, mode), group in grouped(mine, lambda row: (row["model"], row["mode"])):
        found.setdefault(model, {})[mode] = fmean(row["error"] for row in group)
    return Dots("Error by batch norm's statistics", "test error (%)", tuple(found.items())) if found else None


def _budgets(rows: Entries) -> list[Chart]:
    """Test error against budget, and against time, means over seeds."""
    mine = [row for row in rows if {"budget", "mode", "error"} <= row.keys()]
    charts: list[Chart] = []
    for title, axis, field in (
        ("budget", "budget (share of a full step)", "budget"),
        ("time", "time of a step, relative", "relative_time"),
    ):
        points: dict[str, list[tuple[float, float, float | None]]] = {}
        for (mode, _), group in grouped(mine, lambda row: (row["mode"], row["budget"])):
            places = [row[field] for row in group if row.get(field) is not None]
            errors = [row["error"] for row in group]
            spread = stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None
            if places:
                points.setdefault(mode, []).append((fmean(places), fmean(errors), spread))
        series: list[Series] = []
        for mode, found in points.items():
            x, y, spreads = zip(*sorted(found, key=lambda point: point[0]), strict=True)
            series.append(Series(mode, list(x), list(y), None if None in spreads else list(spreads)))
        if series:
            caption = "Bands: standard error over seeds." if any(one.error for one in series) else ""
            charts.append(Chart(f"Test error against {title}", axis, "test error (%)", tuple(series), caption=caption))
    return charts


def _by_samples(rows: Entries) -> Chart | None:
    series: list[Series] = []
    for row in rows:
        if x := row.get("curve.samples"):
            series.append(Series(row.get("rule", "sampled"), x, row["curve.error"], row.get("curve.error_se")))
            if row.get("curve.deterministic") is not None:
                series.append(Series("in expectation", [x[0], x[-1]], [row["curve.deterministic"]] * 2))
    caption = "Bands: standard error over repetitions."
    return Chart("Error by samples", "samples", "test error (%)", tuple(series), caption=caption) if series else None


def _by_epoch(rows: Entries) -> Chart | None:
    series: list[Series] = []
    for row in rows:
        if errors := row.get("run.errors_by_epoch"):
            survival = row.get("run.survival")
            label = row["rule"] if survival in (None, "1") else f"{row['rule']}, {survival}"
            series.append(Series(label, list(range(1, len(errors) + 1)), errors))
    return Chart("Test error along the training", "epoch", "test error (%)", tuple(series)) if series else None


def grouped(
    rows: Iterable[Entry], key: Callable[[Entry], tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], list[Entry]]]:
    """Rows by their key, in order of first appearance; keys may hold lists."""
    groups: dict[str, tuple[tuple[Any, ...], list[Entry]]] = {}
    for row in rows:
        found = key(row)
        groups.setdefault(repr(found), (found, []))[1].append(row)
    return list(groups.values())
