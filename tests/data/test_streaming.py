import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from residrop.common.errors import ConfigError, DataError
from residrop.data import Augmentation, Loader, augmentation, fit, load
from residrop.data.augment import resized_crop_box

# Python 3.12 and later warn of every fork while other threads (torch's own) exist.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def files(tmp_path, write_tree):
    folder = write_tree(tmp_path / "net", parts=("train", "val"), n=4, width=300, height=280)
    return load(f"imagenet:{folder}").train


def loader(files, **options):
    options = {"batch_size": 3, "augmentation": augmentation("resized-crop"), "workers": 0, "seed": 1} | options
    return Loader(files, normalization=fit(files, "imagenet"), **options)


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


def test_streamed_batches_are_pure_and_tails_agree(files):
    one = loader(files)
    batches = list(one.train_batches(3))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 224, 224)] * 2 + [(2, 3, 224, 224)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
    assert same(batches[1:], loader(files).train_batches(3, start=1))
    assert not same(batches, one.train_batches(4))
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == [0] * 4 + [1] * 4


def test_every_image_has_its_own_crop(files):
    for path in files.paths[1:]:
        path.write_bytes(files.paths[0].read_bytes())
    x, _ = next(loader(files, batch_size=8).train_batches(0))
    assert x.flatten(1).unique(dim=0).shape[0] == 8


def test_workers_change_nothing(files):
    state = torch.get_rng_state()
    assert same(loader(files).train_batches(0), loader(files, workers=2).train_batches(0))
    assert torch.equal(state, torch.get_rng_state())


CHANGED = {"flip": True, "crop": "resized", "policy": "trivial-augment", "alternate": True}
CHANGED |= {"erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_changed_and_mixed_batches_are_pure_and_shared_among_ranks(files, workers):
    options = {"augmentation": Augmentation(**CHANGED), "classes": 2}
    state = torch.get_rng_state()
    batches = list(loader(files, **options).train_batches(3))
    assert torch.equal(state, torch.get_rng_state())
    assert same(batches[1:], loader(files, **options, workers=workers).train_batches(3, start=1))
    assert not same(batches, loader(files, **options).train_batches(4))
    assert all(y.shape == (len(x), 2) for x, y in batches)
    parts = [list(loader(files, **options, share=(rank, 2), workers=workers).train_batches(3)) for rank in range(2)]
    for (x, y), *shares in zip(batches, *parts, strict=True):
        assert torch.equal(torch.cat([one for one, _ in shares]), x)
        assert torch.equal(torch.cat([one for _, one in shares]), y)


def test_files_are_mirrored_in_every_other_epoch(files):
    options = {"batch_size": 8, "augmentation": Augmentation(flip=True, crop="none", alternate=True)}
    plain = loader(files, batch_size=8, augmentation=None)
    epochs = [by_label_and_sum(loader(files, **options), epoch) for epoch in range(4)]
    upright = by_label_and_sum(plain, 0)
    for one in upright:
        sides = [torch.equal(epoch[one], upright[one]) for epoch in epochs]
        assert sides in ([True, False] * 2, [False, True] * 2)


def by_label_and_sum(one, epoch):
    return {
        (int(n), round(float(x.double().sum()), 2)): x
        for batch, y in one.train_batches(epoch)
        for x, n in zip(batch, y, strict=True)
    }


def test_evaluation_is_the_central_crop_of_the_resized_image(files):
    x, y = next(loader(files, batch_size=8).eval_batches())
    with Image.open(files.paths[5]) as image:
        small = image.resize((round(300 * 256 / 280), 256), Image.Resampling.BILINEAR)
    left, top = (small.width - 224) // 2, 16
    pixels = np.asarray(small)[top : top + 224, left : left + 224].transpose(2, 0, 1)
    assert y.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(x[5], fit(files, "imagenet")(torch.from_numpy(pixels.copy())))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_named_in_the_main_process(files, workers):
    path = files.paths[2]
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DataError, match=rf"^{path}: image cannot be decoded .*; replace or remove"):
        list(loader(files, workers=workers).eval_batches())


def test_batches_beyond_memory_are_refused_before_they_are_made(files):
    with pytest.raises(DataError, match=r"a batch of 8 images at 99999x99999 pixels would take 1117.6 GiB of memory"):
        loader(dataclasses.replace(files, size=99999), batch_size=500)


def test_padded_crops_are_refused(files):
    with pytest.raises(ConfigError, match="use 'resized-crop'"):
        loader(files, augmentation=augmentation("crop"))


def test_resized_crop_boxes_lie_inside_and_vary():
    generator = torch.Generator().manual_seed(0)
    boxes = {resized_crop_box(50, 30, torch.rand(40, generator=generator).tolist()) for _ in range(300)}
    assert len(boxes) > 250
    assert all(0 <= x < right <= 50 and 0 <= y < bottom <= 30 for x, y, right, bottom in boxes)
    areas = [(right - x) * (bottom - y) / 1500 for x, y, right, bottom in boxes]
    assert min(areas) < 0.15
    assert max(areas) > 0.7


def test_resized_crop_box_falls_back_to_the_centre():
    # full area of a long strip in a ratio of at most 4/3 never fits
    assert resized_crop_box(100, 10, [0.999, 0.5, 0.0, 0.0] * 10) == (45, 0, 55, 10)
