"""Augmentation by torchvision's transforms, against slow references and at fixed seeds."""

import itertools

import pytest
import torch
from scipy.stats import binomtest, kstest
from torch.nn import functional as F
from torchvision.transforms import v2

from residrop.common.errors import ConfigError
from residrop.data import Augmentation, Images, Loader, augmentation, fit
from residrop.data.augment import resized_crop_box
from residrop.data.transforms import changed, check_policy, erased, mixed, with_policy

ALL = {
    "resized": {"crop": "resized"},
    "policy": {"policy": "rand-augment"},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "alternate": {"alternate": True},
    "together": {"crop": "image", "policy": "trivial-augment", "erasing": 0.25, "mixup": 0.2, "cutmix": 1.0},
}


def numbered(n, side=12, channels=3):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n))


def made(**options):
    return Augmentation(**{"flip": True, "crop": "none"} | options)


def loader(images, augmentation, **options):
    options = {"batch_size": 8, "seed": 3, "classes": len(images)} | options
    return Loader(images, normalization=fit(images, "channel"), augmentation=augmentation, **options)


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_functions_of_seed_epoch_and_batch(name, channels):
    images = numbered(30, channels=channels)
    one = loader(images, made(**ALL[name]))
    before = torch.get_rng_state()
    list(one.train_batches(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one.train_batches(5), loader(images, made(**ALL[name])).train_batches(5))
    assert same(one.train_batches(2, 1), list(one.train_batches(2))[1:])
    assert not same(one.train_batches(5), one.train_batches(6))
    for (x, y), (plain, _) in zip(one.train_batches(0), loader(images, made()).train_batches(0), strict=True):
        assert (x.shape, x.dtype) == (plain.shape, plain.dtype)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == ((len(x), 30) if "mix" in name or name == "together" else (len(x),))


def test_each_image_is_mirrored_in_every_other_epoch():
    images = numbered(400)
    one = loader(images, made(alternate=True), batch_size=64)
    whole = fit(images, "channel")(images.pixels)
    mirrored = []
    for epoch in range(4):
        sides = torch.empty(400, dtype=torch.bool)
        for x, y in one.train_batches(epoch):
            sides[y] = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(x, whole[y], strict=True)])
            upright = torch.tensor([torch.equal(a, b) for a, b in zip(x, whole[y], strict=True)])
            assert torch.equal(upright, ~sides[y])
        mirrored.append(sides)
    assert torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[3], ~mirrored[0])
    assert binomtest(int(mirrored[0].sum()), 400, 0.5).pvalue > 1e-3


def test_resized_crops_are_those_of_the_box():
    pixels = numbered(6, side=20).pixels
    found = changed(pixels, made(crop="resized", area=0.3), range(6))
    for seed, (image, got) in enumerate(zip(pixels, found, strict=True)):
        torch.manual_seed(seed)
        left, top, right, bottom = resized_crop_box(20, 20, torch.rand(40).tolist(), 0.3)
        part = image[None, :, top:bottom, left:right].float()
        wanted = F.interpolate(part, (20, 20), mode="bilinear", antialias=True).round()[0]
        assert (got.float() - wanted).abs().max() <= 1.0  # of 255: torchvision resizes bytes as integers
        assert (right - left) * (bottom - top) >= 0.25 * 400


def test_policies_are_torchvisions_with_draws_of_the_seed():
    image = numbered(1, side=24).pixels[0]
    policies = {
        "rand-augment": v2.RandAugment(),
        "rand-augment(3, 20)": v2.RandAugment(3, 20),
        "trivial-augment": v2.TrivialAugmentWide(),
    }
    for name, policy in policies.items():
        for seed in range(20):
            torch.manual_seed(seed)
            assert torch.equal(with_policy(image, name, seed), policy(image))
        assert len({with_policy(image, name, seed).sum().item() for seed in range(20)}) > 5


def test_a_policy_sees_each_image_by_itself():
    images = numbered(16)
    one = loader(images, made(flip=False, policy="rand-augment"))
    other = loader(images, made(flip=False, policy="rand-augment"), batch_size=16)
    by_number = {int(n): x for batch, y in one.train_batches(1) for x, n in zip(batch, y, strict=True)}
    ((x, y),) = other.train_batches(1)
    assert all(torch.equal(image, by_number[int(n)]) for image, n in zip(x, y, strict=True))


