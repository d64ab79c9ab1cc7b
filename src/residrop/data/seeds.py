"""Seeds as a function of their purpose: no generator state survives from one batch to the next."""

import torch

__all__ = ["generator_for", "mix"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, the increment of splitmix64


def mix(*words: int) -> int:
    """Hash whole numbers, negative ones included, to one number in [0, 2**63).

    The order of the words matters. Every word goes through the finalizer of splitmix64, so neighbouring
    words, such as (seed, epoch, batch) and (seed, epoch, batch + 1), give unrelated results.
    """
    state = len(words)
    for word in words:
        state = (state + _GOLDEN + (word & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_for(*words: int) -> torch.Generator:
    """Return a fresh CPU generator seeded with ``mix(*words)``."""
    return torch.Generator().manual_seed(mix(*words))
