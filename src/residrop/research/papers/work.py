"""From rows and curves to what has to be run: recipes under a variant, at a scale, with a seed, in a run directory."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.data import load
from residrop.research.papers import PAPERS, all_rows, find
from residrop.research.papers.rows import Figure, Metric, Row, Table, Variant
from residrop.training.recipe import Recipe
from residrop.training.setup import choose_device, data_digest

__all__ = [
    "DATA",
    "Settings",
    "Source",
    "Training",
    "Wanted",
    "draws",
    "fits",
    "read_under",
    "recipes_of_figure",
    "rows_filled_by",
    "rows_of_run",
    "seeds_missing",
    "source_of",
    "training",
    "variant_of",
    "wanted_of",
    "wanted_of_figure",
]


class _Set(NamedTuple):
    classes: int
    channels: int
    size: int | None  # None: any
    train: int
    test: int


DATA: dict[str, _Set] = {
    "digits": _Set(10, 1, 8, 1442, 355),
    "cifar10": _Set(10, 3, 32, 50_000, 10_000),
    "cifar100": _Set(100, 3, 32, 50_000, 10_000),
    "svhn": _Set(10, 3, 32, 604_388, 26_032),
    "imagenet": _Set(1000, 3, None, 1_281_167, 50_000),
}
"""What tells the papers' data apart from others: classes, channels, pixels, images."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How rows are to be filled.

    Attributes:
        scale: of the schedule: epochs = max(1, round(scale * epochs)); all times in a recipe are shares of them.
        seeds: number of seeds, 0 upwards.
        variant: name of another reading, or None for the recommended one.
        data: where the data are, if not where the recipe says.
        device: as in a recipe.
        steps: timed updates of timing rows.
        points: positions of a figure's points that are to be trained; all, if none.
        compile: whether networks are compiled; None is on a GPU.
    """

    scale: float = 1.0
    seeds: int = 1
    variant: str | None = None
    data: str | None = None
    device: str = "auto"
    steps: int = 15
    points: tuple[float, ...] = ()
    compile: bool | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.scale <= 1.0:
            raise ConfigError(f"scale is {self.scale}; it is a share of the full schedule: give a number in (0, 1]")
        check_whole("seeds", self.seeds, least=1)
        check_whole("steps", self.steps, least=1)


class Source(NamedTuple):
    """What `--data` turned out to be.

    Attributes:
        kind: which of `DATA`, or None if it is other data.
        found: what it is, in words.
        images: number of training images, held-out ones included.
        digest: of them.
    """

    kind: str | None
    found: str
    images: int
    digest: str


class Wanted(NamedTuple):
    """A row, and the recipe of it under the variant (None for rows of instruments)."""

    table: Table
    row: Row
    recipe: Recipe | None

    @property
    def id(self) -> str:
        """ "swapout/table-2/0.5-0.5-stochastic"."""
        return f"{self.table.id}/{self.row.key}"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Its metric, then those shown beside."""
        return (self.row.metric, *self.row.also)


class Training(NamedTuple):
    """One run.

    Attributes:
        name: of its directory: network and rule to be readable, then what identifies it: fingerprint of the recipe at
            full scale, device, scale and seed, and of other data than the paper's their digest. Rows of one recipe
            share it.
        full: the recipe at full scale with seed 0, under the variant.
        recipe: what is trained.
        seed: its seed.
    """

    name: str
    full: Recipe
    recipe: Recipe
    seed: int


def variant_of(paper: str, name: str | None) -> Variant | None:
    """The variant of that name; ConfigError with the paper's names if there is none."""
    if name is None:
        return None
    variants = {variant.name: variant for variant in PAPERS[paper].variants}
    if name not in variants:
        close = get_close_matches(name, variants, n=3, cutoff=0.4) or list(variants)
        raise ConfigError(f"{paper} has no variant {name!r}; did you mean {', '.join(close)}?")
    return variants[name]


