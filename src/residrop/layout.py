"""Layout of tensors in memory: dense strides, and the signs of a ReLU's output packed to one bit a unit."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty_as", "pack_signs", "strides_of", "unpack_signs"]


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


def pack_signs(x: Tensor) -> Tensor:
    """Where the output of a ReLU is above zero, one bit an element in the order of memory.

    A bool an element, for tensors that are not dense or whose elements do not fill bytes.
    """
    if strides_of(x) is None or x.numel() % 8:
        return x.bool()
    bools = x.as_strided((x.numel(),), (1,)).bool().view(torch.uint8)
    if x.device.type == "cpu":
        return torch.from_numpy(np.packbits(bools.numpy()))
    words = bools.view(torch.int64)  # eight bytes of 0 or 1, brought together by one product
    return (words * _GATHER >> 56).to(torch.uint8)


def unpack_signs(signs: Tensor, like: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """What `pack_signs` packed, as numbers of the type of `like`: above zero where x, of these strides, was."""
    if signs.dtype == torch.bool:
        return signs.to(like.dtype)
    assert strides is not None
    if signs.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(signs.numpy()))
    else:
        flat = ((signs.to(torch.int64) * _SPREAD) & _EACH).view(torch.uint8)
    return flat.to(like.dtype).as_strided(like.shape, strides)
