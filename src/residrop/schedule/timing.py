"""Survival rates over training time: the share of every drop that is in force at a step. No torch.

A `Timing` is a curve s(t) in [0, 1] over the steps t of a training (0 is the first). A block of survival rate p_l has
the rate 1 - s(t) (1 - p_l) at step t: s = 0 is full depth, s = 1 is p_l itself. Each kind of curve has a function here
and the same name in the strings that `parse` reads:

- `constant`: p_l throughout;
- `warmup(steps)`: linearly from full depth to p_l;
- `early(steps, fade)`, `late(steps)`: p_l at first only, or from then on (Liu et al. 2023, arXiv 2303.01500);
- `progressive(gamma)`: exponentially from full depth to p_l, ever slower (Zhang & He 2020, arXiv 2010.13369);
- `exponential(steps)`: exponentially from full depth to p_l, ever faster (Elhoushi et al. 2024, arXiv 2404.16710);
- `plateau(hold, fade)`: p_l, then back to full depth, where it stays ("Don't Drop Dropout", arXiv 2609.05275);
- `points(0:0, 100:1, 500:0.5)`: straight lines through any points.

Times are whole steps everywhere but in a training recipe, whose times are shares of the training (see `parse`).
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from residrop.common.checks import check_rate, check_whole, is_number
from residrop.common.errors import ConfigError

__all__ = [
    "Schedule",
    "Timing",
    "constant",
    "early",
    "exponential",
    "late",
    "parse",
    "plateau",
    "points",
    "progressive",
    "warmup",
]


@dataclass(frozen=True)
class Timing:
    """The share s(t) of every drop that is in force at step t; made by the functions of this module or by `parse`.

    Attributes:
        points: pairs (step, share in [0, 1]) in the order of steps. Before the first the share is the first one's,
            between two it is a straight line, from the last one on it is the last one's. Of two points at one step
            the latter counts from that step on.
        gamma: None, or a number > 0: then the share is 1 - exp(-gamma t), held from the one point on if there is one.
        exponential: whether the share rises from 0 at step 0 to 1 at the second point as 2^u - 1, u being the share of
            the way, and not on a straight line. There are these two points then, and no gamma.

    Raises:
        ConfigError: steps that fall, a share outside [0, 1], a gamma that is not positive, no points and no gamma,
            other points of an exponential curve.
    """

    points: tuple[tuple[int, float], ...] = ((0, 1.0),)
    gamma: float | None = None
    exponential: bool = False

    def __post_init__(self) -> None:
        before, pairs = 0, tuple(self.points)
        for step, share in pairs:
            if check_whole("a step of the timing", step, least=0) < before:
                raise ConfigError(f"step {step} of the timing comes after step {before}; give steps in rising order")
            if not (is_number(share) and 0.0 <= share <= 1.0):
                raise ConfigError(
                    f"the share at step {step} is {share!r}; give a number from 0 (full depth) to 1 (survival rates)"
                )
            before = step
        object.__setattr__(self, "points", tuple((step, float(share)) for step, share in pairs))
        if self.gamma is None and not pairs:
            raise ConfigError("the timing has no points; give at least one, as in points(0:1)")
        if self.gamma is not None:
            _check_gamma(self.gamma)
            if len(pairs) > 1:
                raise ConfigError(
                    f"the timing has a gamma and {len(pairs)} points; give at most one, the end of its curve"
                )
        rise = [share for _, share in self.points] == [0.0, 1.0] and self.points[0][0] == 0
        if self.exponential and (self.gamma is not None or not rise):
            raise ConfigError("an exponential timing has the points (0, 0) and (steps, 1), and no gamma")

    def share(self, step: int) -> float:
        """s(step): 0 is full depth, 1 the survival rates. A step below 0 counts as 0."""
        points, step = self.points, max(step, 0)
        if points and step >= points[-1][0]:
            return points[-1][1]
        if self.gamma is not None:
            return _approach(self.gamma, step)
        after = bisect_right(points, step, key=_time_of)
        if after == 0:
            return points[0][1]
        (start, low), (end, high) = points[after - 1], points[after]
        way = (step - start) / (end - start)
        return low + (high - low) * (math.exp2(way) - 1.0 if self.exponential else way)

    @property
    def steady(self) -> bool:
        """Whether the share is the same at all steps."""
        return self.gamma is None and len({share for _, share in self.points}) == 1

    @property
    def final(self) -> float:
        """The share at the end: the last point's, or 1 where `progressive` has none (its limit)."""
        return self.points[-1][1] if self.points else 1.0

    @property
    def most(self) -> float:
        """The largest share, or its limit."""
        return max([1.0 if self.gamma is not None else 0.0, *(share for _, share in self.points)])

    def __str__(self) -> str:
        """A string that `parse` reads back as an equal timing."""
        if self.exponential:
            return f"exponential({self.points[-1][0]})"
        if self.gamma is None:
            return f"points({', '.join(f'{step}:{share!r}' for step, share in self.points)})"
        return f"progressive({self.gamma!r}{''.join(f', {step}' for step, _ in self.points)})"