def read_under(table: Table, row: Row, variant: Variant | None) -> Recipe | None:
    """The recipe of a row under a variant; None without a recipe, or if the variant is no reading of it."""
    if variant is None or row.recipe is None:
        return row.recipe
    return variant.of(row.recipe) if variant.applies(table, row) else None


def wanted_of(table: Table, keys: Sequence[str], settings: Settings) -> list[Wanted]:
    """The rows to fill: those of `keys` (all, if none), without quoted ones and those the variant does not concern.

    Raises:
        ConfigError: an unknown key or variant, or no row that could be filled.
    """
    variant = variant_of(table.paper, settings.variant)
    rows = [table.row(key) for key in dict.fromkeys(keys)] or table.rows
    found: list[Wanted] = []
    for row in rows:
        recipe = read_under(table, row, variant)
        if recipe is not None or (row.instrument is not None and variant is None):
            found.append(Wanted(table, row, recipe))
    if not found:
        why = f"variant {variant.name!r} is no reading of them" if variant else "they are quoted from other work"
        raise ConfigError(f"no row of {table.id} that was asked for can be measured: {why}; choose other --rows")
    return found


def wanted_of_figure(figure: Figure, settings: Settings) -> list[Wanted]:
    """The rows that a figure's points and axes take their values from; under a variant only those that are trained."""
    names = [point.row for curve in figure.curves for point in curve.points]
    names += [point.x_row for curve in figure.curves for point in curve.points]
    names += [name for curve in figure.curves for name in curve.rows]
    found: list[Wanted] = []
    for name in dict.fromkeys(filter(None, names)):
        table_name, _, key = name.partition("/")
        table = find(f"{figure.paper}/{table_name}")
        if isinstance(table, Table) and (settings.variant is None or table.row(key).recipe is not None):
            found += wanted_of(table, [key], settings)
    return found


def recipes_of_figure(figure: Figure, settings: Settings) -> list[Recipe]:
    """The trainings that a figure's curves and points draw by themselves, under the variant; of the points those that
    are asked for.

    Raises:
        ConfigError: an unknown variant or one that does not concern the figure, or no point where one was asked for.
    """
    variant = variant_of(figure.paper, settings.variant)
    if variant is not None and figure.name not in variant.concerns:
        raise ConfigError(f"variant {variant.name!r} is no reading of {figure.id}; leave --variant out")
    points = [point for curve in figure.curves for point in curve.points]
    places = {point.x for point in points}
    if unknown := set(settings.points) - places:
        there = ", ".join(f"{place:g}" for place in sorted(places)) or "none"
        raise ConfigError(f"{figure.id} has no point at {min(unknown):g}; it has {there}: choose other --points")
    every = [curve.recipe for curve in figure.curves]
    every += [point.recipe for point in points if not settings.points or point.x in settings.points]
    found = dict.fromkeys(recipe for recipe in every if recipe is not None)
    return list(found) if variant is None else list(dict.fromkeys(map(variant.of, found)))


def training(recipe: Recipe, seed: int, settings: Settings, source: Source | None) -> Training:
    """The run of a recipe (at full scale, under its variant) with a seed."""
    full = recipe.replace(seed=0)
    epochs = max(1, round(settings.scale * recipe.epochs))
    where = choose_device(settings.device).type
    compiled = where == "cuda" if settings.compile is None else settings.compile
    scaled = recipe.replace(
        seed=seed,
        epochs=epochs,
        data=settings.data or recipe.data,
        device=settings.device,
        compile=compiled and recipe.budget is None and not recipe.watch,  # measurements need branches as they are
    )
    other = ""
    if source is not None and source.kind is None:
        other = f"-data-{source.digest[:8]}"
        if recipe.validation:  # the same share is held out
            share = recipe.validation / DATA[recipe.data].train if recipe.data in DATA else 0.1
            scaled = scaled.replace(validation=max(1, round(share * source.images)))
    parts = (recipe.network, recipe.rule, full.fingerprint(), where, f"scale{settings.scale:g}", f"seed{seed}")
    return Training("-".join(parts) + other, full, scaled, seed)


