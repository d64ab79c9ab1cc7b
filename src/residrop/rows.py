"""Row-level presence: only the live rows of a batch enter a branch, as one contiguous sub-batch.

Live rows are a window that may wrap around (`Rows`). Per block, the live rows are copied once into a batch of their
own, so that what the branch saves for backward is as small as that batch, and the other rows are copied once into the
result; backward copies the other rows once. Everything else is what a batch of exactly the live rows would do.

Inside a compiled graph the same rows come as data (`residrop.tracing`). All functions keep dtype, device and memory
format.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from residrop.layout import empty_as, pack_signs, strides_of, unpack_signs
from residrop.sampler import Rows

__all__ = ["Lane", "combined", "keep_index", "keep_rows", "take_rows", "touch"]

Map = Callable[..., Tensor]


class Lane:
    """A batch on its way through a chain of blocks that nobody else sees: its memory is written in place.

    Only what is made in the chain is overwritten: a batch that `_Put` made, of which nothing is saved for backward, and
    a gradient that a later `_Take` of the chain made. Then not even the absent rows are copied.
    """

    def __init__(self) -> None:
        self.link: _Link | None = None  # what made the batch that comes next; None if anybody may hold it


class _Link:
    """Joins the `_Put` that made a batch to the `_Take` that takes it on."""

    def __init__(self) -> None:
        self.taken = False  # then the gradient of the batch is made by that `_Take`, and is nobody else's


def _pieces(rows: Rows, total: int) -> list[tuple[slice, slice]]:
    """The window as (rows of the batch, rows of the live batch), one or, where it wraps around, two pieces."""
    end = rows.start + rows.live
    if end <= total:
        return [(slice(rows.start, end), slice(0, rows.live))]
    first = total - rows.start
    return [(slice(rows.start, total), slice(0, first)), (slice(0, end - total), slice(first, rows.live))]


def _others(rows: Rows, total: int) -> list[slice]:
    """The rows outside the window, as slices that are not empty."""
    end = rows.start + rows.live
    if end > total:
        return [slice(end - total, rows.start)] if end - total < rows.start else []
    return [part for part in (slice(0, rows.start), slice(end, total)) if part.start < part.stop]


def _cut(x: Tensor, rows: Rows, *, own: bool) -> Tensor:
    """The live rows of x; with `own`, in memory of their own (a view would keep all of x alive)."""
    pieces = _pieces(rows, x.shape[0])
    if len(pieces) == 1:
        view = x[pieces[0][0]]
        return view.clone(memory_format=torch.preserve_format) if own else view
    return torch.cat([x[there] for there, _ in pieces])


def take_rows(x: Tensor, rows: Rows) -> Tensor:
    """The live rows of Tensor[N, ...] in the order of the window: Tensor[rows.live, ...]; differentiable."""
    return x if rows.live == x.shape[0] else _cut(x, rows, own=False)


class _Take(torch.autograd.Function):
    """x to (live rows for the branch, the same for the sum, x itself for the other rows).

    With `whole`, x goes on as a tensor in its own right (into a shortcut); without, `_Put` follows, which reads only
    the other rows of it, so that the gradient of its live rows is not read either.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Rows, whole: bool, own: bool, link: _Link | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.link = link
        ctx.rows, ctx.whole, ctx.shape, ctx.strides = rows, whole, x.shape, strides_of(x)
        ctx.set_materialize_grads(False)
        live = _cut(x, rows, own=own)
        return live, live.view_as(live), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        *pair, rest = grads
        pair = [grad for grad in pair if grad is not None]
        if rest is None or not pair or torch.is_grad_enabled():
            return _merged(ctx, pair, rest), None, None, None, None
        if ctx.link is not None and ctx.link.taken:
            out = rest
        else:
            out = empty_as(rest, ctx.shape[0], ctx.strides)
            for part in _others(ctx.rows, ctx.shape[0]):
                out[part].copy_(rest[part])
        for there, here in _pieces(ctx.rows, ctx.shape[0]):
            first, *more = [grad[here] for grad in pair] + ([rest[there]] if ctx.whole else [])
            if not more:
                out[there].copy_(first)
            else:
                torch.add(first, more[0], out=out[there])
            for grad in more[1:]:
                out[there].add_(grad)
        return out, None, None, None, None


