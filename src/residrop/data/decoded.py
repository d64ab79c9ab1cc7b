"""The cache of decoded images: safetensors files in the user's cache folder, rebuilt whenever they do not fit."""

import contextlib
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["decoded_or_build", "fingerprint", "user_cache"]

_FORMAT = 2  # raise it whenever the same files would decode to other tensors
_LOG = logging.getLogger(__name__)


def user_cache() -> Path:
    """Return the user's cache folder of this library, which need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "residrop"


def fingerprint(folder: Path, files: Iterable[Path], variant: str = "") -> str:
    """Hash what the decoded tensors depend on: names below `folder`, sizes, times, variant, cache format."""
    digest = hashlib.sha256(json.dumps([_FORMAT, variant]).encode())
    for file in files:
        size, time = -1, 0  # of a link to nothing, which the decoder will report
        with contextlib.suppress(FileNotFoundError):
            size, time = file.stat().st_size, file.stat().st_mtime_ns
        digest.update(json.dumps([str(file.relative_to(folder)), size, time]).encode())
    return digest.hexdigest()


def decoded_or_build(
    folder: Path, key: str, mark: str, build: Callable[[], dict[str, Tensor]], cache: Path | None = None
) -> dict[str, Tensor]:
    """Return the cached decoding of a folder, or build it and cache it; the folder itself is never written.

    Args:
        folder: where the source lies.
        key: tells apart several decodings of one folder; part of the file name.
        mark: `fingerprint` of the source; a cache with another one is rebuilt.
        build: decodes the source.
        cache: the file goes into `cache/decoded`. Default: the folder `decoded` of `user_cache()`.

    A cache that is outdated, truncated or corrupt (its checksum differs) counts as absent. If nothing can be written
    the tensors are returned all the same and a log message says so.
    """
    hashed = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", folder.name)[:40]
    place = (cache or user_cache()) / "decoded" / f"{name}-{key}-{hashed}.safetensors"
    found = _read(place, mark)
    if found is None:
        found = build()
        try:
            _write(place, mark, found)
        except (OSError, ValueError, SafetensorError) as error:
            _LOG.warning("could not cache the decoded images of %s (%s): decoded anew next time", folder, error)
    return found


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Of contents, shapes and types."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.numpy().data, value) if tensor.numel() else value
    return f"{value:08x}"


def _read(place: Path, mark: str) -> dict[str, Tensor] | None:
    """Return the content if it is whole and has the right mark."""
    try:
        with safe_open(place, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("fingerprint") != mark:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors if about.get("checksum") == _checksum(tensors) else None
    except (OSError, SafetensorError, ValueError):
        return None


def _write(place: Path, mark: str, tensors: dict[str, Tensor]) -> None:
    """Write atomically. Each process has a temporary file of its own; those of processes that are gone are removed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob("*.tmp"):
        if not _runs(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"fingerprint": mark, "checksum": _checksum(tensors)})
        temporary.replace(place)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _runs(process: str) -> bool:
    if os.name != "posix":
        return True  # there the signal 0 is not only a question
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # of another user, or no temporary file of ours
        return True
    return True
