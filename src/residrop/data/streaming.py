"""Decoding of `Files` in worker processes, batch by batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from residrop.common.errors import ConfigError, DataError
from residrop.data.augment import ATTEMPTS, Augmentation, resized_crop_box
from residrop.data.decode import DecodingError, open_rgb, shrink_and_crop, to_chw, without_warnings
from residrop.data.seeds import generator_for
from residrop.data.splits import Files
from residrop.data.transforms import with_policy
from residrop.schedule.sampler import derive_key

__all__ = ["check_streamable", "stream"]

_Decoded = tuple[Tensor, int] | str  # a string is an error on its way to the main process


def check_streamable(augmentation: Augmentation | None) -> None:
    """Raise ConfigError for an augmentation that `Files` do not support."""
    if augmentation is not None and augmentation.crop not in ("none", "resized"):
        raise ConfigError(
            f"crop={augmentation.crop!r}: images read batch by batch allow 'none' and 'resized'; use 'resized-crop'"
        )


class _FileSet(Dataset[_Decoded]):
    """Images by number; what is drawn for image i of an epoch depends on (seed, epoch, i) only."""

    def __init__(self, files: Files, augmentation: Augmentation | None, seed: int, epoch: int) -> None:
        self._paths: tuple[Path, ...] = files.paths
        self._labels = files.labels.numpy()  # plain memory: a tensor would go through shared memory handles
        self._size, self._shorter = files.size, files.shorter
        self._augmentation, self._seed, self._epoch = augmentation, seed, epoch

    def __getitem__(self, index: int) -> _Decoded:
        with without_warnings():
            return self._decoded(index)

    def _decoded(self, index: int) -> _Decoded:
        try:
            image, _ = open_rgb(self._paths[index])
        except DecodingError as error:
            advice = "replace or remove the file and continue with --resume; residrop check finds all such files"
            return f"{self._paths[index]}: image {error}; {advice}"
        generator = generator_for(self._seed, self._epoch, index)
        image = self._resize(image, generator)
        made = self._augmentation
        if made is not None and made.flip:
            coin = _coin(generator)
            if made.alternate:
                coin = _coin(generator_for(self._seed, index)) ^ bool(self._epoch % 2)
            if coin:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.ascontiguousarray(to_chw(image)))
        if made is not None and made.policy is not None:
            pixels = with_policy(pixels, made.policy, derive_key(self._seed, self._epoch, index, 1) >> 1)
        return pixels, int(self._labels[index])

    def _resize(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        if self._augmentation is None or self._augmentation.crop == "none":
            return shrink_and_crop(image, self._size, self._shorter)
        uniforms = torch.rand(4 * ATTEMPTS, generator=generator).tolist()
        box = resized_crop_box(*image.size, uniforms, self._augmentation.area)
        return image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)


def _coin(generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < 0.5)


def _collate(decoded: list[_Decoded]) -> tuple[Tensor, Tensor] | str:
    images: list[Tensor] = []
    labels: list[int] = []
    for one in decoded:
        if isinstance(one, str):
            return one
        images.append(one[0])
        labels.append(one[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def stream(
    files: Files,
    batches: Sequence[list[int]],
    *,
    augmentation: Augmentation | None,
    seed: int,
    epoch: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode batches of files, in order, in `workers` processes (0: in this one).

    Yields:
        (pixels, labels): uint8 `Tensor[n, 3, S, S]` and int64 `Tensor[n]` on the CPU.

    Raises:
        DataError: naming the file, when the turn of a batch with a damaged image comes.
    """
    loader: DataLoader[_Decoded] = DataLoader(
        _FileSet(files, augmentation, seed, epoch),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own: the default would take a number from the global state
    )
    for batch in loader:
        # Errors travel as text: an exception raised in a worker would arrive wrapped in its traceback.
        if isinstance(batch, str):
            raise DataError(batch)
        yield batch[0], batch[1]
