"""Row-level presence: only the live rows of a batch enter a branch, as one contiguous sub-batch.

Live rows are a window that may wrap around (`Rows`). Per block, the live rows are copied once into a batch of their
own, so that what the branch saves for backward is as small as that batch, and the other rows are copied once into the
result; backward copies the other rows once. Everything else is what a batch of exactly the live rows would do.

Inside a compiled graph the same rows come as data (`residrop.rules.tracing`). All functions keep dtype, device and
memory format.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residrop.functional.call import BranchCall, combined, scaled
from residrop.functional.cut import Window, cut, runs, take_rows
from residrop.functional.layout import empty_as, pack_signs, strides_of, unpack_signs
from residrop.schedule.sampler import Rows

__all__ = ["InPlaceChain", "keep_index", "keep_rows"]


class InPlaceChain:
    """A batch on its way through a chain of blocks that nobody else sees: its memory is written in place.

    Only what is made in the chain is overwritten: a batch that `_Put` made, of which nothing is saved for backward, and
    a gradient that a later `_Take` of the chain made. Then not even the absent rows are copied.

    Nor is anything kept of the ReLU behind a sum. Its derivative is pending, row by row, to whoever takes a row on: the
    block that does so keeps a copy of it anyway, whose signs tell where the ReLU was zero.
    """

    def __init__(self) -> None:
        self.link: _Link | None = None  # what made the batch that comes next; None if anybody may hold it

    def release(self, x: Tensor) -> Tensor:
        """x for anybody to see, with all derivatives paid; its memory is not written any more."""
        link, self.link = self.link, None
        if link is None or not link.pending:
            return x
        return _Release.apply(x, runs(slice(0, x.shape[0]), 0, link.pending), link)  # pyright: ignore[reportReturnType]


class _Link:
    """Joins the `_Put` that made a batch to the `_Take` that takes it on.

    Attributes:
        pending: rows whose ReLU has not been differentiated, row n as bit n.
        taken: whether a `_Take` or `_Release` has taken the batch on, and so is the only one to know of its gradient.
    """

    __slots__ = ("pending", "taken")

    def __init__(self, pending: int) -> None:
        self.pending = pending
        self.taken = False


class _Take(torch.autograd.Function):
    """x to (live rows for the branch, the same for the sum, x itself for the other rows).

    With `whole`, x goes on as a tensor in its own right (into a shortcut); without, `_Put` follows, which reads only
    the other rows of it, so that the gradient of its live rows is not read either. `pending` are live rows that came
    out of a ReLU whose derivative is still to be applied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        window: Window,
        whole: bool,
        own: bool,
        link: _Link | None,
        pending: list[tuple[slice, slice]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.link, ctx.pending = link, pending
        ctx.window, ctx.whole, ctx.shape, ctx.strides = window, whole, x.shape, strides_of(x)
        ctx.set_materialize_grads(False)
        live = cut(x, window, own=own)
        if pending:
            ctx.save_for_backward(live)
        return live, live.view_as(live), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        *pair, rest = grads
        pair = [grad for grad in pair if grad is not None]
        if rest is None or not pair or torch.is_grad_enabled():
            return _merged(ctx, pair, rest), None, None, None, None, None
        window = ctx.window
        if ctx.link is not None and ctx.link.taken:
            out = rest
        else:
            out = empty_as(rest, window.total, ctx.strides)
            for part in window.others:
                out[part].copy_(rest[part])
        for there, here in zip(window.there, window.here, strict=True):
            first, *more = [window.piece(grad, here) for grad in pair] + ([rest[there]] if ctx.whole else [])
            target = out[there]
            if not more:
                target.copy_(first)
            else:
                torch.add(first, more[0], out=target)
            for grad in more[1:]:
                target.add_(grad)
        if ctx.pending:
            _differentiate(out, ctx.saved_tensors[0], ctx.pending)
        return out, None, None, None, None, None


def _differentiate(grad: Tensor, outputs: Tensor, rows: Sequence[tuple[slice, slice]]) -> None:
    """Zero rows of grad, in place, wherever the `outputs` of a ReLU are; both as slices of their tensors."""
    for there, here in rows:
        part = grad[there]
        torch.ops.aten.threshold_backward.grad_input(part, outputs[here], 0, grad_input=part)


def _merged(ctx: Any, pair: Sequence[Tensor], rest: Tensor | None) -> Tensor | None:
    """The same in operations that double backward can follow, and for sides that have no gradient."""
    if rest is None:
        if not pair:
            return None
        rest = pair[0].new_zeros(ctx.shape)
    out = rest.clone(memory_format=torch.preserve_format)
    for there, here in zip(ctx.window.there, ctx.window.here, strict=True):
        start = rest[there] if ctx.whole else torch.zeros_like(rest[there])
        out[there] = sum((grad[here] for grad in pair), start)
    for there, here in ctx.pending:
        out[there] = torch.ops.aten.threshold_backward(out[there], ctx.saved_tensors[0][here], 0)
    return out


class _Release(torch.autograd.Function):
    """x, in backward with the derivative of the ReLU that some of its rows came out of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: list[tuple[slice, slice]], link: _Link) -> Tensor:
        link.taken = True
        ctx.pending = pending
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (x,) = grads, ctx.saved_tensors
        masked, every = torch.ops.aten.threshold_backward, ctx.pending[0][0] == slice(0, x.shape[0])
        if torch.is_grad_enabled() and every:
            return masked(grad, x, 0), None, None
        out = empty_as(grad, x.shape[0], strides_of(x))
        if every:
            return masked.grad_input(grad, x, 0, grad_input=out), None, None
        out.copy_(grad)
        if torch.is_grad_enabled():
            for there, _ in ctx.pending:
                out[there] = masked(out[there], x[there], 0)
        else:
            _differentiate(out, x, ctx.pending)
        return out, None, None


class _Put(torch.autograd.Function):
    """base with its live rows replaced: by `live + scale * out`, by relu of that, or (live None) by `out`.

    With `defers_relu`, the derivative of the ReLU is left to whoever takes the rows on (`InPlaceChain`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        live: Tensor | None,
        out: Tensor,
        window: Window,
        scale: float,
        relu: bool,
        defers_relu: bool,
        in_place: bool,
    ) -> Tensor:
        ctx.window, ctx.adds, ctx.scale, ctx.relu = window, live is not None, scale, relu and not defers_relu
        ctx.dtypes = (base.dtype, None if live is None else live.dtype, out.dtype)
        dtype = torch.promote_types(base.dtype, out.dtype)
        if in_place and base.dtype == dtype:
            y = base.data  # another tensor on the same memory, of which autograd knows nothing
        else:
            y = torch.empty_like(base, dtype=dtype)
            for part in window.others:
                y[part].copy_(base[part])
        parts = [y[there] for there in window.there]
        for part, here in zip(parts, window.here, strict=True):
            if live is None:
                part.copy_(window.piece(out, here))
            else:
                torch.add(window.piece(live, here), window.piece(out, here), alpha=scale, out=part)
            if relu:
                part.relu_()
        ctx.strides = strides_of(y)
        if ctx.relu:
            ctx.save_for_backward(pack_signs(parts, ctx.strides))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        to_live = _where_positive(grad, ctx) if ctx.relu else cut(grad, ctx.window, own=False)
        base, live, out = ctx.dtypes
        # the live rows of the first are not meant: `_Take` does not read them
        to_out = scaled(to_live, ctx.scale).to(out)
        return grad.to(base), to_live.to(live) if ctx.adds else None, to_out, None, None, None, None, None


def _where_positive(grad: Tensor, ctx: Any) -> Tensor:
    """The live rows of grad, zero where the output of the ReLU was."""
    masked, window = torch.ops.aten.threshold_backward, ctx.window
    out = empty_as(grad, window.live, ctx.strides)
    (signs,) = ctx.saved_tensors
    unpack_signs(signs, out)
    if torch.is_grad_enabled():
        return masked(cut(grad, window, own=False), out, 0)
    for there, here in zip(window.there, window.here, strict=True):
        mask = window.piece(out, here)
        masked.grad_input(grad[there], mask, 0, grad_input=mask)
    return out


def keep_rows(x: Tensor, call: BranchCall, rows: Rows, scale: float = 1.0, chain: InPlaceChain | None = None) -> Tensor:
    """shortcut(x), with scale * branch(x) added in a window of rows: only live rows enter the branch, as one batch.

    Args:
        x: Tensor[N, ...].
        call: the block; its branch is row-wise (batch norm inside it sees the live rows only), and is not called if no
            row lives.
        rows: the window, see `Rows`.
        scale: factor of the branch.
        chain: the chain that x comes along, if only its blocks see x.
    """
    identity = isinstance(call.shortcut, nn.Identity)
    if chain is not None and not (identity and 0 < rows.live < x.shape[0]):
        x = chain.release(x)
    if rows.live == 0:
        return call.shortcut(x)
    if rows.live == x.shape[0]:
        return call.whole(x, scale)
    along = call.cut_along(lambda t: take_rows(t, rows))
    window, pending = Window(rows, x.shape[0]), 0
    before, after = None if chain is None else chain.link, _Link(0)
    if before is not None:
        before.taken, pending = True, before.pending
    # a window of almost all rows is not worth a copy of its own, but then x is kept for backward
    own = 4 * rows.live <= 3 * x.shape[0]
    link = after if identity else None
    live, live_again, rest = _Take.apply(x, window, not identity, own, link, window.pending_in(pending))
    out = call.branch(live, *along)
    if not identity:
        _, live_again, rest = _Take.apply(call.shortcut(rest), window, False, own, after, [])
    # what a shortcut gave may be kept for its backward
    in_place = before is not None and identity and own
    relu = isinstance(call.post, nn.ReLU) and not call.post._forward_hooks
    after.pending = pending & ~window.bits
    if call.includes_input or not (call.post is None or relu):
        value = call.finished(combined(live_again, out, scale, call.includes_input))
        y = _Put.apply(rest, None, value, window, 1.0, False, False, in_place)
    else:
        defers_relu = relu and chain is not None
        if defers_relu:
            after.pending |= window.bits
        y = _Put.apply(rest, live_again, out, window, scale, relu, defers_relu, in_place)
    if chain is not None:
        chain.link = after
    return y  # pyright: ignore[reportReturnType]


def keep_index(x: Tensor, call: BranchCall, index: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """As `keep_rows`, for any set of rows: `index` is int64 Tensor[k] of different row numbers on the device of x."""
    along = call.cut_along(lambda t: t.index_select(0, index))
    live = x.index_select(0, index)
    skip = call.shortcut(x)
    value = combined(skip.index_select(0, index), call.branch(live, *along), scale, call.includes_input)
    value = call.finished(value)
    dtype = torch.promote_types(skip.dtype, value.dtype)
    return skip.to(dtype).index_copy(0, index, value.to(dtype))
