"""Survival rates p_l of the blocks l = 1..L, over depth. No torch.

A survival rate is the probability in [0, 1] that a block's branch (or a row or unit of it) is present. Every function
of depth returns one float per block as a tuple, first block first. The papers' "linear" schedules differ and have
different names here:

- `linear_decay` interpolates from the *input* (rate 1, not a block) to the last block (Huang et al. 2016, eq. 4);
- `linear` interpolates from the first block to the last (Singh et al. 2016, "Linear(a, b)").

How rates move over the training is the subject of `timing`.
"""

import math
import re
from collections.abc import Sequence

from residrop.common.checks import check_rate, check_whole, is_number
from residrop.common.errors import ConfigError

__all__ = [
    "blocks",
    "expected_depth",
    "explicit",
    "exponential",
    "linear",
    "linear_decay",
    "parse",
    "uniform",
]


def _check_depth(depth: int) -> int:
    return check_whole("depth (the number of residual blocks)", depth, least=1)


def uniform(depth: int, rate: float) -> tuple[float, ...]:
    """p_l = rate for all `depth` blocks (depth dropout, Guo & Gould; uniform mode of Huang et al.)."""
    return (check_rate("rate", rate),) * _check_depth(depth)


def blocks(depth: int, number: float) -> tuple[float, ...]:
    """p_l = number / L for all L blocks: so many are present in expectation, and with systematic draws in every step.

    >>> blocks(8, 2)
    (0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25)
    """
    if not (is_number(number) and 0.0 <= number <= _check_depth(depth)):
        shown = f"{number:g}" if is_number(number) else repr(number)
        raise ConfigError(f"{shown} of {depth} residual blocks cannot be present; give a number from 0 to {depth}")
    return uniform(depth, float(number) / depth)


def linear_decay(depth: int, last: float = 0.5) -> tuple[float, ...]:
    """p_l = 1 - l/L (1 - p_L), l = 1..L, with p_L = `last` (Huang et al. 2016, eq. 4).

    >>> linear_decay(2, 0.5)
    (0.75, 0.5)
    """
    depth, last = _check_depth(depth), check_rate("last", last)
    # written so that the last block gets exactly `last`
    return tuple(last + (1.0 - last) * (depth - block) / depth for block in range(1, depth + 1))


def linear(depth: int, first: float = 1.0, last: float = 0.5) -> tuple[float, ...]:
    """Interpolate from exactly `first` at block 1 to exactly `last` at block L (Singh et al. 2016, "Linear(a, b)").

    One block alone gets `last`: it is the deepest block, where the schedules end.

    >>> linear(3, 1.0, 0.5)
    (1.0, 0.75, 0.5)
    """
    depth, first, last = _check_depth(depth), check_rate("first", first), check_rate("last", last)
    if depth == 1:
        return (last,)
    between = ((first * (depth - 1 - i) + last * i) / (depth - 1) for i in range(1, depth - 1))
    return (first, *between, last)


def exponential(depth: int, last: float = 0.5) -> tuple[float, ...]:
    """1 - p_l = (1 - `last`) (2^((l - 1) / (L - 1)) - 1), l = 1..L: LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710).

    Drops grow exponentially with depth: the first block has exactly rate 1, the last exactly `last`; the paper's p_max
    is 1 - `last`, its layers count from 0. One block alone gets `last`, as with `linear`.

    >>> exponential(2, 0.5)
    (1.0, 0.5)
    """
    depth, last = _check_depth(depth), check_rate("last", last)
    if depth == 1:
        return (last,)
    # written so that both ends are exact
    return tuple(last + (1.0 - last) * (2.0 - 2.0 ** (block / (depth - 1))) for block in range(depth))


def explicit(depth: int, rates: Sequence[float]) -> tuple[float, ...]:
    """Take one given rate per block; raise ConfigError on a wrong length or a rate outside [0, 1]."""
    _check_depth(depth)
    if len(rates) != depth:
        raise ConfigError(f"{len(rates)} survival rates were given for {depth} residual blocks; give one per block")
    return tuple(check_rate(f"survival rate of block {i}", rate) for i, rate in enumerate(rates, start=1))


def expected_depth(rates: Sequence[float]) -> float:
    """Expected number of live blocks, sum of p_l.

    >>> expected_depth(linear_decay(54, 0.5))
    40.25
    """
    return math.fsum(explicit(len(rates), rates))


_CALL = re.compile(r"\s*([a-z_]+)\s*\(([^()]*)\)\s*")
_SCHEDULES = {
    "uniform": (uniform, 1, "uniform(0.5)"),
    "blocks": (blocks, 1, "blocks(2)"),
    "linear_decay": (linear_decay, 1, "linear_decay(0.5)"),
    "linear": (linear, 2, "linear(1, 0.5)"),
    "exponential": (exponential, 1, "exponential(0.5)"),
}


def parse(spec: str | float | Sequence[float], depth: int) -> tuple[float, ...]:
    """Read survival rates for `depth` blocks from what a user writes.

    A number is uniform; a sequence, or numbers joined by commas, is one rate per block; a string names a schedule:
    `"uniform(0.5)"`, `"blocks(2)"`, `"linear_decay(0.5)"`, `"linear(1, 0.5)"` or `"exponential(0.5)"`.

    Raises:
        ConfigError: anything else, or a rate outside [0, 1].
    """
    if isinstance(spec, (int, float)) or is_number(spec):
        return uniform(depth, spec)
    if not isinstance(spec, str):
        if not hasattr(spec, "__len__") or not hasattr(spec, "__iter__"):
            raise ConfigError(f"survival is {spec!r}; give a number, one number per block, or the name of a schedule")
        return explicit(depth, tuple(spec))
    name, body = "", spec
    if call := _CALL.fullmatch(spec):
        name, body = call.groups()
    allowed = "a rate such as 0.8, one rate per block such as 1,0.9,0.8, or " + ", ".join(
        example for _, _, example in _SCHEDULES.values()
    )
    try:
        numbers = [float(word) for word in body.split(",")]
    except ValueError:
        raise ConfigError(f"survival {spec!r} is not understood; give {allowed}") from None
    if not name:
        return uniform(depth, numbers[0]) if len(numbers) == 1 else explicit(depth, numbers)
    if name not in _SCHEDULES:
        raise ConfigError(f"survival schedule {name!r} is unknown; give {allowed}")
    function, arity, example = _SCHEDULES[name]
    if len(numbers) != arity:
        raise ConfigError(f"survival {spec!r} has {len(numbers)} numbers; {name} takes {arity}, as in {example}")
    return function(depth, *numbers)
