"""What of the papers is measured, and what would be worth measuring next."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from residrop.research.papers import PAPERS, all_rows
from residrop.research.papers.estimate import Estimator
from residrop.research.papers.rows import Figure, Row, Table
from residrop.research.papers.runner import value_of
from residrop.research.papers.work import Settings, Wanted, draws, fits, read_under
from residrop.training.recipe import Recipe

__all__ = ["Missing", "Status", "missing", "overview"]

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Status:
    """How far a table or figure is.

    Attributes:
        id: "swapout/table-2".
        title: what it shows.
        full: rows measured at full scale (figures: lines).
        scaled: by scale, rows measured with a shortened schedule.
        variants: by variant and scale ("resnet-20 at 0.01"), rows (curves) measured that way.
        short: rows measured with a shortened schedule at any scale.
        smaller: rows measured on a network of another size than the paper's.
        open: rows that can be measured and are not, at any scale.
        quoted: rows that cannot be run here: quoted from other work.
        drawing: a figure without data.
    """

    id: str
    title: str
    full: int
    scaled: dict[float, int]
    variants: dict[str, int]
    open: int
    quoted: int
    drawing: bool = False
    short: int = 0
    smaller: int = 0

    @property
    def shortened(self) -> list[str]:
        """What is measured other than in full, in words: "4 at 0.01", "2 (resnet-20 at 0.01)"."""
        scaled = [f"{count} at {scale:g}" for scale, count in self.scaled.items()]
        return scaled + [f"{count} ({how})" for how, count in self.variants.items()]


def overview(entries: Entries) -> list[Status]:
    """The status of every table and figure, paper by paper, under the recommended readings."""
    found: list[Status] = []
    for paper in PAPERS.values():
        found += [_of_table(table, entries) for table in paper.tables]
        found += [_of_figure(figure, entries) for figure in paper.figures]
    return found


def _of_table(table: Table, entries: Entries) -> Status:
    every = [_scales(table, row, entries) for row in table.rows if _measurable(row)]
    below = sorted({scale for scales in every for scale in scales if scale < 1.0}, reverse=True)
    read = _under_variants(table, entries)
    resized = {one.name for one in PAPERS[table.paper].variants if one.resizes}
    return Status(
        table.id,
        table.title,
        full=sum(1.0 in scales for scales in every),
        scaled={scale: sum(scale in scales for scales in every) for scale in below},
        variants=_counted(read),
        short=sum(any(scale < 1.0 for scale in scales) for scales in every),
        smaller=len({row for row, variant, _ in read if variant in resized}),
        open=sum(not scales for scales in every),
        quoted=len(table.rows) - len(every),
    )


def _of_figure(figure: Figure, entries: Entries) -> Status:
    every = [entry for entry in entries if draws(figure, entry)]
    found = [(entry["curve"], entry["scale"]) for entry in every if entry.get("variant") is None]
    drawn = {scale: {curve for curve, of in found if of == scale} for _, scale in found}
    return Status(
        figure.id,
        figure.title,
        full=len(drawn.get(1.0, ())),
        scaled={scale: len(drawn[scale]) for scale in sorted(drawn, reverse=True) if scale < 1.0},
        variants=_counted(
            (entry["curve"], entry["variant"], entry["scale"]) for entry in every if entry.get("variant")
        ),
        open=sum(all(curve.label not in labels for labels in drawn.values()) for curve in figure.curves),
        quoted=0,
        drawing=not figure.curves,
    )


def _under_variants(table: Table, entries: Entries) -> list[tuple[str, str, float]]:
    """Rows measured under a variant at a scale."""
    found: list[tuple[str, str, float]] = []
    for variant in PAPERS[table.paper].variants:
        for row in table.rows:
            name = f"{table.id}/{row.key}"
            recipe = read_under(table, row, variant)
            found += [
                (name, variant.name, entry["scale"])
                for entry in entries
                if entry["kind"] == "paper" and entry["metric"] == row.metric and recipe is not None
                if fits(entry, name, recipe, Settings(scale=entry["scale"], variant=variant.name))
            ]
    return found


def _counted(found: Iterable[tuple[str, str, float]]) -> dict[str, int]:
    """Rows or curves by variant and scale, each once."""
    return dict(sorted(Counter(f"{variant} at {scale:g}" for _, variant, scale in set(found)).items()))


def _measurable(row: Row) -> bool:
    return row.recipe is not None or row.instrument is not None


def _scales(table: Table, row: Row, entries: Entries) -> set[float]:
    """The scales at which a row is measured, in its own metric."""
    name = f"{table.id}/{row.key}"
    mine = [entry for entry in entries if entry["kind"] == "paper" and entry["id"] == name]
    return {
        entry["scale"]
        for entry in mine
        if entry["metric"] == row.metric and fits(entry, name, row.recipe, replace(Settings(), scale=entry["scale"]))
    }


class Missing(NamedTuple):
    """One training or measurement that would fill rows at full scale.

    Attributes:
        rows: ids of the rows.
        value: see `runner.value_of`, summed.
        seconds: estimated.
        command: that does it.
    """

    rows: tuple[str, ...]
    value: int
    seconds: float
    command: str

    @property
    def per_minute(self) -> float:
        """Value per minute; what takes less than a second counts as one."""
        return 60.0 * self.value / max(self.seconds, 1.0)


def missing(entries: Entries, estimator: Estimator, steps: int = 15) -> list[Missing]:
    """What is not measured at full scale, by value per minute.

    Rows of one training are one line. Rows of an instrument are one line for each table. Everything is estimated for
    one seed.
    """
    trained: dict[str, list[Wanted]] = {}
    measured: dict[str, list[Wanted]] = {}
    for table, row in all_rows():
        if not _measurable(row) or 1.0 in _scales(table, row, entries):
            continue
        where = measured if row.recipe is None else trained
        key = table.id if row.recipe is None else row.recipe.fingerprint()
        where.setdefault(key, []).append(Wanted(table, row, row.recipe))
    found = [_line(rows, _seconds_of(rows, estimator)) for rows in trained.values()]
    found += [_line(rows, _seconds_of_instruments(rows, estimator, steps)) for rows in measured.values()]
    return sorted(found, key=lambda one: -one.per_minute)


def _line(rows: Sequence[Wanted], seconds: float) -> Missing:
    first = rows[0].table
    keys = [wanted.row.key for wanted in rows if wanted.table.id == first.id]
    every = len(keys) == sum(_measurable(row) for row in first.rows)
    command = f"residrop reproduce {first.id}" + ("" if every else f" --rows {' '.join(keys)}")
    ids = tuple(wanted.id for wanted in rows)
    return Missing(ids, sum(map(value_of, ids)), seconds, command)


def _seconds_of(rows: Sequence[Wanted], estimator: Estimator) -> float:
    recipe: Recipe | None = rows[0].recipe
    return estimator.seconds(recipe) if recipe is not None else 0.0


def _seconds_of_instruments(rows: Sequence[Wanted], estimator: Estimator, steps: int) -> float:
    """Timed updates are those of each rule, once; other instruments take a second a row."""
    timed = {tuple(str(w.row.setting[name]) for name in ("network", "rule", "survival", "data")): w for w in rows
             if (w.row.instrument or "").startswith("timing")}  # fmt: skip
    rest = sum(not (wanted.row.instrument or "").startswith("timing") for wanted in rows)
    return float(rest) + sum(estimator.timing(wanted.row.setting, steps) for wanted in timed.values())
