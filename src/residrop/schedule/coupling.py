"""Coupled draws: how the presence of a block depends on that of others in the same step. No torch.

Every block is an arc of a circle of length 1, as long as its survival rate, and the rows of a batch are points on the
circle at equal distances: a block is present in a row if the row's point lies on its arc. A block-level coin has one
point. Wherever the arcs lie with respect to one another: if the circle as a whole is turned at random, every rate is
exact. A coupling says how they lie. Positions are whole numbers modulo 2^64, so nothing is rounded.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, pairwise
from math import floor, isfinite
from typing import Literal

from residrop.common.checks import check_choice
from residrop.common.errors import ConfigError

__all__ = [
    "Coupling",
    "absent_blocks",
    "arcs_given_presence",
    "check_apart",
    "check_coupling",
    "gaps_end_to_end",
    "one_of_two",
    "positions",
    "ways_round",
]

Coupling = Literal["independent", "systematic", "balanced", "apart"]

_FULL = 1 << 64
_ROUNDED = 1e-9  # by which sums of rates such as 0.7 and 0.3 may miss 1


def check_coupling(coupling: str, kinds: Iterable[str], costs: Sequence[float], blocks: int) -> Coupling:
    """A coupling that blocks of these granularities can have.

    Raises:
        ConfigError: an unknown one; units, or rows with a coin each; or costs that are missing, not wanted, or wrong.
    """
    check_choice("coupling", coupling, Coupling)
    found: Coupling = coupling  # pyright: ignore[reportAssignmentType]
    if found != "independent" and (other := sorted({kind for kind in kinds if kind not in ("block", "row")})):
        raise ConfigError(
            f"coupling is {found!r}, but draws of granularity {' and '.join(map(repr, other))} are independent; use "
            "rules of blocks or rows, or coupling='independent'"
        )
    if (found == "balanced") != bool(costs):
        raise ConfigError(
            "coupling='balanced' balances costs; give costs=, a number for every rule, for example "
            "residrop.theory.costs_of(model, 'flops', x).branches"
            if found == "balanced"
            else f"coupling={found!r} has no use for costs; leave them out, or use coupling='balanced'"
        )
    if costs and len(costs) != blocks:
        raise ConfigError(f"{len(costs)} costs were given for {blocks} rules; give one for each")
    for number, cost in enumerate(costs, start=1):
        if not (isfinite(cost) and cost >= 0.0):
            raise ConfigError(f"cost {number} is {cost}; costs are finite and not negative")
    return found


def ways_round(coupling: Coupling, places: Sequence[int], costs: Sequence[float]) -> list[list[int]]:
    """The order in which the arcs of some rules lie on the circle, as lists within which it is drawn in every step."""
    if coupling == "apart":
        return [[place] for place in places]
    if coupling == "systematic":
        return [list(places)]
    dearest_first = sorted(places, key=lambda place: -costs[place])
    return [list(group) for _, group in groupby(dearest_first, key=lambda place: costs[place])]


def gaps_end_to_end(
    order: Sequence[Sequence[int]], gaps: Sequence[int], words: Sequence[float]
) -> tuple[list[int], list[int]]:
    """For `systematic` and `balanced` coins: blocks as they follow one another, and where the gap of each ends if gaps,
    whose lengths are 1 less those of the arcs, lie end to end. Of `words` only the order matters."""
    places = [place for group in order for place in sorted(group, key=words.__getitem__)]
    return places, list(accumulate(map(gaps.__getitem__, places)))


def absent_blocks(places: Sequence[int], ends: Sequence[int], turn: int) -> list[int]:
    """The blocks whose coins are dead: those on whose arcs point 0 does not lie, after a turn by `turn`.

    Arcs that lie end to end have their gaps end to end, too (a whole turn further each), so point 0 is looked up in the
    gaps of `gaps_end_to_end`.
    """
    return [places[bisect_left(ends, at)] for at in range(_FULL - turn, ends[-1] + 1, _FULL)]


def positions(
    coupling: Coupling, order: Sequence[Sequence[int]], arcs: Sequence[int], words: Sequence[int], turn: int
) -> dict[int, int]:
    """Where point 0 lies as seen from the beginning of every arc, in [0, 2^64): on it if that is less than its length.

    - `systematic`: arcs lie end to end, in a random order. Point 0, and any other, lies on as many as the sum of the
      rates, rounded up or down: systematic sampling (Madow 1949) in a random order (Hartley & Rao 1962).
    - `balanced`: the same with arcs in the order of their costs, random among equal ones. The blocks that hold a point
      then cost the mean, up to the cost of one block: as the point moves by a length of 1, each is exchanged for the
      next cheaper one, so the sum falls from one end of the list to the other.
    - `apart`: the gap in one arc lies on the arc of its neighbour, at random there. No point is in two gaps.

    Args:
        coupling: not `independent`.
        order: of `ways_round`.
        arcs: lengths of all rules, survival rates times 2^64.
        words: 64 random bits for every rule.
        turn: 64 random bits for all of them.
    """
    found: dict[int, int] = {}
    at = turn
    if coupling == "apart":
        before = None
        for (place,) in order:
            if before is not None:
                gap = _FULL - arcs[place]
                left = max(0, arcs[before] - gap)  # rates that add up to 1 may be rounded to less
                at = (at - gap - (left * words[place] >> 64)) % _FULL
            found[place] = at
            before = place
        return found
    for group in order:
        for place in sorted(group, key=words.__getitem__):
            found[place] = at
            at = (at - arcs[place]) % _FULL
    return found


def arcs_given_presence(arcs: Sequence[int]) -> list[int]:
    """For `apart` blocks: how often each is present where the one before is, times 2^64. Where that is absent it is
    present always, which makes it present as often as its rate says."""
    behind = [max(0, _FULL - ((_FULL - arc) << 64) // before) if before else _FULL for before, arc in pairwise(arcs)]
    return [*arcs[:1], *behind]


def one_of_two(order: Sequence[Sequence[int]], coins: Sequence[int]) -> list[int]:
    """The absent blocks of `apart`: those whose coin (at the rate of `arcs_given_presence`) is dead, but none behind an
    absent one."""
    found: list[int] = []
    absent = False
    for (place,) in order:
        absent = not absent and not coins[place]
        if absent:
            found.append(place)
    return found


def check_apart(rates: Sequence[float], share: float) -> None:
    """ConfigError if neighbours with these rates would have to be absent at once, where so much of their drops is in
    force."""
    worst = max((share * (2.0 - p - q) for p, q in pairwise(rates)), default=0.0)
    if worst > 1.0 + _ROUNDED:
        less = floor(1000.0 / worst) / 1000.0
        raise ConfigError(
            "coupling='apart' keeps one of two neighbours, so their survival rates must add up to 1 at least; take "
            f"{less:g} of every drop 1 - p_l (the lowest rate is {1.0 - less * (1.0 - min(rates)):.3f} then), or others"
        )