def test_erasing_overwrites_one_rectangle_with_noise():
    x = torch.full((400, 3, 16, 16), 100.0)
    gone = erased(x.clone(), 0.25, range(400)) != 100.0
    assert torch.equal(gone[:, 0], gone[:, 2])
    touched = gone.flatten(1).any(1)
    assert binomtest(int(touched.sum()), 400, 0.25).pvalue > 1e-3
    for one in gone[touched][:, 0]:
        rows, columns = one.any(1).nonzero(), one.any(0).nonzero()
        assert one[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    noise = erased(x.clone(), 1.0, range(400))
    assert kstest(noise[noise != 100.0].numpy(), "norm").pvalue > 1e-3


def test_mixup_mixes_each_image_with_the_one_before():
    x, y = torch.randn(5, 3, 4, 4, dtype=torch.float32), torch.tensor([0, 2, 1, 2, 0])
    shares = set()
    for seed in range(5):
        images, labels = mixed(x, y, made(mixup=1.0), 3, seed)
        share = float(labels[1, 2])
        shares.add(share)
        for i in range(5):
            torch.testing.assert_close(images[i], share * x[i] + (1 - share) * x[i - 1])
            wanted = share * F.one_hot(y[i], 3) + (1 - share) * F.one_hot(y[i - 1], 3)
            torch.testing.assert_close(labels[i], wanted.float())
    assert len(shares) == 5


def test_cutmix_pastes_the_share_of_the_label():
    x = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 10, 10).contiguous()
    for seed in range(10):
        images, labels = mixed(x, torch.arange(4), made(cutmix=1.0), 4, seed)
        for i in range(4):
            share = (images[i, 0] == i).float().mean()
            assert ((images[i] == i) | (images[i] == (i - 1) % 4)).all()
            torch.testing.assert_close(labels[i, i], share)
            torch.testing.assert_close(labels[i].sum(), torch.tensor(1.0))


def test_with_both_each_batch_is_mixed_by_one_of_them():
    x = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 10, 10).contiguous()
    kinds = [mixed(x, torch.arange(4), made(mixup=1.0, cutmix=1.0), 4, seed)[0] for seed in range(200)]
    pasted = sum(bool((one == one.round()).all()) for one in kinds)
    assert binomtest(pasted, 200, 0.5).pvalue > 1e-3


@pytest.mark.parametrize(("n", "ranks"), [(19, 2), (19, 3), (8, 8), (10, 4)])
def test_shares_of_mixed_batches_are_the_batch(n, ranks):
    images = numbered(n)
    together = made(**ALL["together"])
    single = list(loader(images, together).train_batches(1))
    parts = [list(loader(images, together, share=(rank, ranks)).train_batches(1)) for rank in range(ranks)]
    for number, (x, y) in enumerate(single):
        some = [part[number] for part in parts if len(part[number][0])]  # 19 images: three in the last batch
        torch.testing.assert_close(torch.cat([one for one, _ in some]), x, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.cat([one for _, one in some]), y)


def test_compiled_batches_are_erased_and_mixed_too():
    together = made(crop="image", erasing=0.5, mixup=0.5)
    images = numbered(16)
    for (x, y), (u, v) in zip(
        loader(images, together).train_batches(0), loader(images, together, compile=True).train_batches(0), strict=True
    ):
        torch.testing.assert_close(u, x, rtol=1e-5, atol=1e-6)
        assert torch.equal(v, y)


@pytest.mark.parametrize("name", ["trivial", "rand-augment(0, 5)", "rand-augment(2, 31)", "trivial-augment(1, 2)"])
def test_wrong_policies_are_refused(name):
    with pytest.raises(ConfigError, match="give rand-augment"):
        check_policy(name)


@pytest.mark.parametrize("wrong", [{"area": 0.0}, {"area": 1.5}, {"erasing": -0.1}, {"mixup": -1.0}, {"cutmix": -1.0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        made(**wrong)


def test_mixing_needs_the_number_of_classes():
    with pytest.raises(ConfigError, match="need the number of classes"):
        loader(numbered(8), made(mixup=0.2), classes=None)


def test_what_a_loader_makes_is_refused_elsewhere():
    for options in (ALL["resized"], ALL["policy"], ALL["erasing"], ALL["mixup"]):
        with pytest.raises(ConfigError, match="made by a Loader"):
            made(**options)(torch.zeros(2, 3, 8, 8), torch.Generator())


def test_named_augmentations_have_none_of_these():
    for name, one in itertools.product(("none", "flip", "crop", "batch-crop", "shift"), ("by_image", "mixes")):
        assert not getattr(augmentation(name), one)
