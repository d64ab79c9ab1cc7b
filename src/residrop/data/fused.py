"""Training batches out of the stored bytes in one kernel: taken, normalised, cropped and mirrored pixel by pixel."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from residrop.data.augment import Draw
from residrop.data.normalize import Normalization

__all__ = ["fused_batch"]


def fused_batch(pixels: Tensor, index: Tensor, draw: Draw, pad: int, normalization: Normalization) -> Tensor:
    """The augmented batch that `Normalization` and `Augmentation.apply` make step by step, compiled into one kernel.

    Args:
        pixels: of all images, uint8 `Tensor[N, C, H, W]`.
        index: images of the batch, int64 `Tensor[n]`.
        draw: of these images.
        pad: zeros around the normalised image.
        normalization: on the device of the pixels.

    Returns:
        float32 `Tensor[n, C, H, W]` in `torch.channels_last`; equal to the result in steps up to the last bit of a
        division.
    """
    device = pixels.device
    nothing = torch.full((1,), pad, device=device)  # a crop that moves nothing
    top, left = (nothing if one is None else one.to(device) for one in (draw.top, draw.left))
    flip = torch.zeros(1, dtype=torch.bool, device=device) if draw.flip is None else draw.flip.to(device)
    shape = pixels.shape[1:]
    mean, std = (part.expand(shape) for part in (normalization.mean, normalization.std))
    made: Tensor = _compiled()(pixels, index, top - pad, left - pad, flip, mean, std)
    return made.permute(0, 3, 1, 2)


@cache
def _compiled() -> Any:
    return torch.compile(_batch, dynamic=False)  # static: an epoch has two sizes of batches


def _batch(
    pixels: Tensor, index: Tensor, down: Tensor, right: Tensor, flip: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    _, channels, height, width = pixels.shape
    device = pixels.device
    column = torch.arange(width, device=device)
    column = torch.where(flip.view(-1, 1), width - 1 - column, column) + right.view(-1, 1)  # [n or 1, W]
    row = torch.arange(height, device=device) + down.view(-1, 1)  # [n or 1, H]
    inside = ((row >= 0) & (row < height)).view(-1, height, 1, 1) & ((column >= 0) & (column < width)).view(
        -1, 1, width, 1
    )
    row, column = row.clamp(0, height - 1).view(-1, height, 1, 1), column.clamp(0, width - 1).view(-1, 1, width, 1)
    channel = torch.arange(channels, device=device)
    x = pixels[index.view(-1, 1, 1, 1), channel, row, column].to(torch.float32)  # [n, H, W, C]
    x = (x / 255 - mean[channel, row, column]) / std[channel, row, column]
    return torch.where(inside, x, 0.0)
