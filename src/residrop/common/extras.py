"""Optional packages: a missing one is answered by the command that installs it."""

from collections.abc import Generator
from contextlib import contextmanager

from residrop.common.errors import MissingExtraError

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Generator[None, None, None]:
    """Put around imports of packages that only the extra `name` of residrop installs (see pyproject.toml).

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not missing or missing.partition(".")[0] == "residrop":
            raise  # a fault of ours, which no installation mends
        raise MissingExtraError(f"{missing} is not installed; run: python -m pip install 'residrop[{name}]'") from None
