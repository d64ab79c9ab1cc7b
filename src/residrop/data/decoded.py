"""The cache of decoded images: one safetensors file, never unpickled, rebuilt whenever it does not fit."""

import contextlib
import hashlib
import json
import logging
import os
import stat
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from residrop.data.splits import Images

__all__ = ["Decoded", "decoded_or_build", "fingerprint", "user_cache"]

_FORMAT = 1  # raise it whenever the same files would decode to other tensors
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Decoded:
    """All decoded images of a source: named parts ("train", "test", ...) and the class names."""

    parts: dict[str, Images]
    classes: tuple[str, ...]


def user_cache() -> Path:
    """Return the user's cache folder of this library, which need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "residrop"


def fingerprint(folder: Path, files: Iterable[Path], variant: str = "") -> str:
    """Hash what the decoded tensors depend on: names below `folder`, sizes, times, variant, cache format.

    Raises:
        OSError: if a file is missing.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, variant]).encode())
    for file in files:
        status = file.stat()
        digest.update(json.dumps([str(file.relative_to(folder)), status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()


def decoded_or_build(
    folder: Path, key: str, mark: str, build: Callable[[], Decoded], cache: Path | None = None
) -> Decoded:
    """Return the cached decoding of a folder, or build it and cache it.

    Args:
        folder: where the source lies.
        key: tells apart several decodings of one folder; part of the file name.
        mark: `fingerprint` of the source; a cache with another one is rebuilt.
        build: decodes the source.
        cache: use `cache/decoded` only. Default: beside the source if that folder may be written, else the
            folder `decoded` of `user_cache()`.

    A cache that is outdated, truncated or corrupt counts as absent. If nothing can be written the images are
    returned all the same and a log message says so.
    """
    hashed = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    remote = (cache or user_cache()) / "decoded" / f"{folder.name}-{key}-{hashed}.safetensors"
    places = [remote] if cache else [folder / f".residrop-{key}.safetensors", remote]
    for place in places:
        found = _read(place, mark)
        if found is not None:
            return found
    built = build()
    if not any(_write(place, mark, built) for place in places):
        _LOG.warning("could not cache the decoded images of %s: decoded anew next time", folder)
    return built


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().numpy().data):08x}"


def _read(place: Path, mark: str) -> Decoded | None:
    """Return the content if it is whole and has the right mark."""
    try:
        with safe_open(place, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("fingerprint") != mark:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if any(about[name] != _checksum(tensor) for name, tensor in tensors.items()):
            return None
        names = json.loads(about["parts"])
        parts = {name: Images(tensors[f"pixels_{name}"], tensors[f"labels_{name}"]) for name in names}
        return Decoded(parts, tuple(json.loads(about["classes"])))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(place: Path, mark: str, decoded: Decoded) -> bool:
    """Write atomically; return whether it worked."""
    if not _may_write(place.parent):
        return False
    tensors: dict[str, Tensor] = {}
    for name, images in decoded.parts.items():
        tensors[f"pixels_{name}"] = images.pixels.to(torch.uint8).contiguous()
        tensors[f"labels_{name}"] = images.labels.to(torch.int64).contiguous()
    about = {name: _checksum(tensor) for name, tensor in tensors.items()}
    about["fingerprint"] = mark
    about["parts"] = json.dumps(list(decoded.parts))
    about["classes"] = json.dumps(decoded.classes)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=about)
        # safetensors lets only the owner read; others who may read the folder shall profit from the cache too.
        temporary.chmod((stat.S_IMODE(place.parent.stat().st_mode) & 0o644) | 0o600)
        temporary.replace(place)
    except (OSError, SafetensorError):
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def _may_write(folder: Path) -> bool:
    """Respect a folder without any write permission even as root, whom the system would let in."""
    if not folder.exists():
        return True  # a cache folder still to be made
    return bool(stat.S_IMODE(folder.stat().st_mode) & 0o222) and os.access(folder, os.W_OK)
