"""Which entries of the ledger belong to which row of a paper."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from residrop.research.papers.rows import Figure, Paper, Row, Table
from residrop.research.papers.work import Settings, draws, fits, read_under

__all__ = ["Drawing", "Entries", "Entry", "Placed", "Setting", "belonging", "drawings"]

Entry = Mapping[str, Any]
Entries = Sequence[Entry]
Placed = tuple[Table, Row, str | None, Entry]  # with the name of the reading, None for the recommended one


Setting = tuple[float, str | None]  # scale and variant


class Drawing(NamedTuple):
    """Curves of a figure that were measured under one setting on one device."""

    setting: Setting
    device: str
    lines: list[Entry]


def drawings(figure: Figure, entries: Entries) -> list[Drawing]:
    """What was measured of a figure, the recommended readings before the variants, the longest schedule first.

    Curves of a recipe that the figure no longer has are left out.
    """
    groups: dict[tuple[Setting, str], list[Entry]] = {}
    for entry in entries:
        if draws(figure, entry):
            groups.setdefault(((entry["scale"], entry.get("variant")), entry["device"]), []).append(entry)
    found = [Drawing(setting, device, lines) for (setting, device), lines in groups.items()]
    return sorted(found, key=lambda one: (one.setting[1] or "", -one.setting[0], one.device))


def belonging(paper: Paper, entries: Entries) -> list[Placed]:
    """Entries of a paper that belong to a row as its recipe now is, each with its table, row and reading."""
    found: list[Placed] = []
    for table in paper.tables:
        for row in table.rows:
            name = f"{table.id}/{row.key}"
            mine = [entry for entry in entries if entry["kind"] == "paper" and entry["id"] == name]
            if not mine:
                continue
            readings = [(None, row.recipe)]
            readings += [(one.name, read_under(table, row, one)) for one in paper.variants if one.applies(table, row)]
            for variant, recipe in readings:
                found += [
                    (table, row, variant, entry)
                    for entry in mine
                    if fits(entry, name, recipe, Settings(scale=entry["scale"], variant=variant))
                ]
    return found
