"""Foreign images in the form of a network's own."""

import numpy as np
import pytest
import torch
from PIL import Image

from residrop.common.errors import ConfigError
from residrop.data import Files, load, load_test
from residrop.data.foreign import in_form


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Colour images of 20x30 pixels, of classes nobody knows, without a training part."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path / "photos" / "test" / f"thing{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_images_of_the_wanted_form_are_as_they_are():
    assert torch.equal(in_form(load_test("digits", None, size=8), 1, 8).pixels, load("digits").test.pixels)


def test_grey_images_become_larger_and_coloured():
    found = in_form(load_test("digits", None, size=16), 3, 16).pixels
    assert found.shape == (355, 3, 16, 16)
    assert found.dtype == torch.uint8
    assert torch.equal(found[:, 0], found[:, 2])
    means = load("digits").test.pixels.double().mean((1, 2, 3))
    torch.testing.assert_close(found.double().mean((1, 2, 3)), means, atol=3.0, rtol=0)


def test_folders_of_unknown_classes_are_read_at_the_size(folder):
    assert in_form(load_test(f"folder:{folder}", None, size=16), 3, 16).pixels.shape == (4, 3, 16, 16)
    grey = in_form(load_test(f"folder:{folder}", None, size=8), 1, 8).pixels
    assert grey.shape == (4, 1, 8, 8)
    assert in_form(load_test(f"folder:{folder}?size=12", None, size=16), 3, 16).pixels.shape == (4, 3, 16, 16)


def test_files_that_are_read_by_batch_stay_so(folder, monkeypatch):
    monkeypatch.setattr("residrop.data.local._IN_MEMORY_BYTES", 1)
    found = in_form(load_test(f"folder:{folder}?size=12", None, size=16), 3, 16)
    assert isinstance(found, Files)
    assert found.size == 16
    with pytest.raises(ConfigError, match="in colour"):
        in_form(load_test(f"folder:{folder}", None, size=8), 1, 8)
