"""Sampled passes of one batch that share what is certain.

Where a network is a sequence of pieces, everything before the first random one is computed once for all samples.

- Block- and row-level draws: samples whose coins agree so far share the work so far. The walk goes down the tree of
  their coins; a branch is called once for everybody who has it, and not at all for the others.
- Unit-level draws: shortcut and branch of the first random block are computed once; its masks part the samples.
- Anything else, and pieces nobody here knows: one sample at a time from there on.

Other models, and all whose own dropout is sampled, are called as a whole, one sample at a time and in the order of
their coins, and blocks give their last output again while nothing before them has changed. Pass number k has the draw
of pass number k of `residrop.sampling` everywhere. Small batches of sequences are stacked, several samples in one pass,
to fill the machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from residrop.blocks.attach import before_root, sampler_of, sampling
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.functional.units import placed
from residrop.inference.sampled.batch import Batch
from residrop.inference.sampled.dropout import Dropouts, dropping
from residrop.inference.sampled.memo import remembering
from residrop.inference.sampled.outputs import Reader
from residrop.inference.sampled.pieces import TREE, UNITS, branch_of, is_plain, is_random, pieces_of
from residrop.inference.sampled.tree import RowsChanged, Tree, same_rows
from residrop.schedule.sampler import DepthSampler, Plan

__all__ = ["Passes", "passes"]

_MEMORY = 1 << 28  # bytes of outputs that are held together
_SMALL = 1 << 22  # bytes of images whose outputs are taken for small before one was made


class Passes(ABC):
    """Sampled passes over one batch of n inputs.

    Args:
        x: the input, if it is one tensor.
    """

    is_tree = False  # whether rows may have passes of their own: `draw_own`

    def __init__(self, x: Tensor | None) -> None:
        # numbers of tokens, say, may become logits of a whole vocabulary
        self._all_at_once = x is not None and x.is_floating_point() and x.nbytes < _SMALL

    @abstractmethod
    def draw(self, numbers: Sequence[int], rows: Tensor | None = None) -> tuple[Any, ...]:
        """What is read of the passes with these numbers: of every head Tensor[passes, m, ...], of detections a list.

        Args:
            numbers: consecutive numbers of passes; each is drawn once.
            rows: int64 Tensor[m], rising, the rows that are wanted; None is all n.
        """

    def draw_own(self, numbers: Tensor, rows: Tensor) -> tuple[Any, ...]:
        """As `draw`, where every row has passes of its own: int64 Tensor[m, passes] on the CPU."""
        raise NotImplementedError

    def stream(self, first: int, samples: int) -> Iterator[tuple[Any, ...]]:
        """Of one pass after the other, what is read; as many are made together as memory is meant to hold."""
        done, count = 0, samples if self._all_at_once else 1
        while done < samples:
            count = min(count, samples - done)
            found = self.draw(range(first + done, first + done + count))
            yield from (tuple(head[number] for head in found) for number in range(count))
            done += count
            size = sum(head[0].nbytes for head in found if isinstance(head, Tensor))
            count = max(1, _MEMORY // max(1, size))


@contextmanager
def passes(
    model: nn.Module,
    batch: Batch,
    read: Reader,
    *,
    first: int = 0,
    stack: int | None = None,
    dropout: bool = False,
    flips: bool = False,
) -> Iterator[Passes]:
    """Inside, `draw` makes sampled passes of a batch, the first of them number `first`; see `residrop.sampling`.

    Args:
        model: an attached network.
        batch: its inputs.
        read: what is wanted of its output.
        first: number of the first pass.
        stack: rows (inputs times samples) that go through the network together; None chooses. With at most n, no two
            samples are stacked.
        dropout: sample the model's dropout modules, too.
        flips: passes of odd numbers see mirrored images.

    Raises:
        ConfigError: the model is not attached or has no dropout to sample, or flips of what are no images.
    """
    if flips:
        if dropout or before_root(model) is None:
            raise ConfigError(
                "flips=True goes neither with dropout=True nor with a wrapper of the attached model; leave one out"
            )
        mirrored = batch.mirrored()
        with (
            passes(model, batch, read, first=first, stack=stack, dropout=dropout) as even,
            passes(model, mirrored, read, first=first, stack=stack, dropout=dropout) as odd,
        ):
            yield _Flipped(batch.tensor, read, even, odd)
        return
    x = batch.tensor
    with sampling(model, first=first), torch.no_grad():
        sampler = sampler_of(model)
        pieces = None if dropout or x is None or not len(x) else pieces_of(model, x)
        if pieces is None:
            dropouts = Dropouts(model, sampler.seed, len(batch)) if dropout else None
            with dropping(dropouts):
                yield _Whole(model, batch, sampler, read, dropouts)
        else:
            assert x is not None
            with sampler.giving(sampler.plan(first, stream="sample")):  # what is certain is so under any plan
                whole = _Whole(model, batch, sampler, read, None)
                yield _Sequence(pieces, x, sampler, _filling(x) if stack is None else stack, read, whole)


def _filling(x: Tensor) -> int:
    """Rows that keep a machine busy: inputs of 1 MiB in all on the CPU, of 32 MiB elsewhere, within bounds."""
    budget, most = (1 << 20, 64) if x.device.type == "cpu" else (1 << 25, 1024)
    return max(len(x), min(most, budget // max(1, x[0].nbytes)))


class _Flipped(Passes):
    """Passes of even numbers over images, those of odd numbers over their mirror images."""

    def __init__(self, x: Tensor | None, read: Reader, even: Passes, odd: Passes) -> None:
        super().__init__(x)
        self.read, self.even, self.odd = read, even, odd

    def draw(self, numbers: Sequence[int], rows: Tensor | None = None) -> tuple[Any, ...]:
        parts = [[number for number in numbers if number % 2 == odd] for odd in (0, 1)]
        made = {}
        for some, part in zip(parts, (self.even, self.odd), strict=True):
            if some:
                found = part.draw(some, rows)
                if part is self.odd:
                    found = self.read.mirrored_back(found)
                made.update(zip(some, zip(*found, strict=True), strict=True))
        return tuple(torch.stack(head) for head in zip(*(made[number] for number in numbers), strict=True))


class _Whole(Passes):
    """A model that is not known to be a sequence: called as a whole, one sample at a time.

    Args:
        model: attached, or a wrapper around an attached model.
        batch: its inputs.
        sampler: of the model.
        read: what is wanted of its output.
        dropouts: its dropout modules, if they are sampled.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, sampler: DepthSampler, read: Reader, dropouts: Dropouts | None
    ) -> None:
        super().__init__(batch.tensor)
        self.model, self.batch, self.sampler, self.read, self.dropouts = model, batch, sampler, read, dropouts
        self._last: tuple[Tensor | None, dict[Any, tuple[Any, ...]]] = None, {}  # rows of a draw, and what it made
        self.is_root = before_root(model) is not None

    def draw(self, numbers: Sequence[int], rows: Tensor | None = None) -> tuple[Any, ...]:
        made = self._wrapped(numbers, rows) if not self.is_root else self._made(numbers, rows)
        heads = zip(*made, strict=True)
        return tuple(torch.stack(head) if isinstance(head[0], Tensor) else list(head) for head in heads)

    def _wrapped(self, numbers: Sequence[int], rows: Tensor | None) -> list[tuple[Any, ...]]:
        """Of a wrapper, which may call its root more than once: the sampler counts the calls."""
        found: list[tuple[Any, ...]] = []
        for number in numbers:
            if self.dropouts is not None:
                self.dropouts.begin(number, rows)
            found.append(self.read(self.batch.copied().called(self.model, rows)))
        return found

    def _made(self, numbers: Sequence[int], rows: Tensor | None) -> list[tuple[Any, ...]]:
        plans = {number: self.sampler.plan(number, stream="sample") for number in numbers}
        alike = sorted(plans, key=lambda number: [draw.alive is False for draw in plans[number].draws])
        dropouts = self.dropouts
        before = self._last[1] if self._last[0] is rows else {}
        # a pass is that of any other number with the same draws, unless dropout parts them
        name = {number: (None if dropouts is None else number, plan.draws) for number, plan in plans.items()}
        made = {key: before[key] for key in name.values() if key in before}
        restless = frozenset() if dropouts is None else dropouts.numbers.keys()
        with remembering(self.model, restless) if len(plans) > 1 else nullcontext() as memo:
            if dropouts is not None:
                dropouts.on_call = None if memo is None else memo.forget
            for number in alike:
                if name[number] in made:
                    continue
                if memo is not None:
                    memo.begin(plans[number])
                if dropouts is not None:
                    dropouts.begin(number, rows)
                with self.sampler.sampling(number):
                    made[name[number]] = self.read(self.batch.copied().called(self.model, rows))
        self._last = rows, made
        return [made[name[number]] for number in numbers]


