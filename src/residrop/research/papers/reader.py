"""Reads papers from their TOML files: the fields of `rows.Paper` and of what it holds, by name.

Two things are shorter there. An entry of `rows`, `curves` or `points` that has a list of the same name stands for the
entries of that list: each has the other fields of the entry, too, unless it says otherwise (`setting` and `recipe` key
by key). A recipe is the name of a preset, or fields over its `base`. The string "None" stands for None.
"""

import tomllib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

from residrop.research.papers.rows import Claim, Curve, Figure, Paper, Point, Row, Table, Variant
from residrop.training.presets import PRESETS, read_recipe

__all__ = ["NAMES", "read"]

NAMES = ("stochastic-depth", "swapout", "depth-dropout", "sd-regularization")
"""The papers that have a file, in order of publication."""

Values = dict[str, Any]


def read(name: str) -> Paper:
    """The paper of the file `name`.toml."""
    values = _plain(tomllib.loads((files("residrop.research.papers") / f"{name}.toml").read_text("utf-8")))
    parts = {
        "tables": tuple(_table(name, one) for one in values.pop("tables")),
        "figures": tuple(_figure(name, one) for one in values.pop("figures")),
        "variants": tuple(Variant(**one) for one in values.pop("variants")),
        "claims": tuple(Claim(**one) for one in values.pop("claims")),
    }
    return Paper(**{"name": name, "arxiv": None, **values, **parts})


def _table(paper: str, values: Values) -> Table:
    where = f"{paper}/{values['name']}"
    rows = tuple(Row(**_with_recipe(one, where)) for one in _each(values.pop("rows"), "rows"))
    return Table(paper=paper, rows=rows, **values)


def _figure(paper: str, values: Values) -> Figure:
    where = f"{paper}/{values['name']}"
    curves = tuple(_curve(one, where) for one in _each(values.pop("curves", ()), "curves"))
    return Figure(paper=paper, curves=curves, **values)


def _curve(values: Values, where: str) -> Curve:
    points = tuple(Point(**_with_recipe(one, where)) for one in _each(values.pop("points", ()), "points"))
    return Curve(points=points, **_with_recipe(values, where))


def _each(entries: Iterable[Values], name: str) -> Iterator[Values]:
    """The entries, those that have a list called `name` replaced by the list's, which add to what the entry says."""
    for entry in entries:
        shared = {key: value for key, value in entry.items() if key != name}
        if name not in entry:
            yield shared
        for one in _each(entry.get(name, ()), name):
            inner = {key: {**shared[key], **one[key]} for key in ("setting", "recipe") if key in shared and key in one}
            yield {**shared, **one, **inner}


def _with_recipe(values: Values, where: str) -> Values:
    found = values.get("recipe")
    if found is None:
        return values
    return {**values, "recipe": PRESETS[found].recipe if isinstance(found, str) else read_recipe(found, where)}


def _plain(value: Any) -> Any:
    """What TOML has, with tuples for lists."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return tuple(_plain(part) for part in value)
    return None if value == "None" else value
