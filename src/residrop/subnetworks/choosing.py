"""Which blocks to keep: costs, importance, and the budget."""

import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from residrop.common.errors import ConfigError, SpreadError, SpreadWarning
from residrop.subnetworks.blocks import Whole
from residrop.theory.costs import Costs, Unit, costs_of
from residrop.theory.sensitivity import sensitivity

__all__ = [
    "Budget",
    "By",
    "Tell",
    "best_for",
    "block_costs",
    "chosen",
    "greedy",
    "importance_of",
    "least_of",
    "predicted",
]

By = Literal["sensitivity", "removal", "greedy", "every_other", "first", "random"]
_FEW = 24  # blocks of which all that are left can be measured anew again and again
_RANKS = ("every_other", "first", "random")  # which give an order, whatever blocks cost
Tell = Callable[[str, float], None]  # what is done, and the share of it that is, in [0, 1]


@dataclass(frozen=True)
class Budget:
    """What a sub-network may cost.

    Attributes:
        amount: a share of the whole network, a number of blocks or milliseconds.
        unit: of it.
        absolute: whether it is no share.
        text: as it was given.
    """

    amount: float
    unit: Unit
    absolute: bool
    text: str

    @classmethod
    def read(cls, given: str | float) -> "Budget":
        """ "0.6 of time", "0.6 of flops", "0.6 of blocks", "8.5 ms", a number "12 of blocks", or a share of blocks.

        Raises:
            ConfigError: it is none of these.
        """
        text = str(given).strip().lower()
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(?:(ms)|of\s+(blocks|flops|time))?", text)
        if found is None:
            raise ConfigError(
                f"budget {given!r} is not understood; give a share such as '0.6 of time', '0.6 of flops' or '0.6 of "
                "blocks', a number of blocks such as '12 of blocks', or milliseconds such as '8.5 ms'"
            )
        amount = float(found[1])
        unit: Unit = "time" if found[2] else found[3] or "blocks"  # pyright: ignore[reportAssignmentType]
        absolute = bool(found[2]) or (found[3] == "blocks" and ("." not in found[1] or amount > 1.0))
        if not absolute and amount > 1.0:
            raise ConfigError(f"the budget is {given}; give a share of the whole network, in [0, 1]")
        if unit == "blocks" and absolute and amount != int(amount):
            raise ConfigError(f"the budget is {given}; give a whole number of blocks, or a share in [0, 1]")
        return cls(amount, unit, absolute, text)

    def limit(self, costs: Costs) -> float:
        """The same as a sum of costs, and what rounding of sums needs."""
        amount = self.amount / 1000.0 if self.absolute and self.unit == "time" else self.amount
        return (amount if self.absolute else amount * costs.total) * (1 + 1e-9)


def block_costs(whole: Whole, budget: Budget, tell: Tell) -> Costs:
    """The cost of every block and of the rest, for the first batch, in the unit of a budget.

    Warns:
        SpreadWarning: times differ too much from call to call, and a share of time is taken as a share of FLOPs.

    Raises:
        ConfigError: the same, where milliseconds are asked for.
    """
    if budget.unit == "blocks":
        return Costs((1.0,) * len(whole.blocks), 0.0, "blocks")
    x = whole.data[0][0]
    try:
        costs = costs_of(
            whole.model, budget.unit, x, training=False, on_progress=lambda share: tell("measuring times", share)
        )
    except SpreadError as error:
        if budget.absolute:
            raise
        warnings.warn(f"{error}; the budget is {budget.amount:g} of flops now", SpreadWarning, stacklevel=3)
        costs = costs_of(whole.model, "flops", x)
    branches = tuple(sum(costs.branches[number] for number in block.rules) for block in whole.blocks)
    return Costs(branches, costs.fixed, costs.unit)


def best_for(whole: Whole) -> By:
    """Greedy choice, which was the best on trained networks, where it takes no more than 300 losses; else removal."""
    return "greedy" if len(whole.blocks) <= _FEW else "removal"


def importance_of(whole: Whole, by: By, seed: int, tell: Tell) -> list[float]:
    """For every block how much is lost without it: what the loss rises by, or only a rank.

    - sensitivity: -dLoss / d delta_l at delta = 1, by one backward pass a batch (Hayou & Ayed 2021, Sec. 5; with its
      sign, so that blocks without which the loss falls go first).
    - removal: Loss(without the block) - Loss.
    - every_other: blocks at even distances go first (Fan et al. 2020, "every other").
    - first: the first blocks stay.
    - random: a random order.
    """
    count = len(whole.blocks)
    if by == "sensitivity":
        return _sensitivities(whole, tell)
    if by == "removal":
        found: list[float] = []
        for number in range(count):
            found.append(whole.loss_with(_without(whole.full, number)) - whole.loss_of_all)
            tell("leaving out one block after the other", (number + 1) / count)
        return found
    if by == "random":
        order = list(range(count))
        random.Random(seed).shuffle(order)
        return [float(one) for one in order]
    if by == "first":
        return [float(count - number) for number in range(count)]
    return [float(-rank) for rank in _evenly(count)]


def _evenly(count: int) -> list[int]:
    """Ranks of places such that any number of the highest ones stand at even distances: bits of the place, reversed."""
    bits = max(1, (count - 1).bit_length())
    return [int(f"{place:0{bits}b}"[::-1], 2) for place in range(count)]


