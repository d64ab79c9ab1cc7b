"""Corrupted images: strengths grow, draws belong to images, and they come before normalisation."""

from itertools import pairwise

import pytest
import torch

from residrop.common.errors import ConfigError
from residrop.data import Images, Loader, fit, load
from residrop.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt


@pytest.fixture(scope="module")
def pixels():
    """Smooth colour images, of which every corruption changes something."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") * 255).to(torch.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_strengths_take_images_further_and_further_away(pixels, kind):
    made = [corrupt(pixels, kind, strength) for strength in STRENGTHS]
    assert all(one.dtype == torch.uint8 and one.shape == pixels.shape for one in made)
    away = [float((one.double() - pixels.double()).abs().mean()) for one in made]
    assert away[0] > 0
    assert all(a < b for a, b in pairwise(away))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_every_batch(pixels, kind):
    whole = corrupt(pixels, kind, 3, seed=4)
    parts = [corrupt(pixels[:5], kind, 3, seed=4), corrupt(pixels[5:], kind, 3, seed=4, first=5)]
    assert torch.equal(torch.cat(parts), whole)
    assert corrupt(pixels[:0], kind, 3).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("kind", ["noise", "rotation", "cutout"])
def test_seeds_and_images_have_draws_of_their_own(pixels, kind):
    same = pixels[:1].expand(12, -1, -1, -1)
    made = corrupt(same, kind, 3)
    assert not torch.equal(made, corrupt(same, kind, 3, seed=1))
    assert len({one.numpy().tobytes() for one in made}) >= 2


def test_noise_has_its_deviation():
    grey = torch.full((40, 1, 16, 16), 128, dtype=torch.uint8)
    found = (corrupt(grey, "noise", 1).double() / 255).std()
    assert float(found) == pytest.approx(0.04, rel=0.05)  # its standard error is 0.7%


def test_a_square_is_cut_out_inside():
    black = torch.zeros(30, 1, 10, 10, dtype=torch.uint8)
    made = corrupt(black, "cutout", 3) > 0
    assert made.sum((1, 2, 3)).tolist() == [25] * 30
    assert made.any(3).sum(2).flatten().tolist() == [5] * 30


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_small_grey_images(kind, size):
    made = corrupt(torch.full((3, 1, size, size), 200, dtype=torch.uint8), kind, 5)
    assert made.shape == (3, 1, size, size)


def test_the_loader_corrupts_before_it_normalises():
    test = load("digits").test
    images = Images(test.pixels[:50], test.labels[:50])
    loader = Loader(images, batch_size=20, normalization=fit(images), channels_last=False)
    found = torch.cat([x for x, _ in loader.eval_batches(lambda x, first: corrupt(x, "noise", 2, first=first))])
    assert torch.equal(found, fit(images)(corrupt(images.pixels, "noise", 2)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "fog", 1), "kind is 'fog'; choose one of 'noise'"),
        ((torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "noise", 6), "strength is 6; give 1"),
        ((torch.zeros(1, 1, 4, 4), "noise", 1), "before normalisation"),
        ((torch.zeros(1, 4, 4, dtype=torch.uint8), "noise", 1), "1 or 3 channels"),
    ],
)
def test_bad_input_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        corrupt(*arguments)
