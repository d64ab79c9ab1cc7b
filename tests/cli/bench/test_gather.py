"""Blocks on the terminal: all words and numbers, and no chart."""

import io

from rich.console import Console

from residrop.cli.bench.gather import show
from residrop.research.report.blocks import Chart, Grid, Series, Text


def test_texts_and_tables_are_shown_and_names_are_no_markup():
    grid = Grid(
        ("name", "error %", "where"), (("[red]a[/red]", "1.50", "here"), ("b", "12.25", "there")), words=frozenset({2})
    )
    chart = Chart("a chart", "x", "y", (Series("s", [1], [1.0]),))
    written = io.StringIO()
    show(Console(file=written, markup=False, width=60), [Text("What [b]it[/b] is"), grid, chart])
    lines = written.getvalue().splitlines()
    assert lines[0] == "What [b]it[/b] is"
    assert [line.strip("┃│ ").split() for line in lines if "━" not in line and "─" not in line][1:] == [
        ["name", "┃", "error", "%", "┃", "where"],
        ["[red]a[/red]", "│", "1.50", "│", "here"],
        ["b", "│", "12.25", "│", "there"],
    ]
    rows = [line for line in lines if line.startswith("│")]
    assert rows[0].index("1.50") == rows[1].index("12.25") + 1  # numbers end in one column, words begin in one
    assert rows[0].index("here") == rows[1].index("there")
    assert "a chart" not in written.getvalue()
