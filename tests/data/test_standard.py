"""CIFAR and SVHN from small files in the original formats, with the checksums of torchvision replaced."""

import hashlib
import pickle

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from residrop.common.errors import DataError
from residrop.data import load


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write CIFAR-10 batches of 10 images; return (root, training pixels [50, 3, 32, 32])."""
    folder = tmp_path / "sets" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (60, 3072), dtype=np.uint8)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for k, name in enumerate(names):
        batch = {"data": data[10 * k : 10 * k + 10], "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{k}" for k in range(10)]}))
    sums = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder.parent, torch.from_numpy(data[:50].reshape(50, 3, 32, 32))


@pytest.mark.parametrize("form", ["cifar10:{}", "cifar10:{}/cifar-10-batches-py", "{}", "{}/cifar-10-batches-py"])
def test_cifar10_is_read_from_a_named_folder(cifar, form):
    root, pixels = cifar
    splits = load(form.format(root), download=False)
    assert torch.equal(splits.train.pixels, pixels)
    assert splits.train.labels.tolist() == list(range(10)) * 5
    assert splits.test.pixels.shape == (10, 3, 32, 32)
    assert (splits.name, splits.size, splits.channels) == ("cifar10", 32, 3)
    assert splits.classes[3] == "class3"


def test_cifar10_default_folder_is_the_user_cache(cifar, user_cache):
    root, pixels = cifar
    user_cache.parent.mkdir()
    root.rename(user_cache)
    assert torch.equal(load("cifar10", download=False).train.pixels, pixels)
    assert torch.equal(load("cifar10", download=False, cache=user_cache).train.pixels, pixels)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_half_downloaded_cifar10(cifar, name):
    root, _ = cifar
    path = root / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=rf"cifar10: {path} is damaged or half downloaded \(its MD5 differs\)"):
        load(f"cifar10:{root}", download=False)
    path.unlink()
    with pytest.raises(DataError, match=f"cifar10: {path} is missing; allow the download"):
        load(f"cifar10:{root}", download=False)


def test_failed_download(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR100, "download", refuse)
    with pytest.raises(DataError, match=r"train is missing; the download failed \(no route to host\)"):
        load("cifar100", cache=tmp_path)


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Write SVHN files of 6,000 (train), 4,000 (extra) and 20 (test) images, equal classes; return the root."""
    root = tmp_path / "svhn"
    root.mkdir()
    split_list = {}
    for k, (name, n) in enumerate({"train": 6000, "extra": 4000, "test": 20}.items()):
        labels = np.arange(n) % 10 + 1  # the file calls the digit 0 "10"
        pixels = np.zeros((2, 2, 3, n), np.uint8)
        pixels[0, 0, 0], pixels[0, 0, 1], pixels[0, 0, 2] = k, np.arange(n) // 256, np.arange(n) % 256
        path = root / f"{name}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": labels[:, None].astype(np.uint8)})
        split_list[name] = ["", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return root


def origins(images):
    return images.pixels[:, 0, 0, 0]


def test_svhn_is_train_and_extra(svhn):
    splits = load(f"svhn:{svhn}", download=False)
    assert origins(splits.train).bincount().tolist() == [6000, 4000]
    assert len(splits.test) == 20
    assert splits.train.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_svhn_validation_is_the_papers(svhn):
    splits = load(f"svhn:{svhn}", validation=6000, download=False)
    labels, origin = splits.validation.labels, origins(splits.validation)
    assert labels[origin == 0].bincount().tolist() == [400] * 10
    assert labels[origin == 1].bincount().tolist() == [200] * 10
    assert len(splits.train) == 4000
    both = torch.cat([splits.train.pixels, splits.validation.pixels])
    assert both.flatten(1).unique(dim=0).shape[0] == 10000


def test_svhn_is_decoded_once(svhn, monkeypatch):
    first = load(f"svhn:{svhn}", download=False)
    monkeypatch.setattr(scipy.io, "loadmat", None)  # any use would now be a TypeError
    again = load(f"svhn:{svhn}", download=False)
    assert torch.equal(first.train.pixels, again.train.pixels)


def test_half_downloaded_svhn(svhn):
    path = svhn / "extra_32x32.mat"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=f"svhn: {path} is damaged or half downloaded"):
        load(f"svhn:{svhn}", download=False)
