"""Charts as SVG for inside a page: colours and fonts are the page's, light or dark, and nothing is loaded."""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from residrop.research.report.blocks import Chart, Dots, Series, slug

__all__ = ["dots", "lines"]

# User units are pixels at the narrowest width at which a page shows a chart, so that 12 stays readable on a phone.
_WIDTH, _HEIGHT = 400, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 42
Place = Callable[[float], float]  # from a value to where it stands

_COLOURS = 8  # that the page's style has
_TICKS, _ROW = 5, 36
_MARKS = ("published", "predicted")  # drawn hollow


def lines(chart: Chart) -> str:
    """Lines with bands of one standard error and dotted predictions; values that there are not break a line."""
    span_x = _span(x for one in chart.series for x in one.x)
    every = [y for one in chart.series for row in (one.y, one.predicted or (), *_edges(one)) for y in row]
    values = [y for y in every if y is not None and _drawable(y, chart.log)]
    span_y = _span((math.log10(y) if chart.log else y for y in values), pad=0.05)

    def across(x: float) -> float:
        return _LEFT + (x - span_x[0]) / (span_x[1] - span_x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        y = math.log10(y) if chart.log else y
        return _HEIGHT - _BOTTOM - (y - span_y[0]) / (span_y[1] - span_y[0]) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(chart, span_x, span_y, across, up)]
    for number, one in enumerate(chart.series):
        colour = f"c{number % _COLOURS}"
        band = [(x, low, high) for x, (low, high) in zip(one.x, _edges(one), strict=False) if low == low]
        band = [(x, low, high) for x, low, high in band if _drawable(low, chart.log)]
        if len(band) > 1:
            outline = [(across(x), up(high)) for x, _, high in band] + [
                (across(x), up(low)) for x, low, _ in band[::-1]
            ]
            parts.append(f'<polygon class="band {colour}" points="{_points(outline)}"/>')
        for style, row in (("line", one.y), ("predicted", one.predicted or ())):
            for piece in _pieces(one.x, row, chart.log):
                drawn = [(across(x), up(y)) for x, y in piece]
                parts.append(f'<polyline class="{style} {colour}" points="{_points(drawn)}"/>')
                if style == "line" and len(one.x) <= 15:
                    parts += [f'<circle class="mark {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in drawn]
    return _svg(chart.title, _HEIGHT, parts) + _legend(chart.series)


def dots(chart: Dots) -> str:
    """Marks of each row on one axis, its label above it, its bound a short stroke."""
    names = list(dict.fromkeys(name for _, marks in chart.rows for name in marks))
    values = [value for _, marks in chart.rows for value in marks.values()] + list(chart.bounds.values())
    low, high = _span(values, pad=0.06)
    bottom = 10 + _ROW * len(chart.rows)

    def across(x: float) -> float:
        return 10 + (x - low) / (high - low) * (_WIDTH - 20)

    parts: list[str] = []
    for tick in _ticks(low, high):
        parts.append(f'<path class="grid" d="M{across(tick):.1f} 4V{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{across(tick):.1f}" y="{bottom + 15}">{tick:g}</text>')
    for number, (label, marks) in enumerate(chart.rows):
        y = 10 + _ROW * number
        parts.append(f'<text class="label" x="10" y="{y + 9}">{escape(_fit(label, 60))}</text>')
        parts.append(f'<path class="rule" d="M10 {y + 21}H{_WIDTH - 10}"/>')
        if label in chart.bounds:
            parts.append(f'<path class="bound" d="M{across(chart.bounds[label]):.1f} {y + 13}v16"/>')
        for name, value in sorted(marks.items(), key=lambda pair: pair[0] not in _MARKS):
            kind = "hollow" if name in _MARKS else "mark"
            colour = f"c{names.index(name) % _COLOURS}"
            title = f"<title>{escape(f'{label}: {name} {value:.4g}')}</title>"
            parts.append(
                f'<circle class="{kind} {colour}" cx="{across(value):.1f}" cy="{y + 21}" r="5">{title}</circle>'
            )
    height = bottom + 36
    parts.append(f'<text class="axis middle" x="{_WIDTH / 2}" y="{height - 4}">{escape(_fit(chart.axis))}</text>')
    keys = [_key(f"{'hollow' if name in _MARKS else 'mark'} c{i % _COLOURS}", name) for i, name in enumerate(names)]
    keys += [_key("bound", "bound")] if chart.bounds else []
    return _svg(chart.title, height, parts) + f'<p class="legend">{"".join(keys)}</p>'


def _svg(title: str, height: float, parts: Iterable[str]) -> str:
    mark = f"t-{slug(title)}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title)}" data-chart="{mark}">'
        f"{''.join(parts)}</svg>"
    )


def _legend(series: Sequence[Series]) -> str:
    keys = [_key(f"mark c{i % _COLOURS}", one.label) for i, one in enumerate(series)]
    keys += [_key("dotted", "predicted (dotted)")] if any(one.predicted for one in series) else []
    return f'<p class="legend">{"".join(keys)}</p>'


def _key(kind: str, name: str) -> str:
    shapes = {"bound": '<path class="bound" d="M6 1v10"/>', "dotted": '<path class="predicted c7" d="M0 6H12"/>'}
    shape = shapes.get(kind, f'<circle class="{kind}" cx="6" cy="6" r="4.5"/>')
    return f'<span><svg class="key" viewBox="0 0 12 12" aria-hidden="true">{shape}</svg>{escape(name)}</span>'


def _axes(chart: Chart, span_x: tuple[float, float], span_y: tuple[float, float], across: Place, up: Place) -> str:
    parts: list[str] = []
    floor = _HEIGHT - _BOTTOM
    for tick in _ticks(*span_x):
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {_TOP}V{floor}"/>')
        parts.append(f'<text class="tick middle" x="{across(tick):.1f}" y="{floor + 15}">{tick:g}</text>')
    for tick in _decades(*span_y) if chart.log else _ticks(*span_y):
        y = up(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    middle = (_TOP + floor) / 2
    parts.append(
        f'<text class="axis middle" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}">{escape(_fit(chart.x))}</text>'
    )
    parts.append(
        f'<text class="axis middle" transform="translate(12 {middle:g}) rotate(-90)">{escape(_fit(chart.y, 36))}</text>'
    )
    return "".join(parts)


def _fit(text: str, letters: int = 58) -> str:
    return text if len(text) <= letters else text[: letters - 3].rstrip() + "..."


def _edges(one: Series) -> list[tuple[float, float]]:
    """Of the band at each position; NaN where there is none."""
    if not one.error:
        return []
    pairs = zip(one.y, one.error, strict=True)
    return [(math.nan, math.nan) if y is None or e is None else (y - e, y + e) for y, e in pairs]


def _drawable(y: float | None, log: bool) -> bool:
    return y is not None and math.isfinite(y) and (y > 0.0 or not log)


def _pieces(x: Sequence[float], y: Sequence[float | None], log: bool) -> list[list[tuple[float, float]]]:
    """Runs of points without a gap."""
    found: list[list[tuple[float, float]]] = [[]]
    for one, value in zip(x, y, strict=False):
        if value is not None and _drawable(value, log):
            found[-1].append((one, value))
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _span(values: Iterable[float], pad: float = 0.0) -> tuple[float, float]:
    every = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(every), max(every)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = pad * (high - low)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a span."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten in a span of logarithms; of a narrow one, round numbers."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first < 1:
        return [tick for tick in _ticks(10.0**low, 10.0**high) if tick > 0.0]
    step = math.ceil((last - first) / 6)
    return [10.0**power for power in range(first, last + 1, step)]
