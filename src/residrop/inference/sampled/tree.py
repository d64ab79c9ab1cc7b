"""Samples of block- and row-level networks as a tree: they share the work up to where their coins first differ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residrop.blocks.residual import Residual
from residrop.functional.units import row_mask
from residrop.inference.sampled.outputs import Reader
from residrop.inference.sampled.pieces import with_branch, without_branch
from residrop.rules.depth import StochasticDepth
from residrop.schedule.sampler import Draw, Plan

__all__ = ["RowsChanged", "Tree", "same_rows"]


class RowsChanged(Exception):
    """A module has given another number of rows than it was given."""


def same_rows(y: Tensor, h: Tensor) -> Tensor:
    """y, if it has as many rows as h; RowsChanged otherwise."""
    if len(y) != len(h):
        raise RowsChanged
    return y


class Tree:
    """One walk down the tree of coins, for some passes.

    A row of the walk is a row of the batch together with the samples whose coins for it have agreed so far.

    Args:
        pieces: what is left of the network, and for each whether samples may differ behind it.
        plans: of the samples, each once.
        which: int64 Tensor[rows, samples] on the CPU, which of these plans is that of a row's sample.
        own: int64 Tensor[rows] on the CPU, the rows' numbers in the batch that they belong to.
        total: rows of that batch.
        stack: rows of the walk that go through a piece together, at most; no fewer than `own` has.
        read: what is wanted of the network's output.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[nn.Module, bool]],
        plans: Sequence[Plan],
        which: Tensor,
        own: Tensor,
        total: int,
        stack: int,
        read: Reader,
    ) -> None:
        self.read = read
        self.pieces, self.stack, self.shape = [piece for piece, _ in pieces], stack, (which.shape[1], len(own))
        self.coins: list[Tensor | None] = [None] * len(self.pieces)  # Bool [rows, samples]
        self.scales = [1.0] * len(self.pieces)
        for number, (piece, is_random) in enumerate(pieces):
            if is_random:
                assert isinstance(piece, Residual)
                assert isinstance(piece.rule, StochasticDepth)
                draws = [plan.draws[piece.rule.index] for plan in plans]
                self.scales[number] = piece.rule.scale(draws[0])
                self.coins[number] = _coins(piece.rule, draws, total)[own].gather(1, which)
        self.found: list[Tensor] = []

    def walk(self, h: Tensor) -> tuple[Tensor, ...]:
        """What is read, of every head Tensor[samples, rows, ...]."""
        samples, rows = self.shape
        self._down(h, torch.arange(rows), torch.ones(rows, samples, dtype=torch.bool), 0)
        return tuple(self.found)

    def _down(self, h: Tensor, rows: Tensor, members: Tensor, number: int) -> None:
        """From piece `number` to the end.

        Args:
            h: Tensor[r, ...], input of the piece.
            rows: int64 Tensor[r], the row of the batch that each is; on the CPU.
            members: bool Tensor[r, samples], the samples that each stands for; on the CPU.
            number: place of the piece.
        """
        while number < len(self.pieces):
            piece: Any = self.pieces[number]
            coins, scale = self.coins[number], self.scales[number]
            number += 1
            if coins is None:
                h = same_rows(piece(h), h)
                continue
            told = coins[rows]
            present, absent = members & told, members & ~told
            alive, dead = present.any(dim=1), absent.any(dim=1)
            some, others = int(alive.sum()), int(dead.sum())
            if not others:
                h = with_branch(piece, h, scale)
            elif not some:
                h = without_branch(piece, h)
            elif some + others > self.stack and 2 * min(some, others) >= self.stack:
                self._down(without_branch(piece, _some(h, dead)), rows[dead], absent[dead], number)
                h = with_branch(piece, _some(h, alive), scale)
                rows, members = rows[alive], present[alive]
            else:
                h = torch.cat((with_branch(piece, _some(h, alive), scale), without_branch(piece, _some(h, dead))))
                rows, members = torch.cat((rows[alive], rows[dead])), torch.cat((present[alive], absent[dead]))
                if len(h) > self.stack:  # no more than twice as many: two even parts, not a full one and a rest
                    half = len(h) // 2
                    self._down(h[:half], rows[:half], members[:half], number)
                    h, rows, members = h[half:], rows[half:], members[half:]
        self._arrive(self.read(h), rows, members)

    def _arrive(self, values: tuple[Tensor, ...], rows: Tensor, members: Tensor) -> None:
        if not self.found:
            self.found = [value.new_empty(*self.shape, *value.shape[1:]) for value in values]
        at, sample = members.nonzero(as_tuple=True)
        row = rows[at]
        for found, value in zip(self.found, values, strict=True):
            found[sample.to(value.device), row.to(value.device)] = value[at.to(value.device)]


def _some(h: Tensor, wanted: Tensor) -> Tensor:
    return h if bool(wanted.all()) else h.index_select(0, wanted.nonzero().squeeze(1).to(h.device))


def _coins(rule: StochasticDepth, draws: Sequence[Draw], total: int) -> Tensor:
    """Bool Tensor[total, draws] on the CPU: which rows of the batch have the branch."""
    if all(draw.alive is not None for draw in draws):
        return torch.tensor([[draw.alive for draw in draws]]).expand(total, -1)
    return torch.stack([_rows_of(rule, draw, total) for draw in draws], dim=1)


def _rows_of(rule: StochasticDepth, draw: Draw, total: int) -> Tensor:
    if draw.alive is not None:
        return torch.full((total,), draw.alive)
    if rule.rows == "bernoulli":
        assert draw.key is not None
        return row_mask(total, draw.rates[0], draw.key)
    start, live = draw.rows(total)
    return (torch.arange(total) - start) % total < live
