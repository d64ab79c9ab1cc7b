"""Residual networks for small images: depth 6n + 2, three groups of n blocks (He et al.; all four papers)."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from residrop.blocks.residual import Chain, Residual
from residrop.common.checks import check_choice, check_whole
from residrop.common.errors import ConfigError
from residrop.models.blocks import PadShortcut, TransformShortcut, basic_v1, basic_v2, conv, init_weights, project
from residrop.models.checks import check_images, complete_rules
from residrop.rules.base import Rule

__all__ = ["CifarResNet", "blocks_per_group", "group_starts"]

_SMALLEST = 4  # pixels a side that survive two halvings


def blocks_per_group(depth: int) -> int:
    """n of depth = 6n + 2; the network has L = 3n residual blocks of two convolutions each."""
    check_whole("depth", depth, least=1)
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        below = 6 * max(1, n) + 2
        raise ConfigError(f"depth is {depth}; it must be 6n + 2 with n >= 1: try {below} or {below + 6}")
    return n


def group_starts(depth: int) -> tuple[int, ...]:
    """0-based indices of the first block of each group: the blocks that depth dropout never drops.

    Only the last two of them halve the image, but the paper counts three among its 27 units.
    """
    n = blocks_per_group(depth)
    return (0, n, 2 * n)


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers: stem, 3n residual blocks of widths 16, 32 and 64 times `width`, tail.

    `Tensor[n, channels, h, w]` with h, w >= 4 becomes `Tensor[n, classes]` of logits. The blocks are
    `blocks.block1` to `blocks.blockL`, numbered from input to output as the papers do.

    The papers' networks:

    * stochastic depth (Huang et al., Sec. 4): the defaults. The released code also has `conv_bias=True` and
      `bn_gamma_init="uniform"`; `shortcut="subsample"` is what it did when the paper was written.
    * Swapout's "ResNet Ours" (Singh et al., Sec. 4): `downsample="pool", shortcut="project", head="conv",
      conv_bias=True`, `block="v1"` or `"v2"`.
    * depth dropout (Guo & Gould, Sec. IV): `transform=True`.
    * Stable ResNet (Hayou & Ayed, eq. 3): `stable=True`.

    Args:
        depth: number of layers, 6n + 2.
        rules: one rule per block, input to output; None keeps every block.
        width: multiplier of the widths.
        block: "v1" has its ReLU after the sum; "v2" (pre-activation) has none there and BN-ReLU in the tail.
        shortcut: where the shape changes, "pad" pools 2x2 and appends zero channels, "subsample" takes every
            second pixel and appends zero channels, "project" is a learned 1x1 convolution.
        downsample: "stride" halves inside the branch and the shortcut of the first block of groups 2 and 3; "pool"
            puts one 2x2 average pooling in front of that block, for branch and shortcut alike.
        head: "linear" pools and then classifies; "conv" classifies every pixel by a 1x1 convolution, then pools.
        transform: replaces every identity shortcut but group 1's first by 1x1 convolution + BN + ReLU.
        stable: multiplies every branch by 1 / sqrt(L), L = 3n blocks.
        classes: number of logits.
        channels: channels of the input image.
        conv_bias: gives every convolution a bias (that of the "conv" head always has one).
        bn_gamma_init: "ones", or "uniform" for U(0, 1).

    Raises:
        ConfigError: for a depth, count or choice that does not exist, or a wrong number of rules; and in `forward`
            for an image that is too small or has the wrong number of channels.
    """

    def __init__(
        self,
        depth: int,
        *,
        rules: Sequence[Rule] | None = None,
        width: int = 1,
        block: Literal["v1", "v2"] = "v1",
        shortcut: Literal["pad", "subsample", "project"] = "pad",
        downsample: Literal["stride", "pool"] = "stride",
        head: Literal["linear", "conv"] = "linear",
        transform: bool = False,
        stable: bool = False,
        classes: int = 10,
        channels: int = 3,
        conv_bias: bool = False,
        bn_gamma_init: Literal["ones", "uniform"] = "ones",
    ) -> None:
        super().__init__()
        n = blocks_per_group(depth)
        check_choice("block", block, ("v1", "v2"))
        check_choice("shortcut", shortcut, ("pad", "subsample", "project"))
        check_choice("downsample", downsample, ("stride", "pool"))
        check_choice("head", head, ("linear", "conv"))
        check_choice("bn_gamma_init", bn_gamma_init, ("ones", "uniform"))
        for option, value in (("width", width), ("classes", classes), ("channels", channels)):
            check_whole(option, value, least=1)
        todo = complete_rules(rules, 3 * n)

        self.channels = channels
        self.block = block
        self.shortcut = shortcut
        self.transform = transform
        self.conv_bias = conv_bias
        self.scale = 1 / math.sqrt(3 * n) if stable else None

        widths = [16 * width, 32 * width, 64 * width]
        self.stem = self._stem(widths[0])
        self.blocks = Chain()
        c_in = widths[0]
        for number, rule in enumerate(todo, start=1):
            group, place = divmod(number - 1, n)
            shrinks = group > 0 and place == 0
            if shrinks and downsample == "pool":
                self.blocks.add_module(f"pool{group + 1}", nn.AvgPool2d(2, ceil_mode=True))
            stride = 2 if shrinks and downsample == "stride" else 1
            residual = self._block(c_in, widths[group], stride, place == 0, rule)
            self.blocks.add_module(f"block{number}", residual)
            c_in = widths[group]
        self.tail = self._tail(c_in, classes, head)
        init_weights(self, bn_gamma_init=bn_gamma_init)

    def _stem(self, c_out: int) -> nn.Sequential:
        parts: dict[str, nn.Module] = {"conv": conv(self.channels, c_out, 3, bias=self.conv_bias)}
        if self.block == "v1":
            # The stem ends in a ReLU so that the first block's input is non-negative: then ReLU(x) = x exactly when
            # its branch is left out (Huang et al., eq. 3).
            parts |= {"bn": nn.BatchNorm2d(c_out), "relu": nn.ReLU()}
        return nn.Sequential(OrderedDict(parts))

    def _block(self, c_in: int, c_out: int, stride: int, first: bool, rule: Rule) -> Residual:
        build = basic_v1 if self.block == "v1" else basic_v2
        branch = build(c_in, c_out, stride, bias=self.conv_bias, scale=self.scale)
        shortcut: nn.Module | None = None
        if c_in != c_out and self.shortcut == "project":
            shortcut = project(c_in, c_out, stride, bias=self.conv_bias)
        elif c_in != c_out:
            shortcut = PadShortcut(c_in, c_out, stride, subsample=self.shortcut == "subsample")
        elif self.transform and not first:
            shortcut = TransformShortcut(c_out, bias=self.conv_bias)
        if self.block != "v1":
            return Residual(branch, shortcut, rule)
        # every shortcut but a projection gives what a ReLU leaves as it is
        return Residual(branch, shortcut, rule, nn.ReLU(), settled=c_in == c_out or self.shortcut != "project")

    def _tail(self, c_in: int, classes: int, head: str) -> nn.Sequential:
        parts: dict[str, nn.Module] = {}
        if self.block == "v2":
            parts |= {"bn": nn.BatchNorm2d(c_in), "relu": nn.ReLU()}
        if head == "conv":
            parts["conv"] = conv(c_in, classes, 1, bias=True)
        parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        if head == "linear":
            parts["linear"] = nn.Linear(c_in, classes)
        return nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.channels, _SMALLEST)
        return self.tail(self.blocks(self.stem(x)))
