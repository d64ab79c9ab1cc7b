"""What a user should know about data that are read all the same: one line each, said once."""

import logging
from collections.abc import Sequence

from residrop.common.torchrun import rank

__all__ = ["named", "remark"]

_LOG = logging.getLogger("residrop.data")
_said: set[str] = set()


def remark(line: str) -> None:
    """Log a line as a warning, which Python prints to standard error; once a process, and on rank 0 only."""
    if rank() == 0 and line not in _said:
        _said.add(line)
        _LOG.warning(line)


def named(names: Sequence[str], most: int = 5) -> str:
    """The first few names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