def _merged(ctx: Any, pair: Sequence[Tensor], rest: Tensor | None) -> Tensor | None:
    """The same in operations that double backward can follow, and for sides that have no gradient."""
    if rest is None:
        if not pair:
            return None
        rest = pair[0].new_zeros(ctx.shape)
    out = rest.clone(memory_format=torch.preserve_format)
    for there, here in _pieces(ctx.rows, ctx.shape[0]):
        start = rest[there] if ctx.whole else torch.zeros_like(rest[there])
        out[there] = sum((grad[here] for grad in pair), start)
    return out


class _Put(torch.autograd.Function):
    """base with its live rows replaced: by `live + scale * out`, by relu of that, or (live None) by `out`."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, live: Tensor | None, out: Tensor, rows: Rows, scale: float, relu: bool, in_place: bool
    ) -> Tensor:
        ctx.rows, ctx.adds, ctx.scale, ctx.relu = rows, live is not None, scale, relu
        ctx.dtypes = (base.dtype, None if live is None else live.dtype, out.dtype)
        dtype = torch.promote_types(base.dtype, out.dtype)
        total = base.shape[0]
        if in_place and base.dtype == dtype:
            y = base.new_empty(0).set_(base)  # pyright: ignore[reportArgumentType]  # another tensor on the same memory
        else:
            y = torch.empty_like(base, dtype=dtype)
            for part in _others(rows, total):
                y[part].copy_(base[part])
        signs = []
        for there, here in _pieces(rows, total):
            part = y[there]
            if live is None:
                part.copy_(out[here])
            else:
                torch.add(live[here], out[here], alpha=scale, out=part)
            if relu:
                part.relu_()
                signs.append(pack_signs(part))
        ctx.save_for_backward(*signs)
        ctx.strides = strides_of(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        to_live = _where_positive(grad, ctx) if ctx.relu else _cut(grad, ctx.rows, own=False)
        base, live, out = ctx.dtypes
        # the live rows of the first are not meant: `_Take` does not read them
        to_out = _scaled(to_live, ctx.scale).to(out)
        return grad.to(base), to_live.to(live) if ctx.adds else None, to_out, None, None, None, None


def _where_positive(grad: Tensor, ctx: Any) -> Tensor:
    """The live rows of grad, zero where the output of the ReLU was."""
    masked = torch.ops.aten.threshold_backward
    out = empty_as(grad, ctx.rows.live, ctx.strides)
    parts = []
    for (there, here), bits in zip(_pieces(ctx.rows, grad.shape[0]), ctx.saved_tensors, strict=True):
        mask = unpack_signs(bits, out[here], ctx.strides)
        if torch.is_grad_enabled():
            parts.append(masked(grad[there], mask, 0))
        else:
            masked.grad_input(grad[there], mask, 0, grad_input=out[here])
    return torch.cat(parts) if parts else out


def keep_rows(
    x: Tensor,
    shortcut: Map,
    branch: Map,
    rows: Rows,
    scale: float = 1.0,
    *,
    post: Map | None = None,
    along: Sequence[Any] = (),
    includes_input: bool = False,
    lane: Lane | None = None,
) -> Tensor:
    """shortcut(x), with scale * branch(x) added in a window of rows: only live rows enter the branch, as one batch.

    Args:
        x: Tensor[N, ...].
        shortcut: maps Tensor[N, ...] to Tensor[N, ...]; always sees the whole batch.
        branch: row-wise map (batch norm inside it sees the live rows only); not called if no row lives.
        rows: the window, see `Rows`.
        scale: factor of the branch.
        post: applied to live rows only: other rows must be fixed points of it.
        along: further arguments of the branch; tensors in them have the batch dimension first and are cut like x.
        includes_input: whether `branch` is a block with a shortcut of its own, so that branch(x) - x is meant.
        lane: the chain that x comes along, if only its blocks see x.
    """
    if rows.live == 0:
        return shortcut(x)
    if rows.live == x.shape[0]:
        y = combined(shortcut(x), branch(x, *along), scale, includes_input)
        return y if post is None else post(y)
    along = [_each_tensor(one, lambda t: take_rows(t, rows)) for one in along]
    identity = isinstance(shortcut, nn.Identity)
    before, after = None if lane is None else lane.link, _Link()
    if before is not None:
        before.taken = True
    # a window of almost all rows is not worth a copy of its own, but then x is kept for backward
    own = 4 * rows.live <= 3 * x.shape[0]
    live, live_again, rest = _Take.apply(x, rows, not identity, own, after if identity else None)
    out = branch(live, *along)
    if not identity:
        _, live_again, rest = _Take.apply(shortcut(rest), rows, False, own, after)
    # what a shortcut gave may be kept for its backward
    in_place = before is not None and identity and own
    relu = isinstance(post, nn.ReLU) and not post._forward_hooks
    if includes_input or not (post is None or relu):
        value = combined(live_again, out, scale, includes_input)
        y = _Put.apply(rest, None, value if post is None else post(value), rows, 1.0, False, in_place)
    else:
        y = _Put.apply(rest, live_again, out, rows, scale, relu, in_place)
    if lane is not None:
        lane.link = after
    return y  # pyright: ignore[reportReturnType]


def combined(skip: Tensor, out: Tensor, scale: float | Tensor, includes_input: bool = False) -> Tensor:
    """skip + scale * F, where `out` is F or, with `includes_input`, skip + F; a `scale` that is data is Tensor[]."""
    if not includes_input:
        return skip + _scaled(out, scale)
    return out if isinstance(scale, float) and scale == 1.0 else skip + _scaled(out - skip, scale)


def keep_index(
    x: Tensor,
    shortcut: Map,
    branch: Map,
    index: Tensor,
    scale: float | Tensor = 1.0,
    *,
    post: Map | None = None,
    along: Sequence[Any] = (),
    includes_input: bool = False,
) -> Tensor:
    """As `keep_rows`, for any set of rows: `index` is int64 Tensor[k] of different row numbers on the device of x."""
    along = [_each_tensor(one, lambda t: t.index_select(0, index)) for one in along]
    live = x.index_select(0, index)
    skip = shortcut(x)
    value = combined(skip.index_select(0, index), branch(live, *along), scale, includes_input)
    if post is not None:
        value = post(value)
    dtype = torch.promote_types(skip.dtype, value.dtype)
    return skip.to(dtype).index_copy(0, index, value.to(dtype))


class _Touch(torch.autograd.Function):
    """x, and zero gradients for what `out` was computed from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        ctx.like = (out.shape, out.dtype, out.device)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)


