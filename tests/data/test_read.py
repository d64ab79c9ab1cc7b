import numpy as np
import pytest
import torch
from PIL import Image

from residrop.common.errors import DataError
from residrop.data.read import read_images


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an array as an image and gives its path."""

    def make(pixels, name="a.png", mode=None):
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode else image).save(tmp_path / name)
        return tmp_path / name

    return make


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_rgb_of_the_right_size_comes_back_untouched(write):
    pixels = noise(8, 8, 3)
    found = read_images([write(pixels)], size=8, channels=3)
    assert found.dtype == torch.uint8
    assert found.shape == (1, 3, 8, 8)
    assert np.array_equal(found[0].numpy(), pixels.transpose(2, 0, 1))


def test_grey_of_the_right_size_comes_back_untouched(write):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = read_images([write(pixels)], size=16, channels=1)
    assert found.shape == (1, 1, 16, 16)
    assert np.array_equal(found[0, 0].numpy(), pixels)


def test_grey_file_for_a_colour_network_has_three_equal_channels(write):
    pixels = noise(8, 8)
    found = read_images([write(pixels)], size=8, channels=3)
    assert all(np.array_equal(found[0, channel].numpy(), pixels) for channel in range(3))


def test_colour_file_for_a_grey_network_is_its_luminance(write):
    pixels = noise(8, 8, 3)
    found = read_images([write(pixels)], size=8, channels=1)[0, 0].numpy().astype(float)
    assert np.abs(found - pixels @ np.array([0.299, 0.587, 0.114])).max() <= 1.0


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (8, 30), (5, 5), (1, 40), (100, 99)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_shape_becomes_the_size_of_the_training_images(write, height, width, channels):
    found = read_images([write(np.full((height, width, 3), 77, dtype=np.uint8))], size=8, channels=channels)
    assert found.shape == (1, channels, 8, 8)
    assert (found == 77).all()


def test_wide_image_is_cut_at_its_centre(write):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    assert (read_images([write(pixels)], size=8, channels=3) == 200).all()


def test_many_files_keep_their_order(write):
    paths = [write(np.full((4, 4), value, dtype=np.uint8), f"{value}.png") for value in (9, 1, 5)]
    found = read_images(paths, size=4, channels=1)
    assert found[:, 0, 0, 0].tolist() == [9, 1, 5]


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", None), ("a.bmp", None), ("a.gif", "P"), ("a.png", "RGBA")])
def test_other_formats_and_modes_are_read(write, name, mode):
    path = write(np.full((8, 8, 3), 102, dtype=np.uint8), name, mode)
    found = read_images([path], size=8, channels=3).float()
    assert (found - 102).abs().max() <= 4


def test_missing_file_and_directory_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.png is no file; give an image file"):
        read_images([tmp_path / "nothing.png"], size=8, channels=3)
    for path in (tmp_path, tmp_path / ("x" * 5000)):
        with pytest.raises(DataError, match="is no file"):
            read_images([path], size=8, channels=3)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.png .*give an image that Pillow can read"):
        read_images([path], size=8, channels=3)


def test_truncated_image_is_named_among_good_ones(write):
    good, bad = write(noise(32, 32, 3), "good.png"), write(noise(32, 32, 3), "bad.png")
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError, match=r"bad\.png cannot be decoded"):
        read_images([good, bad], size=8, channels=3)


def test_values_without_a_range_are_refused_with_advice(write):
    path = write(np.full((8, 8), 4000, dtype=np.int32), "a.tiff")
    with pytest.raises(DataError, match="convert it to 8 bits"):
        read_images([path], size=8, channels=1)
