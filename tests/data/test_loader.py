import shutil

import pytest
import torch
from torch._inductor import metrics

from residrop.common.errors import ConfigError
from residrop.data import Images, Loader, augmentation, fit
from residrop.data.augment import Draw
from residrop.data.fused import _compiled


def numbered(n, side=8, channels=3):
    """Images whose label is their number, all different."""
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n))


def loader(images, **options):
    options = {"batch_size": 8, "augmentation": augmentation("crop"), "seed": 3} | options
    return Loader(images, normalization=fit(images, "channel"), **options)


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", ["none", "crop", "batch-crop"])
def test_batches_are_a_function_of_seed_and_epoch(name):
    images = numbered(30)
    one = loader(images, augmentation=augmentation(name))
    list(one.train_batches(0))  # earlier epochs leave no trace
    assert same(one.train_batches(5), loader(images, augmentation=augmentation(name)).train_batches(5))
    assert not same(one.train_batches(5), one.train_batches(6))
    assert not same(one.train_batches(5), loader(images, seed=4).train_batches(5))


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_gives_the_tail(start):
    one = loader(numbered(30))
    assert one.steps_per_epoch == 4
    assert same(one.train_batches(2, start), list(one.train_batches(2))[start:])


def test_global_random_state_is_not_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(numbered(30)).train_batches(0))
    assert torch.equal(before, torch.get_rng_state())


def test_epoch_visits_each_image_once_in_an_order_of_its_own():
    one = loader(numbered(30))
    orders = [torch.cat([y for _, y in one.train_batches(epoch)]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_train_batch_is_normalised_then_augmented():
    images = numbered(16)
    plain = loader(images, augmentation=None)
    for x, y in plain.train_batches(0):
        assert torch.equal(x, fit(images, "channel")(images.pixels[y]))
    corners = torch.cat([x[:, :, 0, 0] for x, _ in loader(images).train_batches(0)])
    assert (corners == 0).all(1).any()  # zero fill comes after normalisation


def test_augmentation_differs_between_batches():
    images = Images(numbered(1).pixels.expand(16, 3, 8, 8), torch.arange(16))
    first, second = (x for x, _ in loader(images).train_batches(0))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("n", "options", "sizes"),
    [
        (16, {}, [8, 8]),
        (18, {}, [8, 8, 2]),
        (17, {}, [8, 8]),  # a single image has no batch variance
        (18, {"drop_last": True}, [8, 8]),
        (2, {"batch_size": 1}, [1, 1]),
        (5, {}, [5]),
    ],
)
def test_batch_sizes(n, options, sizes):
    one = loader(numbered(n), **options)
    assert [len(y) for _, y in one.train_batches(0)] == sizes
    assert one.steps_per_epoch == len(sizes)
    assert one.num_images == n


def test_eval_batches_are_all_images_in_order():
    images = numbered(17)
    batches = list(loader(images).eval_batches())
    assert [len(y) for _, y in batches] == [8, 8, 1]
    assert torch.cat([y for _, y in batches]).tolist() == list(range(17))
    assert torch.equal(torch.cat([x for x, _ in batches]), fit(images, "channel")(images.pixels))


@pytest.mark.parametrize("name", ["none", "flip", "crop", "batch-crop"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_and_dtypes(channels_last, name):
    one = loader(numbered(12), channels_last=channels_last, augmentation=augmentation(name))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for x, y in [*one.train_batches(0), *one.eval_batches()]:
        assert x.is_contiguous(memory_format=layout)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_memory_format_does_not_change_values():
    images = numbered(30)
    assert same(loader(images).train_batches(1), loader(images, channels_last=False).train_batches(1))


COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler")


def mean_image(images):
    return fit(images, "pixel-mean-only")


@COMPILER
@pytest.mark.parametrize("fitted", [lambda images: fit(images, "channel"), mean_image], ids=["channel", "image"])
@pytest.mark.parametrize("name", ["none", "flip", "crop", "batch-crop"])
def test_one_kernel_makes_the_batches_of_the_steps(name, fitted):
    images = numbered(23)
    options = {"batch_size": 8, "augmentation": augmentation(name), "normalization": fitted(images), "seed": 3}
    steps, fused = Loader(images, **options), Loader(images, compile=True, **options)
    for (x, y), (u, v) in zip(steps.train_batches(1), fused.train_batches(1), strict=True):
        assert torch.equal(y, v)
        torch.testing.assert_close(u, x, rtol=1e-6, atol=1e-7)
        assert u.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(u == 0, x == 0)  # the zeros around an image
    assert same(steps.eval_batches(), fused.eval_batches())


@COMPILER
def test_it_is_one_kernel():
    torch._dynamo.reset()
    _compiled.cache_clear()
    metrics.reset()
    images = numbered(20, side=7)  # a size that nothing else here compiles
    next(loader(images, compile=True).train_batches(0))
    assert metrics.generated_kernel_count == 1


@pytest.mark.parametrize(
    ("name", "there"), [("crop", ("meta", "meta", "meta")), ("batch-crop", ("cpu", "cpu", "meta"))]
)
def test_draws_go_to_the_device_many_at_a_time(name, there):
    made = augmentation(name)
    draws = [made.draw(n, torch.Generator().manual_seed(n)) for n in (8, 8, 3)]
    moved = Draw.moved(draws, torch.device("meta"))
    assert [tuple(one.device.type for one in (draw.top, draw.left, draw.flip)) for draw in moved] == [there] * 3
    assert [len(draw.flip) for draw in moved] == [8, 8, 3]
    assert [len(draw.top) for draw in moved] == [len(draw.top) for draw in draws]
    stayed = Draw.moved(draws, torch.device("cpu"))
    assert all(a.flip is b.flip for a, b in zip(stayed, draws, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_batches_are_the_same_on_a_gpu(compiled):
    images = numbered(30)
    on_gpu = [(x.cpu(), y.cpu()) for x, y in loader(images, device="cuda", compile=compiled).train_batches(1)]
    for (x, y), (u, v) in zip(on_gpu, loader(images).train_batches(1), strict=True):
        assert torch.equal(y, v)
        assert torch.allclose(x, u, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: loader(numbered(4), batch_size=0), "batch_size=0: must be at least 1"),
        (lambda: loader(numbered(4), workers=-1), "workers=-1"),
        (lambda: loader(numbered(4), batch_size=8, drop_last=True).train_batches(0), "4 images make no batch"),
        (lambda: loader(numbered(1)).train_batches(0), "1 images make no batch"),
        (lambda: loader(numbered(20)).train_batches(0, 4), r"start=4: must be in 0\.\.3"),
        (lambda: loader(numbered(20)).train_batches(0, -1), "start=-1"),
        (
            lambda: Loader(numbered(4), batch_size=2, normalization=fit(numbered(4, side=5), "pixel-mean")),
            r"normalization of shape \(3, 5, 5\)",
        ),
        (
            lambda: Loader(numbered(4, channels=1), batch_size=2, normalization=fit(numbered(4), "channel")),
            r"the images are \(1, 8, 8\)",
        ),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_empty_set_is_refused():
    images = numbered(4)
    empty = Images(images.pixels[:0], images.labels[:0])
    with pytest.raises(ConfigError, match="images: none"):
        Loader(empty, batch_size=2, normalization=fit(images, "channel"))
