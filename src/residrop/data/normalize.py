"""Normalisation of pixels: (x/255 - mean) / std, by the statistics each paper used."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.data.splits import Files, Images

__all__ = ["Normalization", "NormalizationMode", "fit"]

NormalizationMode = Literal["channel", "pixel-mean", "pixel-mean-only", "unit", "imagenet"]

_CHUNK = 2048  # images whose float64 copy is held at a time
_IMAGENET_MEAN = (0.485, 0.456, 0.406)  # the constants of fb.resnet.torch and torchvision
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Normalization:
    """Maps uint8 pixels to float32: `(pixels / 255 - mean) / std`.

    Attributes:
        mode: how it was fitted, see `fit`; "model" if a network brought it along.
        mean: float32 `Tensor[C, 1, 1]` or `Tensor[C, H, W]`, in units of the pixel range [0, 1].
        std: float32 `Tensor[C, 1, 1]` or `Tensor[1, 1, 1]`, above 0.
    """

    mode: str
    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return `Tensor[..., C, H, W]` of the shape, device and memory format of `pixels`, in float32."""
        # Not folded into one multiply-add: then a value would depend on how the fold was rounded.
        x = pixels.to(torch.float32)
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            # In rows of whole images: a loop over the three channels of a pixel would be too short to vectorise.
            mean, std = (part.expand(x.shape[1:]).permute(1, 2, 0).reshape(-1) for part in (self.mean, self.std))
            x.permute(0, 2, 3, 1).flatten(1).div_(255).sub_(mean).div_(std)
            return x
        return x.div_(255).sub_(self.mean).div_(self.std)

    def to(self, device: torch.device | str) -> "Normalization":
        """Return the same normalisation for pixels on `device`."""
        return Normalization(self.mode, self.mean.to(device), self.std.to(device))


def fit(images: Images | Files, mode: NormalizationMode | None = None) -> Normalization:
    """Compute the normalisation of a training set.

    Args:
        images: the training images, without the validation set. Its channels and size are those of all later calls.
        mode: one of
            "channel": mean and standard deviation of every channel (the usual choice; Swapout states none);
            "pixel-mean": the mean image, and one standard deviation of all raw values (release of Huang et al.);
            "pixel-mean-only": the mean image, no division (He et al., depth dropout);
            "unit": pixels in [0, 1], nothing else (base repository of the regularization paper);
            "imagenet": the constants of ImageNet, for three channels;
            None: "channel".

    Returns:
        The normalisation, on the device of the images. Sums are taken in float64 and standard deviations over
        all N values, not N - 1; a standard deviation of 0 becomes 1.

    Raises:
        ConfigError: for an unknown mode, for `Files` in another mode than "imagenet", and for "imagenet" with
            other than three channels.
    """
    mode = mode or "channel"
    if mode not in get_args(NormalizationMode):
        raise ConfigError(f"normalisation {mode!r}: allowed are {', '.join(get_args(NormalizationMode))}")
    if mode == "imagenet":
        if isinstance(images, Images) and images.pixels.shape[1] != 3:
            channels = images.pixels.shape[1]
            raise ConfigError(f"normalisation 'imagenet': needs 3 channels, the images have {channels}; use 'channel'")
        device = images.labels.device
        mean = torch.tensor(_IMAGENET_MEAN, device=device).reshape(3, 1, 1)
        return Normalization(mode, mean, torch.tensor(_IMAGENET_STD, device=device).reshape(3, 1, 1))
    if isinstance(images, Files):
        raise ConfigError(f"normalisation {mode!r}: needs images in memory; use 'imagenet' for files read by batch")
    mean, std = _FITS[mode](images.pixels)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return Normalization(mode, mean.to(torch.float32), std.to(torch.float32))


def _sums(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of x and of x*x over the images, x in 0..255, each a float64 `Tensor[C, H, W]`."""
    shape = pixels.shape[1:]
    first = torch.zeros(shape, dtype=torch.float64, device=pixels.device)
    second = torch.zeros_like(first)
    for chunk in pixels.split(_CHUNK):
        values = chunk.to(torch.float64)  # whole numbers below 2**53: both sums are exact
        first += values.sum(0)
        second += values.square_().sum(0)
    return first, second


def _spread(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Return the deviation of `count` values with these sums; a float64 scalar, 0 exactly if all are equal."""
    # In Python's whole numbers nothing cancels, as it would in mean(x*x) - mean(x)**2.
    variance = count * int(second.sum()) - int(first.sum()) ** 2
    return torch.tensor(math.sqrt(variance) / (255 * count), dtype=torch.float64, device=first.device)


def _channel(pixels: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _sums(pixels)
    count = pixels.numel() // pixels.shape[1]
    std = torch.stack([_spread(one, two, count) for one, two in zip(first, second, strict=True)])
    return first.sum((1, 2), keepdim=True) / (255 * count), std.reshape(-1, 1, 1)


def _pixel_mean(pixels: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _sums(pixels)
    # The release takes the deviation before it subtracts the mean image: that of the raw values about their mean.
    return first / (255 * len(pixels)), _spread(first, second, pixels.numel()).reshape(1, 1, 1)


def _pixel_mean_only(pixels: Tensor) -> tuple[Tensor, Tensor]:
    first, _ = _sums(pixels)
    return first / (255 * len(pixels)), torch.ones(1, 1, 1, device=pixels.device)


def _unit(pixels: Tensor) -> tuple[Tensor, Tensor]:
    ones = torch.ones(1, 1, 1, device=pixels.device)
    return torch.zeros(pixels.shape[1], 1, 1, device=pixels.device), ones


_FITS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "channel": _channel,
    "pixel-mean": _pixel_mean,
    "pixel-mean-only": _pixel_mean_only,
    "unit": _unit,
}
