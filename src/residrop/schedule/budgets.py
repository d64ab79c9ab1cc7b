"""Survival rates from a budget: the expected work of the live blocks is given, and a rule says who gets it.

The work of block l is its cost c_l; without costs every block counts 1, and the budget is an expected number of blocks
(the paper's average depth, Hayou & Ayed, Sec. 3).
"""

import math
from collections.abc import Callable, Sequence

from residrop.common.checks import check_rate
from residrop.common.errors import ConfigError
from residrop.schedule.survival import linear_decay

__all__ = ["linear_at", "max_regularization_at", "sensitivity_at", "uniform_at"]


def _checked(blocks: int, budget: float, costs: Sequence[float] | None, least: float = 0.0) -> list[float]:
    """The costs; ConfigError if they are none, or if no rates from `least` to 1 meet the budget."""
    found = [1.0] * blocks if costs is None else [float(cost) for cost in costs]
    if blocks == 0 or len(found) != blocks:
        raise ConfigError(f"{len(found)} costs were given for {blocks} blocks; give one per block, at least one")
    for number, cost in enumerate(found, start=1):
        if not (math.isfinite(cost) and cost > 0.0):
            raise ConfigError(f"cost {number} is {cost}; give a positive number")
    low, high = least * math.fsum(found), math.fsum(found)
    if not low * (1 - 1e-12) <= budget <= high * (1 + 1e-12):
        nearest = low if budget < low else high
        raise ConfigError(
            f"a budget of {budget:g} cannot be met: rates from {least:g} to 1 cost {low:g} to {high:g}; "
            f"the nearest is {nearest:g}"
        )
    return found


def uniform_at(blocks: int, budget: float, costs: Sequence[float] | None = None) -> tuple[float, ...]:
    """p_l = budget / sum_l c_l for every block.

    Args:
        blocks: number of blocks L.
        budget: sum_l c_l p_l, in the unit of the costs.
        costs: c_l > 0; None is 1 each.

    Raises:
        ConfigError: a budget outside [0, sum_l c_l] (the nearest is named), or bad costs.
    """
    costs = _checked(blocks, budget, costs)
    return (min(1.0, budget / math.fsum(costs)),) * blocks


def linear_at(blocks: int, budget: float, costs: Sequence[float] | None = None) -> tuple[float, ...]:
    """p_l = 1 - l / L (1 - p_L), with p_L such that sum_l c_l p_l is the budget (Huang et al., eq. 4).

    For equal costs and b = budget / L that is p_L = 1 - (1 - b) 2 L / (L + 1), which needs b >= 1/2 - 1/(2L): this mode
    cannot drop more.

    Raises:
        ConfigError: as `uniform_at`, or a budget too small for p_L >= 0 (the nearest is named).
    """
    costs = _checked(blocks, budget, costs)
    falls = math.fsum(cost * number / blocks for number, cost in enumerate(costs, start=1))  # what p_L = 0 saves
    least = math.fsum(costs) - falls
    if budget < least * (1 - 1e-12):
        raise ConfigError(
            f"a budget of {budget:g} cannot be met by linear decay, which costs at least {least:g} (p_L = 0); "
            "choose that, or another rule"
        )
    last = 1.0 - (math.fsum(costs) - budget) / falls
    return linear_decay(blocks, min(1.0, max(0.0, last)))


def sensitivity_at(
    scores: Sequence[float], budget: float, costs: Sequence[float] | None = None, *, least: float = 0.0
) -> tuple[float, ...]:
    """SenseMode: p_l = min(1, least + alpha |S_l|), with alpha >= 0 such that sum_l c_l p_l is the budget.

    Hayou & Ayed, Sec. 5; the paper's experiments are `least=0` before anything reaches 1. For sensitivity per unit of
    cost give S_l / c_l as scores. Blocks of score 0 stay at `least`, unless all others are at 1 and the budget is not
    spent; then they share the rest alike. So scores that are all zero give uniform rates.

    Args:
        scores: S_l, finite; their signs do not count.
        budget: sum_l c_l p_l, in the unit of the costs.
        costs: c_l > 0; None is 1 each.
        least: p_min in [0, 1].

    Raises:
        ConfigError: a score that is not finite, bad costs or p_min, or a budget outside [p_min sum c_l, sum c_l] (the
            nearest is named).
    """
    check_rate("least", least)
    sizes = [abs(float(score)) for score in scores]
    for number, size in enumerate(sizes, start=1):
        if not math.isfinite(size):
            raise ConfigError(f"the score of block {number} is {scores[number - 1]}; scores are finite numbers")
    costs = _checked(len(sizes), budget, costs, least)
    largest = max(sizes)
    if largest > 0.0:
        sizes = [size / largest for size in sizes]
        sizes = [size if size > 1e-300 else 0.0 for size in sizes]

    def rates(alpha: float) -> tuple[float, ...]:
        return tuple(min(1.0, least + alpha * size) for size in sizes)

    bends = sorted({0.0, *((1.0 - least) / size for size in sizes if size > 0.0)})
    reached = _spent(rates(bends[-1]), costs)
    if budget <= reached:
        return rates(_root(lambda alpha: _spent(rates(alpha), costs), bends, budget))
    zeros = [size == 0.0 for size in sizes]
    idle = math.fsum(cost for cost, zero in zip(costs, zeros, strict=True) if zero)
    rest = 1.0 if idle == 0.0 else min(1.0, least + (budget - reached) / idle)
    return tuple(rest if zero else 1.0 for zero in zeros)


def max_regularization_at(
    discrepancies: Sequence[float], budget: float, costs: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Lemma 2: the rates that maximise sum_l p_l (1 - p_l) g_l under the budget.

    p_l = min(1, max(0, 1/2 - C c_l / g_l)), where C has the sign of sum_l c_l / 2 - budget. Equal g (and costs) give
    uniform rates.

    Args:
        discrepancies: g_l > 0, as `residrop.theory` measures them.
        budget: sum_l c_l p_l, in the unit of the costs.
        costs: c_l > 0; None is 1 each.

    Raises:
        ConfigError: a g that is not positive and finite, bad costs, or a budget outside [0, sum_l c_l].
    """
    for number, g in enumerate(discrepancies, start=1):
        if not (math.isfinite(g) and g > 0.0):
            raise ConfigError(f"the discrepancy of block {number} is {g}; give a positive number")
    costs = _checked(len(discrepancies), budget, costs)
    slopes = [cost / g for cost, g in zip(costs, discrepancies, strict=True)]

    def rates(minus_c: float) -> tuple[float, ...]:
        return tuple(min(1.0, max(0.0, 0.5 + minus_c * slope)) for slope in slopes)

    bends = sorted({sign * 0.5 / slope for slope in slopes for sign in (-1.0, 1.0)} | {0.0})
    return rates(_root(lambda minus_c: _spent(rates(minus_c), costs), bends, budget))


def _spent(rates: Sequence[float], costs: Sequence[float]) -> float:
    return math.fsum(rate * cost for rate, cost in zip(rates, costs, strict=True))


def _root(spent: Callable[[float], float], bends: Sequence[float], budget: float) -> float:
    """Where a rising function that is linear between `bends` (and constant outside) takes a value: exact."""
    low, high = 0, len(bends) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(bends[middle]) >= budget else (middle, high)
    below, above = spent(bends[low]), spent(bends[high])
    if above <= below:
        return bends[high]
    share = min(1.0, max(0.0, (budget - below) / (above - below)))
    return bends[low] + share * (bends[high] - bends[low])
