"""The images that `residrop evaluate --uncertainty` needs besides the test images."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from residrop.common.errors import ConfigError, DataError
from residrop.data import Loader
from residrop.data.foreign import in_form
from residrop.data.sources import load_test
from residrop.training import Run
from residrop.training.setup import form_of, loader_for, loader_of_run, validation_of_run

__all__ = ["ROTATED", "Foreign", "HeldOut", "foreign_images", "held_out_images"]

ROTATED = "rotated"
_SAME = 0.01  # share of images that sources of real pictures may have in common by accident


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Labelled images that were neither trained nor tested on.

    Attributes:
        loader: their batches.
        name: what to call them.
    """

    loader: Loader
    name: str


@dataclass(frozen=True, eq=False)
class Foreign:
    """Images of another kind than the training's.

    Attributes:
        loader: their batches.
        name: the source.
        change: what happens to their pixels.
        note: what was done to make them fit; empty for nothing.
    """

    loader: Loader
    name: str
    change: Callable[[Tensor, int], Tensor] | None = None
    note: str = ""


def held_out_images(run: Run, source: str | None, test: Loader, device: torch.device) -> HeldOut:
    """The validation images of a run, or the test part of another `source` with the same classes.

    Raises:
        UsageError: the run has none, or the source cannot be read, or holds the test images.
    """
    if source is None:
        return HeldOut(validation_of_run(run, device), "validation images of the run")
    loader = loader_of_run(run, source, device)
    tested = set(_digests(test))
    same = sum(one in tested for one in _digests(loader))
    if same > _SAME * loader.num_images:
        raise ConfigError(
            f"--calibration {source} has {same} of the test images, on which nothing may be fitted; give labelled "
            "images that were neither trained nor tested on"
        )
    return HeldOut(loader, f"images of {_name(source)}")


def _digests(loader: Loader) -> Iterator[bytes]:
    for x, _ in loader.eval_batches():
        for image in x.contiguous().cpu():
            yield hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()


def foreign_images(run: Run, source: str, test: Loader, device: torch.device) -> Foreign:
    """The images of --ood SOURCE in the form that the run's network reads; "rotated" turns the test images.

    Raises:
        UsageError: the source cannot be read.
    """
    if source == ROTATED:
        return Foreign(test, "test images turned by 90 degrees", lambda pixels, first: pixels.rot90(1, (2, 3)))
    dataset = run.dataset()
    wanted = dataset["channels"], dataset["size"]
    try:
        found = load_test(source, None, size=dataset["size"])
        images = in_form(found, *wanted)
    except DataError as error:
        raise DataError(f"--ood: {error}") from None
    note = ""
    if form_of(found) != wanted:
        forms = [f"{channels}x{size}x{size}" for channels, size in (form_of(found), wanted)]
        note = f"images of {_name(source)} were changed from {forms[0]} to {forms[1]} (channels, pixels)"
    loader = loader_for(run.recipe(), images, "test", run.normalization(), device)
    return Foreign(loader, _name(source), note=note)


def _name(source: str) -> str:
    """A source without the folders above it, which are nobody's business."""
    kind, colon, rest = source.partition(":")
    return f"{kind}:{Path(rest).name}" if colon else Path(source).name or source
