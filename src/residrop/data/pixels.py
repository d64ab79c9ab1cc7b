"""Decoded images on their way into one tensor, and whether there is memory for it."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from residrop.common.errors import DataError
from residrop.data.decode import to_chw

__all__ = ["Pixels", "check_memory"]


def check_memory(wanted: int, what: str) -> None:
    """Raise DataError if `what` needs more bytes than this machine has free, before they are taken."""
    free = _free_memory()
    if free is not None and wanted > free:
        need, have = (f"{value / 2**30:.1f} GiB" for value in (wanted, free))
        raise DataError(f"{what} would take {need} of memory, {have} are free; give a smaller ?size=N, or fewer images")


def _free_memory() -> int | None:
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" is no number
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


class Pixels:
    """Square images of one size, filled in by threads, each at its own number."""

    def __init__(self, total: int, skip: bool) -> None:
        """Expect `total` images; those that cannot be read are left out if `skip`, otherwise they are an error."""
        self._total, self._skip = total, skip
        self._bad: list[int] = []
        self._coloured = False
        self._buffer = np.empty((0, 3, 0, 0), np.uint8)

    @property
    def size(self) -> int:
        """Of the images, in pixels; 0 until `start`."""
        return self._buffer.shape[-1]

    def start(self, size: int, what: str) -> None:
        """Take the memory. DataError if there is less than `what` needs."""
        check_memory(self._total * 3 * size * size, f"{what} at {size}x{size} pixels")
        self._buffer = np.empty((self._total, 3, size, size), np.uint8)

    def put(self, i: int, image: Image.Image, grey: bool) -> None:
        """Fill in image `i`, of mode RGB and the right size."""
        self._buffer[i] = to_chw(image)
        if not grey:
            self._coloured = True  # only ever set, so threads need no lock

    def fail(self, i: int, message: str) -> None:
        """Note that image `i` cannot be read, or raise DataError(message)."""
        if not self._skip:
            raise DataError(message)
        self._bad.append(i)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is: `pixels`, uint8 [n, C, S, S] with C = 1 if all are grey, else 3; `skipped`, int64 numbers."""
        pixels = torch.from_numpy(self._buffer[:, : 3 if self._coloured else 1])
        skipped = torch.tensor(sorted(self._bad), dtype=torch.int64)
        if self._bad:
            keep = torch.ones(self._total, dtype=torch.bool)
            keep[skipped] = False
            pixels = pixels[keep]
        return {"pixels": pixels.contiguous(), "skipped": skipped}
