"""Rows of `bench_skip` as tables, and its progress on the terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from residrop.research.bench.skip import Comparison

__all__ = ["progress", "table_of"]


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """One comparison as a table."""
    first = rows[0]
    title = (
        f"{first['model']}, {first['survival']}: batch of {first['batch_size']} at {first['pixels']} px, "
        f"{first['precision']}, {first['memory_format']}, {first['steps']} steps"
    )
    table = Table(title=title, title_justify="left")
    for name in ("variant", "level", "time", "x constant", "x ideal", "kept for backward", "x constant", "x ideal"):
        table.add_column(name, justify="left" if name in ("variant", "level") else "right")
    last = None
    for row in rows:
        if row["granularity"] != last:
            last = row["granularity"]
            table.add_section()
        table.add_row(
            row["variant"],
            row["granularity"] or "",
            f"{1000 * row['seconds']:.1f} ms",
            _ratio(row["relative_to_constant"]),
            _ratio(row["relative_to_ideal"]),
            f"{row['saved_bytes'] / 2**20:.1f} MiB",
            _ratio(row["saved_relative_to_constant"]),
            _ratio(row["saved_relative_to_ideal"]),
        )
    return table


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


class _Bar:
    def __init__(self, bar: Progress, comparisons: int) -> None:
        self._bar, self._comparisons, self._number = bar, comparisons, 0
        self._task = bar.add_task("checking that all variants compute the same", total=None)

    def start(self, comparison: Comparison) -> None:
        """A comparison begins."""
        self._number += 1
        what = f"{self._number}/{self._comparisons}  {comparison.net.name}, {comparison.survival}"
        self._bar.reset(self._task, total=comparison.rounds, description=what)

    def step(self) -> None:
        """A round of it is made."""
        self._bar.advance(self._task)


@contextmanager
def progress(console: Console, comparisons: int) -> Iterator[tuple[Callable[[Comparison], None], Callable[[], None]]]:
    """A live bar; gives `on_start` and `on_step` of `bench_skip`. Nothing is shown where the console is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = _Bar(bar, comparisons)
        yield shown.start, shown.step
