"""`frontier`: what sub-networks of one model lose, against the time they take."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from residrop.blocks.modes import evaluating
from residrop.common.checks import check_choice
from residrop.common.errors import ConfigError
from residrop.inference.sampled.batch import Batch
from residrop.subnetworks.blocks import Loss, Whole, pairs_of
from residrop.subnetworks.choosing import (
    Budget,
    By,
    Tell,
    best_for,
    block_costs,
    chosen,
    greedy,
    importance_of,
    least_of,
    predicted,
)
from residrop.subnetworks.plain import plain
from residrop.subnetworks.shrink import measured, wants_statistics
from residrop.subnetworks.timing import seconds_of

__all__ = ["BUDGETS", "Point", "frontier"]

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Point:
    """One sub-network.

    Attributes:
        name: of the model.
        by: how blocks were chosen.
        budget: as it was asked for.
        kept: names of its blocks.
        blocks: of how many.
        predicted: its cost as a share of the whole network's, in the unit of the budget.
        seconds: median time of a forward on the first batch.
        flops: of that forward.
        before: the metric before batch norms were recalibrated.
        metric: the metric of the result.
    """

    name: str
    by: str
    budget: str
    kept: tuple[str, ...]
    blocks: int
    predicted: float
    seconds: float
    flops: float
    before: float
    metric: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**asdict(self), "kept": list(self.kept)}


def frontier(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Iterable[Any],
    metric: Metric | None = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    unit: str = "time",
    by: By | Sequence[By] | None = None,
    loss: Loss | None = None,
    blocks: Any = None,
    recalibrate: bool | None = None,
    seed: int = 0,
    repeats: int = 15,
    on_progress: Tell | None = None,
) -> list[Point]:
    """Sub-networks of falling budgets, each as `shrink` makes it, with what they lose and the time they take.

    Costs and importance are measured once; greedy choice goes on from budget to budget. Each sub-network is made and
    measured once, whatever ways and budgets lead to it, and all of a model are timed in turns. Budgets below what the
    smallest sub-network takes are left out.

    Args:
        model: one model, or several by name, for a comparison.
        batches: as in `shrink`; for several models the same.
        metric: of a plain sub-network in eval mode, less is better, for example its error on validation images; None
            is the mean loss of the batches.
        budgets: shares of the whole network.
        unit: of the budgets: "time", "flops" or "blocks".
        by: one way of choosing, or several.
        loss: as in `shrink`, as are `blocks`, `recalibrate`, `seed`, `repeats` and `on_progress`.

    Raises:
        ConfigError: as `shrink`.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    ways: tuple[By, ...] = () if by is None else (by,) if isinstance(by, str) else tuple(by)
    for way in ways:
        check_choice("by", way, By)
    wanted = sorted((Budget.read(f"{share} of {unit}") for share in budgets), key=lambda one: -one.amount)
    data, of = pairs_of(batches, loss)
    tell = on_progress or (lambda what, share: None)
    found: list[Point] = []
    for name, one in models.items():
        whole = Whole(one, data, of, blocks, batch_statistics=wants_statistics(one, recalibrate))
        costs = block_costs(whole, wanted[0], tell)
        made: list[tuple[By, Budget, tuple[bool, ...]]] = []
        networks: dict[tuple[bool, ...], tuple[nn.Module, float, float]] = {}
        for way in ways or (best_for(whole),):
            importance = [] if way == "greedy" else importance_of(whole, way, seed, tell)
            kept: tuple[bool, ...] = whole.full
            for number, budget in enumerate(wanted):
                limit = budget.limit(costs)
                if limit < least_of(costs, whole.lists):
                    continue
                if way == "greedy":
                    kept = greedy(whole, costs, limit, budget.text, tell, kept)
                else:
                    kept = chosen(costs, importance, way, limit, budget.text, whole.lists)
                if kept not in networks:
                    network = plain(whole, kept).eval()
                    before, after, _ = measured(whole, network, recalibrate, metric)
                    networks[kept] = network, before, after
                made.append((way, budget, kept))
                tell(f"{name} {way}".strip(), (number + 1) / len(wanted))
        if not made:
            least = least_of(costs, whole.lists) / costs.total
            raise ConfigError(f"no budget can be met: the smallest sub-network takes {least:.3g} of {costs.unit}")
        seconds = seconds_of([network for network, _, _ in networks.values()], data[0][0], repeats)
        times = dict(zip(networks, seconds, strict=True))
        flops = {kept: _flops(network, data[0][0]) for kept, (network, _, _) in networks.items()}
        for way, budget, kept in made:
            names = tuple(block.name for block, keep in zip(whole.blocks, kept, strict=True) if keep)
            _, before, after = networks[kept]
            point = Point(
                name=name,
                by=way,
                budget=budget.text,
                kept=names,
                blocks=len(whole.blocks),
                predicted=predicted(costs, kept),
                seconds=times[kept],
                flops=flops[kept],
                before=before,
                metric=after,
            )
            found.append(point)
    return found


@torch.no_grad()
def _flops(model: nn.Module, inputs: Any) -> float:
    with evaluating(model), FlopCounterMode(display=False) as counter:
        Batch(inputs).copied().called(model)
    return float(counter.get_total_flops())
