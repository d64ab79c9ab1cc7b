"""Images of any kind in the form that a network reads, to ask whether it notices that they are foreign."""

from dataclasses import replace

import torch
from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.data.pixels import check_memory
from residrop.data.splits import Files, Images

__all__ = ["in_form"]

_CHUNK = 1000  # images resized at a time


def in_form(images: Images | Files, channels: int, size: int) -> Images | Files:
    """Images with other channels and another size; labels stay.

    Grey images get three equal channels; of colour images the luminance is taken where one channel is wanted. Resizing
    is antialiased; files are decoded to the new size.

    Args:
        images: square ones.
        channels: 1 or 3.
        size: side in pixels.

    Raises:
        DataError: the images would not fit into memory at this size.
        ConfigError: files that are read batch by batch, which have three channels, where one is wanted.
    """
    if isinstance(images, Files):
        if channels != 3:
            raise ConfigError("these images are read batch by batch in colour, the network wants grey ones; give fewer")
        return images if images.size == size else replace(images, size=size, shorter=0)
    pixels = images.pixels
    if pixels.shape[1:] != (channels, size, size):
        check_memory(len(pixels) * channels * size * size, f"{len(pixels)} images at {size}x{size} pixels")
        pixels = torch.cat([_formed(part, channels, size) for part in pixels.split(_CHUNK)])
    return Images(pixels, images.labels)


def _formed(pixels: Tensor, channels: int, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional  # slow to import

    if channels == 1 and pixels.shape[1] == 3:
        pixels = functional.rgb_to_grayscale(pixels)
    if pixels.shape[2:] != (size, size):
        pixels = functional.resize(pixels, [size, size], antialias=True)
    return pixels.expand(-1, channels, -1, -1)