def _without(kept: Sequence[bool], number: int) -> tuple[bool, ...]:
    return (*kept[:number], False, *kept[number + 1 :])


def _sensitivities(whole: Whole, tell: Tell) -> list[float]:
    """As `theory.sensitivity`, with one number for all branches of a block."""
    try:
        scores = sensitivity(whole.model, whole.data, whole.loss, training=whole.batch_statistics).scores.tolist()
    except (RuntimeError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"the loss cannot be differentiated ({first}); choose by removal, which needs its value alone"
        ) from error
    tell("measuring sensitivities", 1.0)
    return [-sum(scores[number] for number in block.rules) for block in whole.blocks]


def chosen(
    costs: Costs, importance: Sequence[float], by: By, limit: float, text: str, lists: Sequence[frozenset[int]] = ()
) -> tuple[bool, ...]:
    """The blocks that stay: those go first that are worth least for what they cost, until the rest costs no more than
    the limit; then come back, the most important first, those for which there is room. Of mere ranks the lowest go. One
    of each of the `lists` stays.

    Raises:
        ConfigError: even without any block the network costs more (the least is named).
    """
    _check_limit(costs, limit, text)
    kept = [True] * len(costs.branches)
    ranked = by in _RANKS
    worth = [value if ranked else _worth(value, cost) for value, cost in zip(importance, costs.branches, strict=True)]
    for number in sorted(range(len(kept)), key=lambda one: worth[one]):
        if _cost(costs, kept) <= limit:
            break
        kept[number] = _is_last(number, kept, lists)
    if _cost(costs, kept) > limit:
        raise _too_small(costs, kept, text)
    for number in () if ranked else sorted(range(len(kept)), key=lambda one: -importance[one]):
        if not kept[number] and _cost(costs, kept) + costs.branches[number] <= limit:
            kept[number] = True
    return tuple(kept)


def greedy(
    whole: Whole, costs: Costs, limit: float, text: str, tell: Tell, kept: Sequence[bool] | None = None
) -> tuple[bool, ...]:
    """One block after another goes: that without which the loss of the blocks that are left rises least for what it
    costs, measured anew each time. `kept` are those that are left from the start (all)."""
    _check_limit(costs, limit, text)
    kept = whole.full if kept is None else tuple(kept)
    loss = whole.loss_with(kept)
    done, total = 0, sum(range(_fewest(costs, limit) + 1, sum(kept) + 1))
    while _cost(costs, kept) > limit:
        found: list[tuple[float, int, float]] = []
        for number in (one for one, keep in enumerate(kept) if keep):
            if not costs.branches[number] > 0.0 or _is_last(number, kept, whole.lists):
                continue
            without = whole.loss_with(_without(kept, number))
            found.append(((without - loss) / costs.branches[number], number, without))
            done += 1
            tell(f"greedy, {total} losses of {len(whole.data)} batches at most", min(1.0, done / total))
        if not found:
            raise _too_small(costs, kept, text)
        _, number, loss = min(found)
        kept = _without(kept, number)
    return kept


def _too_small(costs: Costs, kept: Sequence[bool], text: str) -> ConfigError:
    return ConfigError(
        f"a budget of {text} cannot be met: one layer of each list has to stay, which takes "
        f"{predicted(costs, kept):.3g} of the whole"
    )


def least_of(costs: Costs, lists: Sequence[frozenset[int]]) -> float:
    """What the smallest sub-network costs: the rest of the network, and the cheapest block of each list."""
    return costs.fixed + sum(min(costs.branches[number] for number in one) for one in lists)


def _worth(value: float, cost: float) -> float:
    """What a block is worth for its cost; one that costs nothing stays."""
    return value / cost if cost > 0.0 else math.inf


def _is_last(number: int, kept: Sequence[bool], lists: Sequence[frozenset[int]]) -> bool:
    """Whether a block is the last one that is left of its list."""
    return any(number in one and sum(kept[other] for other in one) == 1 for one in lists)


def _fewest(costs: Costs, limit: float) -> int:
    """Fewest blocks that may stay, if the cheap ones go first."""
    left = sorted(costs.branches, reverse=True)
    while left and costs.fixed + sum(left) > limit:
        left.pop()
    return len(left)


def _check_limit(costs: Costs, limit: float, text: str) -> None:
    if costs.unit == "blocks" and limit >= len(costs.branches) + 1:
        raise ConfigError(f"the budget is {text}, and the network has {len(costs.branches)} blocks")
    if costs.fixed > limit:
        share = costs.fixed / costs.total
        least = f"{1000 * costs.fixed:.3g} ms" if costs.unit == "time" else f"{share:.3g} of {costs.unit}"
        raise ConfigError(
            f"a budget of {text} cannot be met: without any block the network takes {least} ({share:.3g} of the whole)"
        )


def _cost(costs: Costs, kept: Sequence[bool]) -> float:
    return costs.fixed + sum(cost for cost, keep in zip(costs.branches, kept, strict=True) if keep)


def predicted(costs: Costs, kept: Sequence[bool]) -> float:
    """The share of the whole network's cost."""
    return _cost(costs, kept) / costs.total
