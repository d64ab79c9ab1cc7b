"""Bytes to pixels: one image with Pillow, many in a pool of threads with a progress bar."""

import contextlib
import io
import logging
import math
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["DecodePool", "DecodingError", "open_rgb", "shrink_and_crop", "suffixes", "to_chw", "without_warnings"]

_GREY = {"1", "L", "LA"}
_COLOUR = {"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "RGBX", "RGBa", "La", "HSV", "LAB"}
# Not pictures in pixels, or only recognised and never read; EPS starts another program.
_NOT_READ = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "PDF", "WMF"}
_BACKGROUND = 255  # white, behind what is transparent
_ORIENTATION = 0x0112  # the tag of EXIF that says how the camera was held
_TAGGED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow has it from
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGE = 1 << 24  # pixels; of larger pictures one is decoded at a time, and their resized form is never made whole
_FILE = 1 << 30  # bytes; the largest images that Pillow reads have fewer even without compression
_BAR_FROM = 4000  # images; fewer are decoded before a bar would be read
_CHUNK = 64  # images handed to a thread at once

# Pillow also logs errors that it raises, which would be printed where no logging is set up.
logging.getLogger("PIL").addHandler(logging.NullHandler())
_decoding_large = threading.Lock()


class DecodingError(ValueError):
    """An image that cannot be decoded to 8-bit pixels; the caller adds where it came from."""


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_READ)


@cache
def suffixes() -> frozenset[str]:
    """The endings of files that `open_rgb` reads, in lower case with their dot; those of Pillow's plugins."""
    formats = _formats()
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence Pillow's remarks on large pictures and damaged tags. For the caller of threads, not inside of one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


def open_rgb(source: bytes | Path) -> tuple[Image.Image, bool]:
    """Decode one PNG, JPEG, WebP or other Pillow image completely, upright and on a white background.

    The orientation that a camera wrote into the file (EXIF) is applied. Transparent pixels are blended with white. Of
    16 bits a channel the upper 8 are taken (PNG, and RGB of any format). Inks (CMYK) become RGB by the plain formula,
    without colour profiles. Of several frames or pages the first is taken.

    Args:
        source: the encoded bytes, or a regular file.

    Returns:
        The image in mode "RGB", and whether it was stored as grey.

    Raises:
        DecodingError: if it is missing, no regular file, truncated, corrupt, larger than Pillow's limit of 179 million
            pixels, or its values have no known range (floats, 32 bits, 16-bit grey of other formats than PNG).
    """
    try:
        data = _content(source) if isinstance(source, Path) else source
        with (
            Image.open(io.BytesIO(data), formats=_formats()) as image,
            _decoding_large if image.width * image.height > _LARGE else contextlib.nullcontext(),
        ):
            image.load()
            return _upright(_rgb(image), image), image.mode in _GREY or _is_grey_16(image)
    except DecodingError:
        raise
    except Exception as error:  # Pillow's plugins raise about every type there is on damaged data
        reason = str(error) or type(error).__name__
        reason = re.sub("cannot identify image file <.*", "not an image", reason)
        raise DecodingError(f"cannot be decoded ({' '.join(reason.split())})") from error


def _content(file: Path) -> bytes:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DecodingError("is no regular file")  # opening a pipe would wait for ever
    if status.st_size > _FILE:
        raise DecodingError(f"is a file of {status.st_size / 2**30:.1f} GiB, more than any image that is read")
    return file.read_bytes()


def _is_grey_16(image: Image.Image) -> bool:
    return image.format == "PNG" and image.mode[0] == "I"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        raise DecodingError("CMYK without Adobe's mark, which says how inks are stored; convert it to RGB")
    if _is_grey_16(image):
        values = np.asarray(image).astype(np.int64)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:  # one value that stands for nothing
            grey[values == image.info["transparency"]] = _BACKGROUND
        return Image.fromarray(grey).convert("RGB")
    if image.mode not in _GREY | _COLOUR:
        raise DecodingError(f"pixel mode {image.mode} is not 8-bit grey or colour; convert it to 8 bits")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        background = Image.new("RGBA", opaque.size, (_BACKGROUND,) * 4)
        return Image.alpha_composite(background, opaque).convert("RGB")
    return image.convert("RGB")


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    if not _TAGGED & image.info.keys():
        return pixels
    orientation: Any = 1
    with contextlib.suppress(Exception):  # damaged tags of a picture that is fine
        orientation = image.getexif().get(_ORIENTATION, 1)
    return pixels.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else pixels


def shrink_and_crop(image: Image.Image, size: int, shorter: int = 0) -> Image.Image:
    """Resize the shorter edge to `shorter` pixels (0: to `size`), then cut out the central `size` square.

    `shorter` must be 0 or at least `size`.
    """
    scale = (shorter or size) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > _LARGE:
        return _resized_window(image, (width, height), (left, top, left + size, top + size))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def _resized_window(image: Image.Image, full: tuple[int, int], window: tuple[int, int, int, int]) -> Image.Image:
    """The part `window` of `image` resized to `full`, without the rest of it: the same pixels up to rounding.

    Pillow keeps the corners of a box in single precision, so they are given relative to a part that is cut out before,
    with as many pixels around it as bilinear weights reach.
    """
    tall_shrinks = full[1] < image.height > image.width
    part, inner = [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]
    for axis in (0, 1):
        step = image.size[axis] / full[axis]  # pixels of the image in one of the result
        low, high, reach = window[axis] * step, window[axis + 2] * step, math.ceil(max(step, 1.0)) + 1
        first, last = max(0, int(low) - reach), min(image.size[axis], math.ceil(high) + reach)
        part[axis], part[axis + 2] = first, last
        inner[axis], inner[axis + 2] = low - first, min(high, last) - first
    image = image.crop((part[0], part[1], part[2], part[3]))
    for axis in (1, 0) if tall_shrinks else (0, 1):  # the order of Pillow's own passes
        size, box = list(image.size), [0.0, 0.0, *image.size]
        size[axis], box[axis], box[axis + 2] = window[axis + 2] - window[axis], inner[axis], inner[axis + 2]
        image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3]))
    return image


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
        self._quiet = without_warnings()

    def __enter__(self) -> "DecodePool":
        self._quiet.__enter__()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._bar.stop()
        self._quiet.__exit__(kind, error, trace)

    def run(self, work: Callable[[int, Any], None], items: Sequence[Any]) -> None:
        """Call ``work(i, items[i])`` for every i; of several errors the one of the smallest i is raised."""

        def chunk(start: int) -> int:
            part = items[start : start + _CHUNK]
            for offset, item in enumerate(part):
                work(start + offset, item)
            return len(part)

        for done in self._threads.map(chunk, range(0, len(items), _CHUNK)):
            self._bar.advance(self._task, done)
