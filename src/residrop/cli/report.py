"""`residrop report`: the ledger, or runs, as a summary on the terminal, Markdown, one HTML page, folders to publish."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from residrop.cli.shared import parse, table_of
from residrop.common.errors import ConfigError
from residrop.common.output import check_target, console_for, writing
from residrop.research import ledger
from residrop.research.papers.status import overview
from residrop.research.report import as_markdown, as_page, collect, publish

__all__ = ["run"]


@dataclass(frozen=True)
class Report:
    """Show what the ledger holds: the papers' tables beside our numbers, figures, benchmarks.

    residrop report                                         a summary here, and the page report.html
    residrop report --markdown docs/results.md --html docs/report.html
    residrop report runs/digits-001 runs/digits-002         learning curves of runs, as report.html
    residrop report runs/digits-001 --models models         the run as a folder to publish: weights, recipe, log, card

    The page is one file that needs no network. Numbers of shortened schedules stand in columns of their own. With run
    directories the report is of them only, unless --ledger is given, too.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run directories to show: results, learning curves, first gradients."""
    ledger: Path | None = None
    """Folder of what was measured (default: results, or with RUNS none)."""
    markdown: Path | None = None
    """Write the report as Markdown to this file."""
    html: Path | None = None
    """Write it as one HTML page to this file (default: report.html, unless only --markdown or --models is given)."""
    models: Path | None = None
    """Write finished RUNS into this folder: for each one a folder that can be uploaded to the Hugging Face hub as it is
    (weights, recipe, log, README.md as a model card, scores in .eval_results), and a table of all that are there."""


def run(arguments: Sequence[str], prog: str) -> int:
    """Write the files, then print a summary."""
    args = parse(Report, arguments, prog)
    if args.models is not None and not args.runs:
        raise ConfigError("--models publishes runs, and none were given; name finished run directories before it")
    folder = args.ledger if args.ledger or args.runs else Path("results")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give --ledger the folder of the ledger, or run directories")
    page = args.html or (None if args.markdown or args.models else Path("report.html"))
    check_target(args.markdown, "--markdown")
    check_target(page, "--html")
    console = console_for(None)
    if args.models is not None:
        models = publish(args.runs, args.models)
        console.print(f"written: {args.models / 'README.md'}, a table of {len(models)} model(s)")
        if not (args.markdown or args.html):
            return 0
    found = collect(folder, args.runs)
    if folder is not None:
        _summary(folder, console)
    if args.markdown is not None:
        near = args.markdown.parent
        _write(args.markdown, as_markdown(found, _link(page, near), _link(folder, near)), "--markdown")
    if page is not None:
        _write(page, as_page(found), "--html")
    for path in filter(None, (args.markdown, page)):
        console.print(f"written: {path}")
    return 0


def _link(path: Path | None, start: Path) -> str | None:
    return None if path is None else os.path.relpath(path, start).replace(os.sep, "/")


def _summary(folder: Path, console: Console) -> None:
    """How many rows and curves of each paper are measured."""
    rows: list[tuple[str, ...]] = []
    found = [one for one in overview(ledger.read(folder)) if not one.drawing]
    for paper in dict.fromkeys(one.id.partition("/")[0] for one in found):
        mine = [one for one in found if one.id.startswith(f"{paper}/")]
        scaled = sum(max(one.scaled.values(), default=0) for one in mine)
        counts = (sum(one.full for one in mine), scaled, sum(one.open for one in mine), sum(one.quoted for one in mine))
        rows.append((paper, *map(str, counts)))
    headings = ("paper", "in full", "scaled", "not yet", "quoted")
    console.print(table_of(f"rows of tables and curves of figures in {folder}", headings, rows, left=("paper",)))


def _write(path: Path, text: str, option: str) -> None:
    with writing(path, option) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name of a run may be no UTF-8
