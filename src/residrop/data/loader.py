"""Batches as a pure function of (seed, epoch, batch number), so that a resumed run sees what it would have seen."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from residrop.common.errors import ConfigError
from residrop.data.augment import Augmentation, Draw
from residrop.data.fused import fused_batch
from residrop.data.normalize import Normalization
from residrop.data.pixels import check_memory
from residrop.data.seeds import generator_for
from residrop.data.splits import Files, Images
from residrop.data.streaming import check_streamable, stream
from residrop.data.transforms import changed, check_policy, erased, mixed
from residrop.schedule.sampler import derive_key

__all__ = ["Loader"]

# first words of the seeds: one purpose never repeats another's draw
_ORDER, _AUGMENT, _STREAM, _FIXED, _SIDE, _CHANGE, _ERASE, _MIX = range(1, 9)
Change = Callable[[Tensor, int], Tensor]
_AHEAD = 64  # batches whose draws go to the device together


class Loader:
    """Batches of normalised, augmented images on a device.

    Batch b of epoch e, its order as well as its augmentation, is a function of (seed, e, b) alone: there is no
    generator whose state a checkpoint would have to keep, and draws are the same for every device.

    `Images` live on the device, and no Python code runs per image but for resized crops, policies and erasing. `Files`
    are decoded, and changed by policies, by worker processes. Mixed images have the one before them in the batch as
    partner (the first the last), whichever rank has that.

    The last batch of an epoch may be smaller. If it were a single image (and `batch_size` is not 1) it is left
    out of training, since batch normalisation has no variance of one image; evaluation always covers all images.

    On several ranks each gets its share of every batch: the shares of all ranks together are the batch of one process.

    Attributes:
        num_images: N, the number of images.
        steps_per_epoch: number of batches that `train_batches` gives from the start of an epoch.
    """

    def __init__(
        self,
        images: Images | Files,
        *,
        batch_size: int,
        normalization: Normalization,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
        drop_last: bool = False,
        workers: int = 2,
        share: tuple[int, int] = (0, 1),
        compile: bool = False,
        classes: int | None = None,
    ) -> None:
        """Move the images to the device, if they are in memory.

        Args:
            images: what to give out.
            batch_size: images per batch, at least 1.
            normalization: applied before augmentation; see `residrop.data.fit`.
            augmentation: of training batches only; None for none. `Files` allow crop "none" and "resized". Where it
                mixes images, labels of training batches are float32 `Tensor[n, classes]`.
            seed: any whole number.
            device: of the batches.
            channels_last: whether batches have the memory format `torch.channels_last`.
            drop_last: leave out every incomplete last batch in training.
            workers: processes that decode `Files`; 0 decodes in this process. Unused for `Images`.
            share: (rank, number of ranks). Training batches are cut into shares that are equal up to one image, and
                empty where images are fewer than ranks.
            compile: make augmented batches of `Images` by one compiled kernel (channels-last only); their values may
                differ in the last bit.
            classes: number of classes, which mixed labels need.

        Raises:
            ConfigError: if an argument is out of range or does not fit the images.
            DataError: if a batch of `Files` does not fit into memory.
        """
        _check(images, batch_size, workers, normalization)
        self.num_images = len(images)
        self._batch_size, self._seed, self._workers = batch_size, seed, workers
        self._rank, self._ranks = share
        self._compile = compile and channels_last
        self._device = torch.device(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._normalization = normalization.to(self._device)
        self._augmentation, self._classes = augmentation, classes
        if augmentation is not None:
            check_policy(augmentation.policy)
            if augmentation.mixes and classes is None:
                raise ConfigError("classes: None; mixed labels need the number of classes")
        if isinstance(images, Files):
            check_streamable(augmentation)
            number, size = min(batch_size, len(images)), images.size
            wanted = 5 * 3 * number * size * size  # bytes, as they are decoded and as floats
            check_memory(wanted, f"a batch of {number} images at {size}x{size} pixels")
            self._images: Images | Files = images
        else:
            if augmentation is not None:
                augmentation.check(*images.pixels.shape[2:])
            pixels, labels = images.pixels.to(self._device), images.labels.to(self._device)
            self._images = Images(pixels, labels)
        full, rest = divmod(self.num_images, batch_size)
        self.steps_per_epoch = full + (rest > 1 and not drop_last)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the shuffled, augmented batches of an epoch from batch number `start` on.

        Args:
            epoch: any whole number; every epoch has an order of its own.
            start: 0 to `steps_per_epoch`; the batches are those of ``train_batches(epoch)`` without the first
                `start`, bit for bit.

        Returns:
            An iterator over (x, labels): float32 `Tensor[n, C, H, W]` and int64 `Tensor[n]` (mixed: shares of the
            classes, float32 `Tensor[n, classes]`) on the device; n is the number of images of this rank.

        Raises:
            ConfigError: if `start` is out of range or an epoch would have no batch at all.
            DataError: from the iterator, if an image of `Files` is damaged.
        """
        if self.steps_per_epoch == 0:
            message = f"batch_size={self._batch_size}: {self.num_images} images make no batch to train on"
            raise ConfigError(f"{message}; use a smaller batch or more images")
        if not 0 <= start <= self.steps_per_epoch:
            raise ConfigError(f"start={start}: must be in 0..{self.steps_per_epoch}, the batches of an epoch")
        order = torch.randperm(self.num_images, generator=generator_for(_ORDER, self._seed, epoch))
        numbers = range(start, self.steps_per_epoch)
        if isinstance(self._images, Files):
            batches = (order[self._slice(number)] for number in numbers)
            parts: list[list[int]] = [batch[self._places(len(batch))].tolist() for batch in batches]
            streamed = self._streamed(self._images, parts, self._augmentation, epoch)
            made = zip(numbers, parts, streamed, strict=True)
            return (self._later(x, y, part, epoch, number) for number, part, (x, y) in made)
        return self._resident(self._images, order, numbers, epoch)

    def eval_batches(self, change: Change | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all images once, in their own order, without augmentation; batches as of `train_batches`.

        On several ranks, rank r of k gives batches r, r + k, ... of them. `change(pixels, first)` gets uint8 pixels
        Tensor[n, C, H, W] before normalisation and the number of the first of them, and gives others of that shape.
        """
        numbers = range(self._rank, -(-self.num_images // self._batch_size), self._ranks)
        if isinstance(self._images, Files):
            parts = [list(range(self.num_images)[self._slice(number)]) for number in numbers]
            return self._streamed(self._images, parts, None, 0, change)
        return self._in_order(self._images, numbers, change)

    def fixed_batches(self, batches: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give a random part of the images without augmentation, the same at every call and on every rank.

        At most `batches` batches of `size` images (fewer where there are fewer images), for measurements.
        """
        order = torch.randperm(self.num_images, generator=generator_for(_FIXED, self._seed))
        parts = [part for part in order[: batches * size].split(size) if len(part) > 1 or len(order) == 1]
        if isinstance(self._images, Files):
            yield from self._streamed(self._images, [part.tolist() for part in parts], None, 0)
            return
        for part in parts:
            index = part.to(self._device)
            yield self._finish(self._images.pixels.index_select(0, index)), self._images.labels.index_select(0, index)

    def images_in(self, number: int) -> int:
        """Number of images in training batch `number`, of all ranks together."""
        part = self._slice(number)
        return part.stop - part.start

    def _slice(self, number: int) -> slice:
        return slice(number * self._batch_size, min((number + 1) * self._batch_size, self.num_images))

    def _share(self, images: int) -> slice:
        """The images of this rank in a training batch."""
        return slice(images * self._rank // self._ranks, images * (self._rank + 1) // self._ranks)

    def _finish(self, pixels: Tensor) -> Tensor:
        # The format is set on the bytes, where the copy is cheapest; everything after keeps it.
        return self._normalization(pixels.contiguous(memory_format=self._format))

    def _places(self, images: int) -> slice | Tensor:
        """Where in a training batch the images of this rank are; if they are mixed, in front of them the partner of
        the first, if it is another rank's."""
        mine, made = self._share(images), self._augmentation
        if made is None or not made.mixes or mine.stop - mine.start in (0, images):
            return mine
        return torch.tensor([(mine.start - 1) % images, *range(mine.start, mine.stop)])

    def _resident(self, images: Images, order: Tensor, numbers: range, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        made, there, sides = self._augmentation, order.to(self._device), None
        if made is not None and made.flip and made.alternate:
            sides = torch.rand(self.num_images, generator=generator_for(_SIDE, self._seed)) < 0.5
            sides = (sides ^ bool(epoch % 2)).to(self._device)
        for number, draw in self._drawn(numbers, epoch):
            places = self._places(self.images_in(number))
            batch = there[self._slice(number)]
            index = batch[places]
            labels = images.labels.index_select(0, index)
            if draw is None or made is None or not len(index):
                yield self._finish(images.pixels.index_select(0, index)), labels
                continue
            if sides is not None:
                draw = replace(draw, flip=sides[batch])
            numbered = order[self._slice(number)][places].tolist() if made.by_image or made.erasing else []
            if self._compile and not made.by_image:
                x = fused_batch(images.pixels, index, draw.of(places), made.pad, self._normalization)
            else:
                pixels = images.pixels.index_select(0, index)
                if made.by_image:
                    pixels = changed(pixels, made, self._seeds(_CHANGE, epoch, numbered))
                x = made.apply(self._finish(pixels), draw.of(places))
            yield self._later(x, labels, numbered, epoch, number)

    def _seeds(self, purpose: int, epoch: int, images: list[int]) -> list[int]:
        return [derive_key(purpose, self._seed, epoch, image) >> 1 for image in images]

    def _later(self, x: Tensor, labels: Tensor, images: list[int], epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Erasing and mixing of a training batch; `images` are their numbers."""
        made = self._augmentation
        if made is None or not len(x):
            return x, labels
        if made.erasing:
            x = erased(x, made.erasing, self._seeds(_ERASE, epoch, images))
        if made.mixes:
            assert self._classes is not None  # it was checked
            x, labels = mixed(x, labels, made, self._classes, derive_key(_MIX, self._seed, epoch, number) >> 1)
            share = self._share(self.images_in(number))
            if len(x) > share.stop - share.start:  # without the partner of the first
                x, labels = x[1:], labels[1:]
        return x, labels

    def _drawn(self, numbers: range, epoch: int) -> Iterator[tuple[int, Draw | None]]:
        """Numbers of batches with their draws, which are on the device for many batches at a time."""
        made = self._augmentation
        for first in range(0, len(numbers), _AHEAD):
            part = numbers[first : first + _AHEAD]
            if made is None:
                yield from ((number, None) for number in part)
                continue
            seeds = (generator_for(_AUGMENT, self._seed, epoch, number) for number in part)
            draws = [made.draw(self.images_in(number), seed) for number, seed in zip(part, seeds, strict=True)]
            yield from zip(part, Draw.moved(draws, self._device), strict=True)

    def _in_order(self, images: Images, numbers: range, change: Change | None) -> Iterator[tuple[Tensor, Tensor]]:
        for number in numbers:
            part = self._slice(number)
            pixels = images.pixels[part]
            yield self._finish(change(pixels, part.start) if change else pixels), images.labels[part]

    def _streamed(
        self,
        files: Files,
        parts: list[list[int]],
        augmentation: Augmentation | None,
        epoch: int,
        change: Change | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        batches = stream(
            files,
            [part for part in parts if part],
            augmentation=augmentation,
            seed=derive_key(_STREAM, self._seed),
            epoch=epoch,
            workers=self._workers,
            pin_memory=self._device.type == "cuda",
        )
        nothing = torch.empty(0, 3, files.size, files.size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        for part in parts:
            pixels, labels = next(batches) if part else nothing
            pixels = pixels.to(self._device, non_blocking=True)
            if change and part:
                pixels = change(pixels, part[0])
            yield self._finish(pixels), labels.to(self._device, non_blocking=True)


def _check(images: Images | Files, batch_size: int, workers: int, normalization: Normalization) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1")
    if workers < 0:
        raise ConfigError(f"workers={workers}: must be at least 0; 0 decodes in this process")
    if len(images) == 0:
        raise ConfigError("images: none; a loader needs at least 1")
    shape = (3, images.size, images.size) if isinstance(images, Files) else tuple(images.pixels.shape[1:])
    mean = tuple(normalization.mean.shape)
    if mean not in (shape, (shape[0], 1, 1)):
        raise ConfigError(
            f"normalization of shape {mean}: the images are {shape}; fit it on training images of this shape"
        )
