"""The schema of the ledger's documents, and what is wrong with one."""

import datetime
import math
import re
from collections.abc import Mapping
from typing import Any

from residrop.common.errors import RunError

__all__ = ["SCHEMA", "check", "identity"]

SCHEMA = 1
"""Version of the schema."""

Entry = dict[str, Any]

_TOP = {"schema", "what", "command", "date", "device", "versions", "entries"}
_PAPER = {
    *("kind", "id", "metric", "published", "measured", "seeds", "scale", "epochs", "recipe", "variant"),
    *("wall_seconds", "note"),
}
OPTIONAL = {"standard_errors"}  # of each measured value, where the instrument knows one
_PATH = re.compile(r"(?:^|[\s='\"(])(?:~|/[\w.@+-]+|[A-Za-z]:\\[\w.@+-]*)[/\\][\w.@+-]")


def identity(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two entries of one device have in common if their values may stand side by side."""
    if entry["kind"] == "paper":
        names = ("id", "metric", "recipe", "variant", "scale", "epochs")
        return ("paper", *(entry[name] for name in names))
    return ("curve", *(entry.get(name) for name in ("figure", "curve", "recipe", "variant", "scale", "seed")))


def check(found: object, where: str = "the document") -> None:
    """RunError, naming the place, if `found` is no document of the ledger; nothing if it is one."""
    top = _mapping(found, where)
    _keys(top, _TOP, set(), where)
    if top["schema"] != SCHEMA:
        raise _wrong(where, "schema", top["schema"], f"{SCHEMA}; it was written by another version")
    for name in ("what", "command", "device"):
        _text(top[name], f"{where}: {name}", empty=False)
    try:
        datetime.date.fromisoformat(top["date"])
    except (TypeError, ValueError):
        raise _wrong(where, "date", top["date"], 'a date such as "2026-11-21"') from None
    for name, value in _mapping(top["versions"], f"{where}: versions").items():
        _text(value, f"{where}: versions.{name}")
    if not isinstance(top["entries"], list) or not top["entries"]:
        raise _wrong(where, "entries", top["entries"], "a list of at least one entry")
    identities: set[tuple[Any, ...]] = set()
    for number, entry in enumerate(top["entries"]):
        place = f"{where}: entries[{number}]"
        kind = _mapping(entry, place).get("kind")
        if kind == "paper":
            _check_paper(entry, place)
            if identity(entry) in identities:
                raise RunError(f"{place}: {entry['id']} is there twice with one recipe, scale and variant; merge them")
            identities.add(identity(entry))
        elif kind == "measurement":
            _check_measurement(entry, place)
        else:
            raise _wrong(place, "kind", kind, '"paper" or "measurement"')


def _check_paper(entry: Entry, where: str) -> None:
    _keys(entry, _PAPER, OPTIONAL, where)
    if not isinstance(entry["id"], str) or entry["id"].count("/") != 2 or not all(entry["id"].split("/")):
        raise _wrong(where, "id", entry["id"], '"paper/table/row"')
    _text(entry["metric"], f"{where}: metric", empty=False)
    _text(entry["note"], f"{where}: note")
    for name in ("recipe", "variant"):
        if entry[name] is not None:
            _text(entry[name], f"{where}: {name}", empty=False)
    if entry["published"] is not None:
        _number(entry["published"], f"{where}: published")
    if not 0.0 < _number(entry["scale"], f"{where}: scale") <= 1.0:
        raise _wrong(where, "scale", entry["scale"], "a share of the full training in (0, 1]")
    epochs = entry["epochs"]
    if epochs is not None and not (_whole(epochs) and epochs >= 1):
        raise _wrong(where, "epochs", epochs, "a whole number of at least 1, or null where nothing was trained")
    seeds = entry["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(map(_whole, seeds)) or len(set(seeds)) != len(seeds):
        raise _wrong(where, "seeds", seeds, "different whole numbers, at least one")
    for name in ("measured", "wall_seconds", "standard_errors"):
        if name not in entry:
            continue
        values = entry[name]
        if not isinstance(values, list) or len(values) != len(seeds):
            raise _wrong(where, name, values, f"one number per seed, {len(seeds)} in all")
        for value in values:
            _number(value, f"{where}: {name}")


def _check_measurement(entry: Entry, where: str) -> None:
    if len(entry) < 2:
        raise RunError(f"{where}: the measurement is empty; give at least one number")
    for name, value in entry.items():
        for one in value if isinstance(value, list) else [value]:
            place = f"{where}: {name}"
            if isinstance(one, (dict, list)):
                raise RunError(
                    f"{place} is nested; give scalars and lists of scalars (residrop.research.ledger.flat makes them)"
                )
            if isinstance(one, str):
                _text(one, place)
            elif one is not None and not isinstance(one, bool):
                _number(one, place)


def _keys(found: Mapping[str, Any], wanted: set[str], optional: set[str], where: str) -> None:
    if missing := sorted(wanted - set(found)):
        raise RunError(f"{where}: {', '.join(missing)} missing; give {', '.join(sorted(wanted))}")
    if unknown := sorted(set(found) - wanted - optional):
        raise RunError(f"{where}: {', '.join(unknown)} unknown; the schema has {', '.join(sorted(wanted | optional))}")


def _mapping(found: object, where: str) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise RunError(f"{where} is {type(found).__name__}; give a JSON object")
    return found


def _text(value: object, where: str, *, empty: bool = True) -> None:
    if not isinstance(value, str) or not (value or empty):
        raise RunError(f"{where} is {value!r}; give a text")
    if found := _PATH.search(value):
        raise RunError(f"{where} holds a path, {found[0].strip()}...; say what it is, not where it lies on one machine")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise RunError(f"{where} is {value!r}; give a finite number")
    return value


def _wrong(where: str, name: str, value: object, allowed: str) -> RunError:
    return RunError(f"{where}: {name} is {value!r}; give {allowed}")
