"""Random crops and flips of whole batches, on the device: draw first, then apply."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from residrop.common.errors import ConfigError

__all__ = [
    "ATTEMPTS",
    "Augmentation",
    "Crop",
    "Draw",
    "augmentation",
    "augmentations",
    "like",
    "resized_crop_box",
]

Crop = Literal["none", "image", "batch", "resized"]

ATTEMPTS = 10  # boxes of a resized crop tried before the central one, as fb.resnet.torch and torchvision do
_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True, eq=False)
class Draw:
    """The outcome of all draws for one batch of n images.

    Attributes:
        top: int64 `Tensor[n]` or, for one crop of the whole batch, `Tensor[1]`; first row of the crop in the padded
            image, 0..2*pad. None without crops.
        left: the same for columns.
        flip: bool `Tensor[n]`, which images are mirrored after the crop; None without flips.
    """

    top: Tensor | None
    left: Tensor | None
    flip: Tensor | None

    def of(self, images: slice | Tensor) -> "Draw":
        """The draws of some images of the batch, by their places in it."""
        parts = (self.top, self.left, self.flip)
        return Draw(*(one if one is None or len(one) == 1 else one[images] for one in parts))

    @staticmethod
    def moved(draws: Sequence["Draw"], device: torch.device) -> list["Draw"]:
        """The draws of several batches with what is drawn per image on a device, by one copy each.

        A crop of a whole batch stays: it is read to choose what is copied.
        """

        def move(parts: list[Tensor | None]) -> list[Tensor | None]:
            found = [one for one in parts if one is not None]
            if device.type == "cpu" or len(found) < len(parts) or all(len(one) == 1 for one in found):
                return parts
            return list(torch.cat(found).to(device, non_blocking=True).split([len(one) for one in found]))

        columns = (move([getattr(draw, name) for draw in draws]) for name in ("top", "left", "flip"))
        return [Draw(*parts) for parts in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images.

    A resized crop and the policy come first, on bytes; then the images are normalised, cropped and mirrored (files:
    mirrored before the policy), erased, and mixed with one another.

    Attributes:
        flip: mirror left-right with probability 1/2, every image for itself.
        crop: "none"; "image", every image has its own crop; "batch", all images of a mini-batch share one;
            "resized", random area and aspect ratio, resized to the full side.
        pad: zeros added on every side before a crop of the old size, in pixels. They are added after
            normalisation, so they are the mean colour, not black.
        alternate: mirror every image in one of two epochs, in the even or in the odd ones at random, where flip would
            mirror it at random in each (Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024, section 3.6).
        area: smallest share of an image that a resized crop takes.
        policy: of torchvision, see `residrop.data.transforms.check_policy`.
        erasing: probability that a rectangle of an image is overwritten with noise.
        mixup: parameter of the Beta distribution of mixup (Zhang et al., 2018); 0 for none.
        cutmix: the same for CutMix (Yun et al., 2019); with both, each batch has one of them.

    Raises:
        ConfigError: for an unknown crop or a number out of range.
    """

    flip: bool
    crop: Crop
    pad: int = 4
    alternate: bool = False
    area: float = 0.08
    policy: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.crop not in get_args(Crop):
            raise ConfigError(f"crop={self.crop!r}: allowed are {', '.join(get_args(Crop))}")
        if self.pad < 0:
            raise ConfigError(f"pad={self.pad}: must be at least 0 pixels; 0 moves nothing")
        if not 0.0 < self.area <= 1.0 or not 0.0 <= self.erasing <= 1.0 or min(self.mixup, self.cutmix) < 0.0:
            numbers = f"area={self.area}, erasing={self.erasing}, mixup={self.mixup}, cutmix={self.cutmix}"
            raise ConfigError(f"{numbers}: these are a share above 0, a probability, and two numbers of at least 0")

    @property
    def by_image(self) -> bool:
        """Whether bytes are changed image by image."""
        return self.crop == "resized" or self.policy is not None

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0.0 or self.cutmix > 0.0

    def draw(self, n: int, generator: torch.Generator) -> Draw:
        """Draw for n images: rows, columns, then flips, uniformly and on the generator's device."""
        top = left = flip = None
        device = generator.device
        if self.crop in ("image", "batch"):
            shape = (2, n if self.crop == "image" else 1)
            top, left = torch.randint(2 * self.pad + 1, shape, generator=generator, device=device)
        if self.flip:
            flip = torch.rand(n, generator=generator, device=device) < 0.5
        return Draw(top, left, flip)

    def check(self, height: int, width: int) -> None:
        """ConfigError if images of this size cannot be cropped so."""
        if self.crop in ("image", "batch") and self.pad > min(height, width):
            raise ConfigError(f"pad={self.pad}: images of {height}x{width} allow at most {min(height, width)}")

    def apply(self, x: Tensor, draw: Draw) -> Tensor:
        """Return `x` cropped and flipped as `draw` says; see `__call__`."""
        _, _, height, width = x.shape
        if draw.top is not None and draw.left is not None:
            self.check(height, width)
            if self.crop == "image":
                return _crop_each(x, self.pad, draw.top, draw.left, draw.flip)
            x = _shift_all(x, int(draw.top) - self.pad, int(draw.left) - self.pad)
        if draw.flip is not None:
            x = torch.where(draw.flip.to(x.device).reshape(-1, 1, 1, 1), x.flip(3), x)
        return x

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop and mirror a batch; the result depends on `x` and the generator's state only.

        Args:
            x: float `Tensor[n, C, H, W]`, normalised.
            generator: source of all randomness; one on the CPU gives the same draws for every device.

        Returns:
            A tensor of the shape, dtype, device and memory format of `x`; `x` itself is not changed.

        Raises:
            ConfigError: if `pad` is larger than the images, or for what is made elsewhere (see the class).
        """
        if self.by_image or self.erasing or self.mixes:
            raise ConfigError(f"crop={self.crop!r}, a policy, erasing and mixing: these are made by a Loader")
        return self.apply(x, self.draw(len(x), generator))


def resized_crop_box(
    width: int, height: int, uniforms: Sequence[float], least: float = 0.08
) -> tuple[int, int, int, int]:
    """Choose the box of a random resized crop: up to all of the image, of an aspect ratio of 3/4 to 4/3.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        uniforms: numbers in [0, 1), four for every attempt: area, ratio, left, top.
        least: the smallest share of the image's area.

    Returns:
        (left, top, right, bottom) of the first attempt that fits into the image, otherwise of the central
        square of the shorter side.
    """
    for area, ratio, left, top in zip(*[iter(uniforms)] * 4, strict=True):
        pixels = width * height * (least + area * (1.0 - least))
        low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
        aspect = math.exp(low + ratio * (high - low))
        box_width, box_height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            x, y = int(left * (width - box_width + 1)), int(top * (height - box_height + 1))
            return x, y, x + box_width, y + box_height
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def _crop_each(x: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor | None) -> Tensor:
    """Crop, and flip, every image for itself by one gather of pixels (all channels of a pixel together)."""
    n, channels, height, width = x.shape
    device = x.device
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))  # [n, H + 2 pad, W + 2 pad, C]
    columns = torch.arange(width, device=device).expand(n, width)
    if flip is not None:
        columns = torch.where(flip.to(device).unsqueeze(1), width - 1 - columns, columns)
    columns = columns + left.to(device).unsqueeze(1)  # [n, W]
    rows = torch.arange(height, device=device) + top.to(device).unsqueeze(1)  # [n, H]
    rows = rows + torch.arange(n, device=device).unsqueeze(1) * (height + 2 * pad)  # rows of the whole batch
    index = rows.unsqueeze(2) * (width + 2 * pad) + columns.unsqueeze(1)  # [n, H, W]
    pixels = padded.reshape(-1, channels).index_select(0, index.flatten())
    return like(x, pixels.reshape(n, height, width, channels).permute(0, 3, 1, 2))


def _shift_all(x: Tensor, down: int, right: int) -> Tensor:
    """Crop all images alike by copying one slice: row r of the result is row r + down of `x`, or zeros."""
    _, _, height, width = x.shape
    result = torch.zeros_like(x)
    rows, columns = height - abs(down), width - abs(right)
    to_row, to_column = max(0, -down), max(0, -right)
    row, column = max(0, down), max(0, right)
    source = x[:, :, row : row + rows, column : column + columns]
    result[:, :, to_row : to_row + rows, to_column : to_column + columns] = source
    return result


def like(x: Tensor, result: Tensor) -> Tensor:
    """A tensor in the memory format of another."""
    # One channel fits both formats; contiguous() then leaves the data alone.
    if x.is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


_NAMED = {
    "none": Augmentation(flip=False, crop="none", pad=0),
    "flip": Augmentation(flip=True, crop="none", pad=0),
    "crop": Augmentation(flip=True, crop="image"),
    "batch-crop": Augmentation(flip=True, crop="batch"),
    "shift": Augmentation(flip=False, crop="image", pad=1),
    "resized-crop": Augmentation(flip=True, crop="resized", pad=0),
}


def augmentation(name: str) -> Augmentation:
    """Return a named augmentation.

    Args:
        name: "none"; "flip"; "crop", each image translated by up to 4 pixels, and flips (He et al., Huang et al.);
            "batch-crop", one translation by up to 4 pixels for the mini-batch, and flips by image (Swapout);
            "shift", each image translated by 1 pixel, no flips (digits); "resized-crop", random area and aspect
            ratio, and flips (ImageNet).

    Raises:
        ConfigError: for another name.
    """
    if name not in _NAMED:
        raise ConfigError(f"augmentation {name!r}: allowed are {', '.join(_NAMED)}")
    return _NAMED[name]


def augmentations() -> tuple[str, ...]:
    """Return the names that `augmentation` knows."""
    return tuple(_NAMED)
