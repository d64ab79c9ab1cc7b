"""Recipes by name: the main rows of the four papers at full protocol, and the digits run of the README; or from a file.

The named ones are the tables of `recipes/*.toml`, whose comments and notes say what the papers leave open. A file of
one's own holds one such table at its top level: fields of `Recipe`, and, each optional,

    base: name or .toml file of the recipe whose fields hold where the table is silent; without it, the defaults do.
        A file is looked for beside the one that names it.
    title, published, note: see `Preset`; they are not taken from the base.

The string "None" stands for None, as on the command line.
"""

import os
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from residrop.common.errors import ConfigError
from residrop.common.lazy import Lazy
from residrop.training.recipe import Recipe

__all__ = ["PRESETS", "Preset", "preset", "read_recipe", "short_name", "train_command"]

_FILES = ("digits", "stochastic-depth", "swapout", "depth-dropout", "sd-regularization")  # in order of publication
_ABOUT = {"title": str, "published": float, "note": str}


@dataclass(frozen=True)
class Preset:
    """A named recipe.

    Attributes:
        recipe: the protocol.
        title: one line for listings.
        published: test error in percent as published, or None.
        note: readings where the paper is silent.
    """

    recipe: Recipe
    title: str
    published: float | None = None
    note: str = ""


def preset(name: str) -> Preset:
    """The preset of that name, or the recipe in the TOML file of that path.

    Args:
        name: a name in `PRESETS`, or a path that ends in ".toml", absolute or relative to the working directory.

    Raises:
        ConfigError: no preset has that name (the message has the closest ones); the file cannot be read or is not TOML;
            a field is unknown, of the wrong type or out of range; a base is unknown, or leads back to the recipe.
    """
    return _read(os.path.normpath(name) if _is_file(name) else name, ())


def short_name(name: str) -> str:
    """What runs of `preset(name)` are called: its name, of a file without folder and ending."""
    return Path(name).stem if _is_file(name) else name


def read_recipe(table: Mapping[str, Any], where: str, users: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a table that holds fields of `Recipe` and, perhaps, a `base`.

    Args:
        table: as tomllib reads it.
        where: name or file of the recipe, for messages and to find the file of a base.
        users: the recipes that it is a base of, the first one first.

    Raises:
        ConfigError: as of `preset`.
    """
    values, fields, start = dict(table), get_type_hints(Recipe), Recipe()
    if (base := values.pop("base", None)) is not None:
        if not isinstance(base, str):
            raise ConfigError(
                f"recipe {where}: base is {base!r}; give the name or the .toml file of a recipe in quotes"
            )
        name = os.path.normpath(Path(where).parent / base) if _is_file(base) else base
        start = _read(name, (*users, where)).recipe
    if unknown := next((key for key in values if key not in fields), None):
        close = get_close_matches(unknown, ("base", *_ABOUT, *fields), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"recipe {where} has no field {unknown!r}; {hint}`residrop train --help` lists all")
    try:
        return start.replace(**{key: _value(value, fields[key]) for key, value in values.items()})
    except ConfigError as error:
        raise ConfigError(f"recipe {where}: {error}") from None


def _is_file(name: str) -> bool:
    return name.endswith(".toml")


@cache
def _tables() -> dict[str, dict[str, Any]]:
    """The tables of the package's own files."""
    folder = files("residrop.training") / "recipes"
    read = [tomllib.loads((folder / f"{name}.toml").read_text("utf-8")) for name in _FILES]
    return {name: table for tables in read for name, table in tables.items()}


PRESETS = Lazy(lambda: list(_tables()), preset)
"""The package's own recipes by name, in order of publication; each is read when it is first asked for."""


def _table(name: str, users: tuple[str, ...]) -> dict[str, Any]:
    what = f"{name!r}, the base of {users[-1]}," if users else repr(name)
    if not _is_file(name):
        if name in PRESETS.names():
            return _tables()[name]
        close = get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)[:3]
        raise ConfigError(
            f"recipe {what} is unknown; did you mean {', '.join(close)}? `residrop recipes` lists all, and a "
            "file's name ends in .toml"
        )
    try:
        return tomllib.loads(Path(name).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"recipe {what} cannot be read: {error.strerror}; give the path of a TOML file, or a name that "
            "`residrop recipes` lists"
        ) from None
    except ValueError as error:
        raise ConfigError(f"recipe {what} is not TOML: {error}; write lines such as epochs = 30") from None


def _read(name: str, users: tuple[str, ...]) -> Preset:
    """The preset of a name or file that is the base of `users`, if of any."""
    if name in users:
        raise ConfigError(f"recipe {' is based on '.join((*users, name))}; take out one of these bases")
    table = _table(name, users)
    about = {key: _value(table[key], kind) for key, kind in _ABOUT.items() if key in table}
    for key, value in about.items():
        if not isinstance(value, _ABOUT[key]):
            wanted = "a number" if key == "published" else "text in quotes"
            raise ConfigError(f"recipe {name}: {key} is {value!r}; give {wanted}")
    recipe = read_recipe({key: value for key, value in table.items() if key not in _ABOUT}, name, users)
    about.setdefault("title", f"based on {table['base']}" if "base" in table else "a recipe of your own")
    return Preset(recipe, **about)


def _value(value: Any, kind: Any) -> Any:
    """A value of a table as a field of that type has it: TOML has no None and no tuples, and 1 is short for 1.0."""
    if isinstance(value, list | tuple):
        return tuple(_value(part, kind) for part in value)
    if value == "None" and NoneType in get_args(kind):
        return None
    return float(value) if type(value) is int and float in (kind, *get_args(kind)) else value


def train_command(recipe: Recipe, *, shared: bool = False) -> str:
    """The command that trains by a recipe, quoted for a shell: what differs from the defaults of `residrop train`.

    Args:
        recipe: of a run.
        shared: leave out the seed, and where on this machine the data are.
    """
    if shared:
        kind, _, place = recipe.data.partition(":")
        recipe = recipe.replace(seed=0, data=f"{kind}:PATH" if place else kind)
    base = preset("digits").recipe
    words = ["residrop", "train"]
    for one in fields(recipe):
        value, option = getattr(recipe, one.name), one.name.replace("_", "-")
        if value == getattr(base, one.name):
            continue
        if isinstance(one.default, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)
