"""The parts of residual blocks: branches, shortcuts, and how they are initialised.

Nothing here knows of rules. A branch and a shortcut meet only in `residrop.blocks.residual.Residual`, and both map
`Tensor[n, c_in, h, w]` to `Tensor[n, c_out, ceil(h / stride), ceil(w / stride)]`, for odd sizes too.

No ReLU is in place. A block that is left out returns its input itself, so an in-place ReLU behind it would
overwrite a tensor that the block before still needs in its backward pass.
"""

import math
from collections import OrderedDict
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from residrop.common.errors import ConfigError

__all__ = [
    "PadShortcut",
    "Scale",
    "TransformShortcut",
    "basic_v1",
    "basic_v2",
    "bottleneck_v1",
    "conv",
    "init_weights",
    "project",
]


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A convolution padded so that h becomes ceil(h / stride)."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)


class Scale(nn.Module):
    """Multiply by a constant: `1 / sqrt(L)` ends every branch of a Stable net (Hayou & Ayed, eq. 3).

    It stays a module of its own because a batch norm in front could absorb it (its gamma is trained).
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor!r}"


def _finish(parts: dict[str, nn.Module], scale: float | None) -> nn.Sequential:
    if scale is not None:
        parts["scale"] = Scale(scale)
    return nn.Sequential(OrderedDict(parts))


def basic_v1(
    c_in: int, c_out: int, stride: int = 1, *, bias: bool = False, scale: float | None = None
) -> nn.Sequential:
    """Conv-BN-ReLU-Conv-BN, to be followed by a ReLU after the sum (Huang et al., Sec. 3, figure of `f_l`)."""
    parts: dict[str, nn.Module] = {
        "conv1": conv(c_in, c_out, 3, stride, bias=bias),
        "bn1": nn.BatchNorm2d(c_out),
        "relu1": nn.ReLU(),
        "conv2": conv(c_out, c_out, 3, bias=bias),
        "bn2": nn.BatchNorm2d(c_out),
    }
    return _finish(parts, scale)


def basic_v2(
    c_in: int, c_out: int, stride: int = 1, *, bias: bool = False, scale: float | None = None
) -> nn.Sequential:
    """BN-ReLU-Conv-BN-ReLU-Conv, nothing after the sum (the pre-activation block, Swapout's "v2", Sec. 4)."""
    parts: dict[str, nn.Module] = {
        "bn1": nn.BatchNorm2d(c_in),
        "relu1": nn.ReLU(),
        "conv1": conv(c_in, c_out, 3, stride, bias=bias),
        "bn2": nn.BatchNorm2d(c_out),
        "relu2": nn.ReLU(),
        "conv2": conv(c_out, c_out, 3, bias=bias),
    }
    return _finish(parts, scale)


def bottleneck_v1(c_in: int, c_out: int, stride: int = 1, *, scale: float | None = None) -> nn.Sequential:
    """1x1, 3x3, 1x1 convolutions with a quarter of `c_out` inside, each with BN (Huang et al., ImageNet).

    The stride sits on the 3x3 convolution, as in fb.resnet.torch and torchvision; He et al. put it on the first
    1x1, which then never sees three quarters of the pixels.
    """
    inner = c_out // 4
    parts: dict[str, nn.Module] = {
        "conv1": conv(c_in, inner, 1),
        "bn1": nn.BatchNorm2d(inner),
        "relu1": nn.ReLU(),
        "conv2": conv(inner, inner, 3, stride),
        "bn2": nn.BatchNorm2d(inner),
        "relu2": nn.ReLU(),
        "conv3": conv(inner, c_out, 1),
        "bn3": nn.BatchNorm2d(c_out),
    }
    return _finish(parts, scale)


class PadShortcut(nn.Module):
    """Shrink by 2x2 average pooling and append zero channels after the real ones (Huang et al., Sec. 4).

    `subsample=True` takes every second pixel instead of pooling: He's option A, and what the released code did
    until February 2017. No parameters either way. `[n, c_in, h, w]` to `[n, c_out, ceil(h/s), ceil(w/s)]`; the last
    window of an odd size averages the pixels it has, so the size is that of a strided convolution.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 2, *, subsample: bool = False) -> None:
        super().__init__()
        if c_out < c_in:
            raise ConfigError(f"c_out is {c_out}; a shortcut that only appends channels needs at least c_in = {c_in}")
        self.extra_channels = c_out - c_in
        self.stride = stride
        self.subsample = subsample

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            if self.subsample:
                x = x[:, :, :: self.stride, :: self.stride]
            else:
                x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}, subsample={self.subsample}"


def project(c_in: int, c_out: int, stride: int = 1, *, bias: bool = False, batch_norm: bool = False) -> nn.Module:
    """A learned 1x1 projection where the shape changes: Swapout, Sec. 4; with `batch_norm` He's option B."""
    linear = conv(c_in, c_out, 1, stride, bias=bias)
    if not batch_norm:
        return linear
    return nn.Sequential(OrderedDict(conv=linear, bn=nn.BatchNorm2d(c_out)))


class TransformShortcut(nn.Sequential):
    """The trainable shortcut t_n = 1x1 convolution + BN + ReLU of depth dropout (Guo & Gould, eq. 3).

    Always computed, and shape-preserving: `Tensor[n, channels, h, w]` in and out.
    """

    def __init__(self, channels: int, *, bias: bool = False) -> None:
        parts = OrderedDict[str, nn.Module](
            conv=conv(channels, channels, 1, bias=bias), bn=nn.BatchNorm2d(channels), relu=nn.ReLU()
        )
        super().__init__(parts)


def init_weights(
    model: nn.Module,
    *,
    fan: Literal["fan_in", "fan_out"] = "fan_in",
    bn_gamma_init: Literal["ones", "uniform"] = "ones",
) -> None:
    """Draw convolution weights from N(0, sqrt(2 / fan)); convolution biases are 0, BN has gamma 1 and beta 0.

    `bn_gamma_init="uniform"` draws gamma from U(0, 1): the default of the Torch7 in which stochastic depth was
    released. Linear layers keep torch's default, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as there.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            out, per_group, *kernel = module.weight.shape
            connections = (per_group if fan == "fan_in" else out) * math.prod(kernel)
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / connections))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.bias)
            if bn_gamma_init == "uniform":
                nn.init.uniform_(module.weight)
            else:
                nn.init.ones_(module.weight)
