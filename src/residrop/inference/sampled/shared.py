"""Sampled passes of one batch that share what is certain.

Where a network is a sequence of pieces, everything before the first random one is computed once for all samples.

- Block- and row-level draws: samples whose coins agree so far share the work so far. The walk goes down the tree of
  their coins; a branch is called once for everybody who has it, and not at all for the others.
- Unit-level draws: shortcut and branch of the first random block are computed once; its masks part the samples.
- Anything else, and pieces nobody here knows: one sample at a time from there on.

Other models are called as a whole, one sample at a time and in the order of their coins, and blocks give their last
output again while nothing before them has changed. Pass number k has the draw of pass number k of `residrop.sampling`
everywhere. Small batches of sequences are stacked, several samples in one pass, to fill the machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from residrop.blocks.attach import before_root, sampler_of, sampling
from residrop.blocks.residual import Residual
from residrop.inference.sampled.memo import remembering
from residrop.inference.sampled.pieces import TREE, UNITS, branch_of, is_plain, is_random, pieces_of, softmax
from residrop.inference.sampled.tree import Tree
from residrop.schedule.sampler import DepthSampler, Draw, Plan

__all__ = ["Passes", "passes"]


class Passes(ABC):
    """Sampled passes over one batch of n inputs."""

    @abstractmethod
    def draw(self, numbers: Sequence[int], rows: Tensor | None = None) -> Tensor:
        """Probabilities Tensor[passes, m, classes] float32 of the passes with these numbers.

        Args:
            numbers: consecutive numbers of passes; each is drawn once.
            rows: int64 Tensor[m], rising, the rows that are wanted; None is all n.
        """


@contextmanager
def passes(
    model: nn.Module,
    x: Tensor,
    *,
    first: int = 0,
    stack: int | None = None,
) -> Iterator[Passes]:
    """Inside, `draw` makes sampled passes of a batch, the first of them number `first`; see `residrop.sampling`.

    Args:
        model: an attached network, Tensor[n, ...] to logits Tensor[n, classes].
        x: Tensor[n, ...].
        first: number of the first pass.
        stack: rows (inputs times samples) that go through the network together; None chooses. With at most n, no two
            samples are stacked.
    """
    with sampling(model, first=first), torch.no_grad():
        sampler, pieces = sampler_of(model), pieces_of(model, x)
        if pieces is None or not len(x):
            yield _Whole(model, x, sampler)
        else:
            with sampler.giving(sampler.plan(first, stream="sample")):  # what is certain is so under any plan
                yield _Sequence(pieces, x, sampler, _filling(x) if stack is None else stack)


def _filling(x: Tensor) -> int:
    """Rows that keep a machine busy: inputs of 1 MiB in all on the CPU, of 32 MiB elsewhere, within bounds."""
    budget, most = (1 << 20, 64) if x.device.type == "cpu" else (1 << 25, 1024)
    return max(len(x), min(most, budget // max(1, x[0].nbytes)))


class _Whole(Passes):
    """A model that is not known to be a sequence: called as a whole, one sample at a time.

    Args:
        model: attached, or a wrapper around an attached model.
        x: Tensor[n, ...].
        sampler: of the model.
    """

    def __init__(self, model: nn.Module, x: Tensor, sampler: DepthSampler) -> None:
        self.model, self.x, self.sampler = model, x, sampler
        self.is_root = before_root(model) is not None

    def draw(self, numbers: Sequence[int], rows: Tensor | None = None) -> Tensor:
        x = self.x if rows is None else self.x[rows]
        if not self.is_root:  # a wrapper, which may call its root more than once: the sampler counts the calls
            return torch.stack([softmax(self.model(x)) for _ in numbers])
        plans = {number: self.sampler.plan(number, stream="sample") for number in numbers}
        alike = sorted(plans, key=lambda number: [draw.alive is False for draw in plans[number].draws])
        made: dict[tuple[Draw, ...], Tensor] = {}
        with remembering(self.model) if len(plans) > 1 else nullcontext() as memo:
            for number in alike:
                plan = plans[number]
                if plan.draws not in made:
                    if memo is not None:
                        memo.begin(plan)
                    with self.sampler.sampling(number):
                        made[plan.draws] = softmax(self.model(x))
        return torch.stack([made[plans[number].draws] for number in numbers])


class _Sequence(Passes):
    """A sequence of pieces; what is certain is computed when it is made.

    Args:
        pieces: their composition is the network.
        x: Tensor[n, ...].
        sampler: of the network.
        stack: rows that go through a piece together, at most (but all of x may).
    """

    def __init__(self, pieces: list[nn.Module], x: Tensor, sampler: DepthSampler, stack: int) -> None:
        self.sampler, self.stack, self.total = sampler, max(stack, len(x)), len(x)
        plan = sampler.plan(0, stream="sample")
        self.random = [is_random(piece, plan) for piece in pieces]
        start = self.random.index(True) if any(self.random) else len(pieces)
        self.h = x
        for piece in pieces[:start]:
            self.h = piece(self.h)
        self.pieces, self.random = pieces[start:], self.random[start:]
        random = [piece for piece, is_random in zip(self.pieces, self.random, strict=True) if is_random]
        self.is_tree = all(is_plain(piece, TREE) for piece in random)
        self.is_units = all(is_plain(piece, UNITS) for piece in random)
        self._first: tuple[Tensor, Tensor] | None = None  # shortcut and branch of the first random block

    def draw(self, numbers: Sequence[int], rows: Tensor | None = None) -> Tensor:
        plans = [self.sampler.plan(number, stream="sample") for number in numbers]
        h = self.h if rows is None else self.h[rows]
        if not self.pieces:
            return softmax(h).expand(len(plans), -1, -1)
        if self.is_tree:
            own = torch.arange(self.total) if rows is None else rows.cpu()
            left = list(zip(self.pieces, self.random, strict=True))
            return Tree(left, plans, own, self.total, self.stack).walk(h)
        if self.is_units:
            return self._units(plans, rows)
        found: list[Tensor] = []
        for plan in plans:
            y = h
            with self.sampler.giving(plan):
                for piece in self.pieces:
                    y = piece(y)
            found.append(softmax(y))
        return torch.stack(found)

    def _units(self, plans: Sequence[Plan], rows: Tensor | None) -> Tensor:
        """Unit-level draws: as many samples at once as are to be stacked, each under a key of its own."""
        block: Any = self.pieces[0]
        if self._first is None:
            self._first = block.shortcut(self.h), branch_of(block, self.h)
        skip, f = self._first if rows is None else (self._first[0][rows], self._first[1][rows])
        count = max(1, self.stack // max(1, len(skip)))
        return torch.cat([self._together(plans[at : at + count], skip, f, rows) for at in range(0, len(plans), count)])

    def _together(self, plans: Sequence[Plan], skip: Tensor, f: Tensor, rows: Tensor | None) -> Tensor:
        first, *rest = self.pieces
        y = self._mixed(first, plans, [skip] * len(plans), [f] * len(plans), rows)
        for piece, parts_samples in zip(rest, self.random[1:], strict=True):
            if parts_samples:
                assert isinstance(piece, Residual)
                parts = (piece.shortcut(y).chunk(len(plans)), branch_of(piece, y).chunk(len(plans)))
                y = self._mixed(piece, plans, *parts, rows)
            else:
                y = piece(y)
        return softmax(y).unflatten(0, (len(plans), -1))

    def _mixed(
        self, block: Any, plans: Sequence[Plan], skips: Sequence[Tensor], fs: Sequence[Tensor], rows: Tensor | None
    ) -> Tensor:
        mixed: list[Tensor] = []
        for plan, skip, f in zip(plans, skips, fs, strict=True):
            if rows is not None:  # the mask of a row is that of its place in the whole batch
                skip, f = _placed(skip, rows, self.total), _placed(f, rows, self.total)
            y = block.rule.combine(plan.draws[block.rule.index], skip, f)
            mixed.append(y if rows is None else y[rows])
        return block.post(mixed[0] if len(mixed) == 1 else torch.cat(mixed))


def _placed(part: Tensor, rows: Tensor, total: int) -> Tensor:
    """Tensor[total, ...] with `part` in these rows."""
    last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    whole = torch.zeros(total, *part.shape[1:], dtype=part.dtype, device=part.device).contiguous(memory_format=layout)
    return whole.index_copy_(0, rows, part)
