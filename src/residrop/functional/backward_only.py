"""Presence in backward only: branches that are computed whole, of which only some parts get a gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residrop.functional.call import BranchCall, scaled
from residrop.functional.cut import Window, cut, take_rows
from residrop.schedule.sampler import Rows

__all__ = ["Piece", "joined", "pieces_of", "recorded"]


class Piece(NamedTuple):
    """Some rows of a batch on their way through a branch.

    Attributes:
        x: these rows of the block's input.
        along: these rows of the branch's further arguments.
        window: which rows they are; None is all.
        present: whether the branch gets a gradient from them.
    """

    x: Tensor
    along: Sequence[Any]
    window: Window | None
    present: bool


def pieces_of(x: Tensor, call: BranchCall, rows: Rows) -> list[Piece]:
    """The present rows of a batch, and the absent ones: both are windows, as the rest of a window is one."""
    total = x.shape[0]
    if rows.live in (0, total):
        return [Piece(x, call.along, None, rows.live > 0)]
    rest = Rows((rows.start + rows.live) % total, total - rows.live)
    found: list[Piece] = []
    for part, present in ((rows, True), (rest, False)):
        window = Window(part, total)
        # what the branch keeps for backward would keep all of x alive, if it were a view of it
        piece = cut(x, window, own=present)
        found.append(Piece(piece, call.cut_along(lambda t, part=part: take_rows(t, part)), window, present))
    return found


@contextmanager
def recorded(present: bool) -> Iterator[None]:
    """Inside, nothing is kept for backward but for what is `present`.

    Nor does autocast keep the half-precision weights that it makes: in older torch they have no gradient, and calls
    outside that found them would have none, either (pytorch/pytorch#112583).
    """
    if present:
        yield
        return
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def joined(x: Tensor, call: BranchCall, pieces: Sequence[Piece], outs: Sequence[Tensor], weight: float) -> Tensor:
    """The block's result of what the branch gave for each piece.

    In value it is post(shortcut(x) + F(x)). In backward the gradient for F is `weight` times that of the sum for
    present rows, and none for the others.
    """
    skip = call.shortcut(x)
    return call.finished(_Sum.apply(skip, pieces, weight, call.includes_input, *outs))  # pyright: ignore


class _Sum(torch.autograd.Function):
    """skip + F, or with `includes_input` what holds that sum already, from pieces of the batch.

    The gradients are those of skip + sum_k w_k F_k, where w_k is `weight` for present rows and 0 for absent ones.
    """

    @staticmethod
    def forward(
        ctx: Any, skip: Tensor, pieces: Sequence[Piece], weight: float, includes_input: bool, *outs: Tensor
    ) -> Tensor:
        ctx.pieces = [(piece.window, piece.present) for piece in pieces]  # without their tensors
        ctx.weight, ctx.includes_input = weight, includes_input
        if pieces[0].window is None:
            return outs[0].view_as(outs[0]) if includes_input else skip + outs[0]
        y = torch.empty_like(skip, dtype=torch.promote_types(skip.dtype, outs[0].dtype))
        for piece, out in zip(pieces, outs, strict=True):
            assert piece.window is not None
            for there, here in zip(piece.window.there, piece.window.here, strict=True):
                if includes_input:
                    y[there] = out[here]
                else:
                    torch.add(skip[there], out[here], out=y[there])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        skip: Tensor | None = grad
        outs: list[Tensor | None] = []
        for window, present in ctx.pieces:
            if not present:
                outs.append(None)
                continue
            outs.append(scaled(grad if window is None else cut(grad, window, own=False), ctx.weight))
            if ctx.includes_input:  # through `out` the input has a share already, that of a shortcut inside of it
                skip = _less(grad, window, ctx.weight)
        return skip, None, None, None, *outs


def _less(grad: Tensor, window: Window | None, share: float) -> Tensor | None:
    """grad, of present rows less this share."""
    if window is None:
        return None if share == 1.0 else grad * (1.0 - share)
    rest = grad.clone(memory_format=torch.preserve_format)
    for there in window.there:
        rest[there] = rest[there] * (1.0 - share)
    return rest
