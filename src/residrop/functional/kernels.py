"""Unit-level randomness in one pass over memory: masks made, used and forgotten inside a compiled loop.

The arithmetic is that of `residrop.functional`, to the last bit. What is compiled depends on the kind of operation, the
type of the numbers and the layout (rows after rows, or channels last), never on keys, thetas or sizes: those are data.
"""

import functools
import types
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from residrop.common.errors import ConfigError

__all__ = ["Kind", "data_of", "run", "signed", "traced", "use_compiler"]

Kind = Literal["mix", "unmix", "select", "divide"]
Mode = Literal["auto"] | bool

_LEAST = 1 << 14  # units; for fewer the call costs more than the work
_MANY = 1 << 30  # units combined without a compiler before "auto" takes the seconds to compile


class _State:
    mode: Mode = "auto"
    seen = 0
    failed = False


def use_compiler(mode: Mode) -> None:
    """Say whether unit-level rules compile their arithmetic (`torch.compile`; results are the same, bit for bit).

    Args:
        mode: "auto" (the default) compiles once 2^30 units have been combined, as the first call of a compiled form
            takes seconds; True compiles at the first tensor of at least 2^14 units; False never does. Where there is
            no working compiler, one warning is given and the uncompiled form goes on.

    Raises:
        ConfigError: another mode.
    """
    if mode not in ("auto", True, False):
        raise ConfigError(f"mode is {mode!r}; choose 'auto', True or False")
    _State.mode, _State.failed = mode, False


def signed(word: int) -> int:
    """The 32-bit integer with these low bits, as torch.int32 holds it."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _hashed(index: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As `functional._words`; every operation on its own, for a compiler to fuse."""
    h = index ^ low
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * signed(0x7FEB352D) + high
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * signed(0x846CA68B)
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * signed(0x9E3779B1)
    return h ^ ((h >> 15) & 0x1FFFF)


def _index(like: Tensor) -> Tensor:
    """int32 index of every unit of a tensor in row-major order: an array of loop counters, which nobody stores."""
    index, stride = torch.zeros((), dtype=torch.int32, device=like.device), 1
    for dim in reversed(range(like.ndim)):
        count = torch.arange(like.shape[dim], dtype=torch.int32, device=like.device) * stride
        index = index + count.view(-1, *[1] * (like.ndim - 1 - dim))
        stride = stride * like.shape[dim]
    return index


def _present(index: Tensor, coins: int, data: Tensor) -> list[Tensor]:
    """Bool tensors, one per coin, from what `data_of` made."""
    pairs = (coins + 1) // 2
    found: list[Tensor] = []
    for pair in range(pairs):
        words = _hashed(index, data[2 * pair], data[2 * pair + 1])
        halves = (words & 0xFFFF, (words >> 16) & 0xFFFF)[: coins - 2 * pair]
        found += [half < data[2 * pairs + 2 * pair + number] for number, half in enumerate(halves)]
    return found


def _body(
    kind: Kind, coins: int, wanted: tuple[bool, ...], inputs: Sequence[Tensor], index: Tensor, data: Tensor
) -> Any:
    present = _present(index, coins, data)
    if kind == "mix":
        parts = [torch.where(mask, x, 0.0) for mask, x in zip(present, inputs, strict=True)]
        return (functools.reduce(torch.add, parts),)
    if kind == "select":
        return (torch.where(present[0], inputs[0], inputs[1]),)
    (grad,) = inputs
    if kind == "unmix":
        return tuple(torch.where(mask, grad, 0.0) for mask, want in zip(present, wanted, strict=True) if want)
    return torch.where(present[0], grad, 0.0), torch.where(present[0], 0.0, grad)


@functools.cache
def _compiled(kind: Kind, layout: str, coins: int, wanted: tuple[bool, ...], dtype: torch.dtype, device: str) -> Any:
    """One compiled function. It has a code object of its own: the compiler counts graphs per code object."""

    def kernel(data: Tensor, pixels: Tensor | None, channels: Tensor | None, *inputs: Tensor) -> Any:
        # of two dimensions, from small tensors: computed from two loop counters it would not be vectorised
        counters = None if pixels is None or channels is None else pixels[:, None] + channels[None, :]
        index = _index(inputs[0]) if counters is None else counters
        return _body(kind, coins, wanted, inputs, index, data)

    name = f"residrop_{kind}_{layout}_{coins}_{str(dtype).removeprefix('torch.')}_{device}"
    own = types.FunctionType(
        kernel.__code__.replace(co_name=name), kernel.__globals__, name, kernel.__defaults__, kernel.__closure__
    )
    return torch.compile(own, dynamic=True, fullgraph=True)


