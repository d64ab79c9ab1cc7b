"""The papers' tables and figures beside what was measured, full and shortened schedules in columns of their own."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from residrop.research.papers.rows import METRICS, Figure, Metric, Paper, Row, Table
from residrop.research.report.blocks import MISSING, QUOTED, Block, Chart, Dots, Grid, Section, Series, Text, slug
from residrop.research.report.placing import Entries, Entry, Placed, drawings
from residrop.research.report.verdicts import verdict_on_curves, verdicts_on

__all__ = ["section_of_paper"]


_COMPARED: tuple[Metric, ...] = ("share_saved", "blocks", "growth_rate", "orders_of_magnitude")  # on any machine
_SHORT = "scale {scale:g}"
_VARIANT = "Variant {name}: {why}."
_APART = (
    'Columns headed "scale" come from shortened schedules (that share of the paper\'s epochs): not comparable in '
    "absolute terms with what was published, only with one another."
)


class _Line(NamedTuple):
    """A line of a table: a row in one metric, under one variant, on one device."""

    row: Row
    metric: Metric
    variant: str | None
    device: str
    entries: tuple[Entry, ...]  # one per scale

    def at(self, scale: float) -> Entry | None:
        return next((entry for entry in self.entries if entry["scale"] == scale), None)


def section_of_paper(paper: Paper, entries: Entries, found: Sequence[Placed]) -> Section:
    """A paper: its tables with what was measured, then the figures that were drawn, then what was not.

    Args:
        paper: the paper.
        entries: of the ledger.
        found: those of them that belong to its rows, see `belonging`.
    """
    where = f"{paper.authors} ({paper.year}), {paper.venue}" + (f", arXiv {paper.arxiv}" if paper.arxiv else "")
    section = Section(paper.title, slug(paper.name), [Text(where, "aside")])
    section.sections = [_section_of_table(paper, table, found) for table in paper.tables]
    drawn = [_section_of_figure(paper, figure, entries) for figure in paper.figures]
    section.sections += [one for one in drawn if one is not None]
    left = [figure for figure, one in zip(paper.figures, drawn, strict=True) if one is None and figure.curves]
    if left:
        rows = tuple((figure.id, figure.title) for figure in left)
        grid = Grid(("figure", "what it shows"), rows, left=2)
        section.sections.append(Section("Figures not yet drawn", f"{slug(paper.name)}-figures-open", [grid]))
    return section


def _digits_of(metric: str) -> int:
    """Digits behind the point of a metric."""
    return {"growth_rate": 3, "minutes": 1, "milliseconds": 1}.get(metric, 2)


def _with_spread(values: Sequence[float], errors: Sequence[float] | None, digits: int = 2) -> str:
    """Mean, and standard deviation over several seeds, or the standard error of a single one, where it is known."""
    mean = f"{fmean(values):.{digits}f}"
    if len(values) > 1:
        return f"{mean} ± {stdev(values):.{digits}f}"
    return f"{mean} ± {errors[0]:.{digits}f} se" if errors else mean


# Tables


def _section_of_table(paper: Paper, table: Table, known: Sequence[Placed]) -> Section:
    found = [(row, variant, entry) for of, row, variant, entry in known if of is table]
    lines = [line for row in table.rows for line in _lines(row, [one for one in found if one[0] is row])]
    scales = sorted({entry["scale"] for _, _, entry in found if entry["scale"] < 1.0}, reverse=True)
    blocks: list[Block] = [_grid(table, lines, scales)]
    metrics: list[Metric] = [*(row.metric for row in table.rows), *(line.metric for line in lines)]
    devices = sorted({line.device for line in lines} - {""})
    about = "; ".join(map(_unit, dict.fromkeys(metrics))) + (f". Device: {devices[0]}" if len(devices) == 1 else "")
    blocks.append(Text(f"{about}.", "aside"))
    if scales:
        blocks.append(Text(_APART, "aside"))
    shown = {variant for _, variant, _ in found}
    blocks += [Text(_VARIANT.format(name=v.name, why=v.why), "aside") for v in paper.variants if v.name in shown]
    if table.note:
        blocks.append(Text(f"Note: {table.note}", "aside"))
    blocks += _dots(table, lines)
    for claim in paper.claims:
        if claim.where == table.name:
            blocks += verdicts_on(claim, known)
    return Section(f"{_place(table.name)}: {table.title}", slug(table.id), blocks)


def _unit(metric: Metric) -> str:
    unit, colon, meaning = METRICS[metric].partition(": ")
    name = metric.replace("_", " ")
    return f"{name} ({unit}): {meaning}" if colon and unit != name else f"{name}: {meaning or unit}"


def _lines(row: Row, found: Sequence[tuple[Row, str | None, Entry]]) -> Iterator[_Line]:
    """At least one line of a row, the recommended reading first; the newest entry counts where two are alike."""
    seen = False
    for metric in (row.metric, *row.also):
        groups: dict[tuple[str | None, str], dict[float, Entry]] = {}
        for _, variant, entry in sorted(found, key=lambda one: one[2]["date"]):
            if entry["metric"] == metric:
                groups.setdefault((variant, entry["device"]), {})[entry["scale"]] = entry
        for (variant, device), by_scale in sorted(groups.items(), key=lambda one: (one[0][0] or "", one[0][1])):
            seen = True
            yield _Line(row, metric, variant, device, tuple(by_scale.values()))
    if not seen:
        yield _Line(row, row.metric, None, "", ())


def _grid(table: Table, lines: Sequence[_Line], scales: Sequence[float]) -> Grid:
    several = len({row.metric for row in table.rows} | {line.metric for line in lines}) > 1
    theory = any(row.theory is not None for row in table.rows)
    full = any(line.at(1.0) for line in lines)
    devices = len({line.device for line in lines} - {""}) > 1  # one is named below
    head = ["row", "published", *(["predicted"] if theory else [])]
    head += ["measured", *(["difference", "seeds"] if full else [])]
    first = len(head)
    head += [_SHORT.format(scale=scale) for scale in scales]
    ends = [name for name, wanted in (("metric", several), ("device", devices)) if wanted]
    rows: list[tuple[str, ...]] = []
    for line in lines:
        row, digits = line.row, _digits_of(line.metric)
        own = line.metric == row.metric
        cells = [_label(line)]
        spread = f" ± {row.spread:g}" if row.spread is not None else ""
        cells.append(f"{row.published:.{digits}f}{spread}" if own and row.published is not None else "")
        if theory:
            cells.append(f"{row.theory:.{digits}f}" if own and row.theory is not None else "")
        cells += _in_full(line, digits)[: 3 if full else 1]
        cells += [_shortened(line.at(scale), digits) for scale in scales]
        words = {"metric": line.metric.replace("_", " "), "device": line.device}
        rows.append((*cells, *(words[name] for name in ends)))
    apart = frozenset(range(first, first + len(scales)))
    last = frozenset(range(len(head), len(head) + len(ends)))
    return Grid((*head, *ends), tuple(rows), apart=apart, words=last)


def _label(line: _Line) -> str:
    label = f"{line.row.label}, {line.row.column}" if line.row.column else line.row.label
    return f"{label} (variant: {line.variant})" if line.variant else label


def _in_full(line: _Line, digits: int) -> list[str]:
    """Measured, difference and seeds."""
    entry = line.at(1.0)
    if entry is None:
        able = line.row.own and (line.row.recipe is not None or line.row.instrument is not None)
        return [MISSING if able else QUOTED, "", ""]
    values = entry["measured"]
    own = line.metric == line.row.metric and line.row.published is not None
    difference = f"{fmean(values) - line.row.published:+.{digits}f}" if own and line.row.published is not None else ""
    return [_with_spread(values, entry.get("standard_errors"), digits), difference, str(len(values))]


def _shortened(entry: Entry | None, digits: int) -> str:
    if entry is None:
        return ""
    count = len(entry["seeds"])
    about = f"{count} seed{'s' if count > 1 else ''}"
    about += f", {entry['epochs']} epoch{'s' if entry['epochs'] > 1 else ''}" if entry["epochs"] else ""
    return f"{_with_spread(entry['measured'], entry.get('standard_errors'), digits)} ({about})"


def _dots(table: Table, lines: Sequence[_Line]) -> list[Block]:
    """Published, predicted and measured of what does not depend on the machine, where two rows or more are measured."""
    blocks: list[Block] = []
    for metric in _COMPARED:
        rows: list[tuple[str, dict[str, float]]] = []
        for line in lines:
            entry = line.at(1.0)
            if line.metric != metric or line.row.metric != metric or entry is None:
                continue
            marks = {
                "published": line.row.published,
                "predicted": line.row.theory,
                "measured": fmean(entry["measured"]),
            }
            rows.append((_label(line), {name: value for name, value in marks.items() if value is not None}))
        if len(rows) > 1:
            title = f"{_place(table.name)}, {metric.replace('_', ' ')}: published and measured"
            blocks.append(Dots(title, _unit(metric).partition(":")[0], tuple(rows)))
    return blocks


def _place(name: str) -> str:
    return name.replace("-", " ").capitalize()


# Figures


def _section_of_figure(paper: Paper, figure: Figure, entries: Entries) -> Section | None:
    """The curves of a figure, a picture for each variant, scale and device; None if the ledger has nothing of it."""
    found = drawings(figure, entries)
    if not found:
        return None
    blocks: list[Block] = []
    for setting, device, lines in found:
        scale, variant = setting
        about = "full schedule" if scale == 1.0 else f"scale {scale:g}: schedules shortened to that share of the epochs"
        why = next((one.why for one in paper.variants if one.name == variant), "")
        about += f"; variant {variant}: {why}" if variant else ""
        seeds = max((len(line.get("seeds") or ()) for line in lines), default=1)
        left_out = len({curve.label for curve in figure.curves} - {line["curve"] for line in lines})
        caption = f"{about}; {seeds} seed{'s' if seeds > 1 else ''}; {device}"
        caption += f"; {left_out} of {len(figure.curves)} curves {MISSING}" if left_out else ""
        notes = {f"{line['curve']}: {line['note']}" for line in lines if line.get("note")}
        blocks += _picture(figure, lines, caption)
        blocks += [Text("; ".join(sorted(notes)) + ".", "aside")] if 0 < len(notes) <= 6 else []
        claims = [claim for claim in paper.claims if claim.where == figure.name]
        blocks += [verdict_on_curves(claim, lines, setting) for claim in claims]
    if figure.note:
        blocks.append(Text(f"Note: {figure.note}", "aside"))
    return Section(f"{_place(figure.name)}: {figure.title}", slug(figure.id), blocks)


def _picture(figure: Figure, lines: Sequence[Entry], caption: str) -> list[Block]:
    if figure.shape == "heat map":
        columns = sorted({x for line in lines for x in line["x"]})
        cells = [dict(zip(line["x"], line["y"], strict=True)) for line in lines]
        rows = tuple(
            (line["curve"], *("" if (value := row.get(x)) is None else f"{value:.2f}" for x in columns))
            for line, row in zip(lines, cells, strict=True)
        )
        return [Text(caption, "aside"), Grid((figure.y, *(f"{x:g}" for x in columns)), rows)]
    series = tuple(
        Series(line["curve"], line["x"], line["y"], line.get("error"), line.get("predicted")) for line in lines
    )
    return [Chart(figure.title, figure.x, figure.y, series, figure.scale == "log", caption)]
