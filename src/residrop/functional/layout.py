"""Layout of tensors in memory: dense strides, and the signs of a ReLU's output packed to one bit a unit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["empty_as", "pack_signs", "relu_by_signs", "strides_of", "unpack_signs"]


def strides_of(x: Tensor) -> tuple[int, ...] | None:
    """The strides of a dense tensor: those of any number of its rows, as rows come outermost; None if it is not."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.stride() if dense else None


def empty_as(x: Tensor, rows: int, strides: tuple[int, ...] | None) -> Tensor:
    """An empty tensor of the type of x, with `rows` rows and these strides.

    For gradients, which may arrive in another memory format than their values have (from a mean over pixels); all
    earlier layers would go on in that one.
    """
    if strides is None:
        return torch.empty_like(x[:rows])
    return torch.empty_strided((rows, *x.shape[1:]), strides, dtype=x.dtype, device=x.device)


_SPREAD, _EACH, _GATHER = 0x0101010101010101, 0x8040201008040201 - (1 << 64), 0x0102040810204080


def pack_signs(parts: Sequence[Tensor], strides: tuple[int, ...] | None) -> Tensor:
    """Where the output of a ReLU is above zero, one bit an element in the order of memory.

    A bool an element, for tensors that are not dense or whose elements do not fill bytes.

    Args:
        parts: the rows of a batch in order, as one tensor or two.
        strides: `strides_of` each of them.
    """
    bools = parts[0].bool() if len(parts) == 1 else torch.cat([part.bool() for part in parts])
    size = bools.numel()
    if strides is None or size % 8:
        return bools
    flat = bools.as_strided((size,), (1,)).view(torch.uint8)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy()))
    words = flat.view(torch.int64)  # eight bytes of 0 or 1, brought together by one product
    return (words * _GATHER >> 56).to(torch.uint8)


def unpack_signs(signs: Tensor, out: Tensor) -> Tensor:
    """What `pack_signs` packed, as numbers in `out`, a tensor of the same rows and strides: 1 where above zero."""
    if signs.dtype == torch.bool:
        return out.copy_(signs)
    if signs.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(signs.numpy()))
    else:
        flat = ((signs.to(torch.int64) * _SPREAD) & _EACH).view(torch.uint8)
    out.as_strided(flat.shape, (1,)).copy_(flat)
    return out


class _Relu(torch.autograd.Function):
    """relu(x); one bit a unit is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.strides = strides_of(y)
        ctx.save_for_backward(pack_signs([y], ctx.strides))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        mask = unpack_signs(ctx.saved_tensors[0], empty_as(grad, grad.shape[0], ctx.strides))
        masked = torch.ops.aten.threshold_backward
        return masked(grad, mask, 0) if torch.is_grad_enabled() else masked.grad_input(grad, mask, 0, grad_input=mask)


def relu_by_signs(post: nn.Module, y: Tensor) -> Tensor | None:
    """post(y), if that is a ReLU that nobody watches, keeping only signs for backward; None if it is anything else.

    For an output of which the next block keeps a part of its own: kept in full it would be the larger one.
    """
    if type(post) is not nn.ReLU or post._forward_hooks or post._backward_hooks or torch.compiler.is_compiling():
        return None
    return _Relu.apply(y)  # pyright: ignore[reportReturnType]
