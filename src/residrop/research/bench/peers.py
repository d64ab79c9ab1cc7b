"""What skipping is compared with: peers that compute what they drop, rows by index, and the least work there is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from residrop.blocks.attach import depth_of, sampler_of
from residrop.common.checks import check_rate
from residrop.functional.call import BranchCall
from residrop.research.bench.base import Chain
from residrop.rules.base import Rule
from residrop.schedule.sampler import Plan

__all__ = ["IndexGather", "Spares", "draws", "live_network", "narrow_network", "spares_of"]

Map = Callable[..., Tensor]


class IndexGather(Rule):
    """Row-level presence as in DINOv2: live rows are gathered by an index tensor, and their results are index-added.

    The rows are those of the same draw's window, so the result is that of `StochasticDepth(granularity="row")`.

    Args:
        survival: p in [0, 1].
        scaled: whether the branch is multiplied by 1/p.
    """

    def __init__(self, survival: float, scaled: bool) -> None:
        super().__init__((check_rate("survival", survival),), "row")
        self.scaled = scaled

    def forward(
        self, x: Tensor, shortcut: Map, branch: Map, *, post: Map | None = None, along: Sequence[Any] = ()
    ) -> Tensor:
        draw = self.draw()
        skip = shortcut(x)
        start, live = draw.rows(x.shape[0])
        if live > 0:
            index = (torch.arange(live, device=x.device) + start) % x.shape[0]
            cut = BranchCall(shortcut, branch, along=along).cut_along(lambda one: one[index])
            out = self.executor.part(branch, x[index], cut)
            scale = 1.0 / draw.rates[0] if self.scaled else 1.0
            skip = torch.index_add(skip, 0, index, out.to(skip.dtype), alpha=scale)
        elif post is not None:
            skip = skip.clone()  # post may work in place, and the block before needs its output for backward
        return skip if post is None else post(skip)


def draws(model: nn.Module, steps: int, among: int = 4) -> list[Plan]:
    """`steps` draws of an attached model: of its first `among * steps` those whose depth is nearest to its mean."""
    sampler = sampler_of(model)
    expected = depth_of(model, sampler.expectation())
    plans = [sampler.plan(step) for step in range(among * steps)]
    nearest = sorted(plans, key=lambda plan: abs(depth_of(model, plan) - expected))  # of equals, the earlier first
    return sorted(nearest[:steps], key=lambda plan: plan.step)


def live_network(chain: Chain, alive: Sequence[bool]) -> Map:
    """The ideal for blocks: the plain network that has exactly the live branches of a draw.

    Where a branch is absent, the shortcut is left if it computes something, and nothing otherwise.

    Args:
        chain: the network of constant depth.
        alive: one coin per branch.
    """
    coins = iter(alive)
    parts = [chain.stem]
    for unit in chain.units:
        part = unit.present if not unit.droppable or next(coins) else unit.absent
        if part is not None:
            parts.append(part)
    parts.append(chain.head)
    return lambda x: _through(parts, x)


def _through(parts: Sequence[Map], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x


class Spares(NamedTuple):
    """What stands in for rows that the ideal has no work on: inputs and their gradients, of whole batches, by shape."""

    values: dict[torch.Size, Tensor]
    grads: dict[torch.Size, Tensor]
    cut: dict[tuple[torch.Size, int, bool], Tensor]  # ready-made pieces of them

    def rows(self, like: Tensor, count: int, *, grads: bool) -> Tensor:
        """`count` rows for a tensor of one shape but for the rows; in memory of their own, made once."""
        key = (like.shape[1:], count, grads)
        if key not in self.cut:
            source = (self.grads if grads else self.values)[like.shape[1:]]
            self.cut[key] = source[:count].clone(memory_format=torch.preserve_format)
        return self.cut[key]


def spares_of(chain: Chain, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Spares:
    """Spares from one training step of the network of constant depth on the batch `x`."""
    spares = Spares({}, {}, {})

    def keep(y: Tensor) -> Tensor:
        shape = y.shape[1:]
        spares.values[shape] = y.detach()
        # the hook must not hold y, a circle that no garbage collector sees
        y.register_hook(lambda grad: spares.grads.__setitem__(shape, grad))
        return y

    x = keep(chain.stem(x))
    for unit in chain.units:
        x = keep(unit.present(x))
    loss(chain.head(x)).backward()
    return spares


class _Fit(torch.autograd.Function):
    """The first `count` rows of x, without any copy; rows that x lacks are spare ones.

    Backward owes x a gradient of another number of rows, and gives a spare one: a copy would be work that no row has.
    So the gradients of a network with this in it are those of no function. Only its time and memory mean something.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, spares: Spares) -> Tensor:
        ctx.spare = spares.rows(x, x.shape[0], grads=True)
        return x[:count] if count <= x.shape[0] else spares.rows(x, count, grads=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.spare, None, None


class _Also(torch.autograd.Function):
    """x, after which `other` has been computed, too; in backward `other` gets a spare gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, spares: Spares) -> Tensor:
        ctx.spare = spares.rows(other, other.shape[0], grads=True)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.spare, None


def narrow_network(chain: Chain, counts: Sequence[int], spares: Spares) -> Map:
    """The ideal for rows: every block runs on a batch of exactly as many rows as live in it.

    Where a shortcut computes something, the other rows go through it, as in `live_network`; by themselves. Stem, head
    and units that are `whole` see the whole batch. Rows are neither chosen nor put back: between blocks of different
    row counts the batch is cut to fewer rows, which are a view, or goes on with spare rows. At equal counts this is the
    plain network on a part of the batch.

    Args:
        chain: the network of constant depth.
        counts: live rows of every branch; a branch without any is left out, as in `live_network`.
        spares: see `spares_of`.
    """
    parts: list[tuple[Map, int | None, Map | None]] = []  # the number of rows it needs (None: any); for other rows
    every = -1
    left = iter(counts)
    for unit in chain.units:
        count = next(left) if unit.droppable else None
        part = unit.absent if count == 0 else unit.present
        if part is not None:
            parts.append((part, every if unit.whole else count or None, unit.absent if count else None))

    def run(x: Tensor) -> Tensor:
        rows = x.shape[0]
        x = chain.stem(x)
        for part, needed, others in [*parts, (chain.head, every, None)]:
            count = rows if needed == every else needed
            if count is not None and count != x.shape[0]:
                x = _Fit.apply(x, count, spares)  # pyright: ignore[reportAssignmentType]
            y = part(x)
            if others is not None and count is not None and count < rows:
                rest = spares.rows(x, rows - count, grads=False).requires_grad_()
                y = _Also.apply(y, others(rest), spares)
            x = y  # pyright: ignore[reportAssignmentType]
        return x

    return run