def _time_of(point: Sequence[float]) -> float:
    return point[0]


def _check_gamma(gamma: object) -> float:
    if not (is_number(gamma) and 0.0 < gamma < math.inf):
        raise ConfigError(f"gamma is {gamma!r}; give a finite number > 0")
    return float(gamma)


def _approach(gamma: float, time: float) -> float:
    return -math.expm1(-gamma * time)


def constant() -> Timing:
    """s = 1: the survival rates throughout."""
    return Timing()


def warmup(steps: int) -> Timing:
    """s rises linearly from 0 at step 0 to exactly 1 at step `steps`; 0 is no warm-up."""
    check_whole("steps of the warm-up", steps, least=0)
    return Timing(((0, 0.0), (steps, 1.0)))


def early(steps: int, fade: int = 0) -> Timing:
    """s = 1 before step `steps`, 0 from there on: early dropout (Liu et al. 2023, arXiv 2303.01500).

    With a `fade`, s falls linearly from 1 at step `steps` to exactly 0 at step `steps + fade`; `early(0, fade)` falls
    from the first step on.
    """
    check_whole("steps of the early phase", steps, least=0)
    check_whole("steps of the fade", fade, least=0)
    return Timing(((steps, 1.0), (steps + fade, 0.0)))


def late(steps: int) -> Timing:
    """s = 0 before step `steps`, 1 from there on: late dropout (Liu et al. 2023, arXiv 2303.01500)."""
    check_whole("steps of the phase at full depth", steps, least=0)
    return Timing(((steps, 0.0), (steps, 1.0)))


def plateau(hold: int, fade: int) -> Timing:
    """s = 1, then linearly to 0, then full depth to the end ("Don't Drop Dropout", arXiv 2609.05275).

    Steps up to `hold` have s = 1, those from `hold + fade` on s = 0. The same curve as `early` with a fade.
    """
    return early(hold, fade)


def progressive(gamma: float, until: int | None = None) -> Timing:
    """s(t) = 1 - exp(-gamma t): progressive layer drop (Zhang & He 2020, arXiv 2010.13369).

    With the rates of `linear_decay(theta)`, the last block has the paper's keep(t) = (1 - theta) exp(-gamma t) + theta,
    and block l of L has 1 - l/L (1 - keep(t)).

    Args:
        gamma: number > 0, per step.
        until: step from which on s stays where it is; None is never.
    """
    gamma = _check_gamma(gamma)
    if until is None:
        return Timing((), gamma)
    return Timing(((check_whole("until", until, least=0), _approach(gamma, until)),), gamma)


def exponential(steps: int) -> Timing:
    """s(t) = 2^(t / steps) - 1 up to step `steps`, then 1: LayerSkip's curriculum for training from scratch.

    Elhoushi et al. 2024, arXiv 2404.16710, S(t) with `steps` = T - 1, the last step. 0 is no curriculum.
    """
    check_whole("steps of the exponential rise", steps, least=0)
    return Timing(((0, 0.0), (steps, 1.0)), exponential=True)


def points(*pairs: tuple[int, float]) -> Timing:
    """Straight lines through pairs (step, share); see `Timing.points`."""
    return Timing(tuple(pairs))


_CALL = re.compile(r"\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*")
_COUNTS = {  # fewest and most entries between the brackets
    "constant": (0, 0),
    "warmup": (1, 1),
    "early": (1, 2),
    "late": (1, 1),
    "plateau": (2, 2),
    "progressive": (1, 2),
    "exponential": (1, 1),
    "points": (1, math.inf),
}
_FORMS = (
    "constant, warmup(steps), early(steps), early(steps, fade), late(steps), plateau(hold, fade), progressive(gamma), "
    "progressive(gamma, until), exponential(steps) or points(step:share, step:share, ...)"
)


