"""Entries of several documents that belong together, as one: what every reader of the ledger looks at."""

from collections.abc import Mapping, Sequence
from typing import Any

from residrop.research.ledger.schema import OPTIONAL, identity

__all__ = ["fuller", "merged", "pooled"]

Entry = dict[str, Any]


def pooled(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of a folder with those of one identity and device as one, in the place of the first.

    Documents of one table are apart where versions differ (`record`). Seeds of trainings are put together, the newer
    value counting. Of other numbers and of curves the newest counts (of curves, unless it has fewer seeds or points): a
    time under other threads or versions is another time. What is said around an entry (date, file, versions) is that of
    the newest.

    Args:
        entries: as `read` gives them.
    """
    keys = [(*identity(entry), entry["device"]) if _shared(entry) else (i,) for i, entry in enumerate(entries)]
    newest: dict[tuple[Any, ...], Entry] = {}
    for key, entry in sorted(zip(keys, entries, strict=True), key=lambda one: one[1]["date"]):
        before = newest.get(key)
        if before is not None and "figure" in entry and fuller(before, entry):
            continue
        trained = entry["kind"] == "paper" and entry["recipe"] is not None
        newest[key] = merged(before, entry) if before is not None and trained else entry
    return [newest[key] for key in dict.fromkeys(keys)]


def _shared(entry: Mapping[str, Any]) -> bool:
    """Whether documents may say it again: a row or a curve of a paper."""
    return entry["kind"] == "paper" or "figure" in entry


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> Entry:
    """A newer paper entry with the seeds that only the older one has."""
    lists = [name for name in ("measured", "wall_seconds", "standard_errors") if name in old and name in new]
    rows = {seed: [one[name][i] for name in lists] for one in (old, new) for i, seed in enumerate(one["seeds"])}
    seeds = sorted(rows)
    return {
        **{name: value for name, value in new.items() if name not in OPTIONAL or name in lists},
        "seeds": seeds,
        **{name: [rows[seed][i] for seed in seeds] for i, name in enumerate(lists)},
    }


def fuller(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a curve that was measured before has more seeds or points than the newer one."""

    def size(one: Mapping[str, Any]) -> tuple[int, int]:
        return len(one.get("seeds") or ()), sum(value is not None for value in one.get("y") or ())

    before, now = size(old), size(new)
    return before != now and before[0] >= now[0] and before[1] >= now[1]
