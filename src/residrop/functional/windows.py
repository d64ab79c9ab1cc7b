"""Live rows as data: windows that a compiled graph takes without being compiled anew for every draw."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from residrop.functional.call import BranchCall, combined

__all__ = ["Window", "keep_window"]


class Window(NamedTuple):
    """The live rows of a batch, as data.

    Attributes:
        size: Tensor[live] without values: its length is the number of live rows, at least 1.
        start: int64 Tensor[], the first of them, on the device of the batch.
        scale: float Tensor[], the factor of the branch; None is 1.
        all: whether all rows live, in every pass.
    """

    size: Tensor
    start: Tensor
    scale: Tensor | None
    all: bool


def keep_window(x: Tensor, call: BranchCall, window: Window) -> Tensor:
    """As `rows.keep_rows`, for a window that is data: all is gathered, which compilers fuse, and nothing scattered."""
    size, start, scale, every = window
    scale = 1.0 if scale is None else scale
    if every:
        return call.whole(x, scale)

    def take(value: Tensor) -> Tensor:
        return _Take.apply(value, size, start)  # pyright: ignore[reportReturnType]

    along = call.cut_along(take)
    live, skip = take(x), call.shortcut(x)
    here = live if isinstance(call.shortcut, nn.Identity) else take(skip)
    value = call.finished(combined(here, call.branch(live, *along), scale, call.includes_input))
    dtype = torch.promote_types(skip.dtype, value.dtype)
    return _Put.apply(skip.to(dtype), value.to(dtype), start)  # pyright: ignore[reportReturnType]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    y = x.index_select(0, index)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)
    return y


def _cut(x: Tensor, live: int, start: Tensor) -> Tensor:
    """The live rows of x."""
    return _gather(x, (torch.arange(live, device=x.device) + start) % x.shape[0])


def _spread(base: Tensor, live: Tensor, start: Tensor) -> Tensor:
    """base with its live rows replaced."""
    places = (torch.arange(base.shape[0], device=base.device) - start) % base.shape[0]
    inside = (places < live.shape[0]).view(-1, *[1] * (base.ndim - 1))
    return torch.where(inside, _gather(live, places.clamp(max=live.shape[0] - 1)), base)


class _Take(torch.autograd.Function):
    """x to its live rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(start)
        ctx.total = x.shape[0]
        return _cut(x, size.shape[0], start)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (start,) = ctx.saved_tensors
        base = grads[0].new_zeros(()).expand(ctx.total, *grads[0].shape[1:])
        return _spread(base, grads[0], start), None, None


class _Put(torch.autograd.Function):
    """base with its live rows replaced."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, live: Tensor, start: Tensor) -> Tensor:
        ctx.save_for_backward(start)
        ctx.live = live.shape[0]
        return _spread(base, live, start)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (start,) = ctx.saved_tensors
        live = _cut(grads[0], ctx.live, start)
        return _spread(grads[0], torch.zeros_like(live), start), live, None
