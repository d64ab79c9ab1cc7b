"""What all instruments do: measure a target, print tables, draw a picture, write JSON."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from residrop.blocks.attach import rules_of, sampler_of
from residrop.cli.analyze.targets import Analysis, Target, find_target
from residrop.common.errors import ConfigError
from residrop.common.output import check_target, console_for, write
from residrop.theory import Costs, costs_of

__all__ = ["Found", "Unit", "analyze", "costs_with_bar", "progress"]

Found = dict[str, Any]  # what an instrument measured, as JSON
Unit = Literal["blocks", "flops", "time"]
Options = TypeVar("Options", bound=Analysis)


def analyze(
    instrument: str,
    options: Options,
    measure: Callable[[Options, Target], Found],
    tables: Callable[[Found], Sequence[Table]],
    draw: Callable[[Found, Path], None],
) -> int:
    """Measure the target of the options, print the tables, draw the picture, write JSON; returns the exit code."""
    check_target(options.json)
    check_target(options.picture, "--picture")
    options.check()
    target = find_target(options)
    if instrument != "survival":
        _check_independent(target)
    picture = options.picture or (target.run.path if target.run else Path()) / f"analyze-{instrument}.png"
    check_target(picture, "--picture")
    found = measure(options, target)
    console = console_for(options.json)
    for table in tables(found):
        console.print(table)
    write(options.json, {"instrument": instrument, **found})
    draw(found, picture)
    console.print(f"drawn: {picture}")
    return 0


def _check_independent(target: Target) -> None:
    if any(rule.runs_absent for rule in rules_of(target.model)):
        raise ConfigError(
            f"forwards of {target.name} are whole, and this instrument is of those that leave branches out; analyze "
            "its network by name"
        )
    coupling = sampler_of(target.model).coupling
    if coupling != "independent":
        raise ConfigError(
            f"the draws of {target.name} are coupled ({coupling}), and this instrument is of independent coins; "
            "analyze its network by name, or a run without --coupling"
        )


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[..., None]]:
    """A live bar on a terminal, nothing elsewhere; gives what is to be called after each of `total` steps.

    It is called with nothing, or with the number of steps that are done.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done=None: bar.advance(task) if done is None else bar.update(task, completed=done)


def costs_with_bar(target: Target, unit: Unit) -> Costs:
    """The costs of a target's blocks, with a live bar while they are timed."""
    with progress(100, "timing blocks (%)") as tell:
        return costs_of(target.model, unit, target.x, on_progress=lambda share: tell(int(100 * share)))
