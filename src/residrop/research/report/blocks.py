"""What a report is made of: sections of texts, grids and charts, of which every format shows the same numbers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from residrop.common.errors import RunError

__all__ = [
    "COLOURS",
    "HOLLOW",
    "MISSING",
    "QUOTED",
    "Block",
    "Chart",
    "Dots",
    "Grid",
    "Report",
    "Section",
    "Series",
    "Text",
    "number",
    "slug",
]

MISSING = "not yet measured"
QUOTED = "quoted"  # by the paper, from other work
COLOURS = 8  # of series, in the page's style
HOLLOW = ("published", "predicted")  # marks drawn as circles


@dataclass(frozen=True)
class Text:
    """A paragraph. `tone` is how it is set: plain, small beside it, or as a verdict on a claim."""

    text: str
    tone: Literal["plain", "aside", "seen", "not seen", "open"] = "plain"


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        headings: one per column.
        rows: as many cells in each.
        left: number of first columns that hold words; the others hold numbers, set to the right.
        links: by the text of a cell in the first column, the anchor it leads to.
        apart: columns of numbers that must not be compared with those beside them.
        words: further columns that hold words.
        files: the first column names files of the ledger.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    links: dict[str, str] = field(default_factory=dict)
    apart: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset()
    files: bool = False

    @property
    def wordy(self) -> frozenset[int]:
        """All columns that hold words."""
        return self.words | frozenset(range(self.left))


@dataclass(frozen=True)
class Series:
    """A line of a chart: positions, values (None where there is none), standard errors and predictions if known.

    Raises:
        RunError: there are not as many values as positions.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None
    predicted: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        counts = {len(row) for row in (self.x, self.y, self.error or self.x, self.predicted or self.x)}
        if len(counts) > 1:
            raise RunError(
                f"curve {self.label!r} has lists of different lengths in the ledger; give one value a position"
            )


@dataclass(frozen=True)
class Chart:
    """Lines against an axis. `log`: the y axis is logarithmic. `title` names it for those who do not see it."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Dots:
    """Values side by side, row by row.

    Attributes:
        title: what it shows.
        axis: what the values are.
        rows: label, and by name of the mark its value.
        bounds: by row label, a value that a mark should not exceed.
        caption: below it.
    """

    title: str
    axis: str
    rows: tuple[tuple[str, dict[str, float]], ...]
    bounds: dict[str, float] = field(default_factory=dict)
    caption: str = ""

    @property
    def names(self) -> list[str]:
        """Of the marks, in order of first appearance."""
        return list(dict.fromkeys(name for _, marks in self.rows for name in marks))


Block = Text | Grid | Chart | Dots


@dataclass
class Section:
    """A heading, what stands below it, and the sections under it."""

    title: str
    anchor: str
    blocks: list[Block] = field(default_factory=list)
    sections: list["Section"] = field(default_factory=list)


@dataclass
class Report:
    """A whole report; `blocks` stand before the first section."""

    title: str
    blocks: list[Block]
    sections: list[Section]


def slug(text: str) -> str:
    """An anchor: "swapout/table-2" becomes "swapout-table-2"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def number(value: object, digits: int = 2) -> str:
    """A cell of a value: fixed digits for a number with a fraction, yes or no, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        small = value != 0.0 and abs(value) < 0.5 * 10.0**-digits
        return f"{value:.2g}" if small else f"{value:.{digits}f}"
    if isinstance(value, list):
        return ", ".join(number(one, digits) for one in value)
    return str(value)
