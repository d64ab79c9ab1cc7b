"""Seeds as a function of their purpose: no generator state survives from one batch to the next."""

import torch

from residrop.schedule.sampler import derive_key

__all__ = ["generator_for"]


def generator_for(*words: int) -> torch.Generator:
    """Return a fresh CPU generator seeded with a hash of whole numbers; their order matters.

    Neighbours such as (seed, epoch, batch) and (seed, epoch, batch + 1) give unrelated generators.
    """
    return torch.Generator().manual_seed(derive_key(*words) >> 1)  # torch takes signed 64-bit seeds
