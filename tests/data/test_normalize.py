from pathlib import Path

import numpy as np
import pytest
import torch

from residrop.common.errors import ConfigError
from residrop.data import Files, Images, fit


@pytest.fixture
def images():
    # more than one chunk, so that the accumulation over chunks is covered
    pixels = np.random.default_rng(0).integers(0, 200, (2100, 3, 4, 5), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.zeros(2100, dtype=torch.int64))


REFERENCES = {
    "channel": lambda u: (u - u.mean((0, 2, 3), keepdims=True)) / u.std((0, 2, 3), keepdims=True),
    "pixel-mean": lambda u: (u - u.mean(0)) / u.std(),
    "pixel-mean-only": lambda u: u - u.mean(0),
    "unit": lambda u: u,
    "imagenet": lambda u: (
        (u - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    ),
}


@pytest.mark.parametrize("mode", REFERENCES)
def test_normalization_equals_numpy(images, mode):
    normalization = fit(images, mode)
    expected = REFERENCES[mode](images.pixels.numpy().astype(np.float64) / 255)
    result = normalization(images.pixels)
    assert normalization.mode == mode
    assert result.dtype == normalization.mean.dtype == normalization.std.dtype == torch.float32
    # float32 rounds the pixel, the mean and the quotient: a few units of 2**-24 at values of at most 3
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("mode", "mean", "std"),
    [("channel", (3, 1, 1), (3, 1, 1)), ("pixel-mean", (3, 4, 5), (1, 1, 1)), ("unit", (3, 1, 1), (1, 1, 1))],
)
def test_fit_shapes(images, mode, mean, std):
    normalization = fit(images, mode)
    assert tuple(normalization.mean.shape) == mean
    assert tuple(normalization.std.shape) == std


@pytest.mark.parametrize("mode", REFERENCES)
def test_memory_format_does_not_change_a_bit(images, mode):
    normalization = fit(images, mode)
    pixels = images.pixels[:7]
    plain = pixels.to(torch.float32).div(255).sub(normalization.mean).div(normalization.std)
    assert torch.equal(normalization(pixels), plain)
    assert torch.equal(normalization(pixels.contiguous(memory_format=torch.channels_last)), plain)
    assert torch.equal(normalization(pixels[0]), plain[0])


def test_call_keeps_the_memory_format_and_the_pixels(images):
    pixels = images.pixels[:7].contiguous(memory_format=torch.channels_last)
    before = pixels.clone()
    result = fit(images, "pixel-mean")(pixels)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("mode", ["channel", "pixel-mean"])
def test_constant_channel_has_std_one(mode):
    pixels = torch.full((300, 1, 3, 3), 77, dtype=torch.uint8)
    normalization = fit(Images(pixels, torch.zeros(300, dtype=torch.int64)), mode)
    assert normalization.std.flatten().tolist() == [1.0]
    assert normalization(pixels).abs().max() == 0


def test_fit_refuses_unknown_modes(images):
    with pytest.raises(ConfigError, match="'zca': allowed are channel, pixel-mean"):
        fit(images, "zca")


def test_fit_files_allows_imagenet_only():
    files = Files((Path("a.png"),), torch.zeros(1, dtype=torch.int64), 8)
    assert fit(files, "imagenet").mean.shape == (3, 1, 1)
    with pytest.raises(ConfigError, match="use 'imagenet'"):
        fit(files, "channel")


def test_fit_imagenet_refuses_grey():
    grey = Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="needs 3 channels, the images have 1"):
        fit(grey, "imagenet")
