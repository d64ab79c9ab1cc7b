"""A report as one HTML page: style and charts inside, nothing loaded, light and dark, from phone to desktop."""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from residrop.research.report.blocks import COLOURS, HOLLOW, MISSING, QUOTED, Chart, Dots, Grid, Report, Text

__all__ = ["as_page"]

_FOLDER = Path(__file__).parent


def as_page(report: Report) -> str:
    """The report as a page that needs no other file and no network."""
    from residrop.research.report.drawing import drawing  # matplotlib is slow to import

    loader = FileSystemLoader(_FOLDER)
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    numbers = count(1)
    found.filters["drawing"] = lambda chart: Markup(drawing(chart, f"chart-{next(numbers)}"))
    found.filters |= {"legend": _legend, "unbroken": _unbroken}
    found.tests["text"] = lambda block: isinstance(block, Text)
    found.tests["grid"] = lambda block: isinstance(block, Grid)
    found.tests["chart"] = lambda block: isinstance(block, Chart)
    css = (_FOLDER / "page.css").read_text("utf-8")
    return found.get_template("page.html.jinja").render(report=report, css=css, missing=(MISSING, QUOTED))


def _legend(chart: Chart | Dots) -> Iterator[tuple[str, str, str]]:
    """Shape, colour and label of every key."""
    names = chart.names if isinstance(chart, Dots) else [one.label for one in chart.series]
    for number, name in enumerate(names):
        hollow = isinstance(chart, Dots) and name in HOLLOW
        yield "hollow" if hollow else "mark", f"c{number % COLOURS}", name
    if isinstance(chart, Dots) and chart.bounds:
        yield "bound", "bad", "bound"
    if isinstance(chart, Chart) and any(one.predicted for one in chart.series):
        yield "dotted", "soft", "predicted (dotted)"


def _unbroken(text: str) -> Markup:
    """Escaped, with options that no line break divides."""
    return Markup(re.sub(r"(?<=\s)--[\w-]+", r'<span class="keep">\g<0></span>', str(escape(text))))