def parse(spec: str | Timing, training: int | None = None) -> Timing:
    """Read a timing from what a user writes: the name of a function of this module with its numbers.

    Args:
        spec: such as "warmup(1000)" or "points(0:0, 100:1)"; a Timing is returned as it is.
        training: None, and times are whole steps; or the length of the training in steps, and times are shares of it
            in [0, 1], each rounded once to a step. Then gamma is per training, too: s ends at 1 - exp(-gamma). A
            training of 0 steps is one that is over: s is what it ended with.

    Raises:
        ConfigError: an unknown kind, a wrong number of numbers, or a time or share that is not allowed.
    """
    if isinstance(spec, Timing):
        return spec
    if training is not None:
        check_whole("training (the number of its steps)", training, least=0)
    name, entries = _read(spec)

    def step(time: float) -> int:
        return _to_step(spec, time, training)

    if name == "points":
        if entries != sorted(entries, key=_time_of):  # before rounding hides it
            raise ConfigError(f"survival timing {spec!r} goes back in time; give its points in rising order")
        return points(*((step(time), share) for time, share in entries))
    numbers = [number for (number,) in entries]
    if name == "constant":
        return constant()
    if name == "progressive":
        gamma, until = numbers[0], numbers[1] if len(numbers) == 2 else None
        if training is None:
            return progressive(gamma, None if until is None else step(until))
        until, gamma = 1.0 if until is None else until, _check_gamma(gamma)
        return Timing(((step(until), _approach(gamma, until)),), gamma / training if training else None)
    first, *_ = [step(length) for length in numbers]  # refuses each by itself
    if name in ("early", "plateau"):
        return early(first, step(sum(numbers)) - first)  # ends are rounded, not lengths
    return {"warmup": warmup, "late": late, "exponential": exponential}[name](first)


def _read(spec: str) -> tuple[str, list[list[float]]]:
    """The name of a kind and its entries: one number each, or two around a colon for `points`."""
    call = _CALL.fullmatch(spec) if isinstance(spec, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    name, body = (call[1], call[2] or "") if call else ("", "")
    try:
        entries = [[_number(word) for word in entry.split(":")] for entry in body.split(",")] if body.strip() else []
    except ValueError:
        name, entries = "", []
    fewest, most = _COUNTS.get(name, (1, 0))
    if not fewest <= len(entries) <= most or any(len(entry) != (2 if name == "points" else 1) for entry in entries):
        raise ConfigError(f"survival timing {spec!r} is not understood; give {_FORMS}")
    return name, entries


def _number(word: str) -> float:
    return int(word) if word.strip().isdecimal() else float(word)  # an int of any size stays exact


def _to_step(spec: str, time: float, training: int | None) -> int:
    if training is None:
        if time % 1 or time < 0:  # NaN and infinity have no remainder of 0, either
            raise ConfigError(f"survival timing {spec!r} has the time {time}; times are whole steps of at least 0 here")
        return int(time)
    if not 0 <= time <= 1:
        raise ConfigError(
            f"survival timing {spec!r} reaches the time {time}; times are shares of the training here and lie in [0, 1]"
        )
    return round(time * training)


@dataclass(frozen=True)
class Schedule:
    """Rates over depth *and* time: `at(step)` gives the rates in force at a training step.

    Attributes:
        rates: the survival rates p_l, one per coin (one per block for most rules, two per block for swapout).
        timing: the share of every drop 1 - p_l that is in force, over time: a Timing, or a string for `parse`.
    """

    rates: tuple[float, ...]
    timing: Timing = Timing()

    def __post_init__(self) -> None:
        rates = tuple(check_rate(f"rate {i}", rate) for i, rate in enumerate(self.rates, start=1))
        object.__setattr__(self, "rates", rates)
        object.__setattr__(self, "timing", parse(self.timing))

    def at(self, step: int) -> tuple[float, ...]:
        """Rates at `step` (0 is the first step)."""
        return self.under(self.timing.share(step))

    def under(self, share: float) -> tuple[float, ...]:
        """Rates where `share` of every drop is in force."""
        if share == 1.0:  # exact, which the line below need not be
            return self.rates
        return tuple([1.0 - share * (1.0 - rate) for rate in self.rates])
