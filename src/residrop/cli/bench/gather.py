"""What all benchmark commands do with their rows: a table as each part ends, JSON in the end, whatever that was."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from residrop.common.output import console_for, write
from residrop.research import ledger

__all__ = ["command_of", "gather", "steps_bar"]

Rows = Sequence[dict[str, Any]]


def gather(target: str | None, parts: Iterable[Rows], table: Callable[[Rows], Table], what: str, command: str) -> int:
    """Print a table of every part, write all rows to `target` as a document of the ledger, said to be `what`.

    Returns the exit code: 130 after Ctrl-C. Without a row nothing is written.
    """
    console, rows, code = console_for(target), list[dict[str, Any]](), 0
    try:
        for found in parts:
            rows += found
            console.print(table(found))
    except KeyboardInterrupt:
        code = 130
    finally:  # whatever ended it, what was measured is kept
        if rows:
            write(target, ledger.of_rows(what, command, rows))
    if code:
        print(f"residrop: interrupted; {len(rows)} rows were measured", file=sys.stderr)
    return code


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


@contextmanager
def steps_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A live bar; gives what is to be called after every step. Nothing is shown where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True, markup=False)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
