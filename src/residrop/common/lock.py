"""Who writes into a directory: one process at a time, told by a lock of the operating system.

The lock belongs to the open file `run.lock`, so a killed process holds nothing; the file says who holds it.
"""

import contextlib
import os
import platform
import time
from collections.abc import Generator
from pathlib import Path

from residrop.common.errors import RunError

try:
    import fcntl
except ImportError:  # not on Windows, where two writers are not noticed
    fcntl = None

__all__ = ["held"]

_NAME = "run.lock"


@contextlib.contextmanager
def held(folder: Path) -> Generator[None, None, None]:
    """Hold a directory while a process writes into it. It is made if there is none, and removed if it stays empty.

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    made: list[Path] = []
    try:
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
    except OSError as error:
        _remove(made)
        why = f"{folder} cannot be written ({error.strerror}); choose another --out, or make it possible to write there"
        raise RunError(why) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _NAME).unlink()  # while it is held: whoever waits for this file sees that it has no name any more
        os.close(lock)
        _remove(made)


def _remove(made: list[Path]) -> None:
    for one in made:
        with contextlib.suppress(OSError):  # it is not empty, which keeps those above it, too
            one.rmdir()


def _acquire(folder: Path) -> int:
    """The descriptor of the lock, until it is closed."""
    while True:
        lock = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is None:
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 500, 0).decode(errors="replace") or "another process"
            os.close(lock)
            raise RunError(
                f"{folder} is in use by {holder}; wait until it has ended, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            return lock
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)  # the holder before has just removed it
    with contextlib.suppress(OSError):  # a full disk is told of where it matters
        os.ftruncate(lock, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}, since {since}".encode(), 0)
    return lock