def source_of(data: str) -> Source:
    """Which of the papers' data a source holds; it is read for that."""
    splits = load(data)
    digest = data_digest(splits)
    found = (len(splits.classes), splits.channels, splits.size, len(splits.train), len(splits.test))
    for kind, one in DATA.items():
        if found == (one.classes, one.channels, one.size or splits.size, one.train, one.test):
            return Source(kind, kind, found[3], digest)
    text = f"{found[3]} + {found[4]} images of {found[0]} classes, {found[1]} x {found[2]} x {found[2]}"
    return Source(None, text, found[3], digest)


def rows_filled_by(full: Recipe, variant: str | None, paper: str) -> Iterator[tuple[Table, Row]]:
    """All rows, of any table, that a run of this recipe fills; under a variant those of the paper that it concerns."""
    mark = full.fingerprint()
    for table, row in all_rows():
        if row.recipe is None or (variant is not None and table.paper != paper):
            continue
        recipe = read_under(table, row, variant_of(paper, variant))
        if recipe is not None and recipe.replace(seed=0).fingerprint() == mark:
            yield table, row


_NAMED = re.compile(r"-(?P<mark>[0-9a-f]{16})-[a-z]+-scale(?P<scale>[0-9.e+-]+)-seed[0-9]+$")


def rows_of_run(name: str) -> tuple[str, ...]:
    """The rows that a run directory of `training` fills, by its name, with variant and scale where they are not the
    paper's; none for other names, and for runs on other data than the paper's."""
    if (found := _NAMED.search(name)) is None:
        return ()
    scale = "" if float(found["scale"]) == 1.0 else f", schedule x {float(found['scale']):g}"
    rows: list[str] = []
    for table, row in all_rows():
        for variant in (None, *PAPERS[table.paper].variants):
            recipe = read_under(table, row, variant)
            if recipe is not None and recipe.replace(seed=0).fingerprint() == found["mark"]:
                rows.append(f"{table.id}/{row.key}" + (f", {variant.name}" if variant else "") + scale)
    return tuple(rows)


def fits(entry: Mapping[str, Any], row_id: str, recipe: Recipe | None, settings: Settings) -> bool:
    """Whether an entry of the ledger is of this row under these settings; instruments know no scale."""
    return (
        entry["kind"] == "paper"
        and entry["id"] == row_id
        and entry["variant"] == (settings.variant if recipe else None)
        and entry["scale"] == (settings.scale if recipe else 1.0)
        and entry["recipe"] == (recipe.replace(seed=0).fingerprint() if recipe else None)
    )


def draws(figure: Figure, entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the ledger is a curve of this figure, of the recipe that it now has."""
    curve = next((one for one in figure.curves if one.label == entry.get("curve")), None)
    if entry.get("figure") != figure.id or curve is None:
        return False
    if curve.recipe is None or entry.get("recipe") is None:
        return True
    name = entry.get("variant")
    variant = next((one for one in PAPERS[figure.paper].variants if one.name == name), None)
    recipe = curve.recipe if variant is None else variant.of(curve.recipe)
    return (name is None) == (variant is None) and recipe.replace(seed=0).fingerprint() == entry["recipe"]


def seeds_missing(entries: Sequence[Mapping[str, Any]], wanted: Wanted, settings: Settings, device: str) -> list[int]:
    """The seeds with which a row is still to be measured.

    An error that was measured elsewhere counts, on whichever device most are; a time only on the `device` itself.
    """
    timed = (wanted.row.instrument or "").startswith("timing")
    seeds = 1 if wanted.row.instrument == "counts" else settings.seeds  # arithmetic knows no seed
    missing: set[int] = set()
    for metric in wanted.metrics:
        done: dict[str, set[int]] = {}
        for entry in entries:
            mine = fits(entry, wanted.id, wanted.recipe, settings) and entry["metric"] == metric
            if mine and (not timed or entry["device"] == device):
                done.setdefault(entry["device"], set()).update(entry["seeds"])
        missing |= min((set(range(seeds)) - found for found in done.values()), key=len, default=set(range(seeds)))
    return sorted(missing)
