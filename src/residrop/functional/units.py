"""Tensors in, tensors out: combinations of a shortcut and a branch under unit-level randomness.

Unit masks are not stored: unit i of coin c is present if 16 bits of a stateless hash of (key, i) lie below
theta * 2^16, and backward makes the same mask again from the key. One 32-bit word serves two coins. i is the unit's
index in the logical (row-major) order of its tensor, so results depend neither on memory format nor on threads. A theta
that is not a multiple of 2^-16 is rounded to the nearest one (0 and 1 are exact).

All functions keep dtype, device and memory format, and take tensors of any rank with fewer than 2^31 elements. Much
work is done by compiled loops, with the same results (`use_compiler`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from residrop.common.checks import check_rate
from residrop.common.errors import ConfigError
from residrop.functional import kernels
from residrop.functional.call import scaled
from residrop.functional.kernels import signed, use_compiler
from residrop.schedule.sampler import derive_key

__all__ = [
    "coins_of",
    "mix",
    "placed",
    "row_mask",
    "row_normal",
    "skip_forward",
    "swapout",
    "unit_dropout",
    "unit_mask",
    "use_compiler",
]


_PLACES: ContextVar[tuple[Tensor, int] | None] = ContextVar("residrop_places", default=None)


@contextmanager
def placed(rows: Tensor, total: int) -> Iterator[None]:
    """Inside, tensors are these rows of tensors of `total` rows, and a unit has the coins that it has there.

    For prediction: no gradients are recorded inside, as backward would not know the places.

    Args:
        rows: int64 Tensor[m], each in 0 ... total - 1.
        total: rows of the whole.

    Raises:
        ConfigError: in the functions called inside, tensors have another number of rows, or the whole has 2^31
            elements or more.
    """
    if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < total:
        raise ConfigError(f"rows reach from {int(rows.min())} to {int(rows.max())}, of a whole of {total} rows")
    token = _PLACES.set((rows, total))
    try:
        with torch.no_grad():
            yield
    finally:
        _PLACES.reset(token)


def _places(like: Tensor) -> Tensor | None:
    """The index of the first unit of every row, int32 Tensor[m], inside `placed`; None elsewhere."""
    found = _PLACES.get()
    if found is None:
        return None
    rows, total = found
    if like.ndim == 0 or len(like) != len(rows):
        raise ConfigError(f"a tensor of shape {tuple(like.shape)} does not have the {len(rows)} rows that were placed")
    inner = like[:1].numel() if len(like) else 1
    _check_size(inner * total)
    return (rows * inner).to(like.device, torch.int32)


def _check_size(units: int) -> None:
    if units >= 1 << 31:
        raise ConfigError(f"a tensor of {units} elements is too large for unit masks; split it below 2^31")


def _words(like: Tensor, key: int, word: int, first: int | Tensor = 0) -> Tensor:
    """int32 hash words, shape and memory format of `like`: word number `word` of every unit under the 64-bit `key`.

    `first` is the index of the first unit, for a part of a larger tensor, or of the first unit of every row.
    """
    key = derive_key(key, word)  # also makes neighbouring keys given by hand unrelated
    h = torch.empty_like(like, dtype=torch.int32, requires_grad=False)
    if like.ndim == 0 or like.numel() == 0:
        h.fill_(first if isinstance(first, int) else 0)
    else:  # index = offset of the row + offset within it, by broadcasting: one pass over memory in the format of `like`
        inner = like[0].numel()
        rows = (
            first
            if isinstance(first, Tensor)
            else torch.arange(first, first + like.numel(), inner, dtype=torch.int32, device=like.device)
        )
        within = torch.empty_like(like[:1], dtype=torch.int32, requires_grad=False)
        within.copy_(torch.arange(inner, dtype=torch.int32, device=like.device).view(1, *like.shape[1:]))
        torch.add(within, rows.view(-1, *[1] * (like.ndim - 1)), out=h)
    # Three multiply-xorshift rounds: two (C. Wellons' "lowbias32") leave units at some distances in one large tensor
    # correlated by up to 1%. The second half of the key enters after the first: a key that only shifted the index would
    # make the masks of two keys permutations of each other. int32 shifts are arithmetic, so the sign bits they bring
    # in are masked away. In place: a fresh tensor costs more than an op.
    shifted = torch.empty_like(h)
    h.bitwise_xor_(signed(key))
    h.bitwise_xor_(torch.bitwise_right_shift(h, 16, out=shifted).bitwise_and_(0xFFFF))
    h.mul_(signed(0x7FEB352D)).add_(signed(key >> 32))
    h.bitwise_xor_(torch.bitwise_right_shift(h, 15, out=shifted).bitwise_and_(0x1FFFF))
    h.mul_(signed(0x846CA68B))
    h.bitwise_xor_(torch.bitwise_right_shift(h, 16, out=shifted).bitwise_and_(0xFFFF))
    h.mul_(signed(0x9E3779B1))
    return h.bitwise_xor_(torch.bitwise_right_shift(h, 15, out=shifted).bitwise_and_(0x1FFFF))


def _threshold(theta: float) -> int:
    """How many of the 2^16 values of a coin are present."""
    return round(theta * 65536)


Key = int | Tensor | None
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(words: Tensor, half: int, theta: float, dtype: torch.dtype) -> Tensor:
    """All bits set where a unit is present, none where it is not: integers as wide as `dtype`.

    A present unit is `x & bits`: unlike a product with a 0/1 mask it vectorises for every dtype and removes an
    infinity or NaN of an absent unit.
    """
    drawn = words >> 16 if half else words.clone()
    drawn.bitwise_and_(0xFFFF).sub_(_threshold(theta)).bitwise_right_shift_(31)
    return drawn.to(_INTEGERS[dtype.itemsize])


def _all_bits(like: Tensor, thetas: Sequence[float], key: int, first: int | Tensor) -> Iterator[Tensor | None]:
    """The bits of coins 0, 1, ...; None where theta is 1. Each hash word is computed once for its two coins."""
    words = None
    for coin, theta in enumerate(thetas):
        if coin % 2 == 0:
            words = None
        if theta == 1.0:
            yield None
            continue
        if words is None:
            words = _words(like, key, coin // 2, first)
        yield _bits(words, coin % 2, theta, like.dtype)


def _present(x: Tensor, bits: Tensor | None) -> Tensor:
    return x if bits is None else (x.view(bits.dtype) & bits).view(x.dtype)


_PIECE = 1 << 18  # units


def _at(x: Tensor, rows: slice) -> Tensor:
    return x[rows] if x.ndim else x


def _in_pieces(like: Tensor, count: int, work: Callable[[slice, int | Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """`count` tensors like `like`, filled a piece of rows at a time by `work(rows, index of the first unit)`, or of
    every row inside `placed`.

    On the CPU a piece is small enough that the dozen integer operations of a mask stay in the cache.
    """
    _check_size(like.numel())
    places = _places(like)
    outputs = [torch.empty_like(like, requires_grad=False) for _ in range(count)]
    rows = like.shape[0] if like.ndim else 0
    inner = like.numel() // rows if rows else 0
    step = max(1, _PIECE // inner) if inner and like.device.type == "cpu" else max(rows, 1)
    for start in range(0, max(rows, 1), step):
        part = slice(start, start + step) if rows else slice(None)
        first = start * inner if places is None else places[part]
        for output, value in zip(outputs, work(part, first), strict=True):
            _at(output, part).copy_(value)
    return outputs


def coins_of(thetas: Sequence[float], key: int, device: torch.device) -> Tensor:
    """Key and thetas of a draw as data for a compiled graph: int32 Tensor."""
    keys = [derive_key(key, word) for word in range((len(thetas) + 1) // 2)]
    return kernels.data_of(keys, [_threshold(theta) for theta in thetas], device)


def _compiled(
    kind: kernels.Kind, tensors: Sequence[Tensor], thetas: Sequence[float], key: int, wanted: tuple[bool, ...] = ()
) -> list[Tensor] | None:
    """The outputs of `kernels.run`; None if they are to be made here."""
    if len(tensors) > 2 and tensors[0].dtype.itemsize < 4:
        return None  # compiled sums of half precision are rounded once, not term by term
    keys = [derive_key(key, word) for word in range((len(thetas) + 1) // 2)]
    thresholds = [_threshold(theta) for theta in thetas]
    return kernels.run(kind, tensors, keys, thresholds, wanted, places=_places(tensors[0]))


def unit_mask(like: Tensor, theta: float, key: int, coin: int = 0) -> Tensor:
    """Bool mask of the shape of `like`: coin number `coin` of every unit, True with probability `theta`.

    Args:
        like: Tensor[...], gives shape, device and memory format; its values are not read.
        theta: probability in [0, 1].
        key: 64-bit key, as in `Draw.key`.
        coin: 0 is the coin of the first tensor of `mix`, 1 that of the second, and so on.
    """
    check_rate("theta", theta)
    like = torch.empty_like(like, dtype=torch.float32)

    def work(rows: slice, first: int | Tensor) -> tuple[Tensor]:
        words = _words(_at(like, rows), key, coin // 2, first)
        return (_bits(words, coin % 2, theta, torch.float32),)

    return _in_pieces(like, 1, work)[0] != 0


class _Mix(torch.autograd.Function):
    """sum_i Theta_i x_i. Only the key is saved; `_Unmix` is its adjoint, so every order of gradient works."""

    @staticmethod
    def forward(ctx: Any, key: int, thetas: tuple[float, ...], *tensors: Tensor) -> Tensor:
        ctx.key, ctx.thetas = key, thetas
        if found := _compiled("mix", tensors, thetas, key):
            return found[0]

        def work(rows: slice, first: int | Tensor) -> tuple[Tensor]:
            parts = [_at(x, rows) for x in tensors]
            present = zip(parts, _all_bits(parts[0], thetas, key, first), strict=True)
            return (functools.reduce(torch.add, (_present(x, bits) for x, bits in present)),)

        return _in_pieces(tensors[0], 1, work)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_Unmix.apply(grads[0], ctx.key, ctx.thetas, tuple(ctx.needs_input_grad[2:]))


class _Unmix(torch.autograd.Function):
    """g to (Theta_1 g, Theta_2 g, ...): the gradients of `_Mix`, None where not needed."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, key: int, thetas: tuple[float, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        ctx.key, ctx.thetas = key, thetas
        if not any(needed):
            return tuple(None for _ in needed)
        if found := _compiled("unmix", [grad], thetas, key, needed):
            filled = iter(found)
            return tuple(next(filled) if need else None for need in needed)

        def work(rows: slice, first: int | Tensor) -> list[Tensor]:
            part = _at(grad, rows)
            every = zip(_all_bits(part, thetas, key, first), needed, strict=True)
            return [_present(part, bits) for bits, need in every if need]

        filled = iter(_in_pieces(grad, sum(needed), work))
        return tuple(next(filled) if need else None for need in needed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return None, None, None, None
        filled = [torch.zeros_like(like) if grad is None else grad for grad in grads]
        return mix(filled, ctx.thetas, ctx.key), None, None, None


def mix(tensors: Sequence[Tensor], thetas: Sequence[float], key: Key) -> Tensor:
    """Y = sum_i Theta_i * F_i, each Theta_i an independent Bernoulli(theta_i) per unit (Swapout, eq. 2).

    Args:
        tensors: N >= 1 tensors of one shape and device; unequal dtypes (autocast) are promoted as by addition.
        thetas: N probabilities in [0, 1].
        key: 64-bit key of the draw; None gives the expectation, sum_i theta_i F_i. Inside a compiled graph key and
            thetas are data, what `coins_of` returns, and `thetas` is not read.

    Raises:
        ConfigError: no tensors, unequal shapes, another number of thetas than tensors, or a theta outside [0, 1].
    """
    if not tensors or len(tensors) != len(thetas):
        raise ConfigError(f"{len(tensors)} tensors and {len(thetas)} thetas were given; give one theta per tensor")
    for i, (x, theta) in enumerate(zip(tensors, thetas, strict=True), start=1):
        check_rate(f"theta_{i}", theta)
        if x.shape != tensors[0].shape:
            raise ConfigError(
                f"tensor {i} has shape {tuple(x.shape)}, the first {tuple(tensors[0].shape)}; shapes must agree"
            )
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    tensors = [x.to(dtype) for x in tensors]
    if key is None:
        total = scaled(tensors[0], thetas[0])
        for x, theta in zip(tensors[1:], thetas[1:], strict=True):
            total = total + scaled(x, theta)
        return total
    if isinstance(key, Tensor):
        return kernels.traced("mix", tensors, key)
    result: Any = _Mix.apply(key, tuple(thetas), *tensors)
    return result


def swapout(x: Tensor, branch: Tensor, theta_1: float, theta_2: float, key: Key) -> Tensor:
    """Y = Theta_1 * X + Theta_2 * F(X), independent masks (Swapout, eq. 3). Arguments as in `mix`."""
    return mix((x, branch), (theta_1, theta_2), key)


class _Select(torch.autograd.Function):
    """Theta a + (1 - Theta) b; `_Divide` is its adjoint."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, theta: float, key: int) -> Tensor:
        ctx.coin = (theta, key)
        if found := _compiled("select", [a, b], [theta], key):
            return found[0]

        def work(rows: slice, first: int | Tensor) -> tuple[Tensor]:
            in_a, in_b = _at(a, rows), _at(b, rows)
            bits = _bits(_words(in_a, key, 0, first), 0, theta, a.dtype)
            # put together as bits: a sum would turn the -0.0 of a present unit into 0.0
            return ((in_a.view(bits.dtype) & bits | in_b.view(bits.dtype) & bits.bitwise_not()).view(a.dtype),)

        return _in_pieces(a, 1, work)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_Divide.apply(grads[0], *ctx.coin), None, None


class _Divide(torch.autograd.Function):
    """g to (Theta g, (1 - Theta) g): the gradients of `_Select`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, theta: float, key: int) -> tuple[Tensor, Tensor]:
        ctx.coin = (theta, key)
        if found := _compiled("divide", [grad], [theta], key):
            return found[0], found[1]

        def work(rows: slice, first: int | Tensor) -> tuple[Tensor, Tensor]:
            part = _at(grad, rows)
            bits = _bits(_words(part, key, 0, first), 0, theta, grad.dtype)
            return _present(part, bits), _present(part, bits.bitwise_not())

        to_a, to_b = _in_pieces(grad, 2, work)
        return to_a, to_b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        return _Select.apply(grads[0], grads[1], *ctx.coin), None, None


