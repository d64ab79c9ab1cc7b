"""Where results of commands go: tables to the terminal, JSON to a file or to standard output."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from residrop.common.errors import ConfigError
from residrop.common.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["check_target", "console_for", "write"]


def write(target: str | None, value: object) -> None:
    """Write what `--json TARGET` asks for: nothing (None), to standard output ("-") or to a file."""
    if target == "-":
        print(json.dumps(value, indent=2))
    elif target is not None:
        path = Path(target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # a pipe or device is written to, never replaced
                path.write_text(json.dumps(value, indent=2) + "\n")
            else:
                write_json(path.resolve(), value)
        except OSError as error:
            raise ConfigError(f"--json {target} cannot be written ({error.strerror}); give another file") from None


def check_target(target: str | None) -> None:
    """Refuse a file for --json that cannot be written, before hours of work whose result it should hold."""
    if target in (None, "-"):
        return
    path = Path(target)
    place = next((folder for folder in path.absolute().parents if folder.exists()), path)
    if path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"--json {target} cannot be written; give another file")


def console_for(target: str | None) -> Console:
    """Tables go to standard output, unless that is where the JSON goes; file names are no markup and never cut."""
    from rich.console import Console

    console = Console(stderr=target == "-", highlight=False, markup=False)
    return console if console.is_terminal else Console(stderr=target == "-", highlight=False, markup=False, width=400)
