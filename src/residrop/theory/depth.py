"""The random depth: how many blocks are live, and what they cost (Hayou & Ayed, Sec. 3, Lemma 1).

L_delta = sum_l delta_l with independent delta_l ~ Bernoulli(p_l) has a Poisson-binomial law, which is computed exactly.
Block-level rules draw so, if they are not coupled (`residrop.schedule.coupling`); the law also holds for any other cost
of live blocks, such as FLOPs or milliseconds.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from residrop.common.checks import check_rate
from residrop.common.errors import ConfigError
from residrop.common.extras import extra
from residrop.schedule.coupling import Coupling

__all__ = ["Law", "cost_law", "depth_bound", "depth_bound_probability", "depth_law"]

_MOST = 1 << 16  # different sums that are kept apart


class Law(NamedTuple):
    """A law on finitely many numbers.

    Attributes:
        values: float64 [k], rising.
        probabilities: float64 [k], their probabilities.
        mean: of the exact law.
        variance: of the exact law.
    """

    values: npt.NDArray[np.float64]
    probabilities: npt.NDArray[np.float64]
    mean: float
    variance: float

    def interval(self, probability: float) -> tuple[float, float]:
        """Quantiles that leave (1 - probability) / 2 below and above: the smallest values reached by the law there."""
        check_rate("probability", probability)
        below = np.cumsum(self.probabilities)
        tail = (1.0 - probability) / 2.0
        last = len(self.values) - 1
        low, high = (min(int(np.searchsorted(below, q - 1e-12)), last) for q in (tail, 1.0 - tail))
        return float(self.values[low]), float(self.values[high])


def _checked(rates: Sequence[float]) -> list[float]:
    if len(rates) == 0:
        raise ConfigError("no survival rates were given; give one per block")
    return [check_rate(f"survival rate {number}", rate) for number, rate in enumerate(rates, start=1)]


def depth_law(rates: Sequence[float], coupling: Coupling = "independent") -> Law:
    """The law of the number of live blocks, L_delta: exact, by convolution.

    Args:
        rates: survival rates p_1, ..., p_L in [0, 1].
        coupling: `independent`, or `systematic`, under which the number is the sum of the rates, rounded up or down.

    Raises:
        ConfigError: no rates, one outside [0, 1], or another coupling, which leaves no law that rates alone give.
    """
    rates = _checked(rates)
    if coupling == "systematic":
        mean = math.fsum(rates)
        more = mean - math.floor(mean)
        values = np.array([math.floor(mean), math.floor(mean) + 1.0])[: 1 if more == 0.0 else 2]
        return Law(values, np.array([1.0 - more, more])[: len(values)], mean, more * (1.0 - more))
    if coupling != "independent":
        raise ConfigError(
            f"the number of live blocks under coupling={coupling!r} has no law that follows from the rates alone; "
            "count it in sampler.plan(step) of many steps"
        )
    law = np.ones(1)
    for rate in rates:
        law = np.convolve(law, (1.0 - rate, rate))
    return Law(np.arange(len(law), dtype=np.float64), law, math.fsum(rates), _variance(rates))


def _variance(rates: Sequence[float], costs: Sequence[float] | None = None) -> float:
    costs = [1.0] * len(rates) if costs is None else costs
    return math.fsum(cost * cost * rate * (1.0 - rate) for rate, cost in zip(rates, costs, strict=True))


def cost_law(rates: Sequence[float], costs: Sequence[float], fixed: float = 0.0) -> Law:
    """The law of fixed + sum_l delta_l c_l: the work of a step, if c_l is that of block l.

    Sums are kept apart where there are at most 65536 of them (blocks of a stage cost the same, so there are few), and
    otherwise moved to a grid of that many points. Mean and variance are exact in any case.

    Args:
        rates: survival rates p_1, ..., p_L in [0, 1].
        costs: c_1, ..., c_L, finite and not negative, in any unit (FLOPs, seconds).
        fixed: what every step costs besides.

    Raises:
        ConfigError: rates as in `depth_law`, another number of costs, or a cost that is negative or not finite.
    """
    rates = _checked(rates)
    if len(costs) != len(rates):
        raise ConfigError(f"{len(costs)} costs were given for {len(rates)} blocks; give one per block")
    for number, cost in enumerate([*costs, fixed], start=1):
        if not (math.isfinite(cost) and cost >= 0.0):
            raise ConfigError(f"cost {number} is {cost}; costs are finite and not negative")
    total = math.fsum(costs)
    values: npt.NDArray[np.float64] = np.zeros(1)
    law: npt.NDArray[np.float64] = np.ones(1)
    for rate, cost in zip(rates, costs, strict=True):
        joined = np.concatenate([values, values + cost])
        weights = np.concatenate([law * (1.0 - rate), law * rate])
        # sums of the same costs in another order differ in their last bits
        step = total * (1e-12 if len(joined) <= _MOST else 1.0 / _MOST) or 1.0
        places, inverse = np.unique(np.round(joined / step), return_inverse=True)
        law = np.bincount(inverse, weights=weights, minlength=len(places)).astype(np.float64)
        values = places * step
    mean = fixed + math.fsum(rate * cost for rate, cost in zip(rates, costs, strict=True))
    return Law(values + fixed, law, mean, _variance(rates, costs))


def _rate_function(t: float) -> float:
    """Bennett's u(t) = (1 + t) log(1 + t) - t, for t >= 0."""
    return (1.0 + t) * math.log1p(t) - t


def depth_bound(rates: Sequence[float], beta: float) -> float:
    """Lemma 1: with probability at least 1 - beta, |L_delta - sum p_l| <= v u^-1(log(2 / beta) / v).

    v = sum p_l (1 - p_l) and u(t) = (1 + t) log(1 + t) - t. Among rates of one sum the bound is largest for uniform
    ones, as v is. It is loose: violations are many times rarer than beta.

    Args:
        rates: survival rates in [0, 1].
        beta: probability in (0, 1).

    Returns:
        The bound, in blocks; 0 where the depth is certain.
    """
    variance = _variance(_checked(rates))
    if not 0.0 < beta < 1.0:
        raise ConfigError(f"beta is {beta}; give a probability between 0 and 1")
    if variance == 0.0:
        return 0.0
    target = math.log(2.0 / beta) / variance
    high = 1.0
    while _rate_function(high) < target:
        high *= 2.0
    with extra("theory"):
        from scipy.optimize import brentq
    root = brentq(lambda t: _rate_function(t) - target, 0.0, high, xtol=1e-14)
    return variance * float(root)  # pyright: ignore[reportArgumentType]


def depth_bound_probability(rates: Sequence[float], deviation: float) -> float:
    """Lemma 1 the other way round: a bound on the probability of |L_delta - sum p_l| > deviation (in blocks)."""
    variance = _variance(_checked(rates))
    if not deviation >= 0.0:
        raise ConfigError(f"deviation is {deviation}; give a number of blocks, 0 or more")
    if variance == 0.0:
        return 0.0
    return min(1.0, 2.0 * math.exp(-variance * _rate_function(deviation / variance)))
