"""Charts as SVG for inside a page, drawn by matplotlib: colours and fonts are the page's, and nothing is loaded."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from residrop.research.report.blocks import COLOURS, HOLLOW, Chart, Dots

__all__ = ["drawing"]

_WIDTH, _HEIGHT, _ROW = 400, 270, 36  # about pixels on a phone, so that letters stay readable there
_STEPS = [1, 2, 2.5, 5, 10]
# colours while matplotlib draws, and what the page has in their place, by whether it is light or dark
_SERIES = [f"#0f0f0{number}" for number in range(COLOURS)]
_TEXT, _SOFT, _GRID, _EDGE, _BOUND = (f"#0f0f1{number}" for number in range(5))
_NAMES = {_TEXT: "text", _SOFT: "soft", _GRID: "grid", _EDGE: "edge", _BOUND: "bad"}
_VARIABLES = {colour: f"c{number}" for number, colour in enumerate(_SERIES)} | _NAMES
_LOOK = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names of runs may hold dollars
    "font.size": 12.0,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _EDGE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.03,
    "grid.color": _GRID,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.0,
}


def drawing(chart: Chart | Dots, name: str) -> str:
    """A chart as an SVG element; its legend is left to the page.

    Args:
        chart: lines with bands of one standard error and dotted predictions, or marks of rows on one axis. A value
            that is missing, or on a logarithmic axis not positive, leaves a gap in its line.
        name: makes the ids of the element unique in the page.
    """
    with style.context(["default", {**_LOOK, "svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's fonts draw it
        height = _HEIGHT if isinstance(chart, Chart) else 70 + _ROW * len(chart.rows)
        figure = Figure((_WIDTH / 72, height / 72), layout="constrained")
        draw = _lines if isinstance(chart, Chart) else _dots
        draw(figure.add_subplot(), chart)  # pyright: ignore[reportArgumentType]
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(written.getvalue(), chart.title)


def _lines(axes: Any, chart: Chart) -> None:
    drawn: list[float] = []

    def values(row: Sequence[float | None]) -> list[float]:
        found = [math.nan if y is None or (chart.log and y <= 0.0) else y for y in row]
        drawn.extend(filter(math.isfinite, found))
        return found

    for number, one in enumerate(chart.series):
        look: dict[str, Any] = {"color": _SERIES[number % COLOURS], "clip_on": False}
        axes.plot(one.x, values(one.y), "o-" if len(one.x) <= 15 else "-", **look)
        if one.error:
            pairs = [
                (math.nan if y is None or e is None else y, e or 0.0) for y, e in zip(one.y, one.error, strict=True)
            ]
            low, high = values([y - e for y, e in pairs]), values([y + e for y, e in pairs])
            axes.fill_between(one.x, low, high, alpha=0.18, linewidth=0, **look)
        if one.predicted:
            axes.plot(one.x, values(one.predicted), ":", **look)
    whole = all(float(x).is_integer() for one in chart.series for x in one.x)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=_STEPS))
    if chart.log and drawn:
        axes.set_yscale("log")
        decades = math.log10(max(drawn) / min(drawn)) > 1.0
        axes.yaxis.set_major_locator(LogLocator(numticks=7) if decades else MaxNLocator(6, steps=_STEPS))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=_fit(chart.x, 58), ylabel=_fit(chart.y, 36))


def _dots(axes: Any, chart: Dots) -> None:
    names = chart.names
    for place, (label, marks) in enumerate(chart.rows):
        axes.axhline(place, color=_EDGE, linewidth=1.0, zorder=0)
        axes.text(0.0, place - 0.25, _fit(label, 58), transform=axes.get_yaxis_transform())
        if label in chart.bounds:
            axes.plot([chart.bounds[label]] * 2, [place - 0.22, place + 0.22], color=_BOUND, linewidth=2.5)
        for name, value in sorted(marks.items(), key=lambda mark: mark[0] not in HOLLOW):
            colour = _SERIES[names.index(name) % COLOURS]
            axes.plot(
                [value], [place], "o", markersize=10.0 if name in HOLLOW else 7.0, color=colour, clip_on=False,
                markeredgewidth=2.0, fillstyle="none" if name in HOLLOW else "full",
                gid=_plain(f"{label}: {name} {value:.4g}"),
            )  # fmt: skip
    axes.set_ylim(len(chart.rows) - 0.5, -0.8)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    axes.spines.left.set_visible(False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(_fit(chart.axis, 58))


def _fit(text: str, letters: int) -> str:
    """Two lines at most."""
    return textwrap.fill(_plain(text), letters, max_lines=2, placeholder=" ...")


def _plain(text: str) -> str:
    """Only letters that XML can hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _inlined(svg: str, title: str) -> str:
    """The SVG element without what a page has already, or could have twice: namespaces, styles, fonts and ids.

    An id that is a sentence becomes the title that is shown under the pointer.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            child.tag = child.tag.rpartition("}")[2]
            if child.tag in ("metadata", "style", "clipPath"):
                parent.remove(child)
    kept = {value for one in root.iter() for name, value in one.items() if name.endswith("href")}
    for one in root.iter():
        found = {name.rpartition("}")[2]: value for name, value in one.items()}
        if ": " in found.get("id", ""):
            one.insert(0, ElementTree.Element("title"))
            one[0].text = found["id"]
        if f"#{found.get('id')}" not in kept:
            found.pop("id", None)
        found.pop("clip-path", None)
        if "style" in found:
            look = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", found["style"])
            look = re.sub(r"font-family: [^;]*; ", "", look)
            found["style"] = re.sub(r"#0f0f..", lambda match: f"var(--{_VARIABLES[match[0]]})", look)
        if found.get("transform", "").startswith("rotate(-0 "):
            del found["transform"]
        for name in found.keys() & {"d", "transform", "x", "y"}:
            found[name] = re.sub(r"\d+\.\d+", lambda match: f"{float(match[0]):.1f}", found[name]).replace("  ", " ")
        one.text, one.tail = (one.text or "").strip(), None
        one.attrib.clear()
        one.attrib.update(found)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": title})
    root.tag = "svg"
    return ElementTree.tostring(root, encoding="unicode")
