"""Bytes to pixels: one image with Pillow, many in a pool of threads with a progress bar."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["DecodePool", "DecodingError", "open_rgb", "shrink_and_crop", "to_chw"]

_GREY = {"1", "L", "LA"}
_COLOUR = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "RGBX", "RGBa", "La", "HSV", "LAB"}
_BAR_FROM = 4000  # images; fewer are decoded before a bar would be read
_CHUNK = 64  # images handed to a thread at once


class DecodingError(ValueError):
    """An image that Pillow cannot decode to 8-bit pixels; the caller adds where it came from."""


def open_rgb(source: bytes | Path) -> tuple[Image.Image, bool]:
    """Decode one PNG, JPEG, WebP or other Pillow image completely.

    Args:
        source: the encoded bytes, or a file.

    Returns:
        The image in mode "RGB", and whether it was stored as grey.

    Raises:
        DecodingError: if it is missing, truncated, corrupt, or has more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            mode = image.mode
            if mode not in _GREY | _COLOUR:
                raise DecodingError(f"pixel mode {mode} is not 8-bit grey or colour; convert it to 8 bits")
            if mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB"), mode in _GREY
    except DecodingError:
        raise
    except Exception as error:  # Pillow's plugins raise about every type there is on damaged data
        reason = str(error) or type(error).__name__
        if isinstance(source, bytes):
            reason = reason.replace("cannot identify image file", "not an image:").split(" <_io.")[0]
        raise DecodingError(f"cannot be decoded ({reason})") from error


def shrink_and_crop(image: Image.Image, size: int, shorter: int = 0) -> Image.Image:
    """Resize the shorter edge to `shorter` pixels (0: to `size`), then cut out the central `size` square.

    `shorter` must be 0 or at least `size`.
    """
    scale = (shorter or size) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_chw(image: Image.Image) -> np.ndarray:
    """Return the pixels of an RGB image as a uint8 array [3, H, W] (a view)."""
    return np.asarray(image).transpose(2, 0, 1)


class DecodePool:
    """A thread for every core and, on a terminal, a progress bar on stderr.

    Threads suffice: Pillow lets go of the interpreter lock while it decodes. A context manager.
    """

    def __init__(self, total: int, title: str) -> None:
        """Prepare for `total` images, announced as `title`."""
        self._threads = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16))
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=total < _BAR_FROM or not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> "DecodePool":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._bar.stop()

    def run(self, work: Callable[[int, Any], None], items: Sequence[Any]) -> None:
        """Call ``work(i, items[i])`` for every i; of several errors the one of the smallest i is raised."""

        def chunk(start: int) -> int:
            part = items[start : start + _CHUNK]
            for offset, item in enumerate(part):
                work(start + offset, item)
            return len(part)

        for done in self._threads.map(chunk, range(0, len(items), _CHUNK)):
            self._bar.advance(self._task, done)