class _Sequence(Passes):
    """A sequence of pieces; what is certain is computed when it is made.

    Args:
        pieces: their composition is the network.
        x: Tensor[n, ...].
        sampler: of the network.
        stack: rows that go through a piece together, at most (but all of x may).
        read: what is wanted of its output.
        whole: the same network called as a whole, for pieces that change the number of rows.
    """

    def __init__(
        self, pieces: list[nn.Module], x: Tensor, sampler: DepthSampler, stack: int, read: Reader, whole: Passes
    ) -> None:
        super().__init__(x)
        self.read, self.whole = read, whole
        self.sampler, self.stack, self.total = sampler, max(stack, len(x)), len(x)
        plan = sampler.plan(0, stream="sample")
        self.random = [is_random(piece, plan) for piece in pieces]
        start = self.random.index(True) if any(self.random) else len(pieces)
        self.h = x
        self.keeps_rows = True
        for piece in pieces[:start]:
            self.h = piece(self.h)
            self.keeps_rows = self.keeps_rows and len(self.h) == len(x)
        self.pieces, self.random = pieces[start:], self.random[start:]
        random = [piece for piece, is_random in zip(self.pieces, self.random, strict=True) if is_random]
        self.is_tree = self.keeps_rows and bool(random) and all(is_plain(piece, TREE) for piece in random)
        self.is_units = all(is_plain(piece, UNITS) for piece in random)
        self._first: tuple[Tensor, Tensor] | None = None  # shortcut and branch of the first random block

    def draw(self, numbers: Sequence[int], rows: Tensor | None = None) -> tuple[Any, ...]:
        if self.keeps_rows:
            try:
                return self._shared(numbers, rows)
            except RowsChanged:
                self.keeps_rows = self.is_tree = False
        return self.whole.draw(numbers, rows)

    def _shared(self, numbers: Sequence[int], rows: Tensor | None) -> tuple[Any, ...]:
        plans = [self.sampler.plan(number, stream="sample") for number in numbers]
        h = self.h if rows is None else self.h[rows]
        if not self.pieces:
            return tuple(value.expand(len(plans), *value.shape) for value in self.read(h))
        if self.is_tree:
            own = torch.arange(self.total) if rows is None else rows.cpu()
            return self._walk(h, plans, torch.arange(len(plans)).expand(len(own), -1), own)
        if self.is_units:
            return self._units(plans, rows)
        found: list[tuple[Any, ...]] = []
        for plan in plans:
            y = h
            with self.sampler.giving(plan):
                for piece in self.pieces:
                    y = same_rows(piece(y), y)
            found.append(self.read(y))
        return tuple(torch.stack(head) for head in zip(*found, strict=True))

    def draw_own(self, numbers: Tensor, rows: Tensor) -> tuple[Any, ...]:
        try:
            return self._each_its_own(numbers, rows)
        except RowsChanged:
            raise ConfigError(
                "the network has modules that change the number of rows, which adaptive sampling of a sequence cannot "
                "follow; wrap it in a module of its own and attach that"
            ) from None

    def _each_its_own(self, numbers: Tensor, rows: Tensor) -> tuple[Any, ...]:
        different, which = numbers.unique(return_inverse=True)
        plans = [self.sampler.plan(number, stream="sample") for number in different.tolist()]
        return self._walk(self.h[rows], plans, which, rows.cpu())

    def _walk(self, h: Tensor, plans: Sequence[Plan], which: Tensor, own: Tensor) -> tuple[Any, ...]:
        left = list(zip(self.pieces, self.random, strict=True))
        return Tree(left, plans, which, own, self.total, self.stack, self.read).walk(h)

    def _units(self, plans: Sequence[Plan], rows: Tensor | None) -> tuple[Any, ...]:
        """Unit-level draws: as many samples at once as are to be stacked, each under a key of its own."""
        block: Any = self.pieces[0]
        if self._first is None:
            self._first = block.shortcut(self.h), branch_of(block, self.h)
        skip, f = self._first if rows is None else (self._first[0][rows], self._first[1][rows])
        count = max(1, self.stack // max(1, len(skip)))
        found = [self._together(plans[at : at + count], skip, f, rows) for at in range(0, len(plans), count)]
        return tuple(torch.cat(head) for head in zip(*found, strict=True))

    def _together(self, plans: Sequence[Plan], skip: Tensor, f: Tensor, rows: Tensor | None) -> tuple[Any, ...]:
        first, *rest = self.pieces
        y = self._mixed(first, plans, [skip] * len(plans), [f] * len(plans), rows)
        for piece, parts_samples in zip(rest, self.random[1:], strict=True):
            if parts_samples:
                assert isinstance(piece, Residual)
                parts = (piece.shortcut(y).chunk(len(plans)), branch_of(piece, y).chunk(len(plans)))
                y = self._mixed(piece, plans, *parts, rows)
            else:
                y = same_rows(piece(y), y)
        return tuple(value.unflatten(0, (len(plans), -1)) for value in self.read(y))

    def _mixed(
        self, block: Any, plans: Sequence[Plan], skips: Sequence[Tensor], fs: Sequence[Tensor], rows: Tensor | None
    ) -> Tensor:
        mixed: list[Tensor] = []
        # the mask of a row is that of its place in the whole batch
        with nullcontext() if rows is None else placed(rows, self.total):
            for plan, skip, f in zip(plans, skips, fs, strict=True):
                mixed.append(block.rule.combine(plan.draws[block.rule.index], skip, f))
        return block.post(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
