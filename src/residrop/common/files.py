"""Files that are there completely or not at all."""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

__all__ = ["as_json", "replacing", "write_json", "write_text"]

_PREFIX, _SUFFIX, _LOCK = ".residrop-", ".tmp", ".residrop-lock"


@contextlib.contextmanager
def replacing(path: Path | str) -> Generator[Path, None, None]:
    """Give a temporary file to write, then put it in place of `path` at once: readers see the old or the new file.

    The result is what a plain `open(path, "wb")` would leave: symbolic links are followed; an existing file keeps its
    permissions and owner, a new one gets those of the umask; a device or FIFO is written to, never replaced. If the
    body raises, `path` is left as it was. The temporary file has the name of `path`, in a folder of its own beside it
    whose name cannot be guessed. What killed processes left of such folders is removed at the next write beside them.

    Raises:
        OSError: `path` is a folder, may not be written, or its disk is full.
    """
    given, target = Path(path), Path(os.path.realpath(path))
    before = _status(given)
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if before is not None and not os.access(given, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    stream = None if before is None else _standard_stream(before)
    whole = before is None or (stat.S_ISREG(before.st_mode) and stream is None)
    with _folder(target.parent if whole else Path(tempfile.gettempdir())) as folder:
        temporary = folder / target.name
        temporary.touch()
        plain = temporary.stat()  # what the umask makes of a new file
        yield temporary
        if not whole:
            opened = given.open("ab") if stream is None else os.fdopen(os.dup(stream), "ab")
            with opened as file, temporary.open("rb") as source:
                shutil.copyfileobj(source, file)
            return
        wanted, made = before or plain, temporary.stat()
        if (made.st_uid, made.st_gid) != (wanted.st_uid, wanted.st_gid):
            with contextlib.suppress(OSError):  # which only root may
                os.chown(temporary, wanted.st_uid, wanted.st_gid)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(stat.S_IMODE(wanted.st_mode))  # some libraries write files that their owner alone can read
        temporary.replace(target)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file as UTF-8, by `replacing`; names of files that are no UTF-8 are escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path | str, value: object) -> None:
    """Write a JSON file, by `replacing`."""
    write_text(path, as_json(value) + "\n")


def as_json(value: object) -> str:
    """Indented JSON; a number that is not finite, which JSON does not know, becomes null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in cast(dict[Any, Any], value).items()}
    return [_finite(one) for one in cast(list[Any], value)] if isinstance(value, (list, tuple)) else value


def _status(path: Path) -> os.stat_result | None:
    """The status of what `path` leads to; None if nothing is there yet."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _standard_stream(status: os.stat_result) -> int | None:
    """Which of standard output and error goes to that file already, as with `/dev/stdout > file`; they write on."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(number), status):
                return number
    return None


@contextlib.contextmanager
def _folder(parent: Path) -> Generator[Path, None, None]:
    """A new folder in `parent` that nobody else can read; locked until the body, or this process, ends."""
    _sweep(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent))
        lock = None
        try:
            lock = _lock(folder, os.O_CREAT)
        except (BlockingIOError, FileNotFoundError):  # another process swept it away before it was locked
            continue
        except OSError:  # no locks on this file system; so nobody will sweep, either
            break
        if folder.exists():
            break
        os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sweep(parent: Path) -> None:
    """Remove the folders that killed processes left: nobody holds their locks any more."""
    with contextlib.suppress(OSError), os.scandir(parent) as found:
        for one in [Path(one) for one in found if one.name.startswith(_PREFIX) and one.name.endswith(_SUFFIX)]:
            with contextlib.suppress(OSError):
                one.rmdir()  # killed before it had a lock
            with contextlib.suppress(OSError):
                lock = _lock(one)
                shutil.rmtree(one, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path, flags: int = 0) -> int:
    """Lock a folder: an open descriptor, whose end is the lock's.

    Raises:
        FileNotFoundError: the folder, or without O_CREAT its lock, is not there.
        BlockingIOError: somebody else holds the lock.
        OSError: the file system has no locks.
    """
    import fcntl

    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
