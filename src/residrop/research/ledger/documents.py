"""Documents of measurements, from rows of any shape."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from residrop.common.files import write_json
from residrop.research.ledger.schema import SCHEMA, check
from residrop.training.checkpoint import versions

__all__ = ["describe_device", "document", "flat", "of_rows", "save"]

Document = dict[str, Any]


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without nesting: {"a": {"b": 1}, "c": [{"d": 2}]} becomes {"a.b": 1, "c.0.d": 2}."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, (list, tuple)) and any(isinstance(one, (Mapping, list, tuple)) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": one for inner, one in flat(value).items()}
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def describe_device(kind: str, found: Mapping[str, str] | None = None) -> str:
    """A device by its kind and the processor that `found`, the versions of a run (default: of now), names."""
    found = versions() if found is None else found
    processor = found.get("processor", "")
    if kind == "cpu" and torch.cuda.is_available() and processor == torch.cuda.get_device_name():
        processor = found.get("machine", "")  # versions name the GPU where there is one
    return f"{kind} ({processor})" if processor else kind


def document(
    what: str,
    command: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    device: str,
    found: Mapping[str, str] | None = None,
    date: str | None = None,
) -> Document:
    """A checked document of measurements.

    Args:
        what: one line.
        command: how to repeat it.
        rows: one per entry; nested ones are made `flat`.
        device: on which it was measured.
        found: versions (default: those of now).
        date: ISO (default: today).
    """
    made = {
        "schema": SCHEMA,
        "what": what,
        "command": command,
        "date": date or datetime.date.today().isoformat(),
        "device": device,
        "versions": dict(versions() if found is None else found),
        "entries": [{"kind": "measurement", **flat(row)} for row in rows],
    }
    check(made)
    return made


def of_rows(what: str, command: str, rows: Sequence[Mapping[str, Any]], *, device: str | None = None) -> Document:
    """A document of what a benchmark measured just now.

    Args:
        what: as in `document`.
        command: as in `document`.
        rows: at least one; what all of them say of `device` and `versions` goes to the document.
        device: default: what the rows say, or else the CPU.
    """
    found = {name: value for row in rows for name, value in row.get("versions", {}).items()}
    where = device or next((row["device"] for row in rows if "device" in row), describe_device("cpu"))
    kept = [{name: value for name, value in row.items() if name not in ("device", "versions")} for row in rows]
    return document(what, command, kept, device=where, found={**versions(), **found})


def save(path: Path, what: str, command: str, rows: Sequence[Mapping[str, Any]], *, device: str | None = None) -> None:
    """Write `of_rows` to a file; folders are made."""
    made = of_rows(what, command, rows, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, made)
