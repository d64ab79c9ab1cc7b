"""The four papers as data, a TOML file each: tables and figures with the recipe or instrument of each row and curve.

`find("swapout/table-2")` is a table or figure, `find_row("swapout/table-2/0.5-0.5-stochastic")` one number.
"""

from collections.abc import Iterator
from difflib import get_close_matches

from residrop.common.errors import ConfigError
from residrop.common.lazy import Lazy
from residrop.research.papers.reader import NAMES, read
from residrop.research.papers.rows import INSTRUMENTS as INSTRUMENTS
from residrop.research.papers.rows import METRICS as METRICS
from residrop.research.papers.rows import PLOTTED as PLOTTED
from residrop.research.papers.rows import Claim as Claim
from residrop.research.papers.rows import Curve as Curve
from residrop.research.papers.rows import Figure as Figure
from residrop.research.papers.rows import Metric as Metric
from residrop.research.papers.rows import Paper as Paper
from residrop.research.papers.rows import Point as Point
from residrop.research.papers.rows import Row as Row
from residrop.research.papers.rows import Table as Table
from residrop.research.papers.rows import Variant as Variant

PAPERS = Lazy(lambda: NAMES, read)
"""By name, in order of publication; each is read from its file when it is first asked for."""


def find(name: str) -> Table | Figure:
    """The table or figure of that id, such as "swapout/table-2"; ConfigError with the closest ids if there is none."""
    found = {one.id: one for paper in PAPERS.values() for one in (*paper.tables, *paper.figures)}
    if name in found:
        return found[name]
    close = get_close_matches(name, found, n=3, cutoff=0.4) or list(found)[:3]
    raise ConfigError(
        f"{name!r} is no table or figure; did you mean {', '.join(close)}? `residrop reproduce` lists all"
    )


def find_row(name: str) -> tuple[Table, Row]:
    """The row "paper/table/key" and its table; ConfigError with the closest names if there is none."""
    place, _, key = name.rpartition("/")
    table = find(place)
    if isinstance(table, Figure):
        raise ConfigError(f"{place} is a figure and has curves, no rows; give the id of a table")
    return table, table.row(key)


def all_rows() -> Iterator[tuple[Table, Row]]:
    """Every row of every table of every paper, in order, each with its table."""
    for paper in PAPERS.values():
        for table in paper.tables:
            for row in table.rows:
                yield table, row
