import pytest
import torch

from residrop.common.errors import ConfigError
from residrop.data import Augmentation, augmentation, augmentations

NAMES = [name for name in augmentations() if name != "resized-crop"]


def reference(x, draw, pad):
    """One image, one pixel row at a time: pad with zeros, cut out, mirror."""
    result = torch.zeros_like(x)
    n, channels, height, width = x.shape
    for i in range(n):
        padded = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=x.dtype)
        padded[:, pad : pad + height, pad : pad + width] = x[i]
        top = 0 if draw.top is None else int(draw.top[i % len(draw.top)])
        left = 0 if draw.left is None else int(draw.left[i % len(draw.left)])
        if draw.top is None:
            top = left = pad
        crop = padded[:, top : top + height, left : left + width]
        flip = draw.flip is not None and bool(draw.flip[i])
        result[i] = crop.flip(2) if flip else crop
    return result


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NAMES)
def test_augmentation_equals_the_slow_loop(name, layout, channels, dtype):
    augment = augmentation(name)
    x = torch.randn(33, channels, 7, 9, generator=generator(1)).to(dtype).contiguous(memory_format=layout)
    before = x.clone()
    for seed in range(4):
        result = augment(x, generator(seed))
        assert torch.equal(result, reference(x, augment.draw(33, generator(seed)), augment.pad))
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=layout)
    assert torch.equal(x, before)


@pytest.mark.parametrize("crop", ["image", "batch"])
def test_every_offset_equals_the_slow_loop(crop):
    augment = Augmentation(flip=False, crop=crop, pad=2)
    x = torch.randn(1, 2, 3, 4, generator=generator(2))
    seen = set()
    for seed in range(300):
        draw = augment.draw(1, generator(seed))
        seen.add((int(draw.top), int(draw.left)))
        assert torch.equal(augment.apply(x, draw), reference(x, draw, 2))
    assert seen == {(top, left) for top in range(5) for left in range(5)}


def test_batch_crop_draws_one_offset_and_crop_many():
    one, many = (augmentation(name).draw(64, generator()) for name in ("batch-crop", "crop"))
    assert one.top.shape == one.left.shape == (1,)
    assert many.top.shape == many.left.shape == (64,)
    assert many.top.unique().numel() > 5
    assert many.top.min() >= 0
    assert many.top.max() <= 8
    assert one.flip.shape == many.flip.shape == (64,)


def test_batch_crop_moves_all_images_alike():
    x = torch.ones(64, 1, 8, 8)
    moved = Augmentation(flip=False, crop="batch")(x, generator(5))
    assert moved.sum() < x.sum()
    assert torch.equal(moved, moved[:1].expand_as(moved))
    scattered = Augmentation(flip=False, crop="image")(x, generator(5))
    assert scattered.flatten(1).unique(dim=0).shape[0] > 10


def test_flips_are_single_images():
    x = torch.arange(4.0).expand(500, 1, 1, 4)
    flipped = augmentation("flip")(x, generator())[:, 0, 0, 0] == 3
    assert 180 < int(flipped.sum()) < 320  # six standard deviations of Binomial(500, 1/2)


def test_same_generator_state_same_result():
    x = torch.randn(8, 3, 8, 8, generator=generator())
    augment = augmentation("crop")
    assert torch.equal(augment(x, generator(1)), augment(x, generator(1)))
    assert not torch.equal(augment(x, generator(1)), augment(x, generator(2)))


def test_none_returns_the_input():
    x = torch.randn(3, 1, 4, 4, generator=generator())
    assert augmentation("none")(x, generator()) is x


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: augmentation("cutout"), "'cutout': allowed are none, flip"),
        (lambda: Augmentation(flip=True, crop="pixel"), "crop='pixel': allowed are"),
        (lambda: Augmentation(flip=True, crop="image", pad=-1), "pad=-1"),
        (lambda: augmentation("resized-crop")(torch.zeros(1, 3, 4, 4), generator()), "crop='resized'"),
        (lambda: augmentation("crop")(torch.zeros(1, 3, 3, 3), generator()), "pad=4: images of 3x3"),
    ],
)
def test_bad_augmentations_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
