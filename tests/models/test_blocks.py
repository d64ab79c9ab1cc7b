import math

import pytest
import torch
from torch import nn

from residrop.common.errors import ConfigError
from residrop.models.blocks import (
    PadShortcut,
    Scale,
    TransformShortcut,
    basic_v1,
    basic_v2,
    bottleneck_v1,
    init_weights,
    project,
)


def pad_reference(x: torch.Tensor, c_out: int, subsample: bool) -> torch.Tensor:
    """Pixel by pixel: the mean of the 2x2 window's existing pixels, or its first one; zero channels at the end."""
    n, c, h, w = x.shape
    y = torch.zeros(n, c_out, math.ceil(h / 2), math.ceil(w / 2), dtype=x.dtype)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            window = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            y[:, :c, i, j] = window[:, :, 0, 0] if subsample else window.mean((2, 3))
    return y


@pytest.mark.parametrize("subsample", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (5, 6), (1, 4)])
def test_pad_shortcut_equals_the_loop(size, subsample):
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    y = PadShortcut(4, 10, subsample=subsample)(x)
    torch.testing.assert_close(y, pad_reference(x, 10, subsample))


def test_pad_shortcut_at_stride_one_only_appends_channels():
    x = torch.randn(2, 3, 5, 5)
    y = PadShortcut(3, 5, stride=1)(x)
    assert torch.equal(y[:, :3], x)
    assert torch.equal(y[:, 3:], torch.zeros(2, 2, 5, 5))


def test_pad_shortcut_has_no_state_and_keeps_the_memory_format():
    shortcut = PadShortcut(4, 8)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    assert shortcut.state_dict() == {}
    assert shortcut(x).is_contiguous(memory_format=torch.channels_last)


def test_pad_shortcut_refuses_to_remove_channels():
    with pytest.raises(ConfigError, match=r"c_out is 4; .* at least c_in = 8"):
        PadShortcut(8, 4)


@pytest.mark.parametrize("build", [basic_v1, basic_v2, bottleneck_v1])
@pytest.mark.parametrize("size", [8, 9])
def test_branch_and_shortcuts_agree_in_shape(build, size):
    x = torch.randn(2, 8, size, size)
    shape = build(8, 16, 2)(x).shape
    assert shape == (2, 16, math.ceil(size / 2), math.ceil(size / 2))
    assert PadShortcut(8, 16)(x).shape == shape
    assert PadShortcut(8, 16, subsample=True)(x).shape == shape
    assert project(8, 16, 2)(x).shape == shape
    assert project(8, 16, 2, batch_norm=True)(x).shape == shape


@pytest.mark.parametrize(
    ("build", "order"),
    [
        (basic_v1, "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d"),
        (basic_v2, "BatchNorm2d ReLU Conv2d BatchNorm2d ReLU Conv2d"),
        (bottleneck_v1, "Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d ReLU Conv2d BatchNorm2d"),
    ],
)
def test_branch_has_the_papers_order(build, order):
    assert " ".join(type(module).__name__ for module in build(8, 8)) == order


def test_bottleneck_strides_in_its_middle_convolution():
    strides = [module.stride for module in bottleneck_v1(8, 16, 2) if isinstance(module, nn.Conv2d)]
    assert strides == [(1, 1), (2, 2), (1, 1)]


def test_transform_shortcut_is_convolution_norm_relu():
    shortcut = TransformShortcut(6).eval()
    x = torch.randn(2, 6, 4, 4)
    mixed = torch.einsum("oi,nihw->nohw", shortcut.conv.weight[:, :, 0, 0], x) / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(shortcut(x), mixed.clamp(min=0))


def test_scale_ends_a_branch_and_multiplies():
    branch = basic_v1(4, 4, scale=0.25)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(branch(x), 0.25 * branch[:-1](x))
    assert isinstance(branch[-1], Scale)
    assert repr(Scale(0.1)) == "Scale(factor=0.1)"


def test_init_draws_he_weights_and_clears_biases():
    torch.manual_seed(0)
    branch = basic_v1(64, 128, bias=True)
    nn.init.ones_(branch.conv1.bias)
    init_weights(branch)
    assert branch.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    init_weights(branch, fan="fan_out")
    assert branch.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)
    assert torch.equal(branch.conv1.bias, torch.zeros(128))


def test_init_of_gamma_is_one_or_uniform():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4000)
    init_weights(norm, bn_gamma_init="uniform")
    assert 0 <= norm.weight.min().item() < 0.01
    assert 0.99 < norm.weight.max().item() <= 1
    assert norm.weight.mean().item() == pytest.approx(0.5, abs=0.03)
    init_weights(norm)
    assert torch.equal(norm.weight, torch.ones(4000))