def _as(x: Tensor, layout: str) -> Tensor:
    """x as the compiled loops take it: flat, rows x units or pixels x channels; a view."""
    if layout == "channels_last":
        return x.detach().permute(0, 2, 3, 1).flatten(0, 2)
    return x.detach().view(-1) if layout == "flat" else x.detach().view(len(x), -1)


def _back(y: Tensor, like: Tensor, layout: str) -> Tensor:
    if layout != "channels_last":
        return y.view(like.shape)
    rows, _, height, width = like.shape
    return y.unflatten(0, (rows, height, width)).permute(0, 3, 1, 2)


def _counters(like: Tensor, layout: str, places: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The index of unit (row, number in it) or (pixel, channel) is the sum of these two."""
    if layout == "flat":
        return None, None
    count = torch.arange(max(like.shape[0], like[0].numel()), dtype=torch.int32, device=like.device)
    if layout == "rows":
        assert places is not None
        return places, count[: like[0].numel()]
    rows, channels, pixels = like.shape[0], like.shape[1], like[0, 0].numel()
    first = count[:rows] * (pixels * channels) if places is None else places
    return (first[:, None] + count[:pixels]).view(-1), count[:channels] * pixels


def _layout(tensors: Sequence[Tensor], places: Tensor | None) -> str | None:
    if all(x.is_contiguous() for x in tensors):
        return "flat" if places is None else "rows"
    first = tensors[0]
    if first.ndim == 4 and min(first.shape) > 1 and all(_is_channels_last(x) for x in tensors):
        return "channels_last"
    return None


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _wanted(units: int) -> bool:
    if _State.mode is False or _State.failed or units < _LEAST:
        return False
    if _State.mode is True or _State.seen >= _MANY:
        return True
    _State.seen += units
    return False


def data_of(keys: Sequence[int], thresholds: Sequence[int], device: torch.device) -> Tensor:
    """int32 Tensor: two words of key per pair of coins, then a threshold per coin."""
    words = [signed(half) for key in keys for half in (key, key >> 32)]
    data = torch.tensor([*words, *thresholds], dtype=torch.int32)
    if device.type == "cpu":
        return data
    return (data.pin_memory() if device.type == "cuda" else data).to(
        device, non_blocking=True
    )  # without waiting for it


def traced(kind: Literal["mix", "select"], tensors: Sequence[Tensor], data: Tensor) -> Tensor:
    """The same inside somebody else's graph: plain operations, which its compiler fuses with what is around them.

    As a checkpoint, so that masks are made again in backward: by itself the compiler would keep them.
    """

    def inside(data: Tensor, *tensors: Tensor) -> Tensor:
        coins = 1 if kind == "select" else len(tensors)
        return _body(kind, coins, (), tensors, _index(tensors[0]), data)[0]

    result: Any = checkpoint(inside, data, *tensors, use_reentrant=False, preserve_rng_state=False)
    return result


def run(
    kind: Kind,
    tensors: Sequence[Tensor],
    keys: Sequence[int],
    thresholds: Sequence[int],
    wanted: tuple[bool, ...] = (),
    places: Tensor | None = None,
) -> list[Tensor] | None:
    """Outputs of a compiled operation; None if it is to be done without a compiler.

    Args:
        kind: "mix" sums present units, "unmix" is its adjoint, "select" takes units of the first or the second
            tensor, "divide" is its adjoint.
        tensors: of one shape, type and device.
        keys: a 64-bit key per pair of coins.
        thresholds: per coin how many of 2^16 hashes are present.
        wanted: for "unmix", which coins' outputs are needed.
        places: int32 Tensor[rows], the index of the first unit of every row; None counts from 0.
    """
    first = tensors[0]
    if first.numel() >= 1 << 31 or not _wanted(first.numel()):
        return None
    layout = _layout(tensors, places)
    if layout is None or not first.is_floating_point():
        return None
    data = data_of(keys, thresholds, first.device)
    kernel = _compiled(kind, layout, len(thresholds), wanted, first.dtype, first.device.type)
    try:
        with torch.autocast(first.device.type, enabled=False):
            outputs = kernel(data, *_counters(first, layout, places), *[_as(x, layout) for x in tensors])
    except (RuntimeError, OSError, ImportError) as problem:
        _State.failed = True
        warnings.warn(
            f"unit-level rules go on without a compiler, several times slower: {str(problem).strip().splitlines()[0]} "
            "(residrop.functional.use_compiler(False) silences this)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return [_back(y, first, layout) for y in outputs]
