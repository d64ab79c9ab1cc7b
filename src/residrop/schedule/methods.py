"""Published ways to train transformers with random depth, by name, as options of `residrop.apply`. No torch."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from residrop.common.checks import check_whole
from residrop.common.errors import ConfigError
from residrop.common.lazy import Lazy
from residrop.schedule.timing import parse

__all__ = ["METHODS", "Method", "method"]


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        title: one line that says what it does.
        source: where it was published.
        options: options of `residrop.apply`; a timing counts in shares of the training, from 0 to 1.
        note: what was chosen here where the source is silent, and what is otherwise than there.
    """

    title: str
    source: str
    options: Mapping[str, Any]
    note: str = ""


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads((files("residrop.schedule") / "methods.toml").read_text("utf-8"))


def _read(name: str) -> Method:
    table = dict(_tables()[name])
    about = {key: table.pop(key) for key in ("title", "source", "note") if key in table}
    return Method(options=table, **about)


METHODS = Lazy(lambda: list(_tables()), _read)
"""The methods that `method` knows, by name."""


def method(name: str, steps: int) -> dict[str, Any]:
    """Options of `residrop.apply` that train a transformer by a published method.

    >>> method("layerdrop", steps=1000)["survival"]
    'uniform(0.8)'

    Others are set beside it: `residrop.apply(model, **method("layerskip", 10_000) | {"survival": "exponential(0.9)"})`.

    Args:
        name: one of `METHODS`, which also tell what was chosen here where a paper leaves something open.
        steps: training forwards of the whole training, at least 0. With accumulation every micro-batch is one.

    Raises:
        ConfigError: no method has that name (the message has the closest one); `steps` is no whole number.
    """
    check_whole("steps (training forwards of the whole training)", steps, least=0)
    if name not in METHODS.names():
        close = get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"method {name!r} is unknown; {hint}give one of {', '.join(METHODS)}")
    options = METHODS[name].options
    return {**options, **({"timing": parse(options["timing"], steps)} if "timing" in options else {})}
