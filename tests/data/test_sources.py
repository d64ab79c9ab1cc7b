import os
from pathlib import Path

import numpy as np
import pytest
import torch

from residrop.common.errors import ConfigError, DataError
from residrop.data import Loader, augmentation, check, fit, load, load_test, sources


def rows(pixels):
    return {bytes(image.flatten().tolist()) for image in pixels}


def test_digits_are_fixed_and_stratified():
    splits = load("digits", seed=1)
    other = load("digits", seed=2)
    assert torch.equal(splits.train.pixels, other.train.pixels)
    assert torch.equal(splits.test.pixels, other.test.pixels)
    assert (splits.classes, splits.channels, splits.size) == (tuple("0123456789"), 1, 8)
    train, test = splits.train.labels.bincount(), splits.test.labels.bincount()
    assert int(train.sum() + test.sum()) == 1797
    assert torch.equal(test, (train + test) // 5)
    assert splits.train.pixels.dtype == torch.uint8
    assert splits.train.labels.dtype == torch.int64
    assert (int(splits.train.pixels.min()), int(splits.train.pixels.max())) == (0, 255)


def test_digits_pixels_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    splits = load()
    first_test = np.flatnonzero(bunch.target == 0)[4]
    # the first test image is the earliest fifth image of any class
    position = min(np.flatnonzero(bunch.target == k)[4] for k in range(10))
    expected = np.rint(bunch.images[position] * 255 / 16)
    assert splits.test.pixels[0, 0].tolist() == expected.tolist()
    zero = int((splits.test.labels == 0).nonzero()[0])
    assert splits.test.pixels[zero, 0].tolist() == np.rint(bunch.images[first_test] * 255 / 16).tolist()


def test_validation_is_taken_out_of_train():
    whole = load("digits")
    splits = load("digits", validation=200, seed=5)
    again, other = load("digits", validation=200, seed=5), load("digits", validation=200, seed=6)
    assert len(splits.validation) == 200
    assert len(splits.train) == len(whole.train) - 200
    assert rows(splits.train.pixels) | rows(splits.validation.pixels) == rows(whole.train.pixels)
    assert not rows(splits.train.pixels) & rows(splits.validation.pixels)
    assert torch.equal(splits.validation.pixels, again.validation.pixels)
    assert not torch.equal(splits.validation.pixels, other.validation.pixels)
    assert torch.equal(splits.test.pixels, whole.test.pixels)


def test_limit_keeps_a_balanced_part_of_train():
    splits = load("digits", validation=200, limit=50)
    assert splits.train.labels.bincount().tolist() == [5] * 10
    assert len(splits.validation) == 200
    assert not rows(splits.train.pixels) & rows(splits.validation.pixels)
    assert torch.equal(splits.train.pixels, load("digits", validation=200, limit=50).train.pixels)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"validation": -1}, "validation=-1"),
        ({"validation": 100000}, "validation=100000: must be at least 0 and less than the 1"),
        ({"limit": 0}, "limit=0"),
        ({"source": "svhn", "validation": 5000}, "validation=5000: svhn allows 0 or 6000"),
    ],
)
def test_counts_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        load(**options)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("cifar11", "'cifar11': neither a folder nor a known name; known are digits, cifar10"),
        ("nowhere:/tmp", "'nowhere:/tmp': neither a folder"),
        ("digits:/tmp", "digits has no folder"),
        ("x" * 5000, "neither a folder"),
        ("folder:" + "x" * 5000, "no such folder; check the path after folder:"),
        ("folder:" + "x" * 5000 + "?size=8", "no such folder"),
        ("~nobody-of-this-name/set", "neither a folder"),
        ("a\0b", "neither a folder"),
        ("parquet:", "no folder after the colon; write parquet:DIR"),
        ("parquet", "parquet: no folder named; write parquet:DIR"),
        ("folder:/no/such/place", "/no/such/place: no such folder; check the path after folder:"),
    ],
)
def test_unknown_sources(source, match):
    with pytest.raises(DataError, match=match):
        load(source)


@pytest.mark.parametrize("call", [load, check, lambda source: load_test(source, ("cat", "dog"))])
@pytest.mark.parametrize("prefix", ["", "folder:", "parquet:"])
def test_folder_that_may_not_be_listed_is_one_line(tmp_path, write_tree, monkeypatch, call, prefix):
    folder = write_tree(tmp_path / "pets")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"pets': cannot be read \(\[Errno 13\] Permission denied: .*check path"):
        call(f"{prefix}{folder}")


def test_folder_of_no_known_layout(tmp_path):
    with pytest.raises(DataError, match=r"no known layout; understood are train-\*.parquet"):
        load(str(tmp_path))


def test_sources_lists_every_kind():
    listed = sources()
    assert list(listed) == ["digits", "cifar10", "cifar100", "svhn", "parquet", "folder", "imagenet"]
    assert all("\n" not in text and len(text) > 10 for text in listed.values())


def test_bare_path_of_an_image_folder(tmp_path, write_tree):
    assert load(str(write_tree(tmp_path / "pets"))).classes == ("cat", "dog")


@pytest.mark.slow
@pytest.mark.skipif("RESIDROP_CIFAR10" not in os.environ, reason="RESIDROP_CIFAR10 names no folder")
def test_real_cifar10():
    splits = load(os.environ["RESIDROP_CIFAR10"], validation=5000)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45000, 5000, 10000)
    assert (splits.train.labels.bincount() + splits.validation.labels.bincount()).tolist() == [5000] * 10
    whole = fit(load(os.environ["RESIDROP_CIFAR10"]).train, "channel")
    # the published constants, rounded as published
    assert [round(value, 4) for value in whole.mean.flatten().tolist()] == [0.4914, 0.4822, 0.4465]
    assert [round(value, 4) for value in whole.std.flatten().tolist()] == [0.247, 0.2435, 0.2616]
    loader = Loader(splits.train, batch_size=128, normalization=whole, augmentation=augmentation("crop"))
    assert sum(len(y) for _, y in loader.train_batches(0)) == 45000
