"""The laws of residrop's coins once more, in slow Python integers: written from the definitions, sharing no code."""

from math import floor, prod
from statistics import NormalDist

import torch
from torch import Tensor

M64, M32 = 2**64 - 1, 2**32 - 1
GAMMA = 0x9E3779B97F4A7C15


def splitmix_output(z: int) -> int:
    """Steele, Lea & Flood 2014, mix64 (variant 13 of Stafford)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def key_of(*words: int) -> int:
    """Chain of SplitMix64 outputs over the words."""
    key = 0
    for word in words:
        key = splitmix_output(((key ^ word % 2**64) + GAMMA) % 2**64)
    return key


def lowbias32(x: int, between: int = 0) -> int:
    """C. Wellons' lowbias32; `between` is added after the first product."""
    x ^= x >> 16
    x = (x * 0x7FEB352D + between) & M32
    x ^= x >> 15
    x = (x * 0x846CA68B) & M32
    return x ^ (x >> 16)


def unit_word(key: int, unit: int, word: int = 0) -> int:
    """Hash word of one unit."""
    key = key_of(key, word)
    h = lowbias32(unit ^ (key & M32), key >> 32) * 0x9E3779B1 & M32
    return h ^ h >> 15


def unit_coin(key: int, unit: int, theta: float, coin: int = 0) -> bool:
    """Is unit number `unit` present under coin number `coin`?"""
    half = unit_word(key, unit, coin // 2) >> (16 if coin % 2 else 0) & 0xFFFF
    return half < round(theta * 2**16)


def unit_coins(key: int, shape: tuple[int, ...], theta: float, coin: int = 0) -> Tensor:
    """float64 0/1 tensor of `shape`, one coin per unit in row-major order."""
    coins = [float(unit_coin(key, unit, theta, coin)) for unit in range(prod(shape))]
    return torch.tensor(coins, dtype=torch.float64).reshape(shape)


def live_rows(key: int, rate: float, total: int) -> list[int]:
    """Indices of the live rows of a window draw, in order of the window."""
    whole = floor(rate * total)
    live = whole + (key_of(key, 1) < (rate * total - whole) * 2**64)
    start = key_of(key, 2) * total // 2**64
    return [(start + i) % total for i in range(live)]


def normal_of(key: int) -> float:
    """The standard normal number of a block: the quantile of the upper 52 bits of a word, taken in their middle."""
    return NormalDist().inv_cdf((key_of(key, 1) // 2**12 + 0.5) / 2**52)


def row_normals(key: int, total: int) -> Tensor:
    """float64 Tensor[total]: the standard normal number of every row."""
    numbers = [NormalDist().inv_cdf((unit_word(key, row) + 0.5) / 2**32) for row in range(total)]
    return torch.tensor(numbers, dtype=torch.float64)
