"""Files that are there completely or not at all."""

import contextlib
import json
import os
from collections.abc import Generator
from pathlib import Path

__all__ = ["replacing", "write_json"]


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Write to a temporary file beside `path`, then put it in place at once: readers see the old or the new file.

    Its name is fixed, so that what a killed process leaves is overwritten and does not pile up.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
