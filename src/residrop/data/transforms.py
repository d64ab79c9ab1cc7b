"""Augmentation by torchvision's transforms: policies, crops and erasing image by image, mixing of a batch's images.

torchvision draws from the CPU's default generator; here it is seeded before every call, and put back in the end, so
that what is drawn is a function of the seeds given.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.data.augment import ATTEMPTS, Augmentation, like, resized_crop_box

__all__ = ["changed", "check_policy", "erased", "mixed", "with_policy"]

_POLICY = re.compile(r"(rand-augment|trivial-augment)(?:\((\d+), *(\d+)\))?")


def check_policy(name: str | None) -> None:
    """ConfigError unless this is a policy: rand-augment, rand-augment(OPERATIONS, MAGNITUDE), trivial-augment, None."""
    found = None if name is None else _POLICY.fullmatch(name)
    if name is None or (found is not None and (found[2] is None or _fits(found[1], int(found[2]), int(found[3])))):
        return
    raise ConfigError(
        f"policy {name!r}: give rand-augment, rand-augment(OPERATIONS, MAGNITUDE) with a magnitude of 0 to 30, or "
        "trivial-augment"
    )


def _fits(kind: str, operations: int, magnitude: int) -> bool:
    return kind == "rand-augment" and operations >= 1 and magnitude <= 30


@cache
def _transform(name: str) -> Any:
    from torchvision.transforms import v2  # slow to import

    found = _POLICY.fullmatch(name)
    assert found is not None  # it was checked
    if found[1] == "trivial-augment":
        return v2.TrivialAugmentWide()
    return v2.RandAugment(*map(int, found.groups()[1:])) if found[2] else v2.RandAugment()


@contextmanager
def _drawing() -> Iterator[torch.Generator]:
    """The generator that torchvision draws from; its state is put back. That of a GPU is not touched."""
    state = torch.default_generator.get_state()
    try:
        yield torch.default_generator
    finally:
        torch.default_generator.set_state(state)


def with_policy(image: Tensor, name: str, seed: int) -> Tensor:
    """An image, uint8 Tensor[C, H, W], changed by a policy (`check_policy`) with draws of this seed."""
    with _drawing() as generator:
        generator.manual_seed(seed)
        return _transform(name)(image)


def changed(pixels: Tensor, made: Augmentation, seeds: Sequence[int]) -> Tensor:
    """Images, uint8 Tensor[n, C, H, W], with the resized crop and the policy of an augmentation, one seed for each."""
    from torchvision.transforms.v2 import functional

    size = list(pixels.shape[-2:])
    result = torch.empty_like(pixels)
    with _drawing() as generator:
        for image, seed, place in zip(pixels, seeds, result, strict=True):
            generator.manual_seed(seed)
            if made.crop == "resized":
                left, top, right, bottom = resized_crop_box(
                    size[1], size[0], torch.rand(4 * ATTEMPTS).tolist(), made.area
                )
                image = functional.resized_crop(image, top, left, bottom - top, right - left, size, antialias=True)
            place.copy_(image if made.policy is None else _transform(made.policy)(image))
    return result


def erased(x: Tensor, probability: float, seeds: Sequence[int]) -> Tensor:
    """Normalised images, float Tensor[n, C, H, W], of which some have lost a rectangle; they are changed in place.

    A rectangle of 2 % to 33 % of the image is overwritten by noise, N(0, 1) at every pixel and channel (Zhong et al.,
    Random Erasing Data Augmentation, 2020).
    """
    from torchvision.transforms import v2

    erase = v2.RandomErasing(probability, value="random", inplace=True)  # pyright: ignore[reportArgumentType]
    with _drawing() as generator:
        for image, seed in zip(x, seeds, strict=True):
            generator.manual_seed(seed)
            erase(image)
    return x


def mixed(x: Tensor, labels: Tensor, made: Augmentation, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every image mixed with the one before it (the first with the last) by mixup or CutMix, with one draw for all.

    With both, each batch is mixed by one of them at random.

    Args:
        x: images, float Tensor[n, C, H, W].
        labels: int64 Tensor[n].
        made: has the parameters of the Beta distributions in `mixup` and `cutmix`.
        classes: number of classes, K.
        seed: of the draw.

    Returns:
        Images like x, and the shares of their classes, float32 Tensor[n, K].
    """
    from torchvision.transforms import v2

    pairs = ((v2.MixUp, made.mixup), (v2.CutMix, made.cutmix))
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in pairs if alpha]
    with _drawing() as generator:
        generator.manual_seed(seed)
        kind = kinds[int(torch.randint(len(kinds), ()))]
        images, shares = kind(x, labels)
    return like(x, images), shares