def touch(x: Tensor, skip: Tensor, branch: Map, along: Sequence[Any] = ()) -> Tensor:
    """skip, with a branch that is absent here run all the same, on one row, in eval mode, for gradients of zero.

    For draws that differ between ranks: a branch that lives on another rank takes part in that rank's collectives (of
    gradients, of sharded parameters), so it has to run here, too.
    """
    along = [_each_tensor(one, lambda t: t[:1]) for one in along]
    row = x[:1].detach().requires_grad_(x.requires_grad)  # an overflow in the branch must not reach x as 0 * inf
    with _norms_in_eval(branch):
        out = branch(row, *along)
    return _Touch.apply(skip, out)  # pyright: ignore[reportReturnType]


@contextmanager
def _norms_in_eval(branch: Map) -> Iterator[None]:
    """One row that counts for nothing must not move the statistics of batch norm."""
    owner = branch if isinstance(branch, nn.Module) else getattr(branch, "__self__", None)
    modules = owner.modules() if isinstance(owner, nn.Module) else ()
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    try:
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm in norms:
            norm.training = True


def _each_tensor(value: Any, cut: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda leaf: cut(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _scaled(x: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor):  # in half precision a tensor, unlike a number, would be rounded first
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * factor).to(x.dtype)
    return x if factor == 1.0 else x * factor
