"""Measurements of the ledger, document by document: what is known of their shape first, ratios before seconds."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from residrop.research.report.blocks import Block, Grid, Section, Text, number, slug
from residrop.research.report.measured_charts import charts_of, grouped
from residrop.research.report.shapes import SHAPES, Column, Listing, Pivot

__all__ = ["section_of_document", "summarise"]

Entry = Mapping[str, Any]
Entries = Sequence[Entry]

_VERSIONS = ("residrop", "torch", "timm", "python", "threads")  # the others are in the file
_MANY_ROWS, _MANY_COLUMNS = 60, 9


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
    """Tables and charts of measurements: what is known of their shape, or else all scalar fields that differ."""
    blocks: list[Block] = []
    left = list(rows)
    known: list[int] = []
    for shape in SHAPES:
        mine = [row for row in left if shape.needs <= row.keys()]
        if isinstance(shape, Listing):  # a row is listed once, but may be in several pivots
            mine = [row for row in mine if id(row) not in known]
        if not mine:
            continue
        known += map(id, mine)
        blocks += _listing(shape, mine) if isinstance(shape, Listing) else _pivot(shape, mine)
    rest = [row for row in left if id(row) not in known]
    blocks += charts_of(rows)
    return blocks + (_generic(rest) if rest else [])


# Known shapes


def _listing(shape: Listing, rows: Entries) -> list[Block]:
    by = [(heading, name) for heading, name in shape.by if any(row.get(name) is not None for row in rows)]
    groups = grouped(rows, [name for _, name in by])
    if all(isinstance(key[0], (int, float)) for key, _ in groups):
        groups.sort(key=lambda group: group[0][0])
    columns = [one for one in shape.columns if one.name == "" or any(row.get(one.name) is not None for row in rows)]
    cells = tuple((_label(key), *(_cell(one, mine) for one in columns)) for key, mine in groups)
    grid = Grid((", ".join(heading for heading, _ in by), *(one.heading for one in columns)), cells)
    return [*([Text(shape.text)] if shape.text else []), grid]


def _label(key: Sequence[object]) -> str:
    """One column for all that tells rows apart: on a phone the numbers stay in sight."""
    return ", ".join(number(one) for one in key if one is not None)


def _cell(column: Column, rows: Entries) -> str:
    if column.name == "":
        return str(len(rows))
    values = [row[column.name] for row in rows if row.get(column.name) is not None]
    if column.factor != 1.0:
        values = [column.factor * value for value in values]
    if not values:
        return ""
    if isinstance(values[0], list):
        return number(values[0], column.digits)
    if len(values) == 1:
        error = next((rows[0][name] for name in column.error if rows[0].get(name) is not None), None)
        spread = f" ± {error:.{column.digits}f}" if error is not None else ""
        return number(values[0], column.digits) + spread
    mean = fmean(values)
    return (
        f"{mean:.{column.digits}f} ± {stdev(values):.{column.digits}f}" if len(set(values)) > 1 else number(values[0])
    )


def _pivot(shape: Pivot, rows: Entries) -> list[Block]:
    names = list(dict.fromkeys(row[shape.across] for row in rows))
    base = [row for row in rows if row.get("granularity", "") is None]  # constant depth, the same for all granularities
    by = [pair for pair in shape.by if any(row.get(pair[1]) is not None for row in rows)]
    lines: list[tuple[str, ...]] = []
    for key, mine in grouped([row for row in rows if row not in base], [name for _, name in by]):
        values = {row[shape.across]: row[shape.value] for row in mine}
        lines.append((_label(key), *(_scaled(values.get(name), shape.factor) for name in names)))
    if base:  # it is 1 by definition
        spare = 1 + names.index(base[0][shape.across])
        lines = [line[:spare] + line[spare + 1 :] for line in lines]
        names.remove(base[0][shape.across])
    return [Text(shape.text), Grid((", ".join(heading for heading, _ in by), *names), tuple(lines))]


def _scaled(value: float | None, factor: float) -> str:
    return "" if value is None else number(value * factor)


# Unknown shapes


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
