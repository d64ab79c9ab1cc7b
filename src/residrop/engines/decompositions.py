"""Batch norm, ReLU and pooling in forms that Inductor turns into fast code on the CPU.

Inductor's own decomposition of batch norm takes mean and variance over all pixels of a batch at once. In channels-last
memory that is one long chain of Welford updates a channel, several times slower than torch's kernel. Here sums go image
by image: vectors over channels inside, images over the threads outside. And the gradient of a ReLU makes it keep bools,
which it writes one at a time. The numbers are those of torch up to rounding.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["inductor"]

_aten = torch.ops.aten


class _Table(dict[Any, Callable[..., Any]]):
    """Decompositions by operation; pickled by name, as a key of what is compiled with them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _table, ()


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """A backend of `torch.compile`: Inductor, with training in channels-last memory on the CPU in mind.

    On other devices, in other memory formats and in eval mode it makes what Inductor makes.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    # The key of that cache does not tell decompositions apart; what is compiled from the graph has a cache of its own.
    with config.patch(enable_autograd_cache=False):
        return compile_fx(graph, list(inputs), decompositions=_table())


@cache
def _table() -> _Table:
    from torch._inductor.decomposition import select_decomp_table

    table = _Table(select_decomp_table())
    own: dict[Any, Callable[..., Any]] = {
        _aten._native_batch_norm_legit_functional.default: _batch_norm,
        _aten.native_batch_norm_backward.default: _batch_norm_backward,
        _aten.avg_pool2d_backward.default: _avg_pool_backward,
        _aten.threshold_backward.default: _threshold_backward,
        _aten.constant_pad_nd.default: _crop,
    }
    for operation, form in own.items():
        table[operation] = _or_else(form, table.get(operation, NotImplemented))
    return table


def _or_else(form: Callable[..., Any], other: Any) -> Callable[..., Any]:
    """`form`, and where that declines, what Inductor does: its decomposition, or (NotImplemented) its own loop."""

    def decompose(*args: Any, **kwargs: Any) -> Any:
        made = form(*args, **kwargs)
        return other(*args, **kwargs) if made is NotImplemented and other is not NotImplemented else made

    return decompose


def _suits(x: Tensor, *statistics: Tensor | None) -> bool:
    """Whether x is an image batch in channels-last memory on the CPU, with statistics in the type of its sums."""
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and x.is_floating_point()
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(one is None or one.dtype == _sums(x) for one in statistics)
    )


def _sums(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pixels(x: Tensor) -> Tensor:
    """Tensor[n, C, H, W] as Tensor[n, H * W, C].

    `as_strided` rather than a view: Inductor then stores what x is computed from in the type that x has. Else it would
    keep the float32 of it that the sums read.
    """
    n, channels, height, width = x.shape
    return x.as_strided((n, height * width, channels), (height * width * channels, channels, 1))


def _images(pixels: Tensor, like: Tensor) -> Tensor:
    n, channels, height, width = like.shape
    return pixels.to(like.dtype).view(n, height, width, channels).permute(0, 3, 1, 2)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Output, mean, 1 / deviation, and what the running statistics become.

    Variance in two steps, as Chan et al. 1983 add up parts: of each image around its first pixel, then of their means.
    """
    if not training or running_mean is None or not _suits(x, weight, bias, running_mean, running_var):
        return NotImplemented
    assert running_var is not None
    pixels = _pixels(x)
    images, size = pixels.shape[:2]
    count = images * size
    values, first = pixels.to(_sums(x)), pixels[:, :1].to(_sums(x))
    away = values - first
    shift = away.sum(1) / size
    means = first[:, 0] + shift
    spread = (away * away).sum(1) - shift * shift * size
    mean = means.sum(0) / images
    var = (spread + (means - mean).square() * size).sum(0) / count
    rstd = torch.rsqrt(var + eps)
    factor = rstd if weight is None else weight * rstd
    offset = -mean * factor if bias is None else bias - mean * factor
    out = _images(values * factor + offset, x)
    unbiased = var * (count / (count - 1))
    return (
        out,
        mean,
        rstd,
        running_mean + (mean - running_mean) * momentum,
        running_var + (unbiased - running_var) * momentum,
    )


def _batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> Any:
    """Gradients of x, weight and bias.

    What is the same for all pixels of a channel comes out of the sums over images, ready to use: Inductor would repeat
    it at every pixel otherwise.
    """
    if not training or mean is None or rstd is None or not _suits(x, weight, mean, rstd) or not _suits(grad):
        return NotImplemented
    values, grads = (_pixels(one).to(_sums(x)) for one in (x, grad))
    count = values.shape[0] * values.shape[1]
    factor = rstd if weight is None else weight * rstd
    sums, products = grads.sum(1), (grads * (values - mean)).sum(1)  # of each image
    slope = products * (factor * rstd * rstd / count)
    of_x = _images(grads * factor - values * slope.sum(0) - (sums * (factor / count) - slope * mean).sum(0), x)
    of_weight, of_bias = (products * rstd).sum(0), sums.sum(0)
    return tuple(one if wanted else None for one, wanted in zip((of_x, of_weight, of_bias), output_mask, strict=True))


def _avg_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Any:
    """Windows that tile the image: each pixel has its share of one gradient."""
    high, wide = _pair(kernel_size)
    tiles = _pair(stride or kernel_size) == (high, wide) and not any(padding) and divisor_override is None
    if not tiles or not (_suits(x) and _suits(grad)) or x.shape[2] % high or x.shape[3] % wide:
        return NotImplemented
    height, width = x.shape[2:]
    n, channels, rows, columns = grad.shape
    share = (grad / (high * wide)).permute(0, 2, 3, 1).view(n, rows, 1, columns, 1, channels)
    spread = share.expand(n, rows, high, columns, wide, channels)
    return spread.reshape(n, height, width, channels).permute(0, 3, 1, 2)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0], sizes[-1]


def _threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Any:
    """The gradient of a ReLU, from its output: grad where x is above the threshold.

    The comparison is with a number computed from the gradient, which cannot be known before backward. Else Inductor
    would compare in the forward pass and keep the bools, which it writes one at a time.
    """
    if grad.device.type != "cpu":
        return NotImplemented
    return torch.where(x <= grad.clamp(threshold, threshold), 0.0, grad)


def _crop(x: Tensor, pad: Sequence[int], value: float = 0) -> Any:
    """Padding by no positive number, as the gradient of a padding is: a slice, where Inductor masks every load."""
    if x.device.type != "cpu" or any(one > 0 for one in pad):
        return NotImplemented
    for dim, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        x = x.narrow(-1 - dim, -before, x.shape[-1 - dim] + before + after)
    return x.clone()
