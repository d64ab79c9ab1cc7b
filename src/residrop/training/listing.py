"""The training images of a run that are read batch by batch: files.json.gz, their names in order.

A training that goes on must see its images in the same order although some may have been removed since.
"""

import gzip
import json
import zlib
from typing import Any

from residrop.common.errors import RunError
from residrop.common.files import replacing
from residrop.training.checkpoint import Run

__all__ = ["data_of", "save_listing"]

_FILE = "files.json.gz"


def save_listing(run: Run, listed: tuple[str, ...]) -> None:
    """Write the list. RunError if that fails."""
    try:
        with replacing(run.path / _FILE) as temporary:
            temporary.write_bytes(gzip.compress(json.dumps(listed).encode(), mtime=0))
    except OSError as error:
        raise RunError(f"{run.path / _FILE} cannot be written ({error.strerror}); choose another --out") from None


def data_of(run: Run) -> dict[str, Any]:
    """`classes` and `digest` of a run's training images and their names, `listed` (None if there is no list).

    Raises:
        RunError: a file is damaged.
    """
    path, listed = run.path / _FILE, None
    if path.exists():
        try:
            listed = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
            raise RunError(f"{path} is damaged ({error}); delete it to continue, if no image was removed") from None
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise RunError(f"{path} is no list of files; delete it to continue, if no image was removed")
    dataset = run.dataset()
    return {"classes": dataset["classes"], "digest": dataset.get("digest"), "listed": listed}
