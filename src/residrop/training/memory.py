"""Memory of a training on the CPU."""

import ctypes
import os
import platform

import torch

__all__ = ["keep_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MOST, _LARGE = 2**31 - 1, 2**30
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory(device: torch.device) -> bool:
    """Have this process keep memory that tensors leave, for the next step, instead of giving it back to the system.

    By default glibc returns large blocks at once, and every step of a training asks for them again: the system then
    fills each page with zeros at its first touch. No number changes. The memory of the process stays at its peak.

    Args:
        device: of the training; only on the CPU memory comes from the C library.

    Returns:
        Whether it was done: not on another device or with another C library, and not where the environment has chosen
        (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES).
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOSEN):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_TRIM_THRESHOLD, _MOST)) and bool(library.mallopt(_MMAP_THRESHOLD, _LARGE))
