"""Arguments: each check returns the value, or raises a ConfigError that says what is allowed. No torch."""

import difflib
from collections.abc import Iterable
from numbers import Real
from typing import Any, TypeGuard, cast, get_args

from residrop.common.errors import ConfigError

__all__ = ["check_choice", "check_rate", "check_whole", "closest_first", "is_number"]


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number (NumPy's count, too) and no bool."""
    return not isinstance(value, bool) and isinstance(value, Real)


def check_rate(name: str, rate: object) -> float:
    """Return `rate` as a float; raise ConfigError unless it is a number in [0, 1]."""
    if not is_number(rate):
        raise ConfigError(f"{name} is {rate!r}; give a number in [0, 1]")
    if not 0.0 <= rate <= 1.0:  # NaN compares false and is refused here, too
        raise ConfigError(f"{name} is {rate}; survival rates lie in [0, 1] (1 - drop rate)")
    return float(rate)


def check_whole(name: str, value: object, least: int | None = None) -> int:
    """Return `value` as an int; raise ConfigError unless it is a whole number (of at least `least`)."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        allowed = "a whole number" if least is None else f"a whole number of at least {least}"
        raise ConfigError(f"{name} is {value!r}; give {allowed}")
    return value


def closest_first(given: str, allowed: Iterable[str]) -> str:
    """The allowed words joined by commas, the one most like `given` first."""
    words = list(allowed)
    words.sort(key=lambda word: -difflib.SequenceMatcher(None, given.lower(), word.lower()).ratio())
    return ", ".join(words)


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ConfigError unless `value` is one of `choices`: a `Literal` of strings, or a sequence of them."""
    allowed: tuple[Any, ...] = get_args(choices) or tuple(cast(Iterable[str], choices))
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}")