def skip_forward(x: Tensor, branch: Tensor, theta: float, key: Key) -> Tensor:
    """Every unit is either F(X), with probability `theta`, or X (SkipForward, Swapout eq. 4, complementary masks).

    The paper's Theta multiplies X; here theta belongs to the branch, as all survival rates do. `key=None` gives the
    expectation theta F(X) + (1 - theta) X.

    Raises:
        ConfigError: unequal shapes or a theta outside [0, 1].
    """
    check_rate("theta", theta)
    if x.shape != branch.shape:
        raise ConfigError(f"shortcut has shape {tuple(x.shape)}, branch {tuple(branch.shape)}; shapes must agree")
    if key is None:
        return scaled(x, 1.0 - theta) + scaled(branch, theta)
    dtype = torch.promote_types(x.dtype, branch.dtype)
    x, branch = x.to(dtype), branch.to(dtype)
    if isinstance(key, Tensor):
        return kernels.traced("select", (branch, x), key)
    result: Any = _Select.apply(branch, x, theta, key)
    return result


def unit_dropout(x: Tensor, theta: float, key: Key) -> Tensor:
    """Y = Theta * X, not rescaled (Swapout, eq. 1); `key=None` gives the expectation theta X."""
    return mix((x,), (theta,), key)


def row_mask(rows: int, rate: float, key: int, device: torch.device | str = "cpu") -> Tensor:
    """Bool Tensor[rows]: independent coins, True with probability `rate` (exact Bernoulli rows)."""
    return unit_mask(torch.empty(rows, device=device), rate, key)


def row_normal(rows: int, key: int) -> Tensor:
    """float64 Tensor[rows] on the CPU: independent standard normal numbers, quantiles of 32-bit uniforms (|xi| < 6.4).

    Args:
        rows: how many.
        key: 64-bit key, as in `Draw.key`.
    """
    like = torch.empty(rows)
    places = _places(like)
    words = _words(like, key, 0, 0 if places is None else places).long().bitwise_and_(0xFFFFFFFF)
    return torch.special.ndtri((words.double() + 0.5) * 2.0**-32)
