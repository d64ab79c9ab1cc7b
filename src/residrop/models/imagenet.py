"""Residual networks for large images (He et al.): used by stochastic depth (152) and depth dropout (18)."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from residrop.blocks.residual import Chain, Residual
from residrop.common.checks import check_choice, check_whole
from residrop.common.errors import ConfigError
from residrop.models.blocks import TransformShortcut, basic_v1, bottleneck_v1, conv, init_weights, project
from residrop.models.checks import check_images, complete_rules
from residrop.rules.base import Rule

__all__ = ["IMAGENET_DEPTHS", "ImageNetResNet", "blocks_per_group", "reshaping_blocks"]

_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
IMAGENET_DEPTHS: tuple[int, ...] = (*_BASIC, *_BOTTLENECK)


def blocks_per_group(depth: int) -> tuple[int, ...]:
    """Number of residual blocks in each of the four groups; L is their sum (50 for ResNet-152)."""
    groups = _BASIC.get(depth) or _BOTTLENECK.get(depth)
    if groups is None:
        raise ConfigError(f"depth is {depth!r}; allowed: {', '.join(map(str, IMAGENET_DEPTHS))}")
    return groups


def reshaping_blocks(depth: int) -> tuple[int, ...]:
    """0-based indices of the blocks whose output has another shape than their input: depth dropout's exempt ones.

    ResNet-18 and 34 have three of them (64 to 128, 128 to 256, 256 to 512 channels; Guo & Gould count 3 downsampling
    and 5 identity units in ResNet-18). With bottlenecks group 1 starts with a fourth, from 64 to 256 channels.
    """
    groups = blocks_per_group(depth)
    starts = tuple(sum(groups[:g]) for g in range(4))
    return starts[1:] if depth in _BASIC else starts


class ImageNetResNet(nn.Module):
    """ResNet-18, 34 (basic blocks), 50, 101 or 152 (bottlenecks): stem of 7x7 and max pooling, four groups, tail.

    `Tensor[n, channels, h, w]` becomes `Tensor[n, classes]` of logits. Shortcuts are He's option B: 1x1 convolution
    and BN where the shape changes, identity elsewhere, as in fb.resnet.torch. Weights of the
    torchvision network of the same depth fit in its order: stem, blocks (branch, then shortcut), tail.

    Args:
        depth: 18, 34, 50, 101 or 152.
        rules: one rule per block, input to output; None keeps every block.
        transform: puts 1x1 convolution + BN + ReLU in place of every identity shortcut (Guo & Gould, Sec. IV-B).
        stable: multiplies every branch by 1 / sqrt(L) (Hayou & Ayed, eq. 3).
        classes: number of logits.
        channels: channels of the input image.
        bn_gamma_init: "ones", or "uniform" for U(0, 1).
    """

    def __init__(
        self,
        depth: int,
        *,
        rules: Sequence[Rule] | None = None,
        transform: bool = False,
        stable: bool = False,
        classes: int = 1000,
        channels: int = 3,
        bn_gamma_init: Literal["ones", "uniform"] = "ones",
    ) -> None:
        super().__init__()
        groups = blocks_per_group(depth)
        num_blocks = sum(groups)
        check_choice("bn_gamma_init", bn_gamma_init, ("ones", "uniform"))
        check_whole("classes", classes, least=1)
        check_whole("channels", channels, least=1)
        todo = complete_rules(rules, num_blocks)

        self.channels = channels
        build = basic_v1 if depth in _BASIC else bottleneck_v1
        expansion = 1 if depth in _BASIC else 4
        scale = 1 / math.sqrt(num_blocks) if stable else None

        self.stem = _stem(channels)
        self.blocks = Chain()
        c_in, number = 64, 0
        for group, size in enumerate(groups):
            c_out = 64 * 2**group * expansion
            for place in range(size):
                stride = 2 if group > 0 and place == 0 else 1
                branch = build(c_in, c_out, stride, scale=scale)
                shortcut: nn.Module | None = None
                if c_in != c_out:
                    shortcut = project(c_in, c_out, stride, batch_norm=True)
                elif transform:
                    shortcut = TransformShortcut(c_out)
                residual = Residual(branch, shortcut, todo[number], nn.ReLU(), settled=c_in == c_out)
                number += 1
                self.blocks.add_module(f"block{number}", residual)
                c_in = c_out
        self.tail = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(c_in, classes))
        )
        # fan_out is the choice of fb.resnet.torch, on which stochastic depth's ImageNet code builds, and torchvision.
        init_weights(self, fan="fan_out", bn_gamma_init=bn_gamma_init)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.channels, smallest=1)
        return self.tail(self.blocks(self.stem(x)))


def _stem(channels: int) -> nn.Sequential:
    parts: dict[str, nn.Module] = {
        "conv": conv(channels, 64, 7, 2),
        "bn": nn.BatchNorm2d(64),
        "relu": nn.ReLU(),
        "pool": nn.MaxPool2d(3, 2, 1),
    }
    return nn.Sequential(OrderedDict(parts))
