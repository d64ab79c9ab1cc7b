"""Reading a folder of documents, and recording in it what was measured of a table or figure."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from residrop.common.errors import RunError
from residrop.common.files import write_json
from residrop.research.ledger.pooled import fuller, merged
from residrop.research.ledger.schema import SCHEMA, check, identity

__all__ = ["load", "read", "record"]

Entry = dict[str, Any]
Document = dict[str, Any]


def load(path: Path) -> Document:
    """A checked document; RunError if the file is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); restore it, or delete it and measure again") from None
    check(found, str(path))
    return found


def read(folder: Path) -> list[Entry]:
    """All entries of all documents of a folder, in order of file names; none if there is no folder.

    Each has, beside its own, what its document says: `what`, `command`, `date`, `device`, `versions`, and `file`.

    Raises:
        RunError: a file is no document of the ledger.
    """
    entries: list[Entry] = []
    for path in sorted(folder.glob("*.json")):
        found = load(path)
        around = {name: found[name] for name in ("what", "command", "date", "device", "versions")}
        entries += [{**around, "file": path.name, **entry} for entry in found["entries"]]
    return entries


def record(
    folder: Path,
    place: str,
    entries: Sequence[Mapping[str, Any]],
    *,
    what: str,
    command: str,
    device: str,
    found: Mapping[str, str],
) -> Path:
    """Write entries of one table or figure, all of one scale and variant, into the file of that name.

    The file is named from table, variant, kind of device and scale, "swapout_table-2_cpu_scale0.05.json"; those of
    another machine or of other versions go to a file of their own, "..._2.json". Paper entries get their seeds merged
    with those that are there, the newer value counting; a curve is replaced by a newer one, unless that has fewer seeds
    or points. The file is replaced at once, so that nobody reads half of it, and processes wait for one another.

    Args:
        folder: made if it is missing.
        place: id of the table or figure, "swapout/table-2".
        entries: at least one.
        what: one line.
        command: how to repeat it; "{seeds}" in it becomes the number of seeds from 0 to the largest one.
        device: as `describe_device` has it.
        found: versions.

    Returns:
        The file.

    Raises:
        RunError: entries that are none, a damaged file, or a folder that cannot be written.
    """
    first = entries[0]
    scale = first["scale"]
    parts = [place.replace("/", "_"), first["variant"], device.partition(" ")[0], f"scale{scale:g}"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            return _write(folder, "_".join(part for part in parts if part), entries, what, command, device, found)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); choose another --ledger") from None


def _write(
    folder: Path,
    stem: str,
    entries: Sequence[Mapping[str, Any]],
    what: str,
    command: str,
    device: str,
    found: Mapping[str, str],
) -> Path:
    timed = any(entry.get("recipe") is None for entry in entries)
    path = _file_for(folder, stem, device, found, timed)
    before: list[Entry] = load(path)["entries"] if path.exists() else []
    kept = {identity(entry): entry for entry in before}
    for entry in entries:
        key = identity(entry)
        kept[key] = _merged(kept[key], dict(entry)) if key in kept else dict(entry)
    seeds = 1 + max(
        max(entry.get("seeds") or [0]) for entry in kept.values()
    )  # of 0 upwards, as `reproduce` counts them
    made = {
        "schema": SCHEMA,
        "what": what,
        "command": command.replace("{seeds}", str(seeds)),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": dict(found),
        "entries": list(kept.values()),
    }
    check(made, str(path))
    write_json(path, made)
    return path


def _file_for(folder: Path, stem: str, device: str, found: Mapping[str, str], timed: bool) -> Path:
    """The first file of that stem that does not exist or holds what was measured by the same machine and versions.

    Trainings may have had other numbers of threads, which is chosen run by run; times may not.
    """

    def core(versions: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in versions.items() if timed or name != "threads"}

    def same(path: Path) -> bool:
        there = load(path)
        return there["device"] == device and core(there["versions"]) == core(found)

    number = 1
    while True:
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}_{number}.json")
        if not path.exists() or same(path):
            return path
        number += 1


def _merged(old: Entry, new: Entry) -> Entry:
    if new["kind"] == "paper":
        return merged(old, new)
    return old if "figure" in new and fuller(old, new) else new
