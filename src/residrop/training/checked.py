"""Files of runs that are checked when they are read.

Every file that a run is continued or evaluated from holds a checksum of its content, in itself: JSON as one more entry,
safetensors in their metadata, a state as one more entry. So a file and its checksum cannot come apart, neither by a
kill between two writes nor by copying. A file without one was written by an earlier version and is taken as it is.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from residrop.common.errors import RunError
from residrop.common.files import as_json, replacing, write_json

__all__ = [
    "load_state",
    "load_tensors",
    "read_json",
    "read_lines",
    "read_record",
    "save_state",
    "save_tensors",
    "unwritable",
    "write_record",
    "writing",
]

_CHECKSUM = "sha256"
_RESTORE = "restore it or train anew"


# Checksums


def _digest(value: Any) -> str:
    """Hash of nested mappings, sequences, tensors and plain values; the order of a mapping does not count."""
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"tensor {value.dtype} {list(value.shape)};".encode())
            found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            found.update(f"mapping {len(value)};".encode())
            for key in sorted(value, key=repr):
                feed(key)
                feed(value[key])
        elif isinstance(value, list | tuple):
            found.update(f"sequence {len(value)};".encode())
            for one in value:
                feed(one)
        else:
            found.update(f"{type(value).__name__} {value!r};".encode())

    feed(value)
    return found.hexdigest()


def _check(path: Path, value: Any, given: Any, advice: str) -> None:
    if given is not None and given != _digest(value):
        raise RunError(f"{path} is damaged (it does not hold what its checksum was made of); {advice}")


def _check_file(path: Path, missing: str) -> None:
    if not path.exists():
        raise RunError(f"{path} does not exist; {missing}")
    if not path.is_file():  # a pipe would be waited for
        raise RunError(f"{path} is no regular file; {_RESTORE}")


# Writing


def unwritable(path: Path, error: Exception) -> RunError:
    """The error for a file of a run that cannot be written."""
    reason = (error.strerror if isinstance(error, OSError) else "") or str(error).partition("\n")[0]
    return RunError(
        f"{path} cannot be written ({reason}); free some space or make it writable, and give the command again "
        "(train and compare: with --resume)"
    )


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """As `replacing`; RunError if the file cannot be written."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from None


# JSON


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum; RunError if the file cannot be written."""
    plain = json.loads(as_json(values))
    try:
        write_json(path, {**plain, _CHECKSUM: _digest(plain)})
    except OSError as error:
        raise unwritable(path, error) from None


def read_json(path: Path, advice: str = _RESTORE) -> Any:
    """The content of a JSON file; RunError if there is none that can be read."""
    _check_file(path, f"is {path.parent} a run directory of residrop train?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); {advice}") from None


def read_record(path: Path, kinds: Mapping[str, Any] | None = None, advice: str = _RESTORE) -> dict[str, Any]:
    """The JSON object that `write_record` wrote.

    Args:
        path: the file.
        kinds: entries that must be there, and the type of each, or [type] for a list of such values.
        advice: what to do if the file is damaged.

    Raises:
        RunError: the file is missing, damaged, or something else.
    """
    values = read_json(path, advice)
    if not isinstance(values, dict):
        raise RunError(f"{path} holds {type(values).__name__} instead of entries by name; {advice}")
    given = values.pop(_CHECKSUM, None)
    _check(path, values, given, f"{advice}, or remove its entry {_CHECKSUM} if you have changed it yourself")
    for name, kind in (kinds or {}).items():
        if name not in values or not _is_kind(values[name], kind):
            what = f"a list of {kind[0].__name__}" if isinstance(kind, list) else getattr(kind, "__name__", str(kind))
            has = repr(values[name])[:60] if name in values else "missing"
            raise RunError(f"{path} is damaged ({name} is {has}, where {what} belongs); {advice}")
    return values


def _is_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is_kind(one, kind[0]) for one in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if there is no file. What is no number (NaN) reads as None.

    The last line may be cut short, as a killed process leaves it, and is left out then.

    Raises:
        RunError: the file cannot be read, or another line is no JSON object.
    """
    if not path.exists():
        return []
    _check_file(path, _RESTORE)
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
        *whole, rest = text.split("\n")
        for number, line in enumerate([*whole, rest], start=1):
            try:
                value = json.loads(line, parse_constant=lambda name: None)
            except (ValueError, RecursionError):
                if number > len(whole):  # without an end of line: empty, or cut short
                    break
                raise
            if not isinstance(value, dict):
                raise ValueError(f"line {number} is no JSON object")
            found.append(value)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}); {_RESTORE}") from None
    return found


# Tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors and texts `about` them as safetensors; RunError if the file cannot be written."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    about = dict(about or {})
    with writing(path) as temporary:
        save_file(plain, temporary, {**about, _CHECKSUM: _digest([plain, about])})


def load_tensors(path: Path, missing: str, damaged: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote: the tensors, and the texts about them.

    Args:
        path: the file.
        missing: what to do if there is none.
        damaged: what to do if it cannot be read.

    Raises:
        RunError: the file is missing or damaged.
    """
    _check_file(path, missing)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            about = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} is damaged ({error}); {damaged}") from None
    given = about.pop(_CHECKSUM, None)
    _check(path, [tensors, about], given, damaged)
    return tensors, about


# States


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested mapping of tensors and plain values with torch; RunError if the file cannot be written."""
    content = io.BytesIO()  # torch's writer of files aborts the process where a disk is full
    torch.save({**state, _CHECKSUM: _digest(state)}, content)
    with writing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path, damaged: str) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU; RunError, which says `damaged`, if the file holds anything else."""
    _check_file(path, damaged)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}); {damaged}") from None
    if not isinstance(state, dict):
        raise RunError(f"{path} is not the state of a run; {damaged}")
    given = state.pop(_CHECKSUM, None)
    _check(path, state, given, damaged)
    return state
