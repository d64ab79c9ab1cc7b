"""Images made worse in five ways at five strengths, to see how error and calibration follow.

After Hendrycks and Dietterich (2019), but not their files: corruptions by torchvision, scaled to the size of images.
"""

from collections.abc import Callable
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor

from residrop.common.checks import check_choice, check_whole
from residrop.common.errors import ConfigError
from residrop.data.seeds import generator_for

__all__ = ["CORRUPTIONS", "STRENGTHS", "Corruption", "corrupt"]

Corruption = Literal["noise", "blur", "contrast", "rotation", "cutout"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
STRENGTHS = (1, 2, 3, 4, 5)

_CORRUPT = 11  # first word of the seeds: another purpose has other draws
_SIGMA = (0.04, 0.08, 0.12, 0.18, 0.26)  # of noise, in the pixel range [0, 1]
_RADIUS = (0.6, 0.9, 1.2, 1.6, 2.2)  # standard deviation of the blur in pixels of a side of 32
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # of what it was
_DEGREES = (10.0, 20.0, 30.0, 45.0, 60.0)
_SIDE = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the square that is cut out, as a share of the side


def corrupt(pixels: Tensor, kind: Corruption, strength: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupt images as they are before normalisation.

    - noise: Gaussian, added to every value.
    - blur: Gaussian.
    - contrast: values are moved towards the mean grey of their image.
    - rotation: by a fixed angle, to a random side; what comes into view is black.
    - cutout: a grey square at a random place inside (DeVries and Taylor 2017).

    Noise, side and place of an image are functions of the seed and its number alone, the same for every strength, so
    neither batches nor devices change them.

    Args:
        pixels: uint8 Tensor[n, C, H, W], C = 1 or 3.
        kind: see above.
        strength: 1 (weak) to 5.
        seed: any whole number.
        first: number of the first image; the others follow it.

    Returns:
        uint8 Tensor[n, C, H, W] on the same device: rounded, as a file would hold it.

    Raises:
        ConfigError: another kind, strength, type or shape.
    """
    check_choice("kind", kind, Corruption)
    if check_whole("strength", strength) not in STRENGTHS:
        raise ConfigError(f"strength is {strength}; give 1 (weak) to 5")
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ConfigError(
            f"pixels is {pixels.dtype} of shape {tuple(pixels.shape)}; give a uint8 Tensor[n, C, H, W] with 1 or 3 "
            "channels, before normalisation"
        )
    drawn = [generator_for(_CORRUPT, seed, CORRUPTIONS.index(kind), first + i) for i in range(len(pixels))]
    made = _MADE[kind](pixels.to(torch.float32) / 255, strength - 1, drawn)
    return (made.clamp(0, 1) * 255).round().to(torch.uint8)


def _noise(x: Tensor, at: int, drawn: list[torch.Generator]) -> Tensor:
    # torchvision's gaussian_noise has one generator for a batch
    noise = [torch.randn(x.shape[1:], generator=one) for one in drawn]
    return x + _SIGMA[at] * torch.stack(noise).to(x.device) if noise else x


def _blur(x: Tensor, at: int, drawn: list[torch.Generator]) -> Tensor:
    from torchvision.transforms.v2 import functional  # slow to import

    # by the root of the side, as 1 pixel is much of 8 and little of 224; width, then height, as torchvision has them
    sigmas = [_RADIUS[at] * (side / 32) ** 0.5 for side in x.shape[:1:-1]]
    sizes = [2 * min(ceil(3 * sigma), side - 1) + 1 for sigma, side in zip(sigmas, x.shape[:1:-1], strict=True)]
    return functional.gaussian_blur(x, kernel_size=sizes, sigma=sigmas)


def _contrast(x: Tensor, at: int, drawn: list[torch.Generator]) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.adjust_contrast(x, _CONTRAST[at])


def _rotation(x: Tensor, at: int, drawn: list[torch.Generator]) -> Tensor:
    from torchvision.transforms.v2 import functional

    left = torch.tensor([bool(torch.rand((), generator=one) < 0.5) for one in drawn], dtype=torch.bool, device=x.device)
    result = torch.empty_like(x)
    for side, angle in ((left, _DEGREES[at]), (~left, -_DEGREES[at])):
        if bool(side.any()):
            result[side] = functional.rotate(x[side], angle, functional.InterpolationMode.BILINEAR)
    return result


def _cutout(x: Tensor, at: int, drawn: list[torch.Generator]) -> Tensor:
    from torchvision.transforms.v2 import functional

    height, width = x.shape[2:]
    h, w = (max(round(_SIDE[at] * side), 1) for side in (height, width))
    grey = torch.full((x.shape[1], 1, 1), 0.5, device=x.device)
    made: list[Tensor] = []
    for image, one in zip(x, drawn, strict=True):
        # shares of the free places, so that one draw serves all strengths
        down, right = torch.rand(2, generator=one).tolist()
        made.append(functional.erase(image, int(down * (height - h + 1)), int(right * (width - w + 1)), h, w, grey))
    return torch.stack(made) if made else x


_MADE: dict[Corruption, Callable[[Tensor, int, list[torch.Generator]], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "rotation": _rotation,
    "cutout": _cutout,
}
