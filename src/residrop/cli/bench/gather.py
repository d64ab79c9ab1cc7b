"""What all benchmark commands do with their rows: tables as each part ends, JSON in the end, whatever that was."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from residrop.cli.shared import table_of
from residrop.common.output import console_for, write
from residrop.research import ledger
from residrop.research.report.blocks import Block, Grid, Text
from residrop.research.report.measurements import summarise

__all__ = ["command_of", "gather", "show", "steps_bar"]

Rows = Sequence[dict[str, Any]]


def gather(target: str | None, parts: Iterable[Rows], what: str, command: str) -> int:
    """Print every part as a report shows it, write all rows to `target` as a document of the ledger, said to be `what`.

    Returns the exit code: 130 after Ctrl-C. Without a row nothing is written.
    """
    console, rows, code = console_for(target), list[dict[str, Any]](), 0
    said: list[Block] = []  # what the columns mean is said once
    try:
        for found in parts:
            rows += found
            blocks = [block for block in summarise([ledger.flat(row) for row in found]) if block not in said]
            said += [block for block in blocks if isinstance(block, Text) and block.tone == "aside"]
            show(console, blocks)
    except KeyboardInterrupt:
        code = 130
    finally:  # whatever ended it, what was measured is kept
        if rows:
            write(target, ledger.of_rows(what, command, rows))
    if code:
        print(f"residrop: interrupted; {len(rows)} rows were measured", file=sys.stderr)
    return code


def show(console: Console, blocks: Iterable[Block]) -> None:
    """Print the texts and tables of a report; charts are left to the page."""
    for block in blocks:
        if isinstance(block, Text):
            console.print(block.text)
        elif isinstance(block, Grid):
            left = {heading for column, heading in enumerate(block.headings) if column in block.wordy}
            console.print(table_of(None, block.headings, block.rows, left))


def command_of(start: str, args: object, default: object) -> str:
    """The command line whose options are `args`: those that differ from `default`, --json left out."""
    words = [start]
    for field in dataclasses.fields(args):  # pyright: ignore[reportArgumentType]
        value = getattr(args, field.name)
        if field.name == "json" or value == getattr(default, field.name):
            continue
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


class _Steps:
    """A bar of steps, to which `start` gives another title and total."""

    def __init__(self, bar: Progress, title: str, total: int | None) -> None:
        self._bar, self._task = bar, bar.add_task(title, total=total)

    def start(self, title: str, total: int) -> None:
        self._bar.reset(self._task, total=total, description=title)

    def step(self) -> None:
        self._bar.advance(self._task)


@contextmanager
def steps_bar(title: str, total: int | None = None) -> Iterator[_Steps]:
    """A live bar, of unknown length without a total. Nothing is shown where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True, markup=False)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        yield _Steps(bar, title, total)
