"""Measurements: every benchmark is shown by its view, whatever else there is as it is."""

import itertools
import json
from pathlib import Path

import pytest

from residrop.research.report.blocks import Chart, Dots, Grid, Series, Text
from residrop.research.report.measurements import VIEWS, summarise

ROOT = Path(__file__).parents[3]


def committed(name):
    return json.loads((ROOT / "results" / f"{name}_cpu_202611.json").read_text())["entries"]


def grids(rows):
    return [block for block in summarise(rows) if isinstance(block, Grid)]


def test_skipping_is_shown_as_measured():
    rows = committed("skip")
    blocks = summarise(rows)
    tables = [(title, grid) for title, grid in itertools.pairwise(blocks) if isinstance(grid, Grid)]
    for _, grid in tables:
        assert grid.headings == (
            "variant, level", "time, ms", "time, x constant", "time, x ideal",
            "saved, MiB", "saved, x constant", "saved, x ideal",
        )  # fmt: skip
    about = {(title.text.partition(":")[0], line[0]): line[1:] for title, grid in tables for line in grid.rows}
    assert len(about) == len(rows)
    for row in rows:
        level = f", {row['granularity']}" if row["granularity"] else ""
        ideal, saved = row["relative_to_ideal"], row["saved_relative_to_ideal"]
        assert about[f"{row['model']}, {row['survival']}", row["variant"] + level] == (
            f"{1000 * row['seconds']:.1f}",
            f"{row['relative_to_constant']:.3f}",
            "" if ideal is None else f"{ideal:.3f}",
            f"{row['saved_bytes'] / 2**20:.1f}",
            f"{row['saved_relative_to_constant']:.3f}",
            "" if saved is None else f"{saved:.3f}",
        )
    (drawn,) = [block for block in blocks if isinstance(block, Dots)]
    assert drawn.bounds["resnet-56, block, uniform(0.5)"] == 1.04
    assert drawn.bounds["resnet-56, row, uniform(0.5)"] == 1.10
    assert drawn.bounds["torchvision/resnet50, row, uniform(0.5)"] == 1.20
    ideal = {row["relative_to_ideal"] for row in rows if row["variant"] == "residrop"}
    assert {value for _, marks in drawn.rows for value in marks.values()} == ideal


def test_every_view_shows_a_document_of_the_ledger():
    rows = [row for path in (ROOT / "results").glob("*.json") for row in json.loads(path.read_text())["entries"]]
    unused = [view.needs for view in VIEWS if not any(view.fits(row) for row in rows)]
    assert unused == []


def test_a_row_that_lacks_a_part_of_the_title_is_shown_all_the_same():
    rows = [{"variant": "a", "relative_to_naive": 1.5}, {"variant": "b", "relative_to_naive": 2.5}]
    (grid,) = grids(rows)
    assert grid.rows == (("a", "1.500"), ("b", "2.500"))


@pytest.mark.parametrize(
    ("name", "heading", "value"),
    [
        ("digits_compare", "rule, survival rates", "deterministic_error"),
        ("cifar10_10epochs", "rule, network, survival rates", "sampled_error"),
        ("inference", "variant", "relative_to_naive"),
        ("swapout", "variant", "relative_to_add"),
        ("tax", "model, batch", "relative_to_plain"),
        ("throughput", "loop, rule, precision", "relative_to_plain"),
        ("wirings", "network, wiring", "relative_to_none"),
        ("draw", "granularity, timing, coupling", "microseconds"),
        ("adaptive_digits", "confidence", "agreement"),
    ],
)
def test_known_shapes_show_their_ratios(name, heading, value):
    rows = committed(name)
    shown = [
        cell.split(" ")[0].strip(",")
        for grid in grids(rows)
        for line in grid.rows
        for cell in line[1:]
        if cell and grid.headings[0] == heading
    ]
    measured = [row[value] for row in rows if row.get(value) is not None]
    assert measured
    printed = {float(cell): len(cell.partition(".")[2]) for cell in shown}
    for one in measured:  # as printed: to the last digit that a cell has
        assert any(abs(cell - one) <= 0.5000001 * 10.0**-digits for cell, digits in printed.items()), one


def test_seeds_are_averaged():
    rows = [
        {"mode": mode, "budget": budget, "seed": seed, "error": 10 * budget + seed, "relative_time": budget / 2}
        for mode in ("uniform", "linear")
        for budget in (0.5, 0.3)
        for seed in (0, 2)
    ]
    (grid,) = grids(rows)
    assert grid.headings == ("budget, rates found by", "time, relative", "error %", "seeds")
    assert grid.rows[0] == ("0.30, uniform", "0.15", "4.00 ± 1.41", "2")
    assert [row[0] for row in grid.rows] == ["0.30, uniform", "0.30, linear", "0.50, uniform", "0.50, linear"]
    by_budget, by_time = [block for block in summarise(rows) if isinstance(block, Chart)]
    assert by_budget.series[0] == Series("uniform", [0.3, 0.5], [4.0, 6.0], [1.0, 1.0])
    assert by_time.series[1].x == [0.15, 0.25]


def test_unknown_shapes_are_shown_as_they_are():
    rows = [{"images": 100 * n, "relative_to_loop": 2.0 + n, "network": f"n{n}", "threads": 2} for n in range(70)]
    same, grid, more = summarise([{**row, "all": list(range(9))} for row in rows])
    assert same == Text("In all: threads 2.", "aside")
    assert grid.headings == ("network", "relative_to_loop", "images")
    assert grid.rows[1] == ("n1", "3.000", "100")
    assert more.text == "In the file: 10 more rows; fields all."
    assert grids([{"a": 1, "b": True}])[0].rows == (("a", "1"), ("b", "yes"))
