"""Measurements as tables and charts: a view for each benchmark (views.toml), and one for whatever else there is."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from residrop.research.report.blocks import Block, Grid, Section, Text, number, slug
from residrop.research.report.measured_charts import charts_of, grouped

__all__ = ["VIEWS", "section_of_document", "summarise"]

Entry = Mapping[str, Any]
Entries = Sequence[Entry]

_VERSIONS = ("residrop", "torch", "timm", "transformers", "python", "threads")  # the others are in the file
_MANY_ROWS, _MANY_COLUMNS = 60, 9


@dataclass(frozen=True)
class _Column:
    heading: str
    field: str
    digits: int = 2
    factor: float = 1.0
    errors: tuple[str, ...] = ()

    def cell(self, rows: Entries) -> str:
        """The value of one row, or mean and standard deviation of several."""
        if not self.field:
            return str(len(rows))
        values = [row[self.field] for row in rows if row.get(self.field) is not None]
        if not values:
            return ""
        if self.factor != 1.0:
            values = [self.factor * value for value in values]
        spread = next((rows[0][name] for name in self.errors if rows[0].get(name) is not None), None)
        if len(values) > 1:
            spread = stdev(values) if len(set(values)) > 1 else None
            values = values if spread is None else [fmean(values)]
        return number(values[0], self.digits) + ("" if spread is None else f" ± {spread:.{self.digits}f}")


@dataclass(frozen=True)
class _View:
    """A table of views.toml, where its fields are explained."""

    needs: Sequence[str]
    lines: Sequence[tuple[str, str]]
    columns: Sequence[Mapping[str, Any]]
    title: str = ""
    text: str = ""

    def fits(self, row: Entry) -> bool:
        named = set(re.findall(r"%\((\w+)\)s", self.title)) - {"options", "size"}
        return {*self.needs, *named} <= row.keys()

    def blocks(self, rows: Entries) -> list[Block]:
        found: list[Block] = [Text(self.text, "aside")] if self.text else []
        for (title,), mine in grouped(rows, lambda row: (self.title % _titled(row),)):
            found += [*([Text(title)] if title else []), self._grid(mine)]
        return found

    def _grid(self, rows: Entries) -> Grid:
        lines = [(heading, name) for heading, name in self.lines if any(row.get(name) is not None for row in rows)]
        groups = grouped(rows, lambda row: tuple(row.get(name) for _, name in lines))
        if all(isinstance(key[0], (int, float)) for key, _ in groups):
            groups.sort(key=lambda group: group[0][0])
        columns = [_Column(**one) for one in self.columns]
        columns = [one for one in columns if not one.field or any(row.get(one.field) is not None for row in rows)]
        # one column for all that tells lines apart: on a phone the numbers stay in sight
        cells = [(", ".join(number(one) for one in key if one is not None), mine) for key, mine in groups]
        return Grid(
            (", ".join(heading for heading, _ in lines), *(one.heading for one in columns)),
            tuple((label, *(one.cell(mine) for one in columns)) for label, mine in cells),
        )


VIEWS = [_View(**one) for one in tomllib.loads(Path(__file__).with_name("views.toml").read_text("utf-8"))["view"]]


def section_of_document(file: str, entries: Entries) -> Section:
    """A document's measurements: what it is, how to repeat it, where and when, then a summary.

    Args:
        file: its name.
        entries: its measurements, as `ledger.read` gives them.
    """
    about = entries[0]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in _VERSIONS if about["versions"].get(name))
    blocks: list[Block] = [
        Text(f"Command: {about['command']}", "aside"),
        Text(f"{about['date']}; {about['device']}; {versions}; file {file}", "aside"),
    ]
    outside = {"kind", "what", "command", "date", "device", "versions", "file"}
    rows = [{name: value for name, value in entry.items() if name not in outside} for entry in entries]
    return Section(about["what"], slug(f"measured-{file.removesuffix('.json')}"), blocks + summarise(rows))


def summarise(rows: Entries) -> list[Block]:
    """Tables and charts of measurements: each row by the first view that fits it, the others by all scalar fields.

    Args:
        rows: measurements without nesting, see `ledger.flat`.
    """
    blocks: list[Block] = []
    left = list(rows)
    for view in VIEWS:
        mine = [row for row in left if view.fits(row)]
        left = [row for row in left if not view.fits(row)]
        blocks += view.blocks(mine) if mine else []
    return blocks + charts_of(rows) + (_generic(left) if left else [])


def _titled(row: Entry) -> dict[str, str]:
    """Values of a row as they stand in a title."""
    options = "".join(f", {name[8:]} {number(value)}" for name, value in row.items() if name.startswith("options."))
    size = f"{number(row['tokens'])} tokens" if "tokens" in row else f"{number(row.get('pixels'))} px"
    sizes = {name: " x ".join(map(str, value)) for name, value in row.items() if isinstance(value, list)}
    return {name: number(value) for name, value in row.items()} | sizes | {"options": options, "size": size}


def _generic(rows: Entries) -> list[Block]:
    """What is the same everywhere in one sentence, what differs as a table; long lists are left to the file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row.get(name) for row in rows] for name in names}
    short = [name for name in names if not any(isinstance(one, list) and len(one) > 4 for one in values[name])]
    same = [name for name in short if len(rows) > 1 and all(one == values[name][0] for one in values[name])]
    shown = [name for name in short if name not in same]
    blocks: list[Block] = []
    if same:
        parts = (f"{name} {number(values[name][0], 3)}" for name in same if values[name][0] is not None)
        blocks.append(Text(f"In all: {'; '.join(parts)}.", "aside"))
    if len(rows) == 1:
        cells = tuple((name, number(values[name][0], 3)) for name in shown)
        return [*blocks, Grid(("field", "value"), cells)] if cells else blocks
    wordy = [name for name in shown if any(isinstance(one, str) for one in values[name])]
    ratios = [name for name in shown if "relative" in name or "ratio" in name or "share" in name]
    order = [*wordy, *ratios, *shown]  # words first, so that numbers line up; then ratios
    head = list(dict.fromkeys(order))[:_MANY_COLUMNS]
    if not head:
        return blocks
    cells = tuple(tuple(number(row.get(name), 3) for name in head) for row in rows[:_MANY_ROWS])
    blocks.append(Grid(tuple(head), cells, left=min(len(wordy), len(head))))
    more = [f"{len(rows) - len(cells)} more rows"] if len(rows) > len(cells) else []
    hidden = [name for name in names if name not in head and name not in same]
    more += [f"fields {', '.join(hidden)}"] if hidden else []
    return [*blocks, *([Text(f"In the file: {'; '.join(more)}.", "aside")] if more else [])]
