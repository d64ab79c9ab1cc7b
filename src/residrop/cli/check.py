"""`residrop check`: every image of a data source read once, before a long training meets a damaged one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from residrop.cli.shared import Json, parse, table_of
from residrop.common.errors import DataError
from residrop.common.output import check_target, console_for, write
from residrop.data import check

__all__ = ["run"]

_NAMED = 20  # images in the list on the terminal; --json has all


@dataclass(frozen=True)
class Check:
    """Read a whole data source once: layout, labels, and every image.

    Images that cannot be read are counted and named, and the exit code is 2. Remove or replace them, or train with
    --on-error skip.
    """

    data: Annotated[str, tyro.conf.Positional]
    """As --data of residrop train: folder:PATH, parquet:PATH, imagenet:PATH, the PATH of a folder, ..."""
    json: Json = None


def run(arguments: Sequence[str], prog: str) -> int:
    """Check a source, print a table of its parts and the images that cannot be read, write JSON."""
    args = parse(Check, arguments, prog)
    check_target(args.json)
    parts = check(args.data)
    console = console_for(args.json)
    rows = [(part.name, f"{part.images:,}", str(part.classes), str(len(part.unreadable))) for part in parts]
    headings = ("part", "images", "classes", "cannot be read")
    console.print(table_of(args.data, headings, rows, left=("part",)))
    bad = [(where, reason) for part in parts for where, reason in part.unreadable.items()]
    for where, reason in bad[:_NAMED]:
        console.print(f"{where}: {reason}")
    if len(bad) > _NAMED:
        console.print(f"and {len(bad) - _NAMED} more (--json FILE lists all)")
    write(args.json, [asdict(part) for part in parts])
    if bad:
        images = sum(part.images for part in parts)
        advice = "remove or replace them, or train with --on-error skip"
        raise DataError(f"{len(bad)} of {images} images of {args.data} cannot be read; {advice}")
    return 0
