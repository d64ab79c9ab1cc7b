"""Where results of commands go: tables to the terminal, JSON to standard output, and whatever a file is named for."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from residrop.common.errors import ConfigError
from residrop.common.files import as_json, replacing

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["check_target", "console_for", "write", "writing"]


@contextmanager
def writing(target: Path | str, option: str) -> Generator[Path, None, None]:
    """A temporary file for what `option TARGET` asks for, put in place by `replacing`; folders are made.

    Raises:
        ConfigError: the target cannot be written.
    """
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            yield temporary
    except OSError as error:
        raise _refusal(target, option, error.strerror or type(error).__name__) from None


def write(target: str | None, value: object) -> None:
    """Write what `--json TARGET` asks for: nothing (None), to standard output ("-") or to a file."""
    if target == "-":
        print(as_json(value))
    elif target is not None:
        with writing(target, "--json") as temporary:
            temporary.write_text(as_json(value) + "\n")


def check_target(target: Path | str | None, option: str = "--json") -> None:
    """Refuse a file that cannot be written, before hours of work whose result it should hold.

    Raises:
        ConfigError: what `option` names is a folder, too long a name, or may not be written.
    """
    if target is None or target == "-":
        return
    try:
        obstacle = _obstacle(Path(target))
    except OSError as error:
        obstacle = error.errno
    if obstacle:
        raise _refusal(target, option, os.strerror(obstacle))


def _obstacle(path: Path) -> int | None:
    """What would keep `replacing` from writing there, as a number of the system's errors."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    else:
        if stat.S_ISDIR(mode):
            return errno.EISDIR
        if not os.access(path, os.W_OK):
            return errno.EACCES
    if not stat.S_ISREG(mode):  # a device or FIFO is written to where it is
        return None
    target = Path(os.path.realpath(path))
    place = next(folder for folder in target.parents if folder.exists())
    if any(len(os.fsencode(part)) > os.pathconf(place, "PC_NAME_MAX") for part in target.parts):
        return errno.ENAMETOOLONG
    Path(tempfile.mkdtemp(dir=place)).rmdir()  # what permissions promise is not always so: read-only disks, /proc
    return None


def _refusal(target: Path | str, option: str, why: str) -> ConfigError:
    return ConfigError(f"{option} {target} cannot be written ({why}); give another file")


def console_for(target: str | None) -> Console:
    """Tables go to standard output, unless that is where the JSON goes; file names are no markup and never cut."""
    from rich.console import Console

    console = Console(stderr=target == "-", highlight=False, markup=False)
    return console if console.is_terminal else Console(stderr=target == "-", highlight=False, markup=False, width=400)
