"""Blocks of a report on the terminal: texts and tables; charts are left to the page."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from residrop.research.report.blocks import Block, Grid, Text

__all__ = ["show", "table_of"]


def show(console: Console, blocks: Iterable[Block]) -> None:
    """Print texts and tables.

    Args:
        console: where to; one that reads no markup, see `console_for`.
        blocks: what; charts are left out.
    """
    for block in blocks:
        if isinstance(block, Text):
            console.print(block.text)
        elif isinstance(block, Grid):
            console.print(table_of(block))


def table_of(grid: Grid, title: str | None = None) -> Table:
    """A table for a rich console, words to the left and numbers to the right, long cells folded."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(grid.headings):
        table.add_column(heading, justify="left" if number in grid.wordy else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table
